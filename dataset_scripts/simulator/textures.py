"""Random textures and blurs of small pictures, made in the frequency domain: a few fast Fourier transforms each.

Pictures wrap around at their borders, so what is drawn here needs a margin where that would show.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import fft

ANGLES_OF_STROKES = 8  # a stroke turns to the nearest of these, 22.5 degrees apart


@lru_cache(maxsize=4)
def frequencies(image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Cycles per pixel along rows `(rows, 1)` and columns `(1, columns // 2 + 1)`: the layout of `rfft2`."""
    row = fft.fftfreq(image_size[0]).astype(np.float32)[:, None]
    column = fft.rfftfreq(image_size[1]).astype(np.float32)[None]
    return row, column


def gaussian(image_size: tuple[int, int], sd: float) -> np.ndarray:
    """Transfer function of a Gaussian blur of `sd` pixels."""
    row, column = frequencies(image_size)
    factor = np.float32(-2 * (np.pi * sd) ** 2)
    return np.exp(factor * row**2) * np.exp(factor * column**2)


def blur(image: np.ndarray, transfer: np.ndarray) -> np.ndarray:
    """`image` (its last two axes) through a transfer function."""
    return fft.irfft2(fft.rfft2(image) * transfer, image.shape[-2:])


def grain(rng: np.random.Generator, image_size: tuple[int, int], slope: float, longest: float) -> np.ndarray:
    """Noise of mean 0 and sd 1 with power at every scale from 2.5 to `longest` pixels; a high `slope` is coarse."""
    noise = blur(rng.standard_normal(image_size, dtype=np.float32), _amplitude(image_size, slope, longest))
    noise -= noise.mean()
    return noise / max(float(noise.std()), 1e-6)


@lru_cache(maxsize=16)
def _amplitude(image_size, slope, longest) -> np.ndarray:
    row, column = frequencies(image_size)
    square = row**2 + column**2 + np.float32(longest**-2)
    return square ** (-0.5 * slope) * gaussian(image_size, 0.7)


def spots(points: np.ndarray, sd: float) -> np.ndarray:
    """Gaussian spots whose peaks are the values of `points`."""
    return 2 * np.pi * sd**2 * blur(points, gaussian(points.shape, sd))


def strokes(
    points: np.ndarray, where: np.ndarray, angle: np.ndarray, weight: np.ndarray, length: float, width: float
) -> np.ndarray:
    """Short oriented strokes, Gaussian along and across: a dense network where there are many.

    Parameters
    ----------
    points : array
        Gives the shape of the picture.
    where : int array
        Flat indices of the strokes' middles.
    angle : array
        Direction of each stroke in radians, from the columns' axis towards the rows'.
    weight : array
        Peak of each stroke.
    length, width : float
        Standard deviations along and across, pixels.
    """
    size = points.size
    turn = np.rint(angle * (ANGLES_OF_STROKES / np.pi)).astype(np.int64) % ANGLES_OF_STROKES
    dealt = np.bincount(turn * size + where, weights=weight, minlength=ANGLES_OF_STROKES * size)
    hat = fft.rfft2(dealt.astype(np.float32).reshape(ANGLES_OF_STROKES, *points.shape))
    drawn = np.einsum("kij,kij->ij", hat, _stroke_transfers(points.shape, round(length, 1), round(width, 1)))
    return 2 * np.pi * length * width * fft.irfft2(drawn, points.shape)


@lru_cache(maxsize=256)
def _stroke_transfers(image_size, length, width) -> np.ndarray:
    row, column = frequencies(image_size)
    angle = (np.arange(ANGLES_OF_STROKES, dtype=np.float32) * np.float32(np.pi / ANGLES_OF_STROKES))[:, None, None]
    along = column * np.cos(angle) + row * np.sin(angle)
    across = row * np.cos(angle) - column * np.sin(angle)
    return np.exp(np.float32(-2 * np.pi**2) * ((length * along) ** 2 + (width * across) ** 2)).astype(np.float32)
