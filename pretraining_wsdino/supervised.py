"""The bound that self-distillation is compared with: a linear head on the backbone learns the weak label itself."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from .distillation import MultiCropNetwork
from .pairs import WeakLabelPairSampler
from .self_distillation import views_of
from .settings import TrainingSettings
from .trainer import Monitors, Objective, Progress


class Supervised(Objective):
    """Cross-entropy of the weak label, from one global view of each anchor.

    Parameters
    ----------
    settings : TrainingSettings
    make_backbone : callable
        A drop path rate to a backbone; equal weights in every process.
    pairs : WeakLabelPairSampler
        Knows the label of every image.
    max_intensity : float
        Counts that become 1.0.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        make_backbone: Callable[[float], Any],
        pairs: WeakLabelPairSampler,
        max_intensity: float,
    ):
        self.settings, self.max_intensity = settings, max_intensity
        backbone = make_backbone(settings.drop_path_rate)
        if settings.compile:
            backbone.compile(dynamic=False)
        if settings.gradient_checkpointing:
            backbone.activation_checkpointing_enable()
        torch.manual_seed(settings.seed + 1)
        self.network = MultiCropNetwork(backbone, nn.Linear(backbone.config.hidden_size, len(pairs.label_counts)))
        labels = np.full(pairs.num_images, -1)
        labels[pairs.labelled] = pairs.code
        self.labels = torch.from_numpy(labels)

    def prepare(self, accelerator: Accelerator, network: nn.Module) -> None:
        """Nothing stands beside the network."""
        self.student, self.device = accelerator.unwrap_model(network), accelerator.device

    def loss(self, network: nn.Module, batch: dict[str, Any], progress: Progress) -> tuple[torch.Tensor, Monitors]:
        """Cross-entropy in nats, and the share of right labels."""
        logits, _ = network(views_of(batch, self.settings, self.max_intensity, self.device))
        labels = self.labels[batch["anchors"]].to(self.device, non_blocking=True)
        loss = F.cross_entropy(logits.float(), labels)
        return loss, {"loss": loss.detach(), "accuracy": (logits.argmax(1) == labels).float().mean()}

    def model(self) -> nn.Module:
        """The trained backbone."""
        return self.student.backbone
