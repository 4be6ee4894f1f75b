"""What the steps of a run are made of: images, the pairs drawn from them, and the crops cut out of the pairs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wsdino.errors import UserError

from .multicrop import CropSpec
from .pairs import LABEL_STREAM, PairDraws, PlanePairs, WeakLabelPairCollator, WeakLabelPairSampler, keyed_generator
from .settings import PRESETS, TrainingSettings


@dataclass(frozen=True)
class StepData:
    """What a trainer makes batches of.

    Attributes
    ----------
    images : PlanePairs
        Indexed by `Pair`.
    pairs : PairDraws
    collate : callable
        A list of items to a batch.
    """

    images: PlanePairs
    pairs: PairDraws
    collate: Callable[[Sequence[Any]], dict[str, Any]]


def training_data(
    settings: TrainingSettings, planes: np.ndarray, columns: Mapping[str, Sequence], say: Callable[[str], None]
) -> StepData:
    """Weak-label pairs of one channel's planes and the crops that the settings' objective takes.

    Parameters
    ----------
    planes : numpy.ndarray
        `(fields, height, width)` uint16 or uint8.
    columns : mapping
        One value per field: the weak label and, where they are known, compound, plate, well and batch.
    say : callable
        Is given a sentence where a setting of the preset does not fit the dataset.

    Raises
    ------
    UserError
        Planes smaller than a crop or the model's tiles, or labels and groups that cannot be used.
    """
    s = settings
    height, width = planes.shape[1:]
    for flags, least in (
        (f"--tile_size {s.tile_size} and --tile_grid {s.tile_grid} need", s.tile_size * s.tile_grid),
        (f"--global_crop_size {s.global_crop_size} needs", s.global_crop_size),
        (f"--local_crop_size {s.local_crop_size} needs", s.local_crop_size if s.local_crops else 0),
    ):
        if min(height, width) < least:
            raise UserError(
                f"{flags} images of at least {least} x {least} pixels, and these have {height} x {width}: choose "
                "smaller ones."
            )
    pairs = weak_label_pairs(s, columns, len(planes), say)
    varied = {"transpose": s.transpose, "brightness_sd": s.brightness_sd}
    supervised = s.objective == "supervised"  # one view of each anchor
    collate = WeakLabelPairCollator(
        CropSpec(1 if supervised else s.global_crops, s.global_crop_size, tuple(s.global_crop_area), **varied),
        CropSpec(0 if supervised else s.local_crops, s.local_crop_size, tuple(s.local_crop_area), **varied),
        seed=s.seed,
    )
    return StepData(PlanePairs(planes), pairs, collate)


def weak_label_pairs(
    settings: TrainingSettings, columns: Mapping[str, Sequence], num_images: int, say: Callable[[str], None]
) -> WeakLabelPairSampler:
    """The sampler of a run's pairs; a preset's constraints are loosened where the dataset names no such groups."""
    s = settings
    groups = {name: columns[name] for name in ("plate", "batch") if name in columns}
    if {"plate", "well"} <= set(columns):
        groups["well"] = [f"{plate}/{well}" for plate, well in zip(columns["plate"], columns["well"], strict=True)]
    used: dict[str, Any] = {"pair_constraint": s.pair_constraint, "anchor_group": s.anchor_group}
    for name, loose in (("pair_constraint", "image"), ("anchor_group", "none")):
        value = used[name]
        if value == PRESETS[s.preset].get(name) and value in ("well", "plate", "batch") and value not in groups:
            used[name] = loose
            say(f"the dataset names no {value}, so --{name} {loose} is used in place of the preset's {value}.")
    eligible = None
    if s.exclude_compounds:
        compounds = columns.get("compound", [])
        unknown = sorted(set(s.exclude_compounds) - set(compounds))
        if unknown:
            raise UserError(f"--exclude_compounds {unknown[0]}: no field of the dataset has this compound.")
        eligible = [compound not in s.exclude_compounds for compound in compounds]
    labels = None if s.weak_label == "none" else list(columns[s.weak_label])
    if s.shuffle_labels and labels is not None:
        labels = shuffled_labels(labels, eligible, s.seed)
    pairs = WeakLabelPairSampler(
        labels,
        num_images=num_images,
        groups=groups,
        constraint=used["pair_constraint"],
        unlabelled=s.unlabelled,
        eligible=eligible,
        anchor_group=used["anchor_group"],
        group_size=s.group_size,
        seed=s.seed,
    )
    single = int((pairs.label_counts == 1).sum())
    if single and s.objective == "distillation":
        say(f"{single} weak labels have a single image, which is its own partner.")
    return pairs


def shuffled_labels(labels: Sequence[str | None], eligible: Sequence[bool] | None, seed: int) -> list[str | None]:
    """The labels of the images that may train, permuted among these images; the same for every channel.

    Parameters
    ----------
    labels : sequence
        Weak label of every image.
    eligible : sequence of bool, optional
        Which images may train; the others keep their labels.
    seed : int
        Of the run.
    """
    rows = np.arange(len(labels)) if eligible is None else np.flatnonzero(eligible)
    permuted = list(labels)
    for row, other in zip(rows, keyed_generator(seed, LABEL_STREAM, 0).permutation(rows), strict=True):
        permuted[row] = labels[other]
    return permuted
