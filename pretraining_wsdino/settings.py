"""Every setting of a training run as typed dataclasses, its presets, and what makes settings unusable together."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from wsdino.errors import UserError
from wsdino.settings import setting

# What a partner differs in, from the loosest to the strictest.
CONSTRAINTS = ("none", "image", "well", "plate", "batch")

# What the presets for small images have in common: a small ViT, from random weights unless told otherwise.
SMALL_NETWORK = {
    "init": "random",
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "drop_path_rate": 0.0,
    "global_crop_size": 64,
    "tile_size": 64,
    "num_prototypes": 64,
    "head_hidden_dim": 256,
    "head_bottleneck_dim": 64,
    "freeze_last_layer_epochs": 0,
    "student_temperature": 0.1,
    "centering": "sinkhorn",
    "koleo_weight": 0.02,
    "max_grad_norm": 1.0,
    "stop_after_epoch": None,
}
# What a preset changes; all other settings keep the defaults of `TrainingSettings`, which are the paper's.
PRESETS: dict[str, dict] = {
    "paper": {},
    # The paper's recipe for a GPU with bfloat16: four times the batch with the learning rates scaled alike, float32
    # master weights, teacher, centre and loss. Not bit-comparable with "paper"; epochs mean the same.
    "fast": {
        "output_dir": "runs/fast",
        "mixed_precision": "bf16",
        "tf32": True,
        "per_device_train_batch_size": 64,
        "learning_rate": 1.6e-5,
        "final_learning_rate": 1.2e-5,
    },
    # Without ImageNet weights the paper's 4e-6 moves nothing; these are the settings with which DINO trains ViT-S from
    # random weights (Caron et al. 2021, appendix: 5e-4 at batch 256, weight decay 0.04 to 0.4, clipping, EMA 0.996).
    "scratch": {
        "init": "random",
        "output_dir": "runs/scratch",
        "per_device_train_batch_size": 64,
        "learning_rate": 1.25e-4,
        "final_learning_rate": 1e-6,
        "weight_decay": 0.04,
        "final_weight_decay": 0.4,
        "max_grad_norm": 3.0,
        "teacher_momentum": 0.996,
        "center_momentum": 0.9,
        "student_temperature": 0.1,
        "stop_after_epoch": None,
    },
    # A small ViT on small simulated fields, from random weights: minutes on two CPU cores. RESULTS.md says what was
    # measured: without the first two settings even a supervised network of this size hardly learns in that time, and
    # Sinkhorn targets and a little KoLeo keep targets and features from collapsing. Anchors of one plate keep the
    # batch out of the targets, which longer runs learned instead of the phenotype; at this length no score moved.
    "demo": {
        **SMALL_NETWORK,
        "whiten_patches": True,
        "initializer_range": 0.1,
        "anchor_group": "plate",
        "pair_constraint": "plate",
        "output_dir": "runs/demo",
        "local_crops": 4,
        "local_crop_size": 32,
        "teacher_temperature": 0.04,
        "teacher_momentum": 0.97,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-5,
        "warmup_epochs": 2,
        "weight_decay": 0.04,
        "final_weight_decay": 0.04,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 24,
        "logging_steps": 5,
    },
    # Single cells and small screens, from a network trained on drawn cells (wsdino-pretrain) or from random weights:
    # the views differ in orientation and brightness, which are the shortcuts; one target per group of four cells.
    "cells": {
        **SMALL_NETWORK,
        "patch_embedding": "convolutional",
        "output_dir": "runs/cells",
        "group_size": 4,
        "pair_constraint": "none",
        "global_crops": 1,
        "global_crop_area": [0.7, 1.0],
        "student_sees_globals": False,
        "local_crops": 2,
        "local_crop_size": 48,
        "local_crop_area": [0.4, 1.0],
        "transpose": 0.5,
        "brightness_sd": 0.25,
        "intensity_scale": "log",
        "tile_grid": 1,
        "symmetries": 4,
        "teacher_temperature": 0.015,
        "warmup_teacher_temperature": 0.015,
        "teacher_momentum": 0.98,
        "learning_rate": 2e-4,
        "final_learning_rate": 4e-6,
        "warmup_epochs": 1,
        "weight_decay": 0.02,
        "final_weight_decay": 0.02,
        "per_device_train_batch_size": 48,
        "num_train_epochs": 5,
        "logging_steps": 10,
        "save_every_epochs": 1,
    },
}

INFINITY = float("inf")


@dataclass
class LoopSettings:
    """Settings of the training loop, whatever it trains; the defaults are the paper's."""

    output_dir: str = setting("runs/paper", "Run folder.")
    resume: bool = setting(
        False, "Continue the run in --output_dir from its newest checkpoint; start it if there is none."
    )
    seed: int = setting(0, "Keys every random draw of the run.", low=0, high=2**32 - 1)
    num_train_epochs: int = setting(
        400, "Length of the schedules; an epoch draws as many pairs as there are images.", low=1
    )
    stop_after_epoch: int | None = setting(
        200, "Stop here, before the schedules end; the paper reports epoch 200 of 400.", low=1
    )
    max_steps: int | None = setting(None, "Stop after so many steps, for trials; schedules are unchanged.", low=1)
    per_device_train_batch_size: int = setting(16, "Image pairs per process and micro-batch.", low=1, high=65536)
    gradient_accumulation_steps: int = setting(1, "Micro-batches per optimiser step.", low=1, high=65536)
    learning_rate: float = setting(4e-6, "Peak, after the warm-up; not scaled by the batch.", above=0, below=INFINITY)
    final_learning_rate: float = setting(3e-6, "At the end of the cosine.", low=0, below=INFINITY)
    warmup_epochs: int = setting(10, "Linear warm-up from 0.", low=0)
    num_train_steps: int | None = setting(None, "Length of the schedules in steps, instead of epochs.", low=1)
    warmup_steps: int | None = setting(None, "Length of the warm-up in steps, instead of epochs.", low=0)
    weight_decay: float = setting(0.0, "AdamW's, at the start; never on biases and norms.", low=0, below=INFINITY)
    final_weight_decay: float = setting(0.0, "At the end of its cosine.", low=0, below=INFINITY)
    max_grad_norm: float = setting(0.0, "Clip the gradient's global norm; 0 is off.", low=0, below=INFINITY)
    mixed_precision: Literal["no", "bf16", "fp16"] | None = setting(
        None, "no is float32. Default: what accelerate was launched or configured with."
    )
    tf32: bool = setting(False, "On a GPU, let float32 matrix products round their factors to TF32.")
    compile: bool = setting(False, "Compile the backbones with torch.compile; pays on a GPU, hardly on a CPU.")
    save_every_epochs: int = setting(10, "Epochs between checkpoints; the last step always has one.", low=1)
    save_total_limit: int = setting(2, "Checkpoints kept; older ones go once a newer one is whole.", low=1)
    logging_steps: int = setting(10, "Steps between lines of metrics.jsonl.", low=1)
    dataloader_num_workers: int | None = setting(
        None, "Loader processes per training process. Default: up to 8 on a GPU, 0 on a CPU.", low=0, high=4096
    )
    num_threads: int | None = setting(
        None, "CPU threads per training process. Default: chosen by its launch.", low=1, high=4096
    )
    report_to: list[str] = setting([], "Accelerate trackers beside metrics.jsonl, such as tensorboard or wandb.")


@dataclass
class TrainingSettings(LoopSettings):
    """Every setting of a run, with the paper's recipe, as its released code runs it, as defaults."""

    preset: str = setting("demo", f"Named settings, overridden by any flag given: {', '.join(PRESETS)}.")
    dataset: str | None = setting(
        None,
        "Dataset folder or Hub id. Default: the dataset that the run was started with, or a simulated screen for a "
        "new run.",
    )
    subset: str = setting("annotated", "Subset of the dataset to train on.")
    channels: list[str] = setting(["dna", "tubulin", "actin"], "Image columns, one network each.")
    objective: Literal["distillation", "supervised"] = setting(
        "distillation", "Self-distillation (the paper), or cross-entropy of the weak label: the bound to compare with."
    )
    weak_label: str = setting("compound", "none (plain DINO), treatment, compound, moa, or any column of the dataset.")
    shuffle_labels: bool = setting(False, "Permute the weak labels among the images: the negative control.")
    group_size: int = setting(
        1,
        "1 makes pairs (the paper); with k > 1 a step takes groups of k images of one weak label, with one target.",
        low=1,
        high=65536,
    )
    unlabelled: Literal["drop", "self"] = setting(
        "drop", "Rows without a weak label: drop them, or pair each with itself (self)."
    )
    pair_constraint: Literal["none", "image", "well", "plate", "batch"] = setting(
        "image", "What a partner differs in, where the label allows it."
    )
    anchor_group: Literal["none", "plate", "batch"] = setting(
        "none",
        "All anchors of a step from one plate or batch, so that batch effects tell no two of them apart; or none.",
    )
    exclude_compounds: list[str] = setting([], "Compounds held out of training, such as one for leave-one-out.")

    init: str = setting(
        "facebook/dino-vits8",
        "Starting weights: random, a DINO .pth, a model folder or a Hub id; {channel} stands for the channel's name.",
    )
    hidden_size: int = setting(384, "Width of a network that starts from random weights.", low=1, high=65536)
    num_hidden_layers: int = setting(12, "Depth of a network that starts from random weights.", low=1, high=1000)
    num_attention_heads: int = setting(6, "Heads of a network that starts from random weights.", low=1, high=65536)
    patch_size: int = setting(
        8, "Patch side in pixels of a network that starts from random weights.", low=1, high=1000
    )
    initializer_range: float = setting(
        0.02, "SD of random weights, the head's too; 1 / sqrt(width) for narrow ones.", above=0, below=INFINITY
    )
    patch_embedding: Literal["linear", "convolutional"] = setting(
        "linear", "How patches become tokens in a network that starts from random weights."
    )
    whiten_patches: bool = setting(
        False, "Start a random patch embedding from the whitened patches of the training images."
    )
    drop_path_rate: float = setting(
        0.1, "Stochastic depth of the student's last block; earlier ones less, linearly.", low=0, below=1
    )
    gradient_checkpointing: bool = setting(False, "Trade a slower step for less memory.")

    global_crops: int = setting(2, "Views of the anchor, seen by teacher and student.", low=1, high=1000)
    global_crop_size: int = setting(224, "Side of a global view in pixels.", low=1, high=8192)
    global_crop_area: list[float] = setting([0.1, 0.2], "Smallest and largest share of the field.")
    student_sees_globals: bool = setting(True, "Whether the student sees the teacher's views too, as in the paper.")
    local_crops: int = setting(8, "Views of the partner, seen by the student.", low=0, high=1000)
    local_crop_size: int = setting(96, "Side of a local view in pixels.", low=1, high=8192)
    local_crop_area: list[float] = setting([0.04, 0.08], "Smallest and largest share of the field.")
    transpose: float = setting(
        0.0, "Probability of exchanging a crop's rows and columns; 0.5: all its symmetries.", low=0, high=1
    )
    brightness_sd: float = setting(
        0.0, "SD of the natural logarithm of a crop's random change of brightness.", low=0, high=10
    )
    intensity_scale: Literal["linear", "log"] = setting(
        "linear", "linear (the paper: clipped, divided) or log, which clips no bright pixel."
    )
    max_intensity: float | None = setting(
        None, "Counts that become 1.0. Default: 10000 for 16-bit and 255 for 8-bit planes.", above=0, below=INFINITY
    )
    tile_size: int = setting(
        224, "Side of the tiles that the saved model's processor cuts from a field.", low=1, high=8192
    )
    tile_grid: int = setting(2, "Tiles along a side of the field's centre; 1 for single cells.", low=1, high=65536)
    symmetries: Literal[1, 4, 8] = setting(
        1, "Turns and mirror images that the saved model averages a tile's features over."
    )

    num_prototypes: int = setting(65536, "Outputs of the projection head.", low=1, high=2**26)
    head_hidden_dim: int = setting(2048, "Width of the projection head's MLP.", low=1, high=65536)
    head_bottleneck_dim: int = setting(256, "Width of the projection head's bottleneck.", low=1, high=65536)
    freeze_last_layer_epochs: int = setting(1, "Epochs in which the prototypes do not move.", low=0)
    student_temperature: float = setting(0.07, "Softmax temperature of the student.", above=0, below=INFINITY)
    teacher_temperature: float = setting(
        0.04, "Softmax temperature of the teacher after its warm-up.", above=0, below=INFINITY
    )
    warmup_teacher_temperature: float = setting(
        0.04, "Teacher temperature in the first epoch.", above=0, below=INFINITY
    )
    warmup_teacher_temperature_epochs: int = setting(0, "Epochs over which the teacher temperature warms up.", low=0)
    centering: Literal["mean", "sinkhorn"] = setting(
        "mean", "What keeps targets apart: mean (the moving centre) or sinkhorn (SwAV, DINOv2)."
    )
    koleo_weight: float = setting(
        0.0, "Weight of KoLeo, which spreads the student's features (0.1 in DINOv2).", low=0, below=INFINITY
    )
    center_momentum: float = setting(0.8, "Memory of the moving centre of the teacher's outputs.", low=0, high=1)
    teacher_momentum: float = setting(
        0.99, "EMA momentum of the teacher at the start; a cosine takes it to 1.", low=0, high=1
    )

    eval_every_epochs: int = setting(
        0, "Epochs between evaluations (TVN, NSC, NSCB) into metrics.jsonl; 0 is never.", low=0
    )
    eval_subsets: list[str] = setting(["annotated", "dmso"], "Subsets of the dataset that are evaluated.")


# Settings that may differ between a run and its resumption. The dataset may have moved; the loop checks its size, and
# continues with the run's own where none is given. Of the batch size and the accumulation the loop checks the product
# with the number of processes, which the draws depend on: beyond rounding it alone matters to the moving centre,
# whereas Sinkhorn balances each micro-batch over all processes, and KoLeo looks for neighbours in a process's own.
FREE_ON_RESUME = set(
    "preset dataset channels output_dir resume tf32 compile gradient_checkpointing stop_after_epoch max_steps "
    "per_device_train_batch_size gradient_accumulation_steps save_every_epochs save_total_limit eval_every_epochs "
    "eval_subsets logging_steps dataloader_num_workers num_threads report_to".split()
)


def changed_settings(old: Mapping[str, Any], new: LoopSettings) -> list[str]:
    """Names of the settings that differ from those of an earlier launch and change what is learned."""
    now = asdict(new)
    names = [each.name for each in fields(new) if each.name not in FREE_ON_RESUME]
    return [name for name in names if name in old and old[name] != now[name]]


def check_area(flag: str, area: Sequence[float]) -> None:
    """Refuse an area range that is not two shares of a field: `UserError` naming `flag`."""
    if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
        given = " ".join(f"{share:g}" for share in area)
        raise UserError(f"{flag} is {given}: give two shares of the field's area with 0 < low <= high <= 1.")


def check_settings(settings: TrainingSettings, patch_size: int) -> None:
    """Refuse settings that contradict each other or the network's patch size.

    Raises
    ------
    UserError
        Naming the flags and what to give.
    """
    s = settings
    for name in ("global_crop_size", "local_crop_size", "tile_size"):
        size = getattr(s, name)
        if size < patch_size or size % patch_size:
            raise UserError(f"--{name} {size} is not a multiple of the patch size {patch_size}: choose one that is.")
    check_area("--global_crop_area", s.global_crop_area)
    check_area("--local_crop_area", s.local_crop_area)
    head = s.head_hidden_dim * (s.hidden_size + s.head_hidden_dim + s.head_bottleneck_dim)
    head += s.head_bottleneck_dim * s.num_prototypes
    batch, supervised, labelled = s.per_device_train_batch_size, s.objective == "supervised", s.weak_label != "none"
    _refuse(batch % s.group_size, f"--per_device_train_batch_size {batch} is not a multiple of --group_size.")
    if s.group_size > 1:
        _refuse(s.unlabelled == "self", "--group_size goes with --unlabelled drop: give both.")
        _refuse(s.anchor_group != "none", "--group_size goes with --anchor_group none: give both.")
    if not s.student_sees_globals:
        _refuse(not s.local_crops, "--student_sees_globals false needs --local_crops, for the student to see.")
    _refuse(s.global_crops + s.local_crops < 2, "--global_crops and --local_crops make one view: the loss needs two.")
    if s.init == "random":
        _refuse(s.hidden_size % s.num_attention_heads, "--hidden_size is not a multiple of --num_attention_heads.")
    _refuse(
        head > 10**10, f"--num_prototypes and --head_hidden_dim make a head of {head:.1e} weights: use smaller ones."
    )
    _refuse(s.koleo_weight and batch < 2, "--koleo_weight needs a neighbour: give --per_device_train_batch_size 2.")
    if s.whiten_patches:
        _refuse(
            s.patch_embedding != "linear", "--whiten_patches starts a linear --patch_embedding: leave one of them out."
        )
        _refuse(s.init != "random", "--whiten_patches would overwrite the weights of --init: leave one of them out.")
    if supervised:
        _refuse(not labelled, "--objective supervised learns the weak label: name one with --weak_label.")
        _refuse(s.unlabelled == "self", "--objective supervised needs labels: leave --unlabelled at drop.")
    _refuse(s.shuffle_labels and not labelled, "--shuffle_labels needs labels: name a column with --weak_label.")
    once = bool(s.channels) and len(set(s.channels)) == len(s.channels)
    _refuse(not once, f"--channels is {' '.join(s.channels)!r}: name each image column once.")


def _refuse(found: object, sentence: str) -> None:
    if found:
        raise UserError(sentence)
