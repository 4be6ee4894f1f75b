"""Train a start for WS-DINO on drawn cells alone: no real image, no label and nobody's weights.

wsdino-pretrain --output_dir runs/simulated_start
wsdino-train --preset cells --init 'runs/simulated_start/{channel}/model' --dataset my_screen
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from accelerate import Accelerator

from dataset_scripts.simulator.drawn_cells import DrawingSettings, draw_cells, open_drawn_cells
from modeling_wsdino import WSDinoConfig, WSDinoImageProcessor, WSDinoModel
from modeling_wsdino.build_repository import build_repository
from pretraining_wsdino.simulated_start import StartSettings, train_start
from wsdino.errors import command
from wsdino.files import claim_folder, write_json
from wsdino.launch import choose_threads, keep_freed_memory, on_main_process, start_processes, usable_cores
from wsdino.settings import parse_settings

CARD = """---
library_name: transformers
license: apache-2.0
tags: [wsdino, microscopy, simulated]
---
# Simulated start ({channel})

Trained on cells that a program draws, **simulated throughout**: no real image, no label and no other network's weights
took part. The network regresses the {numbers} numbers of a drawn phenotype and recognises it under other optics.
{source} Drawn cells: {cells:,} of {phenotypes:,} phenotypes. Steps: {steps:,} of {batch} cells.

It is a start for `wsdino-train --preset cells --init <this folder>`, not a finished encoder.
"""
SOURCE = {
    "mechanisms": "The phenotypes are blends of what twelve mechanisms of action look like in BBBC021, as the "
    "literature of 2010 describes them in words (Caie et al. 2010).",
    "ranges": "Each number of a phenotype is drawn from a wide range: no mechanism of action is behind them.",
}


def pretrain(settings: StartSettings) -> None:
    """Draw what is absent, then train one network per channel; a channel that is already trained is skipped."""
    s = settings
    start_processes("pretrain_simulated.py")
    accelerator = Accelerator(mixed_precision=s.mixed_precision)
    choose_threads(None)
    run = Path(s.output_dir)
    on_main_process(accelerator, lambda: claim_folder(run, "settings.json", "run"))
    drawing = DrawingSettings(s.source, s.phenotypes, s.cells, s.crop_size + 4, s.seed)
    on_main_process(accelerator, lambda: draw_cells(s.drawn_cells, drawing, s.draw_processes or usable_cores()))
    on_main_process(accelerator, lambda: write_json(run / "settings.json", {"start": asdict(s)}))
    for channel in s.channels:
        folder = run / channel
        if (folder / "model").exists():
            accelerator.print(f"{channel}: already trained.")
            continue
        cells = open_drawn_cells(s.drawn_cells, channel)
        torch.manual_seed(s.seed)
        config = WSDinoConfig(
            hidden_size=s.hidden_size,
            num_hidden_layers=s.num_hidden_layers,
            num_attention_heads=s.num_attention_heads,
            patch_size=s.patch_size,
            image_size=s.crop_size,
            patch_embedding=s.patch_embedding,
            initializer_range=0.1,
            channel_names=[channel],
        )
        backbone = WSDinoModel(config)
        if s.mixed_precision == "bf16" and accelerator.device.type == "cpu":
            backbone.set_attn_implementation("eager")  # sdpa's backward in bf16 on a CPU is slower than float32
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "metrics.jsonl", "w") as log:

            def write(line: dict, log: TextIO = log) -> None:
                if accelerator.is_main_process:
                    print(json.dumps(line), file=log, flush=True)

            trained = train_start(
                s, backbone, cells.planes, cells.phenotype, cells.optics, cells.numbers, accelerator, write
            )
        processor = WSDinoImageProcessor(
            tile_size=s.crop_size, tile_grid=1, max_intensity=s.max_intensity, intensity_scale="log", symmetries=4
        )
        words = {"numbers": cells.numbers.shape[1], "source": SOURCE[s.source], "cells": len(cells.planes)}
        words |= {"phenotypes": s.phenotypes, "steps": s.max_steps, "batch": s.per_device_train_batch_size}
        card = CARD.format(channel=channel, **words)
        save = partial(build_repository, folder / "model", trained, processor, card=card)
        on_main_process(accelerator, save)
    accelerator.print(f"Trained {', '.join(s.channels)} on drawn (simulated) cells into {run}.")
    accelerator.end_training()


@command("wsdino-pretrain")
def main(argv: list[str] | None = None) -> None:
    """Read the flags and train; see the module's docstring."""
    keep_freed_memory()
    pretrain(parse_settings(StartSettings, argv, prog="wsdino-pretrain", description=__doc__.split("\n")[0]))


if __name__ == "__main__":
    main()
