"""The objective of a start without real images or weights: drawn cells and the numbers of their phenotypes."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from wsdino.settings import setting

from .multicrop import CropSpec, resize_windows
from .pairs import PlanePairs, WeakLabelPairCollator
from .phenotypes import PhenotypeGroupSampler, PhenotypeLoss, standardised_logs
from .settings import LoopSettings
from .step_data import StepData
from .trainer import Monitors, Objective, Progress


@dataclass
class StartSettings(LoopSettings):
    """Settings of `wsdino-pretrain`."""

    output_dir: str = setting("runs/simulated_start", "Run folder; a channel's start is written to <channel>/model.")
    resume: bool = setting(True, "Continue the run in --output_dir, if there is one.")
    stop_after_epoch: int | None = setting(None, "Stop here, before the schedules end.", low=1)
    num_train_steps: int | None = setting(1_000, "Length of the schedules in steps, instead of epochs.", low=1)
    warmup_steps: int | None = setting(50, "Length of the warm-up in steps, instead of epochs.", low=0)
    per_device_train_batch_size: int = setting(256, "Cells per process and micro-batch.", low=1)
    learning_rate: float = setting(1e-3, "Peak, after the warm-up.", above=0)
    final_learning_rate: float = setting(2e-5, "At the end of the cosine.", low=0)
    weight_decay: float = setting(0.05, "AdamW's, at the start; never on biases and norms.", low=0)
    final_weight_decay: float = setting(0.05, "At the end of its cosine.", low=0)
    max_grad_norm: float = setting(1.0, "Clip the gradient's global norm; 0 is off.", low=0)
    save_every_epochs: int = setting(1, "Epochs between checkpoints; the last step always has one.", low=1)

    channels: list[str] = setting(["dna", "tubulin", "actin"], "Channels to train, one network each.")
    drawn_cells: str = setting("data/drawn_cells", "Folder of drawn cells; what is absent is drawn first.")
    source: Literal["mechanisms", "ranges"] = setting(
        "mechanisms", "Phenotypes: blends of twelve mechanisms' looks, or every number from a wide range."
    )
    phenotypes: int = setting(8_000, "Phenotypes to draw, each under two optics.", low=1)
    cells: int = setting(4, "Cells per phenotype and optics.", low=1)
    draw_processes: int = setting(0, "Processes that draw; 0 is one per usable core.", low=0)
    hidden_size: int = setting(96, "Width of the network.", low=1)
    num_hidden_layers: int = setting(4, "Depth of the network.", low=1)
    num_attention_heads: int = setting(3, "Heads of the network.", low=1)
    patch_size: int = setting(8, "Patch side in pixels.", low=1)
    patch_embedding: Literal["linear", "convolutional"] = setting("convolutional", "How patches become tokens.")
    crop_size: int = setting(64, "Side of a crop that the network sees, in pixels.", low=1)
    crop_area: list[float] = setting([0.6, 1.0], "Smallest and largest share of a drawn cell.", above=0, high=1)
    brightness_sd: float = setting(0.3, "SD of the natural logarithm of a crop's random change of brightness.", low=0)
    max_intensity: float = setting(10_000.0, "Counts that become 1.0 before the logarithm.", above=0)
    group_size: int = setting(2, "Cells of one phenotype and optics whose features are averaged for InfoNCE.", low=1)
    temperature: float = setting(0.1, "Softmax temperature of InfoNCE.", above=0)
    regression_weight: float = setting(1.0, "Weight of the regression of a phenotype's numbers.", low=0)
    contrast_weight: float = setting(0.5, "Weight of InfoNCE between a phenotype's two optics.", low=0)


class PhenotypeNetwork(nn.Module):
    """A backbone and the loss that reads its features, which has weights of its own."""

    def __init__(self, backbone: nn.Module, loss: PhenotypeLoss):
        super().__init__()
        self.backbone, self.loss = backbone, loss

    def forward(self, crops: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, Monitors]:
        """Loss and monitors of `crops (n, 1, size, size)` of phenotypes with `numbers (n, numbers)`."""
        return self.loss(self.backbone(crops).pooler_output, numbers)


class RecognisePhenotypes(Objective):
    """Regress a drawn phenotype's numbers, and recognise the phenotype under other optics.

    Parameters
    ----------
    settings : StartSettings
    backbone : torch.nn.Module
        Called with `(batch, 1, crop_size, crop_size)` floats; its output has `pooler_output (batch, hidden_size)`.
    phenotype : numpy.ndarray
        `(cells,)`: row of `numbers` of every drawn cell.
    numbers : numpy.ndarray
        `(phenotypes, numbers)`, not negative.
    """

    def __init__(self, settings: StartSettings, backbone: nn.Module, phenotype: np.ndarray, numbers: np.ndarray):
        s = self.settings = settings
        targets = torch.from_numpy(standardised_logs(numbers))
        self.targets = targets[torch.from_numpy(np.asarray(phenotype, np.int64))]
        torch.manual_seed(s.seed + 1)
        loss = PhenotypeLoss(
            s.hidden_size,
            targets.shape[1],
            group_size=s.group_size,
            temperature=s.temperature,
            regression_weight=s.regression_weight,
            contrast_weight=2 * s.contrast_weight,  # the loss halves the sum of both directions
        )
        self.network = PhenotypeNetwork(backbone, loss)

    def prepare(self, accelerator: Accelerator, network: nn.Module) -> None:
        """Nothing stands beside the network."""
        self.device = accelerator.device

    def loss(self, network: nn.Module, batch: dict[str, Any], progress: Progress) -> tuple[torch.Tensor, Monitors]:
        """`PhenotypeLoss` of a micro-batch of cells in the sampler's order."""
        s = self.settings
        view = {name: each.to(self.device, non_blocking=True) for name, each in batch["global"].items()}
        crops = resize_windows(**view, size=s.crop_size, max_intensity=s.max_intensity, intensity_scale="log")
        loss, monitors = network(crops, self.targets[batch["anchors"]].to(self.device, non_blocking=True))
        return loss, {"loss": loss.detach(), **monitors}


def drawn_data(settings: StartSettings, planes: np.ndarray, phenotype: np.ndarray, optics: np.ndarray) -> StepData:
    """Batches of drawn cells, `planes (cells, height, width)`: groups of one phenotype under either optics."""
    s = settings
    sampler = PhenotypeGroupSampler(
        phenotype, optics, block=s.per_device_train_batch_size, group_size=s.group_size, seed=s.seed
    )
    crops = CropSpec(1, s.crop_size, tuple(s.crop_area), transpose=0.5, brightness_sd=s.brightness_sd)
    collate = WeakLabelPairCollator(crops, CropSpec(0, s.crop_size, (1.0, 1.0)), seed=s.seed)
    return StepData(PlanePairs(planes), sampler, collate)
