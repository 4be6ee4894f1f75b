"""What `accelerate launch`, torchrun or srun ask for: used, or refused by name before anything is written."""

import os
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from .errors import UserError

# Environment variables that a launcher sets for what this project does not do.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
GROUP_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def processes_wanted() -> int:
    """How many processes the launcher says work together."""
    return next((int(os.environ[name]) for name in GROUP_SIZES if os.environ.get(name)), 1)


def check_launcher(script: str) -> None:
    """Refuse a launch that cannot work or would silently do something else.

    Parameters
    ----------
    script : str
        Name of the command in the message, such as "train_accelerate.py".

    Raises
    ------
    UserError
        Naming what was asked for, its cause and the command that works.
    """
    asked = [what for name, what in UNSUPPORTED.items() if parse_flag_from_env(name)]
    asked += ["a TPU"] if os.environ.get("PJRT_DEVICE", "").upper() == "TPU" or "XRT_TPU_CONFIG" in os.environ else []
    if asked:
        raise UserError(
            f"The launcher asks for {asked[0]}, which {script} does not support: its networks fit one GPU, so launch "
            "it with --multi_gpu or for one process, and take that out of the accelerate configuration."
        )
    on_cpu, wanted = parse_flag_from_env("ACCELERATE_USE_CPU"), processes_wanted()
    several_on_a_cpu = (
        "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N --num_machines 1 "
        f"--mixed_precision no --dynamo_backend no {script} ..."
    )
    # `accelerate launch --cpu --num_processes 2` starts one process, but leaves the address of a group in its
    # environment without the group's size.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and wanted == 1:
        if "WORLD_SIZE" not in os.environ:
            raise UserError(
                "accelerate launched one process where several were asked for (its --cpu flag does so): use "
                f"'{several_on_a_cpu}'."
            )
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if wanted == 1 and tasks > 1:
        raise UserError(
            f"srun started {tasks} copies that know nothing of each other: start one task per node, which launches "
            f"its processes, 'srun --ntasks-per-node 1 accelerate launch ... {script} ...'."
        )
    if wanted > 1 and not on_cpu:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", wanted))
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not found:
            raise UserError(
                f"{wanted} processes were launched to use GPUs and torch sees none on this machine: use "
                f"'{several_on_a_cpu}'."
            )
        if local > found:
            raise UserError(
                f"{local} processes were launched on this machine, which has {found} GPUs: launch one per GPU, "
                f"'accelerate launch --num_processes {found} {script} ...'."
            )


def follow_launcher(settings: Any, given: Collection[str]) -> Any:
    """Settings with what the launcher asks for where the command's own flags are silent.

    A launcher that says "no" (precision, dynamo) or 1 (accumulation) counts as silent: accelerate says so by default.

    Parameters
    ----------
    settings : dataclass
        With `mixed_precision`, `gradient_accumulation_steps` and `compile`.
    given : names
        Of the flags on the command line; others are defaults or a preset's, over which the launcher goes.

    Raises
    ------
    UserError
        A flag contradicts the launcher, or it asks for a precision or a backend that is not supported.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(
            f"The launcher asks for mixed_precision {precision}, which is not supported: use bf16 or fp16."
        )
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if dynamo not in ("no", "inductor"):
        raise UserError(f"The launcher asks for dynamo_backend {dynamo}, which is not supported: use inductor or no.")
    asked = {
        "mixed_precision": None if precision == "no" else precision,
        "gradient_accumulation_steps": _steps(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")),
        "compile": True if dynamo == "inductor" else None,
    }
    changes = {}
    for name, wanted in asked.items():
        ours = getattr(settings, name)
        if wanted is None or wanted == ours:
            continue
        if name in given:
            raise UserError(
                f"The launcher asks for {name} {wanted} and the command line for --{name} {ours}: leave one of them "
                "out, or make them equal."
            )
        changes[name] = wanted
    settings = replace(settings, **changes)
    return settings if settings.mixed_precision else replace(settings, mixed_precision="no")


def _steps(text: str) -> int | None:
    """The launcher's accumulation; None where it says 1 or leaves it to DeepSpeed ("auto")."""
    return int(text) if text.isdigit() and int(text) > 1 else None


def check_precision(precision: str | None, device: torch.device) -> None:
    """Refuse a precision that the device does not compute in: `UserError` naming the flag."""
    on_gpu = device.type == "cuda"
    if precision == "bf16" and not (on_gpu or torch.cpu._is_avx512_bf16_supported()):
        raise UserError("--mixed_precision bf16 is about six times slower than float32 on this CPU: leave it at no.")
    if precision == "fp16" and not on_gpu:
        raise UserError("--mixed_precision fp16 needs a GPU: leave it at no.")
