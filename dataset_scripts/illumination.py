"""Illumination correction and halving of raw planes, as CellProfiler 4.0.7 does them in the paper's pipeline.

Per plate and channel: the mean of all images (`CorrectIlluminationCalculate`, "All"), a median filter of size 320
(a disk of radius int(320 / 2.35 + 0.5) = 136 on the mean as uint16), a robust rescale (everything below the 2nd
percentile is raised to it, then divided by it, so that the smallest value is 1), then every image divided by the
function and clipped to full scale (`CorrectIlluminationApply`, "Divide"), and resized by one half with
`skimage.transform.resize` order 3 (`Resize`, "Bicubic").

What that order 3 is depends on scikit-image: since 0.19 a cubic spline that passes through the pixels ("spline", the
default here, as of the scikit-image that is installed), before that cubic convolution of 4 x 4 pixels ("bicubic").
CellProfiler 4.0.7 asks for scikit-image >= 0.17.2, so its application of 2020 convolved. On four real fields the two
differ by an rms of 0.4 to 1.0 % of the image's standard deviation.

Two things make it fast and change nothing:

- the median of a disk is the same whatever the grey levels are called, so the mean is recoded to the ranks of its
  distinct values before scikit-image's sliding histogram runs (65,536 bins become about two thousand);
- resizing is linear and separable, so it is two banded matrices, made once by resizing the identity with scipy's own
  Gaussian and spline, and applied in blocks by matrix multiplication.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import numpy as np
from scipy import ndimage
from skimage.filters import rank
from skimage.morphology import disk

FULL_SCALE = 65535.0


def median_radius(filter_size: float) -> int:
    """Radius of CellProfiler's median disk for an "approximate object size" (320 in the paper: 136)."""
    return max(1, int(filter_size / 2.35 + 0.5))


def scaled_filter_size(image_size: tuple[int, int], filter_size: float = 320.0) -> float:
    """The paper's filter size for 1024 x 1280 images, shrunk in proportion for smaller ones."""
    return filter_size * min(1.0, image_size[0] / 1024, image_size[1] / 1280)


def median_disk(image: np.ndarray, radius: int, border: str = "edge") -> np.ndarray:
    """Median of every pixel's disk, exactly.

    Parameters
    ----------
    image : numpy.ndarray
        `(rows, columns)` uint16.
    radius : int
        Of the disk, pixels.
    border : str
        "edge": the image continues with its nearest pixel (CellProfiler 4.0 and 4.1). "inside": only the disk's
        pixels inside the image count (CellProfiler 4.2 and later).

    Returns
    -------
    numpy.ndarray
        uint16, of the same shape.
    """
    values, ranks = np.unique(image, return_inverse=True)
    ranks = ranks.reshape(image.shape).astype(np.uint16 if len(values) > 256 else np.uint8)
    if border == "edge":
        ranks = np.pad(ranks, radius, mode="edge")
    elif border != "inside":
        raise ValueError(f"border {border!r} is unknown: choose 'edge' or 'inside'")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Bad rank filter performance")
        median = rank.median(ranks, disk(radius))
    if border == "edge":
        median = median[radius:-radius, radius:-radius]
    return values[median]


def illumination_levels(mean: np.ndarray, filter_size: float | None = None, border: str = "edge") -> np.ndarray:
    """The smoothed mean of one plate and channel, raised to its robust minimum.

    It holds everything of the illumination function and, being smooth whole numbers, is small as a PNG: this is what
    is saved with the dataset.

    Parameters
    ----------
    mean : numpy.ndarray
        `(rows, columns)` mean of all the plate's images, grey levels of 0 to 65535.
    filter_size : float, optional
        Default: 320 for 1024 x 1280, in proportion for smaller images.
    border : str
        See :func:`median_disk`.

    Returns
    -------
    numpy.ndarray
        `(rows, columns)` uint16, at least 1.
    """
    if filter_size is None:
        filter_size = scaled_filter_size(mean.shape)
    smooth = median_disk(np.clip(mean, 0, FULL_SCALE).astype(np.uint16), median_radius(filter_size), border)
    positive = np.sort(smooth[smooth > 0])
    # All black: nothing to correct.
    robust_minimum = positive[int(len(positive) * 0.02)] if len(positive) else np.uint16(1)
    return np.maximum(smooth, robust_minimum)


def illumination_function(levels: np.ndarray) -> np.ndarray:
    """The float32 function to divide by: the levels over their minimum, so that it is 1 in the darkest place."""
    return (levels / np.float64(levels.min())).astype(np.float32)


def _blur_before(size: int, new_size: int) -> float:
    """Standard deviation of the Gaussian before downsampling, as scikit-image chooses it."""
    return max(0.0, (size / new_size - 1) / 2)


@lru_cache(maxsize=16)
def _resize_blocks(
    size: int, new_size: int, interpolation: str, block: int = 32
) -> list[tuple[slice, slice, np.ndarray]]:
    """The matrix of a 1-D cubic resize with anti-aliasing, as (output rows, input columns, weights) blocks."""
    # As skimage.transform.resize(order=3, mode="symmetric"): Gaussian of (factor - 1) / 2, then the cubic.
    identity = np.eye(size)
    if interpolation == "spline":
        sigma = _blur_before(size, new_size)
        smooth = ndimage.gaussian_filter1d(identity, sigma, axis=0, mode="reflect") if sigma else identity
        weights = ndimage.zoom(smooth, (new_size / size, 1), order=3, mode="reflect", grid_mode=True)
    elif interpolation == "bicubic":
        centre = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
        first = np.floor(centre).astype(int) - 1
        weights = np.zeros((new_size, size))
        for k in range(4):
            at = first + k
            away = np.abs(centre - at)
            # Keys' kernel with a = -1/2, as scikit-image's warp.
            near, far = 1.5 * away**3 - 2.5 * away**2 + 1, -0.5 * away**3 + 2.5 * away**2 - 4 * away + 2
            mirrored = np.where(at < 0, -1 - at, np.where(at >= size, 2 * size - 1 - at, at))
            weights += np.where(away <= 1, near, far)[:, None] * identity[mirrored]
    else:
        raise ValueError(f"interpolation {interpolation!r} is unknown: choose 'spline' or 'bicubic'")
    blocks = []
    for start in range(0, new_size, block):
        part = weights[start : start + block]
        used = np.flatnonzero(np.abs(part).max(axis=0) > 1e-8)
        columns = slice(int(used[0]), int(used[-1]) + 1)
        blocks.append((slice(start, start + len(part)), columns, np.ascontiguousarray(part[:, columns], np.float32)))
    return blocks


def resize_plane(plane: np.ndarray, new_size: tuple[int, int], interpolation: str = "spline") -> np.ndarray:
    """`skimage.transform.resize(plane, new_size, order=3, mode="symmetric")`, to float32 precision.

    Parameters
    ----------
    plane : numpy.ndarray
        `(rows, columns)` float32.
    new_size : (rows, columns)
    interpolation : str
        "spline" (scikit-image 0.19 and later) or "bicubic" (before).

    Returns
    -------
    numpy.ndarray
        float32 `new_size`, within the range of `plane`.
    """
    if interpolation == "bicubic":
        # Blurred apart, for scikit-image then clipped to the range of the blurred image.
        sigma = [_blur_before(*sizes) for sizes in zip(plane.shape, new_size, strict=True)]
        plane = ndimage.gaussian_filter(plane, sigma, mode="reflect")
    rows = np.empty((new_size[0], plane.shape[1]), np.float32)
    for out, used, weights in _resize_blocks(plane.shape[0], new_size[0], interpolation):
        np.matmul(weights, plane[used], out=rows[out])
    result = np.empty(new_size, np.float32)
    for out, used, weights in _resize_blocks(plane.shape[1], new_size[1], interpolation):
        result[:, out] = rows[:, used] @ weights.T
    return np.clip(result, plane.min(), plane.max(), out=result)


def correct_plane(
    plane: np.ndarray, function: np.ndarray | None, resize: float = 0.5, interpolation: str = "spline"
) -> np.ndarray:
    """Divide a raw plane by the illumination function, clip to full scale, resize, and return the same depth again.

    Parameters
    ----------
    plane : numpy.ndarray
        `(rows, columns)` uint16 or uint8.
    function : numpy.ndarray or None
        `(rows, columns)` from :func:`illumination_function`; None divides by nothing.
    resize : float
        Factor of both sides.
    interpolation : str
        See :func:`resize_plane`.

    Returns
    -------
    numpy.ndarray
        `(round(rows * resize), round(columns * resize))`, of the plane's depth.
    """
    depth = plane.dtype
    if function is None:
        if resize == 1:
            return plane
        corrected = plane.astype(np.float32)
    else:
        corrected = np.divide(plane, function, dtype=np.float32)
        np.clip(corrected, 0, np.iinfo(depth).max, out=corrected)
    if resize != 1:
        new_size = (max(1, round(plane.shape[0] * resize)), max(1, round(plane.shape[1] * resize)))
        corrected = resize_plane(corrected, new_size, interpolation)
    return np.rint(corrected, out=corrected).astype(depth)
