"""Self-distillation with weak labels: pairs, crops, head, loss, teacher and schedules, in plain PyTorch."""

from .arguments import TrainingArguments, TrainingError, changed_settings, check_arguments, preset_arguments
from .distillation import (
    DinoHead,
    DinoLoss,
    FeatureWindow,
    MultiCropNetwork,
    koleo_loss,
    participation_ratio,
    sinkhorn_targets,
    update_teacher,
)
from .multicrop import CropSpec, cut_window, draw_boxes, resize_windows
from .pairs import PairBatchSampler, PlanePairs, WeakLabelPairCollator, WeakLabelPairSampler
from .patch_whitening import whiten_patch_embedding
from .schedules import cosine_schedule, linear_schedule

__all__ = [
    "CropSpec",
    "DinoHead",
    "DinoLoss",
    "FeatureWindow",
    "MultiCropNetwork",
    "PairBatchSampler",
    "PlanePairs",
    "TrainingArguments",
    "TrainingError",
    "WeakLabelPairCollator",
    "WeakLabelPairSampler",
    "changed_settings",
    "check_arguments",
    "cosine_schedule",
    "cut_window",
    "draw_boxes",
    "koleo_loss",
    "linear_schedule",
    "participation_ratio",
    "preset_arguments",
    "resize_windows",
    "sinkhorn_targets",
    "update_teacher",
    "whiten_patch_embedding",
]
