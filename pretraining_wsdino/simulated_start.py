"""Train one network on drawn cells: a start that needs no real image and nobody's weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from wsdino.settings import setting

from .multicrop import CropSpec, resize_windows
from .pairs import PairBatchSampler, PlanePairs, WeakLabelPairCollator
from .phenotypes import PhenotypeGroupSampler, PhenotypeLoss, standardised_logs


@dataclass
class StartSettings:
    """Settings of `wsdino-pretrain`."""

    output_dir: str = setting("runs/simulated_start", "Run folder; a channel's start is written to <channel>/model.")
    channels: list[str] = setting(["dna", "tubulin", "actin"], "Channels to train, one network each.")
    drawn_cells: str = setting("data/drawn_cells", "Folder of drawn cells; what is absent is drawn first.")
    source: Literal["mechanisms", "ranges"] = setting(
        "mechanisms", "Phenotypes: blends of twelve mechanisms' looks, or every number from a wide range."
    )
    phenotypes: int = setting(8_000, "Phenotypes to draw, each under two optics.", low=1)
    cells: int = setting(4, "Cells per phenotype and optics.", low=1)
    draw_processes: int = setting(0, "Processes that draw; 0 is one per usable core.", low=0)
    hidden_size: int = setting(96, "Width of the network.", low=1)
    num_hidden_layers: int = setting(4, "Depth of the network.", low=1)
    num_attention_heads: int = setting(3, "Heads of the network.", low=1)
    patch_size: int = setting(8, "Patch side in pixels.", low=1)
    patch_embedding: Literal["linear", "convolutional"] = setting("convolutional", "How patches become tokens.")
    crop_size: int = setting(64, "Side of a crop that the network sees, in pixels.", low=1)
    crop_area: list[float] = setting([0.6, 1.0], "Smallest and largest share of a drawn cell.", above=0, high=1)
    brightness_sd: float = setting(0.3, "SD of the natural logarithm of a crop's random change of brightness.", low=0)
    max_intensity: float = setting(10_000.0, "Counts that become 1.0 before the logarithm.", above=0)
    group_size: int = setting(2, "Cells of one phenotype and optics whose features are averaged for InfoNCE.", low=1)
    temperature: float = setting(0.1, "Softmax temperature of InfoNCE.", above=0)
    regression_weight: float = setting(1.0, "Weight of the regression of a phenotype's numbers.", low=0)
    contrast_weight: float = setting(0.5, "Weight of InfoNCE between a phenotype's two optics.", low=0)
    max_steps: int = setting(1_000, "Optimiser steps.", low=1)
    per_device_train_batch_size: int = setting(256, "Cells per process and step.", low=1)
    learning_rate: float = setting(1e-3, "Peak, after the warm-up.", above=0)
    warmup_steps: int = setting(50, "Linear warm-up from 0.", low=0)
    weight_decay: float = setting(0.05, "AdamW's.", low=0)
    max_grad_norm: float = setting(1.0, "Clip the gradient's global norm; 0 is off.", low=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "no (float32), bf16 or fp16.")
    logging_steps: int = setting(10, "Steps between lines of metrics.jsonl.", low=1)
    seed: int = setting(0, "Keys every random draw.", low=0)


def train_start(
    settings: StartSettings,
    backbone: nn.Module,
    planes: np.ndarray,
    phenotype: np.ndarray,
    optics: np.ndarray,
    numbers: np.ndarray,
    accelerator: Accelerator,
    log: Callable[[dict], None],
) -> nn.Module:
    """Train `backbone` to recognise phenotypes under other optics and to read off their numbers.

    Parameters
    ----------
    backbone : torch.nn.Module
        Called with `(batch, 1, crop_size, crop_size)` floats; its output has `pooler_output (batch, hidden_size)`.
    planes, phenotype, optics, numbers : numpy.ndarray
        One channel of the drawn cells, see `dataset_scripts.simulator.drawn_cells.DrawnCells`.
    log : callable
        Is given one dictionary per `logging_steps` steps.

    Returns
    -------
    torch.nn.Module
        The trained backbone, unwrapped.
    """
    s = settings
    targets = torch.from_numpy(standardised_logs(numbers))
    sampler = PhenotypeGroupSampler(
        phenotype, optics, block=s.per_device_train_batch_size, group_size=s.group_size, seed=s.seed
    )
    torch.manual_seed(s.seed + 1)
    loss = PhenotypeLoss(
        s.hidden_size,
        targets.shape[1],
        group_size=s.group_size,
        temperature=s.temperature,
        regression_weight=s.regression_weight,
        contrast_weight=2 * s.contrast_weight,  # the loss halves the sum of both directions
    )
    both = nn.ModuleDict({"backbone": backbone.train(), "loss": loss})
    optimizer = torch.optim.AdamW(both.parameters(), lr=s.learning_rate, weight_decay=s.weight_decay)
    backbone, loss, optimizer = accelerator.prepare(backbone, loss, optimizer)
    window, since = [], time.perf_counter()
    bar = tqdm(_batches(s, sampler, planes, accelerator), total=s.max_steps, unit="step", disable=None)
    for step, batch in enumerate(bar):
        rate = learning_rate(step, s)
        for group in optimizer.param_groups:
            group["lr"] = rate
        view = batch["global"]
        crops = resize_windows(
            *(view[name].to(accelerator.device) for name in ("windows", "sizes", "flips")),
            s.crop_size,
            s.max_intensity,
            intensity_scale="log",
            log_gains=view["log_gains"].to(accelerator.device),
        )
        with accelerator.autocast():
            features = backbone(crops).pooler_output
        total, monitors = loss(features, targets[phenotype[batch["anchors"].numpy()]].to(accelerator.device))
        accelerator.backward(total)
        if s.max_grad_norm:
            accelerator.clip_grad_norm_(both.parameters(), s.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        window.append({"loss": total.detach(), **monitors})
        if (step + 1) % s.logging_steps == 0 or step + 1 == s.max_steps:
            line = {name: float(torch.stack([one[name] for one in window]).mean()) for name in window[0]}
            line["pairs_per_second"] = len(window) * s.per_device_train_batch_size / (time.perf_counter() - since)
            log({"step": step + 1, "lr": rate, **line})
            bar.set_postfix(loss=f"{line['loss']:.3f}")
            window, since = [], time.perf_counter()
    return accelerator.unwrap_model(backbone).eval()


def learning_rate(step: int, settings: StartSettings) -> float:
    """Warm-up times a cosine that ends at 2 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.max_steps)) + 0.02
    return settings.learning_rate * cosine * min(1.0, (step + 1) / max(settings.warmup_steps, 1))


def _batches(
    s: StartSettings, sampler: PhenotypeGroupSampler, planes: np.ndarray, accelerator: Accelerator
) -> Iterator[dict]:
    crops = CropSpec(1, s.crop_size, tuple(s.crop_area), transpose=0.5, brightness_sd=s.brightness_sd)
    batches = PairBatchSampler(
        sampler,
        batch_size=s.per_device_train_batch_size,
        total_steps=s.max_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    collator = WeakLabelPairCollator(crops, CropSpec(0, s.crop_size, (1.0, 1.0)), seed=s.seed)
    yield from DataLoader(PlanePairs(planes), batch_sampler=batches, collate_fn=collator)
