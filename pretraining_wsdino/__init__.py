"""Self-distillation with weak labels: settings, pairs, crops, head, loss, schedules and the loop, in plain PyTorch."""

from .accelerators import new_accelerator, start_training, suit_attention
from .channels import train_channels
from .distillation import DinoHead, DinoLoss, MultiCropNetwork, koleo_loss, sinkhorn_targets, update_teacher
from .monitors import FeatureWindow, participation_ratio
from .multicrop import CropSpec, cut_window, draw_boxes, resize_windows
from .pairs import PairBatchSampler, PlanePairs, WeakLabelPairCollator, WeakLabelPairSampler
from .patch_whitening import whiten_patch_embedding
from .schedules import cosine_schedule, linear_schedule
from .self_distillation import SelfDistillation
from .settings import PRESETS, LoopSettings, TrainingSettings, check_settings
from .step_data import StepData, training_data
from .supervised import Supervised
from .trainer import Objective, Progress, Trainer

__all__ = [
    "PRESETS",
    "CropSpec",
    "DinoHead",
    "DinoLoss",
    "FeatureWindow",
    "LoopSettings",
    "MultiCropNetwork",
    "Objective",
    "PairBatchSampler",
    "PlanePairs",
    "Progress",
    "SelfDistillation",
    "StepData",
    "Supervised",
    "Trainer",
    "TrainingSettings",
    "WeakLabelPairCollator",
    "WeakLabelPairSampler",
    "check_settings",
    "cosine_schedule",
    "cut_window",
    "draw_boxes",
    "koleo_loss",
    "linear_schedule",
    "new_accelerator",
    "participation_ratio",
    "resize_windows",
    "sinkhorn_targets",
    "start_training",
    "suit_attention",
    "train_channels",
    "training_data",
    "update_teacher",
    "whiten_patch_embedding",
]
