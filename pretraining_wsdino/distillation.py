"""DINO's self-distillation: projection head, loss with a moving centre or Sinkhorn, EMA teacher."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn


class DinoHead(nn.Module):
    """Three-layer MLP, L2-normalised bottleneck and weight-normed prototypes (Caron et al. 2021, section 3).

    Parameters
    ----------
    in_dim : int
        Width of the backbone.
    num_prototypes : int
        Outputs; 65,536 in the paper.
    hidden_dim, bottleneck_dim : int
        2,048 and 256 in the paper.
    initializer_range : float
        Standard deviation of the MLP's truncated normals; 0.02 in DINO, whose layers are wide.

    The length of each prototype is trained (the paper; DINO's `norm_last_layer=False`).
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        initializer_range: float = 0.02,
    ):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=initializer_range)
                nn.init.zeros_(layer.bias)
        # Only the MLP has this initialisation in DINO; the prototypes keep nn.Linear's own, with unit length.
        last_layer = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
        self.last_layer = nn.utils.parametrizations.weight_norm(last_layer, dim=0)
        nn.init.ones_(self.last_layer.parametrizations.weight.original0)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(n, in_dim)` to logits `(n, num_prototypes)`."""
        bottleneck = F.normalize(self.mlp(features), dim=-1)
        # In bfloat16 cosines near 1 are 0.004 apart; divided by the teacher's temperature that is a tenth of a nat.
        with torch.autocast(bottleneck.device.type, enabled=False):
            return self.last_layer(bottleneck.float())


class MultiCropNetwork(nn.Module):
    """Backbone and head over views of several sizes: one backbone pass per size, one head pass over all.

    `backbone(pixel_values, cls_only=True).pooler_output` must give `(n, dim)`.
    """

    backbone: Any
    head: Any

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `(sum n_i, prototypes)` and features `(sum n_i, dim)` of views `(n_i, 1, size_i, size_i)`."""
        features = torch.cat([self.backbone(view, cls_only=True).pooler_output for view in views])
        return self.head(features), features


def _num_processes() -> int:
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def _sum_over_processes(value: torch.Tensor) -> torch.Tensor:
    if _num_processes() > 1:
        torch.distributed.all_reduce(value)
    return value


@torch.no_grad()
def sinkhorn_targets(logits: torch.Tensor, temperature: float, iterations: int = 3) -> torch.Tensor:
    """Teacher targets that use all prototypes equally: Sinkhorn-Knopp in place of centring and softmax.

    Caron et al. 2020 (SwAV), section 3.1; in DINO by Oquab et al. 2023 (DINOv2), section 4. Rows and columns of
    exp(logits / temperature) are scaled in turn, the rows last, so that each image's targets sum to 1; the columns are
    those of one micro-batch over all processes.

    Parameters
    ----------
    logits : torch.Tensor
        `(n, prototypes)`, this process's rows; every process has as many.
    temperature : float
    iterations : int
        3 in both papers.

    Returns
    -------
    torch.Tensor
        `(n, prototypes)` float32.
    """
    # In double precision, shifted by the largest logit of all, so that low temperatures neither overflow nor vanish.
    scaled = logits.double() / temperature
    largest = scaled.max()
    if _num_processes() > 1:
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    targets = torch.exp(scaled - largest)
    rows = float(len(targets) * _num_processes())
    for _ in range(iterations):
        columns = _sum_over_processes(targets.sum(0, keepdim=True)).clamp_min(1e-300)
        targets *= rows / (len(columns[0]) * columns)
        targets /= targets.sum(1, keepdim=True).clamp_min(1e-300)
    return targets.float()


def koleo_loss(features: torch.Tensor) -> torch.Tensor:
    """Spreads features over the sphere: minus the mean log distance of each to its nearest neighbour in the batch.

    Sablayrolles et al. 2019; Oquab et al. 2023 (DINOv2), section 4. `features (n, dim)` of one view of n images,
    n >= 2; they are made unit length first.
    """
    unit = F.normalize(features.float(), dim=-1)
    with torch.no_grad():
        nearest = (unit @ unit.T).fill_diagonal_(-2.0).argmax(1)
    return -torch.log((unit - unit[nearest]).norm(dim=1) + 1e-8).mean()


class DinoLoss(nn.Module):
    """Cross-entropy of the student under centred, sharpened teacher targets, over all pairs of different views.

    Parameters
    ----------
    num_prototypes : int
        Columns of the logits.
    student_temperature : float
        0.07 in the paper (0.1 in DINO).
    center_momentum : float
        0.8 in the paper (0.9 in DINO).
    centering : {"mean", "sinkhorn"}
        The moving centre of the paper and of DINO, or `sinkhorn_targets`, which leaves the centre unused.
    group_size : int
        Neighbouring images of a batch that share a weak label and one target, made from the mean of the teacher's
        logits over them; 1 in the paper.
    student_sees_globals : bool
        Whether the student's views begin with the teacher's (the paper, DINO), so that no view is compared with
        itself, or are all its own.
    """

    center: torch.Tensor

    def __init__(
        self,
        num_prototypes: int,
        student_temperature: float = 0.07,
        center_momentum: float = 0.8,
        centering: str = "mean",
        group_size: int = 1,
        student_sees_globals: bool = True,
    ):
        super().__init__()
        self.student_temperature, self.center_momentum = student_temperature, center_momentum
        self.centering, self.group_size, self.student_sees_globals = centering, group_size, student_sees_globals
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        self._sums: list[torch.Tensor] = []

    def forward(
        self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, batch_size: int, teacher_temperature: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one micro-batch, in float32 whatever the logits' precision.

        Parameters
        ----------
        student_logits : torch.Tensor
            `(views * batch_size, prototypes)`, view-major, the teacher's views first.
        teacher_logits : torch.Tensor
            `(teacher views * batch_size, prototypes)`, view-major.
        batch_size : int
        teacher_temperature : float

        Returns
        -------
        torch.Tensor, dict
            The loss, and monitors (0-dimensional tensors, detached, in nats): `teacher_entropy`, mean entropy of the
            targets; `mean_entropy`, entropy of the mean target; `kl`, loss less teacher entropy over the same pairs.
            Collapse to one prototype drives the first two to 0, collapse to uniform drives both to ln(prototypes);
            their difference is what the targets tell images apart by.
        """
        student = F.log_softmax(student_logits.float() / self.student_temperature, dim=-1).view(
            -1, batch_size, student_logits.shape[-1]
        )
        with torch.no_grad():
            teacher = teacher_logits.float()
            if self.group_size > 1:
                teacher = teacher.view(-1, self.group_size, teacher.shape[-1]).mean(1)
            if self.centering == "sinkhorn":
                targets = sinkhorn_targets(teacher, teacher_temperature)
            else:
                targets = F.softmax((teacher - self.center) / teacher_temperature, dim=-1)
            targets = targets.repeat_interleave(self.group_size, 0).view(-1, batch_size, teacher.shape[-1])
            # Every student view learns from the sum of the targets of all *other* views: one product per student view
            # instead of one per pair.
            wanted = targets.sum(0, keepdim=True).expand(len(student), -1, -1).clone()
            if self.student_sees_globals:
                wanted[: len(targets)] -= targets
        pairs = len(targets) * (len(student) - 1 if self.student_sees_globals else len(student))
        loss = -(wanted * student).sum() / (pairs * batch_size)
        self._sums.append(teacher.mean(0, keepdim=True))

        with torch.no_grad():
            entropy = torch.special.entr(targets).sum(-1).mean()
            mean_target = targets.flatten(0, 1).mean(0)
            monitors = {
                "teacher_entropy": entropy,
                "mean_entropy": torch.special.entr(mean_target).sum(),
                "kl": loss.detach() - entropy,
            }
        return loss, monitors

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the centre by the mean teacher output since the last call, over all micro-batches and processes.

        Called once per optimiser step, so that all micro-batches of a step see the same centre.
        """
        sums, self._sums = self._sums, []
        if self.centering == "sinkhorn":  # which reads no centre
            return
        mean = torch.stack(sums).mean(0)
        mean = _sum_over_processes(mean) / _num_processes()
        self.center.mul_(self.center_momentum).add_(mean, alpha=1 - self.center_momentum)


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Set teacher <- momentum * teacher + (1 - momentum) * student, all parameters in one fused call.

    Buffers, which are the running statistics of a convolutional stem's batch normalisation, are the student's.
    """
    torch._foreach_lerp_(list(teacher.parameters()), [p.detach() for p in student.parameters()], 1.0 - momentum)
    for ours, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        ours.copy_(theirs)
