"""Measures of raw planes that tell damaged, dead and saturated images from good ones, and how sharp they are.

The thresholds follow from what the measures mean, not from one data set: the pixels of an image that passed a
microscope's optics resemble their neighbours (a correlation above 0.75 in every good plane tried), those of a damaged
file do not; a hundredth of a field at the camera's full scale hides the brightest structures; a plane of one value
shows nothing. Sharpness depends on stain and magnification, so it is measured and nothing is judged by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import combinations

import numpy as np
from scipy import fft

MEASURES = ("saturated", "one_value", "correlation", "focus")
SATURATED_ABOVE, ONE_VALUE_ABOVE, CORRELATION_BELOW, ALIKE_ABOVE = 0.01, 0.9, 0.3, 0.999
FOCUS_SIDE = 256


def measure_plane(plane: np.ndarray) -> dict[str, float]:
    """Measure one raw plane, on every fourth row and column pair and a square in the middle.

    Parameters
    ----------
    plane : numpy.ndarray
        `(rows, columns)` uint8 or uint16.

    Returns
    -------
    dict
        `saturated`: share of pixels, 0 to 1, at the full scale of an 8- to 16-bit camera, where the brightest pixel is
        that; `one_value`: share of the most frequent value; `correlation`: the smaller of the correlations of
        neighbouring pixels along rows and along columns, each line centred (0 for noise and constants); `focus`: slope
        of the logarithm of the power spectrum over that of the frequency, as CellProfiler's PowerLogLogSlope: the more
        negative, the blurrier.
    """
    rows = plane[::4]
    counts = np.bincount(rows.reshape(-1))
    top = int(plane.max())
    full_scale = top >= 255 and (top + (top & -top)) & top == 0 and top // (top & -top) >= 255
    along = min(_neighbours(rows), _neighbours(np.ascontiguousarray(plane[:, ::4].T)))
    return {
        "saturated": float(np.count_nonzero(plane == top) / plane.size) if full_scale else 0.0,
        "one_value": float(counts.max() / rows.size),
        "correlation": along,
        "focus": _power_slope(plane),
    }


def flaws(measured: Mapping[str, Mapping[str, float]], planes: Mapping[str, np.ndarray]) -> tuple[str, float]:
    """What is wrong with a field, and how alike its channels are.

    Parameters
    ----------
    measured : mapping
        Channel -> `measure_plane` of its plane.
    planes : mapping
        Channel -> `(rows, columns)` raw plane.

    Returns
    -------
    text : str
        Such as `dna: noise; actin: saturated`, or "" for a good field.
    alike : float
        The largest correlation of two channels' pixels, NaN for a single channel.
    """
    found = []
    for channel, values in measured.items():
        if values["one_value"] > ONE_VALUE_ABOVE:
            found.append(f"{channel}: one value")
        elif values["saturated"] > SATURATED_ABOVE:
            found.append(f"{channel}: saturated")
        elif values["correlation"] < CORRELATION_BELOW:
            found.append(f"{channel}: noise")
    small = {name: _centred(plane[::8, ::8].reshape(1, -1)) for name, plane in planes.items()}
    alike = float("nan")
    for one, two in combinations(small, 2):
        value = _correlation(small[one], small[two])
        alike = value if np.isnan(alike) else max(alike, value)
        if value > ALIKE_ABOVE:
            found.append(f"{one} and {two}: alike")
    return "; ".join(found), alike


def _centred(lines: np.ndarray) -> np.ndarray:
    values = lines.astype(np.float32)
    return values - values.mean(axis=1, keepdims=True)


def _correlation(one: np.ndarray, two: np.ndarray) -> float:
    norm = np.sqrt(np.vdot(one, one)) * np.sqrt(np.vdot(two, two))
    return float(np.vdot(one, two) / norm) if norm > 0 else 0.0


def _neighbours(lines: np.ndarray) -> float:
    """Correlation of each pixel with the next one of its line."""
    values = _centred(lines)
    return _correlation(values[:, 1:], values[:, :-1])


@lru_cache(maxsize=4)
def _rings(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ring of frequencies of each coefficient, the logarithm of each ring's frequency, and a window."""
    radius = np.hypot(np.fft.fftfreq(side)[:, None] * side, np.fft.rfftfreq(side)[None] * side)
    window = np.hanning(side).astype(np.float32)
    return radius.round().astype(int).reshape(-1), np.log(np.arange(1, side // 2)), window[:, None] * window


def _power_slope(plane: np.ndarray) -> float:
    side = min(*plane.shape, FOCUS_SIDE)
    if side < 8:
        return float("nan")
    top, left = (plane.shape[0] - side) // 2, (plane.shape[1] - side) // 2
    square = plane[top : top + side, left : left + side].astype(np.float32)
    rings, log_frequency, window = _rings(side)
    power = np.abs(fft.rfft2((square - square.mean()) * window)) ** 2
    mean = (np.bincount(rings, power.reshape(-1)) / np.bincount(rings))[1 : side // 2]
    return float(np.polyfit(log_frequency, np.log(mean), 1)[0]) if (mean > 0).all() else float("nan")
