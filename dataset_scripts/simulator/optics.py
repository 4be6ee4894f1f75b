"""How one plate was stained, seeded and imaged: light, focus and camera."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .textures import blur, gaussian


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
    read_noise: float = 2.0  # variance in camera counts (a count is 16 grey levels)
    shot_noise: float = 0.25  # variance per count: the inverse of the electrons per count
    # What follows stands at 0 in a simulated screen.
    focus: tuple[float, float, float] = (0.0, 0.0, 0.0)  # sd of each channel's own blur beside `blur`, raw pixels
    haze: float = 0.0  # share of the light that the optics spread widely
    haze_width: float = 0.0  # sd of that spread, raw pixels
    gradient: float = 0.0  # change of the background across a crop, relative to it
    smear: float = 0.0  # share of a pixel's light and noise that its right neighbour gets too
    stripes: float = 0.0  # sd of the rows' offsets, camera counts
    hot: float = 0.0  # share of pixels that are hot
    damaged: float = 0.0  # share of crops that have a plane of pure noise


def random_optics(rng: np.random.Generator) -> Optics:
    """Draw a plate's optics, wider than the plates of one screen.

    Stain and background vary log-normally; focus, haze, noise and the place of the light on wide ranges. One plate in
    ten is out of focus; stripes and hot pixels are as rare.
    """
    rare = rng.uniform(size=3)
    return Optics(
        gain=tuple((np.array([2.0, 1.2, 0.9]) * np.exp(rng.normal(0, 0.45, 3))).tolist()),
        background=tuple((np.array([700.0, 720.0, 780.0]) * np.exp(rng.normal(0, 0.2, 3))).tolist()),
        blur=float(np.exp(rng.uniform(np.log(0.5), np.log(1.2))) * (rng.uniform(1, 2.5) if rare[0] < 0.1 else 1)),
        density=float(np.exp(rng.normal(0, 0.15))),
        cell_size=float(np.exp(rng.normal(0, 0.06))),
        centre=tuple(rng.uniform(-0.5, 1.5, 2).tolist()),
        read_noise=float(np.exp(rng.uniform(np.log(1), np.log(6)))),
        shot_noise=float(np.exp(rng.uniform(np.log(0.06), np.log(0.2)))),
        focus=tuple((rng.uniform(0, 1, 3) ** 2 * (2.5, 0.8, 0.8)).tolist()),
        haze=float(0.5 * rng.uniform() ** 2),
        haze_width=float(rng.uniform(3, 14)),
        gradient=float(rng.uniform(0, 0.2)),
        smear=float(rng.uniform(0, 0.8)),
        stripes=float(rng.uniform(0, 3) * (rare[1] < 0.1)),
        hot=float(rng.uniform(0, 1e-3) * (rare[2] < 0.1)),
        damaged=0.01,
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
    if optics.haze:
        wide = 0.6 * gaussian(image_size, optics.haze_width * scale)
        wide += 0.4 * gaussian(image_size, 2.5 * optics.haze_width * scale)
        sharp = np.stack([gaussian(image_size, float(np.hypot(optics.blur, own)) * scale) for own in optics.focus])
        spread = blur(np.stack(signals), (1 - optics.haze) * sharp + optics.haze * wide)
    for channel, signal in enumerate(signals):
        if optics.haze:
            seen = np.maximum(spread[channel], 0)
        else:
            seen = ndimage.gaussian_filter(signal, optics.blur * scale, truncate=3, output=np.float32)
        background = optics.background[channel]
        if optics.gradient:
            background = background * (1 + optics.gradient * _slope(rng, image_size))
        counts = (seen * light * optics.gain[channel] + background) / 16
        noise = rng.standard_normal(counts.shape, dtype=np.float32)
        if optics.smear:  # light and noise alike
            counts = (counts + optics.smear * np.roll(counts, 1, axis=1)) / np.float32(1 + optics.smear)
            noise = (noise + optics.smear * np.roll(noise, 1, axis=1)) / np.float32(np.hypot(1, optics.smear))
        variance = optics.read_noise + optics.shot_noise * np.maximum(counts, 0)
        counts += noise * np.sqrt(variance).astype(np.float32)
        if optics.stripes:
            counts += rng.normal(0, optics.stripes, (image_size[0], 1))
        if optics.hot:
            counts[rng.uniform(size=image_size) < optics.hot] += 4095 * rng.uniform()
        planes[channel] = np.clip(np.rint(counts), 0, 4095).astype(np.uint16) << 4
    return planes


def _slope(rng, image_size) -> np.ndarray:
    """A plane through 0 in the middle that differs by 1 between opposite sides, in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    row = np.linspace(-0.5, 0.5, image_size[0], dtype=np.float32)[:, None]
    column = np.linspace(-0.5, 0.5, image_size[1], dtype=np.float32)[None]
    return row * np.float32(np.sin(angle)) + column * np.float32(np.cos(angle))


def damage(rng: np.random.Generator, crop: np.ndarray) -> None:
    """Replace one plane of a crop `(3, rows, columns)`, or all of them, by noise, as of a damaged file."""
    planes = range(len(crop)) if rng.uniform() < 0.5 else [int(rng.integers(len(crop)))]
    for plane in planes:
        counts = rng.normal(np.exp(rng.uniform(np.log(20), np.log(100))), rng.uniform(1, 8), crop.shape[1:])
        crop[plane] = np.clip(np.rint(counts), 0, 4095).astype(np.uint16) << 4
