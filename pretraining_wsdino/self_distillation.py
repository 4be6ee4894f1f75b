"""WS-DINO's objective: a student learns from its moving average which other views are of the same weak label."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from wsdino.collapse import collapse_verdict

from .distillation import DinoHead, DinoLoss, MultiCropNetwork, koleo_loss, update_teacher
from .monitors import FeatureWindow
from .multicrop import resize_windows
from .patch_whitening import whiten_patch_embedding
from .schedules import cosine_schedule, linear_schedule
from .settings import TrainingSettings
from .step_data import StepData
from .trainer import Monitors, Objective, Progress


def views_of(
    batch: dict[str, Any], settings: TrainingSettings, max_intensity: float, device: torch.device
) -> list[torch.Tensor]:
    """The network's input, `(views * batch, 1, size, size)`: global views of the anchors, then local ones, if any."""
    s, views = settings, []
    names = ["windows", "sizes", "flips"] + ["log_gains"] * bool(s.brightness_sd)
    for part, size in (("global", s.global_crop_size), ("local", s.local_crop_size)):
        if part in batch:
            moved = {name: batch[part][name].to(device, non_blocking=True) for name in names}
            views.append(
                resize_windows(**moved, size=size, max_intensity=max_intensity, intensity_scale=s.intensity_scale)
            )
    return views


class SelfDistillation(Objective):
    """Student, teacher, head and loss.

    Parameters
    ----------
    settings : TrainingSettings
    make_backbone : callable
        A drop path rate to a backbone; equal weights at every call and in every process.
    data : StepData
        Its planes whiten the patch embedding where the settings ask for it.
    max_intensity : float
        Counts that become 1.0.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        make_backbone: Callable[[float], Any],
        data: StepData,
        max_intensity: float,
    ):
        s = self.settings = settings
        self.max_intensity = max_intensity
        student, self.teacher = (self._network(make_backbone(rate)) for rate in (s.drop_path_rate, 0.0))
        if s.whiten_patches:  # from thousands of patches; `prepare` copies the student's to the teacher
            patches = student.backbone.embeddings.patch_embeddings
            whiten_patch_embedding(
                patches.weight, patches.bias, data.images.planes, max_intensity, rows=data.pairs.rows, seed=s.seed
            )
        if s.gradient_checkpointing:
            student.backbone.activation_checkpointing_enable()
        self.teacher.requires_grad_(False).eval()
        if s.compile:  # in place, so that the weights keep their names; one static graph per crop size
            student.backbone.compile(dynamic=False)
            self.teacher.backbone.compile(dynamic=False)
        self.network = student
        self.criterion = DinoLoss(
            s.num_prototypes,
            s.student_temperature,
            s.center_momentum,
            s.centering,
            1 if s.weak_label == "none" else s.group_size,
            s.student_sees_globals,
        )
        self.features = FeatureWindow(1024, student.backbone.config.hidden_size)

    def _network(self, backbone: Any) -> MultiCropNetwork:
        s = self.settings
        torch.manual_seed(s.seed + 1)
        head = DinoHead(
            backbone.config.hidden_size,
            s.num_prototypes,
            hidden_dim=s.head_hidden_dim,
            bottleneck_dim=s.head_bottleneck_dim,
            initializer_range=s.initializer_range,
        )
        return MultiCropNetwork(backbone, head)

    def prepare(self, accelerator: Accelerator, network: nn.Module) -> None:
        """Start the teacher from the student that all processes share, and keep both with the loss in checkpoints."""
        self.student = accelerator.unwrap_model(network)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher = accelerator.prepare_model(self.teacher, evaluation_mode=True)
        self.criterion.to(accelerator.device)
        self.features.to(accelerator.device)
        accelerator.register_for_checkpointing(self.criterion, self.features)
        self.device = accelerator.device

    def schedules(self, progress: Progress) -> dict[str, float]:
        """The teacher's momentum and temperature."""
        s = self.settings
        return {
            "teacher_momentum": cosine_schedule(
                progress.step, start=s.teacher_momentum, end=1.0, total_steps=progress.total_steps
            ),
            "teacher_temperature": linear_schedule(
                progress.epoch,
                start=s.warmup_teacher_temperature,
                end=s.teacher_temperature,
                warmup_epochs=s.warmup_teacher_temperature_epochs,
            ),
        }

    def loss(self, network: nn.Module, batch: dict[str, Any], progress: Progress) -> tuple[torch.Tensor, Monitors]:
        """DINO's loss, and KoLeo's where it has a weight."""
        s, views = self.settings, views_of(batch, self.settings, self.max_intensity, self.device)
        pairs = s.per_device_train_batch_size
        with torch.no_grad():
            teacher_logits, teacher_features = self.teacher(views[:1])
        self.features.add(teacher_features)
        student_logits, student_features = network(views if s.student_sees_globals else views[1:])
        temperature = self.schedules(progress)["teacher_temperature"]
        loss, monitors = self.criterion(student_logits, teacher_logits, pairs, temperature)
        monitors = {"loss": loss.detach(), **monitors}
        if s.koleo_weight:  # each view apart: two views of one image are neighbours by right
            spread = s.global_crops if s.student_sees_globals else 1
            seen = student_features[: spread * pairs].split(pairs)
            koleo = torch.stack([koleo_loss(view) for view in seen]).mean()
            loss = loss + s.koleo_weight * koleo
            monitors["koleo"] = koleo.detach()
        return loss, monitors

    def before_update(self, progress: Progress) -> None:
        """Keep the prototypes where they are in the first epochs."""
        if progress.epoch < self.settings.freeze_last_layer_epochs:
            for parameter in self.student.head.last_layer.parameters():
                parameter.grad = None

    def after_update(self, progress: Progress) -> None:
        """Move the centre and the teacher."""
        self.criterion.update_center()
        update_teacher(self.student, self.teacher, self.schedules(progress)["teacher_momentum"])

    def model(self) -> nn.Module:
        """The teacher's backbone."""
        return self.teacher.backbone

    def logged(self, progress: Progress, means: dict[str, float]) -> dict[str, Any]:
        """The teacher's schedules, the participation ratio of its features, and whether it looks collapsed."""
        ratio = {"participation_ratio": self.features.participation_ratio()}
        verdict = collapse_verdict(means | ratio, self.settings.num_prototypes)
        return {**self.schedules(progress), **ratio, "collapse": verdict}
