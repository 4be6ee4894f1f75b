"""Every setting of a training run as one typed dataclass, its presets, and what makes a setting unusable."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from wsdino.errors import UserError

# What a partner differs in, from anything goes to the strictest.
CONSTRAINTS = ("none", "image", "well", "plate", "batch")


class TrainingError(UserError):
    """A setting or an input that training cannot use; the message names it and says the mend."""


def setting(default, help: str):
    """A dataclass field with its `--help` text; lists are copied for every instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


# What a preset changes; all other arguments keep the defaults of `TrainingArguments`, which are the paper's.
PRESETS = {
    "paper": {},
    # The paper's recipe for a GPU with bfloat16: four times the batch with the learning rates scaled alike, float32
    # master weights, teacher, centre and loss. Not bit-comparable with "paper"; epochs mean the same.
    "fast": {
        "output_dir": "runs/fast",
        "mixed_precision": "bf16",
        "tf32": True,
        "batch_size": 64,
        "learning_rate": 1.6e-5,
        "final_learning_rate": 1.2e-5,
        "num_workers": 8,
    },
    # Without ImageNet weights the paper's 4e-6 moves nothing; these are the settings with which DINO trains ViT-S from
    # random weights (Caron et al. 2021, appendix: 5e-4 at batch 256, weight decay 0.04 to 0.4, clipping, EMA 0.996).
    "scratch": {
        "init": "random",
        "output_dir": "runs/scratch",
        "batch_size": 64,
        "learning_rate": 1.25e-4,
        "final_learning_rate": 1e-6,
        "weight_decay": 0.04,
        "final_weight_decay": 0.4,
        "max_grad_norm": 3.0,
        "teacher_momentum": 0.996,
        "center_momentum": 0.9,
        "student_temperature": 0.1,
        "stop_after_epoch": None,
        "num_workers": 8,
    },
    # A small ViT on small simulated fields, from random weights: minutes on two CPU cores. RESULTS.md says what was
    # measured: without the first two settings even a supervised network of this size hardly learns in that time, and
    # Sinkhorn targets and a little KoLeo keep targets and features from collapsing. Anchors of one plate keep the
    # batch out of the targets, which longer runs learned instead of the phenotype; at this length no score moved.
    "demo": {
        "init": "random",
        "whiten_patches": True,
        "initializer_range": 0.1,
        "anchor_group": "plate",
        "pair_constraint": "plate",
        "output_dir": "runs/demo",
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "drop_path_rate": 0.0,
        "global_crop_size": 64,
        "local_crops": 4,
        "local_crop_size": 32,
        "tile_size": 64,
        "num_prototypes": 64,
        "head_hidden_dim": 256,
        "head_bottleneck_dim": 64,
        "freeze_last_layer_epochs": 0,
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
        "centering": "sinkhorn",
        "koleo_weight": 0.02,
        "teacher_momentum": 0.97,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-5,
        "warmup_epochs": 2,
        "weight_decay": 0.04,
        "final_weight_decay": 0.04,
        "max_grad_norm": 1.0,
        "batch_size": 32,
        "epochs": 24,
        "stop_after_epoch": None,
        "log_every": 5,
    },
    # Single cells and small screens, from a network trained on drawn cells (wsdino-pretrain) or from random weights:
    # the views differ in orientation and brightness, which are the shortcuts; one target per group of four cells.
    "cells": {
        "init": "random",
        "patch_embedding": "convolutional",
        "output_dir": "runs/cells",
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "drop_path_rate": 0.0,
        "group_size": 4,
        "pair_constraint": "none",
        "global_crops": 1,
        "global_crop_size": 64,
        "global_crop_area": [0.7, 1.0],
        "student_sees_globals": False,
        "local_crops": 2,
        "local_crop_size": 48,
        "local_crop_area": [0.4, 1.0],
        "transpose": 0.5,
        "brightness_sd": 0.25,
        "intensity_scale": "log",
        "tile_size": 64,
        "tile_grid": 1,
        "symmetries": 4,
        "num_prototypes": 64,
        "head_hidden_dim": 256,
        "head_bottleneck_dim": 64,
        "freeze_last_layer_epochs": 0,
        "student_temperature": 0.1,
        "teacher_temperature": 0.015,
        "warmup_teacher_temperature": 0.015,
        "centering": "sinkhorn",
        "koleo_weight": 0.02,
        "teacher_momentum": 0.98,
        "learning_rate": 2e-4,
        "final_learning_rate": 4e-6,
        "warmup_epochs": 1,
        "weight_decay": 0.02,
        "final_weight_decay": 0.02,
        "max_grad_norm": 1.0,
        "batch_size": 48,
        "epochs": 5,
        "stop_after_epoch": None,
        "log_every": 10,
        "save_every": 1,
    },
}

# Smallest and largest value of each number that is bounded on both sides: beyond them lie slips of the keyboard, whose
# arrays no machine holds, not experiments.
LIMITS = {
    **dict.fromkeys(("epochs", "save_every", "keep", "log_every", "stop_after_epoch"), (1, 10**7)),
    **dict.fromkeys(("eval_every", "warmup_epochs"), (0, 10**7)),
    **dict.fromkeys(("freeze_last_layer_epochs", "warmup_teacher_temperature_epochs"), (0, 10**7)),
    "max_steps": (1, 10**10),
    **dict.fromkeys(("hidden_size", "num_attention_heads", "head_hidden_dim", "head_bottleneck_dim"), (1, 65536)),
    **dict.fromkeys(("patch_size", "num_hidden_layers"), (1, 1000)),
    "num_prototypes": (1, 2**26),
    **dict.fromkeys(("global_crop_size", "local_crop_size", "tile_size"), (1, 8192)),
    "global_crops": (1, 1000),
    "local_crops": (0, 1000),
    **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "group_size", "tile_grid"), (1, 65536)),
    "num_threads": (1, 4096),
    "num_workers": (0, 4096),
    "seed": (0, 2**32 - 1),
    **dict.fromkeys(("drop_path_rate", "center_momentum", "teacher_momentum", "transpose"), (0, 1)),
    "brightness_sd": (0, 10),
    **dict.fromkeys(("weight_decay", "final_weight_decay", "max_grad_norm", "koleo_weight"), (0, 10**6)),
    "final_learning_rate": (0, 10**6),
}
CHOICES = {
    "patch_embedding": ("linear", "convolutional"),
    "intensity_scale": ("linear", "log"),
    "symmetries": (1, 4, 8),
}
POSITIVE = (
    *("student_temperature", "teacher_temperature", "warmup_teacher_temperature", "learning_rate"),
    "initializer_range",
)


@dataclass
class TrainingArguments:
    """Every setting of a run, with the paper's recipe, as its released code runs it, as defaults."""

    preset: str = setting("demo", f"Named settings, overridden by any flag given: {', '.join(PRESETS)}.")
    dataset: str | None = setting(
        None, "Built dataset folder or Hub id. Without it a run resumes on its own, and a new one simulates a screen."
    )
    part: str = setting("annotated", "Configuration of the dataset to train on.")
    channels: list[str] = setting(["dna", "tubulin", "actin"], "Image columns, one network each.")
    weak_label: str = setting("compound", "none (plain DINO), treatment, compound, moa, or any column of the dataset.")
    group_size: int = setting(
        1, "1 makes pairs (the paper); with k > 1 a step takes groups of k images of one weak label, with one target."
    )
    unlabelled: str = setting("drop", "Rows without a weak label: drop them, or pair each with itself (self).")
    pair_constraint: str = setting(
        "image", "A partner differs, where the label allows, in: none, image, well, plate or batch."
    )
    anchor_group: str = setting(
        "none",
        "All anchors of a step from one plate or batch, so that batch effects tell no two of them apart; or none.",
    )
    exclude_compounds: list[str] = setting([], "Compounds held out of training, such as one for leave-one-out.")
    output_dir: str = setting("runs/paper", "Run folder.")
    resume: bool = setting(
        False, "Continue the run in --output_dir from its newest checkpoint; start it if there is none."
    )
    seed: int = setting(0, "Keys every random draw of the run.")

    init: str = setting("facebook/dino-vits8", "Starting weights: random, a DINO .pth, or a model folder or Hub id.")
    hidden_size: int = setting(384, "Width of a network that starts from random weights.")
    num_hidden_layers: int = setting(12, "Depth of a network that starts from random weights.")
    num_attention_heads: int = setting(6, "Heads of a network that starts from random weights.")
    patch_size: int = setting(8, "Patch side in pixels of a network that starts from random weights.")
    initializer_range: float = setting(0.02, "SD of random weights, the head's too; 1 / sqrt(width) for narrow ones.")
    patch_embedding: str = setting("linear", "Of a network that starts from random weights: linear or convolutional.")
    whiten_patches: bool = setting(
        False, "Start a random patch embedding from the whitened patches of the training images."
    )
    drop_path_rate: float = setting(0.1, "Stochastic depth of the student's last block; earlier ones less, linearly.")
    gradient_checkpointing: bool = setting(False, "Trade a slower step for less memory.")

    global_crops: int = setting(2, "Views of the anchor, seen by teacher and student.")
    global_crop_size: int = setting(224, "Side of a global view in pixels.")
    global_crop_area: list[float] = setting([0.1, 0.2], "Smallest and largest share of the field.")
    student_sees_globals: bool = setting(True, "Whether the student sees the teacher's views too, as in the paper.")
    local_crops: int = setting(8, "Views of the partner, seen by the student.")
    local_crop_size: int = setting(96, "Side of a local view in pixels.")
    local_crop_area: list[float] = setting([0.04, 0.08], "Smallest and largest share of the field.")
    transpose: float = setting(0.0, "Probability of exchanging a crop's rows and columns; 0.5: all its symmetries.")
    brightness_sd: float = setting(0.0, "SD of the natural logarithm of a crop's random change of brightness.")
    intensity_scale: str = setting(
        "linear", "linear (the paper: clipped, divided) or log, which clips no bright pixel."
    )
    max_intensity: float | None = setting(
        None, "Counts that become 1.0: 10000 for 16-bit and 255 for 8-bit planes if not given."
    )
    tile_size: int = setting(224, "Side of the tiles that the saved model's processor cuts from a field.")
    tile_grid: int = setting(2, "Tiles along a side of the field's centre; 1 for single cells.")
    symmetries: int = setting(
        1, "Turns and mirror images that the saved model averages a tile's features over: 1, 4, 8."
    )

    num_prototypes: int = setting(65536, "Outputs of the projection head.")
    head_hidden_dim: int = setting(2048, "Width of the projection head's MLP.")
    head_bottleneck_dim: int = setting(256, "Width of the projection head's bottleneck.")
    freeze_last_layer_epochs: int = setting(1, "Epochs in which the prototypes do not move.")
    student_temperature: float = setting(0.07, "Softmax temperature of the student.")
    teacher_temperature: float = setting(0.04, "Softmax temperature of the teacher after its warm-up.")
    warmup_teacher_temperature: float = setting(0.04, "Teacher temperature in the first epoch.")
    warmup_teacher_temperature_epochs: int = setting(0, "Epochs over which the teacher temperature warms up.")
    centering: str = setting("mean", "What keeps targets apart: mean (the moving centre) or sinkhorn (SwAV, DINOv2).")
    koleo_weight: float = setting(0.0, "Weight of KoLeo, which spreads the student's features (0.1 in DINOv2).")
    center_momentum: float = setting(0.8, "Memory of the moving centre of the teacher's outputs.")
    teacher_momentum: float = setting(0.99, "EMA momentum of the teacher at the start; a cosine takes it to 1.")

    epochs: int = setting(400, "Length of the schedules; an epoch draws as many pairs as there are images.")
    stop_after_epoch: int | None = setting(
        200, "Stop here, before the schedules end; the paper reports epoch 200 of 400."
    )
    max_steps: int | None = setting(None, "Stop after so many optimiser steps, for trials; schedules are unchanged.")
    batch_size: int = setting(16, "Pairs a process and micro-batch.")
    gradient_accumulation_steps: int = setting(1, "Micro-batches an optimiser step.")
    learning_rate: float = setting(4e-6, "Peak, after the warm-up; not scaled by the batch.")
    final_learning_rate: float = setting(3e-6, "At the end of the cosine.")
    warmup_epochs: int = setting(10, "Linear warm-up from 0.")
    weight_decay: float = setting(0.0, "AdamW's, at the start; never on biases and norms.")
    final_weight_decay: float = setting(0.0, "At the end of its cosine.")
    max_grad_norm: float = setting(0.0, "Clip the gradient's global norm; 0 is off.")
    mixed_precision: str = setting("no", "no (float32), bf16 or fp16.")
    tf32: bool = setting(False, "On a GPU, let float32 matrix products round their factors to TF32.")
    compile: bool = setting(False, "Compile both backbones with torch.compile; pays on a GPU, hardly on a CPU.")

    save_every: int = setting(10, "Epochs between checkpoints; the last step always has one.")
    keep: int = setting(2, "Checkpoints kept; older ones are deleted once a newer one is whole.")
    eval_every: int = setting(0, "Epochs between evaluations (TVN, NSC, NSCB) into metrics.jsonl; 0 is never.")
    eval_parts: list[str] = setting(["annotated", "dmso"], "Configurations of the dataset that are evaluated.")
    log_every: int = setting(10, "Steps between lines of metrics.jsonl.")
    num_workers: int = setting(0, "Loader processes a training process.")
    num_threads: int | None = setting(None, "CPU threads of a training process; chosen by its launch if not given.")
    trackers: list[str] = setting([], "Accelerate trackers beside metrics.jsonl, e.g. tensorboard wandb.")


# Settings that may differ between a run and its resumption. The dataset may have moved; the loop checks its size, and
# goes on with the run's own where none is given. Of `batch_size` and the accumulation the loop checks the product with
# the number of processes, which the draws depend on: beyond rounding it alone matters to the moving centre, whereas
# Sinkhorn balances each micro-batch over all processes, and KoLeo looks for neighbours in a process's own micro-batch.
FREE_ON_RESUME = set(
    "preset dataset channels output_dir resume tf32 compile gradient_checkpointing stop_after_epoch max_steps "
    "batch_size gradient_accumulation_steps save_every keep eval_every eval_parts log_every num_workers num_threads "
    "trackers".split()
)


def preset_arguments(preset: str) -> dict:
    """The defaults that `preset` changes.

    Raises:
        TrainingError: an unknown preset.
    """
    if preset not in PRESETS:
        raise TrainingError(f"--preset is {preset!r}: use one of {', '.join(PRESETS)}.")
    return PRESETS[preset]


def check_area(flag: str, area: Sequence[float]) -> None:
    """Refuse an area range that is not two shares of a field.

    Raises:
        TrainingError: naming `flag`.
    """
    if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
        given = " ".join(f"{share:g}" for share in area)
        raise TrainingError(f"{flag} is {given}: give two shares of the field's area with 0 < low <= high <= 1.")


def check_arguments(arguments: TrainingArguments, patch_size: int) -> None:
    """Refuse settings that contradict each other or the network's patch size.

    Raises:
        TrainingError: naming the flag and the mend.
    """
    a = arguments
    for name, (low, high) in LIMITS.items():
        value = getattr(a, name)
        if value is not None and not low <= value <= high:  # so written, NaN is refused too
            raise TrainingError(f"--{name} is {value:g}: give a number from {low:,} to {high:,}.")
    for name in ("global_crop_size", "local_crop_size", "tile_size"):
        size = getattr(a, name)
        if size < patch_size or size % patch_size:
            raise TrainingError(
                f"--{name} {size} is not a multiple of the patch size {patch_size}: choose one that is."
            )
    for name in ("global_crop_area", "local_crop_area"):
        check_area(f"--{name}", getattr(a, name))
    for name, choices in CHOICES.items():
        if getattr(a, name) not in choices:
            raise TrainingError(f"--{name} is {getattr(a, name)!r}: use one of {', '.join(map(str, choices))}.")
    if a.batch_size % a.group_size:
        raise TrainingError(
            f"--batch_size {a.batch_size} is not a multiple of --group_size {a.group_size}: choose one."
        )
    if a.group_size > 1 and (a.unlabelled == "self" or a.anchor_group != "none"):
        raise TrainingError("--group_size goes with --unlabelled drop and --anchor_group none: give these.")
    if not a.student_sees_globals and not (a.global_crops and a.local_crops):
        raise TrainingError(
            "--student_sees_globals false needs a global and a local crop: the student sees the latter."
        )
    if a.global_crops + a.local_crops < 2:
        raise TrainingError("--global_crops and --local_crops make a single view: the loss compares at least two.")
    for name in POSITIVE:
        if not 0 < getattr(a, name) < float("inf"):
            raise TrainingError(f"--{name} is {getattr(a, name)}: give a positive number.")
    if not a.drop_path_rate < 1:
        raise TrainingError(f"--drop_path_rate is {a.drop_path_rate}: give a number below 1.")
    if a.init == "random" and a.hidden_size % a.num_attention_heads:
        raise TrainingError(f"--hidden_size {a.hidden_size} is not a multiple of --num_attention_heads: choose one.")
    head = a.head_hidden_dim * (a.hidden_size + a.head_hidden_dim + a.head_bottleneck_dim)
    head += a.head_bottleneck_dim * a.num_prototypes
    if head > 10**10:
        raise TrainingError(
            f"--num_prototypes, --head_hidden_dim and --head_bottleneck_dim make a head of {head:.1e} weights: "
            "choose at most 1e10."
        )
    if a.max_intensity is not None and not 0 < a.max_intensity < float("inf"):
        raise TrainingError(f"--max_intensity is {a.max_intensity}: give a positive number of counts.")
    if a.centering not in ("mean", "sinkhorn"):
        raise TrainingError(f"--centering is {a.centering!r}: use mean or sinkhorn.")
    if a.koleo_weight and a.batch_size < 2:
        raise TrainingError("--koleo_weight needs a neighbour in the batch: give --batch_size 2 or more.")
    if a.whiten_patches and a.patch_embedding != "linear":
        raise TrainingError("--whiten_patches starts a linear patch embedding: leave it out, or --patch_embedding.")
    if a.whiten_patches and a.init != "random":
        raise TrainingError("--whiten_patches would overwrite the weights of --init: leave one of them out.")
    if a.mixed_precision not in ("no", "bf16", "fp16"):
        raise TrainingError(f"--mixed_precision is {a.mixed_precision!r}: use no, bf16 or fp16.")
    if a.unlabelled not in ("drop", "self"):
        raise TrainingError(f"--unlabelled is {a.unlabelled!r}: use drop or self.")
    if a.pair_constraint not in CONSTRAINTS:
        raise TrainingError(f"--pair_constraint is {a.pair_constraint!r}: use one of {', '.join(CONSTRAINTS)}.")
    most = 8 * (os.cpu_count() or 1)
    if a.num_workers > most:
        raise TrainingError(f"--num_workers is {a.num_workers}: this machine takes at most {most}, 8 a core.")
    if a.anchor_group not in ("none", "plate", "batch"):
        raise TrainingError(f"--anchor_group is {a.anchor_group!r}: use none, plate or batch.")
    if not a.channels or len(set(a.channels)) != len(a.channels):
        raise TrainingError(f"--channels is {' '.join(a.channels)!r}: name each image column once.")


def changed_settings(old: dict, new: dict) -> list[str]:
    """Names of the settings that differ between two runs and change what is learned."""
    names = [f.name for f in fields(TrainingArguments) if f.name not in FREE_ON_RESUME]
    return [name for name in names if name in old and old[name] != new[name]]
