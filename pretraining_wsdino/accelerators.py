"""Accelerate as training uses it: the processes of a launch, and one accelerator per channel."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin

from wsdino.errors import UserError
from wsdino.launch import choose_threads, start_processes
from wsdino.launcher import check_precision

from .settings import LoopSettings


def start_training(settings: LoopSettings, command: str) -> Accelerator:
    """Join the processes of the launch, set torch up, and say what is used.

    Raises
    ------
    UserError
        The launch, the precision or a tracker is not what this machine has.
    """
    s = settings
    if torch.backends.mps.is_available():  # an Apple GPU lacks float64 and uint16, which targets and crops use
        os.environ["ACCELERATE_USE_CPU"] = "true"
    state = start_processes(command)
    check_precision(s.mixed_precision, state.device)
    trackers = ["all", *map(str, get_available_trackers())]
    for name in s.report_to:
        if name not in trackers:
            raise UserError(f"--report_to {name} is not installed: install it, or use one of {', '.join(trackers)}.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = s.tf32
    choose_threads(s.num_threads)
    accelerator = new_accelerator(s)
    accelerator.print(
        f"Training on {state.num_processes} x {state.device.type}, mixed_precision {s.mixed_precision}, "
        f"{s.gradient_accumulation_steps} micro-batches of {s.per_device_train_batch_size} per step."
    )
    return accelerator


def suit_attention(backbone: Any, accelerator: Accelerator) -> None:
    """Choose the attention that trains faster: the backward of sdpa in bf16 on a CPU is slower than float32's."""
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu":
        backbone.set_attn_implementation("eager")


def new_accelerator(settings: LoopSettings, folder: Path | None = None) -> Accelerator:
    """An accelerator for one channel's training, whose trackers write below `folder`."""
    return Accelerator(
        mixed_precision=settings.mixed_precision,
        log_with=(settings.report_to or None) if folder else None,
        project_dir=folder and str(folder),
        # `follow_launcher` has taken these two from the launcher. The loop divides by its number of micro-batches, and
        # compiles the backbones alone; accelerate would do both once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        # Every parameter takes part in every backward pass, so the search for unused ones is left out.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False)],
    )
