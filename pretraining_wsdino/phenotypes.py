"""Learning from drawn cells: which cells a step takes, and the loss that a drawing's own numbers give.

A program draws cells of thousands of phenotypes, each a vector of plain numbers and each under two different optics
(staining, blur, light). A network that sees one cell learns those numbers, and learns to recognise the phenotype under
the other optics. No real image and nobody's label takes part. The idea of pretraining on drawings whose parameters are
known is formula-driven supervised learning (Kataoka et al. 2022, arXiv 2206.09132).
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import nn

from wsdino.errors import UserError

from .pairs import PAIR_STREAM, keyed_generator


class PhenotypeGroupSampler:
    """Cells of one global batch: groups of cells of one phenotype, each phenotype once under either optics.

    A batch is a sequence of blocks of `block` cells, one per process and micro-batch. The first half of a block holds
    groups of `group_size` cells under the first optics, the second half the same phenotypes in the same order under
    the second. It has the interface of `WeakLabelPairSampler`, and like it keeps no state.

    Parameters
    ----------
    phenotypes : sequence of int
        Phenotype of every cell, by row.
    optics : sequence of int
        0 or 1 for every cell: which of its phenotype's two optics it was drawn under.
    block : int
        Cells per process and micro-batch; a multiple of `2 * group_size`.
    group_size : int
        Cells of one phenotype and optics whose projected features are averaged.
    seed : int
        Of the whole run.

    Raises
    ------
    UserError
        A block that cannot be divided into groups, or too few phenotypes with cells under both optics.
    """

    def __init__(self, phenotypes: ArrayLike, optics: ArrayLike, *, block: int, group_size: int = 2, seed: int = 0):
        if block % (2 * group_size):
            raise UserError(
                f"A batch of {block} cells is not a multiple of 2 x {group_size} cells: choose one that is."
            )
        self.block, self.group_size, self.seed = block, group_size, seed
        self.groups = block // (2 * group_size)
        under = np.asarray(optics)
        _, code = np.unique(np.asarray(phenotypes), return_inverse=True)
        order = np.lexsort((under, code))
        key = code[order] * 2 + under[order]
        # Row p of starts and counts: where the cells of the p-th phenotype begin in `order`, under either optics.
        counts = np.bincount(key, minlength=2 * (code.max(initial=-1) + 1)).reshape(-1, 2)
        starts = (np.cumsum(counts) - counts.ravel()).reshape(-1, 2)
        whole = np.all(counts > 0, axis=1)
        self.order, self.starts, self.counts = order, starts[whole], counts[whole]
        self.rows = np.sort(order[whole[code[order]]])
        if len(self.counts) < self.groups:
            raise UserError(
                f"{len(self.counts)} phenotypes have cells under both optics and a step takes {self.groups}: draw "
                "more phenotypes or choose a smaller batch."
            )

    def draw(self, step: int, size: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Rows of the cells of a global batch of `size`, twice, and no fallbacks: each cell is its own partner."""
        random = keyed_generator(self.seed, PAIR_STREAM, step)
        blocks = [self._block(random) for _ in range(size // self.block)]
        rows = np.concatenate(blocks)
        return rows, rows, {}

    def _block(self, random: np.random.Generator) -> np.ndarray:
        chosen = random.choice(len(self.counts), self.groups, replace=False)
        counts, starts = self.counts[chosen].T[:, :, None], self.starts[chosen].T[:, :, None]  # (optics, groups, 1)
        shape = (2, self.groups, self.group_size)
        # Different cells where there are enough: consecutive ones from a random place on, round the group's cells.
        first = (random.random((2, self.groups, 1)) * counts).astype(np.int64)
        within = (first + np.arange(self.group_size)) % counts
        return self.order[np.broadcast_to(starts + within, shape).ravel()]


class PhenotypeLoss(nn.Module):
    """Mean squared error of a phenotype's standardised numbers, and InfoNCE between its two optics.

    Parameters
    ----------
    in_dim : int
        Width of the backbone's features.
    num_numbers : int
        Numbers per phenotype.
    group_size : int
        As of the sampler: InfoNCE compares means over so many cells.
    temperature : float
        Of InfoNCE's softmax over cosine similarities.
    regression_weight, contrast_weight : float
        Of the two losses in the sum.
    """

    def __init__(
        self,
        in_dim: int,
        num_numbers: int,
        *,
        group_size: int = 2,
        temperature: float = 0.1,
        regression_weight: float = 1.0,
        contrast_weight: float = 1.0,
    ):
        super().__init__()
        self.group_size, self.temperature = group_size, temperature
        self.regression_weight, self.contrast_weight = regression_weight, contrast_weight
        self.regressor = nn.Linear(in_dim, num_numbers)
        self.projector = nn.Sequential(nn.Linear(in_dim, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, features: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one block, in float32.

        Parameters
        ----------
        features : torch.Tensor
            `(block, in_dim)` of the cells in the sampler's order.
        numbers : torch.Tensor
            `(block, num_numbers)`, see `standardised_logs`.

        Returns
        -------
        torch.Tensor, dict
            The loss, and detached monitors: `regression`, the mean squared error (1 for a network that knows nothing);
            `contrast`, InfoNCE in nats (the logarithm of the number of groups for such a network).
        """
        features = features.float()
        regression = F.mse_loss(self.regressor(features), numbers)
        means = features.view(2, -1, self.group_size, features.shape[1]).mean(2)
        first, second = F.normalize(self.projector(means), dim=-1)
        similarity = first @ second.T / self.temperature
        same = torch.arange(len(similarity), device=similarity.device)
        contrast = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
        loss = self.regression_weight * regression + self.contrast_weight * contrast
        return loss, {"regression": regression.detach(), "contrast": contrast.detach()}


def standardised_logs(numbers: np.ndarray, offset: float = 0.05) -> np.ndarray:
    """Logarithms of phenotypes' numbers, each with mean 0 and variance 1 over the phenotypes.

    Parameters
    ----------
    numbers : numpy.ndarray
        `(phenotypes, numbers)`, not negative.
    offset : float
        Added before the logarithm, since shares may be 0.

    Returns
    -------
    numpy.ndarray
        `(phenotypes, numbers)` float32; 0 for a number that never varies.
    """
    logs = np.log(np.asarray(numbers, np.float64) + offset)
    spread = logs.std(axis=0)
    return ((logs - logs.mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)).astype(np.float32)
