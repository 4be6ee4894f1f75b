"""How one plate was stained, seeded and imaged: light, focus and camera."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class Optics:
    """How one plate was stained, seeded and imaged. Triples are in the order DNA, tubulin, actin."""

    gain: tuple[float, float, float] = (1.0, 1.0, 1.0)
    background: tuple[float, float, float] = (500.0, 650.0, 750.0)  # 16-bit grey levels
    blur: float = 0.9  # sd of the point spread function, raw pixels
    density: float = 1.0
    cell_size: float = 1.0
    vignette: float = 0.3  # loss of light from the brightest place to the farthest corner
    centre: tuple[float, float] = (0.5, 0.5)  # of the illumination, relative (row, column)


def random_optics(rng: np.random.Generator) -> Optics:
    """Draw a plate's optics: stain and background vary log-normally, focus and the place of the light uniformly."""
    return Optics(
        gain=tuple(np.exp(rng.normal(0, 0.35, 3)).tolist()),
        background=tuple((np.array(Optics.background) * np.exp(rng.normal(0, 0.15, 3))).tolist()),
        blur=float(rng.uniform(0.6, 1.7)),
        density=float(np.exp(rng.normal(0, 0.15))),
        cell_size=float(np.exp(rng.normal(0, 0.06))),
        centre=tuple(rng.uniform(-0.5, 1.5, 2).tolist()),
    )


def _illumination(image_size, optics: Optics) -> np.ndarray:
    """Smooth light field with maximum 1: brightest at `optics.centre`, darker towards the corners."""
    row = np.linspace(0, 1, image_size[0], dtype=np.float32)[:, None] - optics.centre[0]
    column = np.linspace(0, 1, image_size[1], dtype=np.float32)[None] - optics.centre[1]
    square = row**2 + column**2
    return (1 - optics.vignette * square / max(float(square.max()), 1e-6)).astype(np.float32)


def photograph(
    rng: np.random.Generator, signals: tuple[np.ndarray, ...], optics: Optics, scale: float = 1.0
) -> np.ndarray:
    """Image the signals through the microscope with a 12-bit camera limited by shot noise.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of the noise.
    signals : three float32 arrays `(rows, columns)`
        Grey levels that a perfect microscope would see: DNA, tubulin, actin.
    optics : Optics
    scale : float
        Multiplies the sd of the point spread function.

    Returns
    -------
    numpy.ndarray
        `(3, rows, columns)` uint16: the camera's numbers shifted left by four bits, as BBBC021 stores them.
    """
    image_size = signals[0].shape
    light = _illumination(image_size, optics)
    planes = np.empty((len(signals), *image_size), np.uint16)
    for channel, signal in enumerate(signals):
        seen = ndimage.gaussian_filter(signal, optics.blur * scale, truncate=3, output=np.float32)
        counts = (seen * light * optics.gain[channel] + optics.background[channel]) / 16
        # Shot noise of a camera with a gain of about four electrons per count, and two counts of read noise.
        noise = rng.standard_normal(counts.shape, dtype=np.float32)
        counts += noise * np.sqrt(2.0 + 0.25 * np.maximum(counts, 0)).astype(np.float32)
        planes[channel] = np.clip(np.rint(counts), 0, 4095).astype(np.uint16) << 4
    return planes
