"""What is not of one channel: thick and rounded cells out of focus, floating cells, debris and vacuoles."""

from __future__ import annotations

import numpy as np

from .cells import Cells
from .phenotypes import Phenotype
from .textures import blur, gaussian, spots

SURROUNDINGS = ("thickness", "vacuoles", "glow", "defocus", "floating", "debris")  # numbers that are drawn here


def draw_surroundings(
    rng: np.random.Generator,
    signals: np.ndarray,
    cells: Cells,
    phenotype: Phenotype,
    label: np.ndarray,
    depth: np.ndarray,
    scale: float,
) -> np.ndarray:
    """Change and add to the signals `(3, rows, columns)` of DNA, tubulin and actin what all three of them show."""
    image_size = label.shape
    tall = np.append(cells.rounded, False)[label]
    body = signals[1:]
    if phenotype.thickness:
        # `cell_map` counts the depth of rounded cells up to 0.3.
        profile = np.where(tall, 1.4 * np.sqrt(np.maximum(1 - (depth / 0.3) ** 2, 0)), 1.3 * np.exp(-2 * depth**2))
        body *= 1 + phenotype.thickness * (profile.astype(np.float32) - 1)
    if phenotype.vacuoles:
        holes = rng.random(image_size, dtype=np.float32) < phenotype.vacuoles / (7000 * scale**2)
        if holes.any():
            body *= 1 - np.minimum(spots(holes * np.float32(0.8), rng.uniform(1.5, 4) * scale), 0.9)
    if tall.any() and (phenotype.glow or phenotype.defocus):
        above = signals * tall
        signals = signals - above
        above *= 1 + phenotype.glow * rng.uniform(0.3, 1.2)
        if phenotype.defocus:
            above = blur(above, gaussian(image_size, phenotype.defocus * rng.uniform(0.3, 1.5) * scale))
        signals += above
    area = image_size[0] * image_size[1] / (1e4 * scale**2)
    for number, size, brightness in (
        (rng.poisson(phenotype.floating * area), (7, 14), (3000, 7000, 9000)),
        (rng.poisson(phenotype.debris * area), (0.7, 2.5), (4000, 8000, 12000)),
    ):
        if number:
            points = np.zeros((3, *image_size), np.float32)
            place = rng.integers(image_size[0], size=number), rng.integers(image_size[1], size=number)
            points[:, place[0], place[1]] = rng.exponential(1, (3, number)) * np.array(brightness)[:, None]
            sd = rng.uniform(*size) * scale
            signals = signals + 2 * np.pi * sd**2 * blur(points, gaussian(image_size, sd))
    return signals
