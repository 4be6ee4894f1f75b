"""Train a start for WS-DINO on drawn cells alone: no real image, no label and nobody's weights.

wsdino-pretrain --output_dir runs/simulated_start
wsdino-train --preset cells --init 'runs/simulated_start/{channel}/model' --dataset my_screen
"""

import sys
from pathlib import Path

import torch

from dataset_scripts.simulator.drawn_cells import DrawingSettings, draw_cells, open_drawn_cells
from modeling_wsdino import WSDinoConfig, WSDinoImageProcessor, WSDinoModel
from modeling_wsdino.build_repository import build_repository
from pretraining_wsdino import Trainer, new_accelerator, start_training, suit_attention, train_channels
from pretraining_wsdino.run_record import begun_run, recorded_run
from pretraining_wsdino.simulated_start import RecognisePhenotypes, StartSettings, drawn_data
from wsdino.errors import command
from wsdino.launch import keep_freed_memory, on_main_process, usable_cores
from wsdino.launcher import follow_launcher
from wsdino.settings import given_flags, parse_settings

NAME = "wsdino-pretrain"
RENAMED = {"max_steps": "num_train_steps"}
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


def channel_trainer(settings: StartSettings, channel: str) -> Trainer:
    """Everything that one channel's training needs."""
    s = settings
    accelerator = new_accelerator(s, Path(s.output_dir, channel))
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
    suit_attention(backbone, accelerator)
    processor = WSDinoImageProcessor(
        tile_size=s.crop_size, tile_grid=1, max_intensity=s.max_intensity, intensity_scale="log", symmetries=4
    )
    card = CARD.format(
        channel=channel,
        numbers=cells.numbers.shape[1],
        source=SOURCE[s.source],
        cells=len(cells.planes),
        phenotypes=s.phenotypes,
        steps=s.num_train_steps,
        batch=s.per_device_train_batch_size,
    )

    def save_model(folder: Path, trained: WSDinoModel) -> None:
        build_repository(folder, trained, processor, card=card)

    objective = RecognisePhenotypes(s, backbone, cells.phenotype, cells.numbers)
    data = drawn_data(s, cells.planes, cells.phenotype, cells.optics)
    return Trainer(s, objective, data, channel, accelerator, save_model)


def pretrain(settings: StartSettings) -> bool:
    """Draw what is absent, then train one network per channel; False when interrupted."""
    s = settings
    accelerator = start_training(s, NAME)
    on_main_process(accelerator, lambda: recorded_run(s))
    drawing = DrawingSettings(s.source, s.phenotypes, s.cells, s.crop_size + 4, s.seed)
    on_main_process(accelerator, lambda: draw_cells(s.drawn_cells, drawing, s.draw_processes or usable_cores()))
    dataset = {"path": s.drawn_cells, "fields": s.phenotypes * s.cells * 2, "source": ["simulated"]}
    begun = begun_run(s, s.channels, dataset, accelerator)
    said = f"Trained {', '.join(s.channels)} on drawn (simulated) cells into {s.output_dir}."
    return train_channels(s.channels, lambda channel: channel_trainer(s, channel), begun, accelerator, said)


@command(NAME)
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    summary = __doc__.split("\n")[0]
    settings = parse_settings(StartSettings, argv, prog=NAME, description=summary, renamed=RENAMED)
    keep_freed_memory()
    if not pretrain(follow_launcher(settings, given_flags(argv, RENAMED))):
        sys.exit(130)


if __name__ == "__main__":
    main()
