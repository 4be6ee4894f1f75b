"""Train WS-DINO, one channel or all in turn, on one process or many.

    accelerate launch train_accelerate.py                                        # the demo, on simulated images
    accelerate launch train_accelerate.py --preset paper --dataset data/bbbc021  # the paper's recipe

This script joins the rooms: the data room's planes, the model room's networks and the evaluation's scores go to
`pretraining_wsdino.Trainer`, which holds the loop.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from dataset_scripts import (
    Fields,
    Planes,
    metadata_table,
    open_fields,
    open_planes,
    simulated_demo,
)
from evaluation_wsdino.evaluate_profiles import evaluate_set
from modeling_wsdino import WSDinoConfig, WSDinoFeatureExtractionPipeline, WSDinoImageProcessor, WSDinoModel
from modeling_wsdino.build_repository import build_combined_repository, build_repository
from modeling_wsdino.convert_checkpoint import load_backbone
from pretraining_wsdino import (
    PRESETS,
    SelfDistillation,
    Supervised,
    Trainer,
    TrainingSettings,
    check_settings,
    new_accelerator,
    start_training,
    suit_attention,
    train_channels,
    training_data,
)
from pretraining_wsdino.run_record import begun_run, joined_channels, recorded_run
from wsdino.errors import UserError, command
from wsdino.launch import keep_freed_memory, on_main_process
from wsdino.launcher import follow_launcher
from wsdino.run_folder import RENAMED_SETTINGS, RunFolder
from wsdino.settings import given_flags, parse_settings

NAME = "train_accelerate.py"
# Settings that describe a network from random weights, and the values of its config that they become.
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "patch_embedding")
SCORES = ("nsc", "nscb", "nsc_correct", "nsc_total", "nscb_correct", "nscb_total")


def parse(argv: list[str] | None = None) -> TrainingSettings:
    """Flags over the preset's settings over the paper's."""
    summary = __doc__.split("\n")[0]
    return parse_settings(
        TrainingSettings, argv, prog=NAME, description=summary, presets=PRESETS, renamed=RENAMED_SETTINGS
    )


def check_depths(settings: TrainingSettings, channels: list[str], fields: Fields) -> None:
    """Refuse, before they are trained, channels whose towers cannot become one model."""
    if len(channels) == 1 or settings.max_intensity is not None:
        return
    present = [name for name in channels if name in fields.column_names]
    depths = {Planes(fields.with_images([name]), name).like.dtype: name for name in present}
    if len(depths) > 1:
        which = " and ".join(f"{name} is {dtype}" for dtype, name in depths.items())
        raise UserError(f"--channels: {which}, and one model cannot hold both: give each an --output_dir.")


def initial_backbone(settings: TrainingSettings, channel: str, drop_path_rate: float = 0.0) -> WSDinoModel:
    """The network that a run starts from: random, or whatever layout `load_backbone` reads.

    Raises
    ------
    UserError
        The start cannot be loaded, or is not the network that the settings ask for.
    """
    s, own = settings, {"channel_names": [channel], "drop_path_rate": drop_path_rate}
    shape = {name: getattr(s, name) for name in SHAPE}
    if s.init == "random":
        config = WSDinoConfig(**shape, image_size=s.global_crop_size, initializer_range=s.initializer_range, **own)
        torch.manual_seed(s.seed)
        backbone = WSDinoModel(config)
    else:
        source = s.init.replace("{channel}", channel)
        backbone = load_backbone(source, **own)
        usual = TrainingSettings()
        for name, asked in shape.items():
            found = getattr(backbone.config, name)
            if asked not in (found, getattr(usual, name)):
                raise UserError(
                    f"--init {source} has {name} {found} and the settings ask for {asked}: give --{name} {found}, or "
                    "another start."
                )
    check_settings(s, backbone.config.patch_size)
    return backbone


def scorer(
    settings: TrainingSettings, channel: str, processor: WSDinoImageProcessor, accelerator: Accelerator
) -> Callable[[Any], dict]:
    """A function that scores a backbone on all evaluated fields, of which each process extracts its share.

    Random features are scored once, so that a bad setup fails now and not hours into training.
    """
    with accelerator.local_main_process_first():
        fields = open_fields(settings.dataset, settings.eval_subsets, channels=[channel])
        metadata, planes = metadata_table(fields), open_planes(fields, channel)

    def scores(features: np.ndarray) -> dict[str, Any]:
        names = [f"{channel}_{index:04d}" for index in range(features.shape[1])]
        found = evaluate_set(pd.concat([metadata, pd.DataFrame(features, columns=names)], axis=1), details=False)
        if not found["nsc_total"]:
            raise UserError(
                "--eval_every_epochs scores NSC, but no evaluated field has a mechanism (moa): leave it out."
            )
        return {name: found[name] for name in SCORES}

    def score(backbone: WSDinoModel) -> dict[str, Any]:
        extract = WSDinoFeatureExtractionPipeline(
            model=backbone.eval(), image_processor=processor, device=backbone.device
        )
        rows = range(accelerator.process_index, len(planes), accelerator.num_processes)
        stream = extract((planes[row] for row in rows), batch_size=16, return_tensors=True)
        stream = tqdm(stream, total=len(rows), desc=f"evaluate {channel}", unit="field", disable=rows.start > 0)
        parts = gather_object([(row, features.numpy()) for row, features in zip(rows, stream, strict=True)])
        features = np.stack([features for _, features in sorted(parts, key=lambda part: part[0])])
        return on_main_process(accelerator, lambda: scores(features))

    on_main_process(accelerator, lambda: scores(np.random.default_rng(0).normal(size=(len(fields), 2))))
    return score


def save_model(processor: WSDinoImageProcessor, folder: Path, backbone: WSDinoModel) -> None:
    """Write a complete model repository."""
    try:
        build_repository(folder, backbone, processor)
    except SafetensorError as error:  # of a full disk
        raise UserError(f"{folder} cannot be written ({error}).") from error


def channel_trainer(settings: TrainingSettings, channel: str, fields: Fields) -> Trainer:
    """Everything that one channel's training needs; nothing is written yet."""
    s = settings
    accelerator = new_accelerator(s, RunFolder(s.output_dir).path / channel)
    fields = fields.with_images([channel])
    with accelerator.local_main_process_first():
        planes = open_planes(fields, channel)
    known = {"compound", "plate", "well", "batch", s.weak_label} & set(fields.column_names)
    say = lambda sentence: accelerator.print(f"{channel}: {sentence}")  # noqa: E731
    data = training_data(s, planes, {name: fields[name] for name in known}, say)
    max_intensity = s.max_intensity or (255.0 if planes.dtype == np.uint8 else 10_000.0)
    processor = WSDinoImageProcessor(
        tile_size=s.tile_size,
        tile_grid=s.tile_grid,
        max_intensity=max_intensity,
        intensity_scale=s.intensity_scale,
        symmetries=s.symmetries,
    )

    def make_backbone(drop_path_rate: float) -> WSDinoModel:
        backbone = initial_backbone(s, channel, drop_path_rate)
        suit_attention(backbone, accelerator)
        return backbone

    if s.objective == "supervised":
        objective = Supervised(s, make_backbone, data.pairs, max_intensity)
    else:
        objective = SelfDistillation(s, make_backbone, data, max_intensity)
    score = scorer(s, channel, processor, accelerator) if s.eval_every_epochs else None
    return Trainer(
        s, objective, data, channel, accelerator, partial(save_model, processor),
        score=score, eval_every=s.eval_every_epochs,
    )  # fmt: skip


def train(settings: TrainingSettings) -> bool:
    """Train every channel in turn, then join the towers into one model. False when interrupted."""
    if settings.init == "random":
        check_settings(settings, settings.patch_size)
    accelerator = start_training(settings, NAME)
    recorded = on_main_process(accelerator, lambda: recorded_run(settings))
    if settings.dataset is None:
        path = recorded["arguments"]["dataset"] if recorded else None
        settings = replace(
            settings, dataset=path or on_main_process(accelerator, partial(simulated_demo, "data/simulated_demo"))
        )
    run, label = RunFolder(settings.output_dir), [settings.weak_label] if settings.weak_label != "none" else []
    with accelerator.local_main_process_first():
        fields = open_fields(settings.dataset, [settings.subset], columns=[*settings.channels, *label])
    if recorded and recorded["dataset"]["fields"] != len(fields):
        raise UserError(
            f"{run} trains on {recorded['dataset']['fields']} fields and --dataset {settings.dataset} --subset "
            f"{settings.subset} has {len(fields)}: give the dataset that it began with, or another --output_dir."
        )
    channels = joined_channels(settings.channels, recorded, fields.column_names)
    check_depths(settings, channels, fields)
    dataset = {
        "path": settings.dataset,
        "subset": settings.subset,
        "fields": len(fields),
        "source": sorted(set(fields["source"])) if "source" in fields.column_names else [],
        "fingerprint": fields.fingerprint,
    }

    def join_towers() -> None:
        towers = {name: run.model(name) for name in channels}
        if len(towers) > 1 and all(folder.exists() for folder in towers.values()):
            on_main_process(accelerator, lambda: build_combined_repository(run.combined_model, towers))

    return train_channels(
        settings.channels,
        lambda channel: channel_trainer(settings, channel, fields),
        begun_run(settings, channels, dataset, accelerator),
        accelerator,
        f"Trained {', '.join(settings.channels)} into {run}.",
        at_end=join_towers,
        save_initial=settings.whiten_patches,
    )


@command(NAME)
def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    settings = follow_launcher(parse(argv), given_flags(argv, RENAMED_SETTINGS))
    keep_freed_memory()
    disable_progress_bar()  # of reading and writing a model's file, which takes no time worth showing
    if not train(settings):
        sys.exit(130)


if __name__ == "__main__":
    main()
