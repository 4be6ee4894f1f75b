"""Starts a patch embedding from whitened pixels: random mixtures of the principal directions of the data's patches.

Fluorescence images are a bright, smooth part that all patches share plus a little structure. A random kernel answers
to the shared part, so that all images give an untrained network nearly one feature direction, and minutes of training
do not get out of it. Whitening the first layer (Coates and Ng 2012, "Learning feature representations with k-means")
takes the mean away and gives every spatial frequency the same say. Only the start changes: the kernel trains on.
"""

import numpy as np
import torch


@torch.no_grad()
def whiten_patch_embedding(
    kernel: torch.Tensor,
    bias: torch.Tensor,
    planes: np.ndarray,
    max_intensity: float,
    *,
    rows: np.ndarray | None = None,
    seed: int = 0,
    patches: int = 20_000,
    floor: float = 0.01,
) -> None:
    """Overwrite a convolution's `kernel` and `bias` so that its outputs on `planes` are white.

    They are uncorrelated, with mean 0 and variance about 1.

    Parameters
    ----------
    kernel : torch.Tensor
        `(dim, input channels, p, p)`; a gray image is fed to all input channels, so each gets an equal share.
    bias : torch.Tensor
        `(dim,)`.
    planes : numpy.ndarray
        `(fields, height, width)` raw counts, anything indexed by row.
    max_intensity : float
        Counts that become 1.0; brighter pixels are clipped first.
    rows : numpy.ndarray, optional
        Of the planes that may be used; all by default.
    seed : int
        Of the patches drawn and of the random mixtures.
    patches : int
        How many are drawn, uniformly over fields and places.
    floor : float
        Added to each variance, as a share of the mean variance, so that noise is not blown up.
    """
    dim, inputs, side, _ = kernel.shape
    random = np.random.default_rng(seed)
    height, width = planes[0].shape
    # In the order of rows, since the planes may be a memory map.
    rows = np.arange(len(planes)) if rows is None else np.asarray(rows)
    chosen = np.sort(rows[random.integers(0, len(rows), patches)])
    tops, lefts = random.integers(0, height - side + 1, patches), random.integers(0, width - side + 1, patches)
    drawn = np.empty((patches, side * side))
    for patch, row, top, left in zip(drawn, chosen, tops, lefts, strict=True):
        patch[:] = planes[row][top : top + side, left : left + side].ravel()
    drawn = np.minimum(drawn, max_intensity) / max_intensity
    mean = drawn.mean(axis=0)
    variance, directions = np.linalg.eigh(np.cov(drawn.T))
    spread = np.sqrt(np.maximum(variance, 0) + max(floor * variance.mean(), 1e-12))
    mixtures = random.normal(size=(dim, side * side)) / side
    filters = mixtures @ (directions / spread).T
    kernel.copy_(torch.from_numpy(filters.reshape(dim, 1, side, side) / inputs).expand_as(kernel))
    bias.copy_(torch.from_numpy(-filters @ mean))
