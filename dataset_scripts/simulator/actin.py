"""The actin channel: cell bodies, edges, stress fibres and puncta."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .cells import Cells, keep_in_cell, splat
from .phenotypes import Phenotype


def draw_actin(
    rng: np.random.Generator,
    cells: Cells,
    phenotype: Phenotype,
    label: np.ndarray,
    depth: np.ndarray,
    rim: np.ndarray,
    scale: float,
) -> np.ndarray:
    """Actin signal in grey levels; `label`, `depth` and `rim` are of `cell_map`."""
    count = len(cells.row)
    brightness = np.append(cells.brightness, 0).astype(np.float32)
    body = np.where(label >= 0, brightness[label], 0)
    patches = ndimage.gaussian_filter(rng.standard_normal(label.shape, dtype=np.float32), 5 * scale)
    patches = 1 + 0.15 * patches / max(float(patches.std()), 1e-6)
    signal = 4300 * phenotype.actin_body * body * (0.65 + 0.35 * np.exp(-((depth / 0.6) ** 2))) * patches
    width = 2.0 * scale
    signal += 4200 * phenotype.actin_edge * body * np.exp(-((rim / width) ** 2)) * np.maximum(patches, 0.3) ** 4
    if not count:
        return signal

    # Stress fibres: straight, nearly parallel lines across the cell.
    # Some cells are full of them and many have none.
    per_cell = np.where(cells.rounded, 0, rng.poisson(phenotype.actin_fibres * rng.gamma(0.6, 1 / 0.6, count)))
    owner = np.repeat(np.arange(count), per_cell)
    if len(owner):
        t = np.linspace(-1, 1, max(int(2 * phenotype.cell_radius * scale), 16))[None]
        angle = (cells.angle[owner] + rng.normal(0, 0.18, len(owner)))[:, None]
        aside = (rng.uniform(-0.8, 0.8, len(owner)) * cells.radius[owner])[:, None]
        along = cells.radius[owner][:, None] * (
            rng.uniform(0.2, 0.8, len(owner))[:, None] * t + rng.uniform(-0.4, 0.4, len(owner))[:, None]
        )
        row = cells.row[owner][:, None] + along * np.sin(angle) + aside * np.cos(angle)
        column = cells.column[owner][:, None] + along * np.cos(angle) - aside * np.sin(angle)
        weight = (cells.brightness[owner] * rng.uniform(0.3, 1, len(owner)))[:, None] * keep_in_cell(
            label, owner[:, None], row, column
        )
        fibres = splat(label.shape, row.ravel(), column.ravel(), weight.ravel())
        signal += 2400 * scale * ndimage.gaussian_filter(fibres, 1.0 * scale, truncate=3)

    spots = np.repeat(np.arange(count), rng.poisson(phenotype.actin_puncta, count))
    if len(spots):
        r = cells.radius[spots] * np.sqrt(rng.uniform(0.02, 0.9, len(spots)))
        angle = rng.uniform(0, 2 * np.pi, len(spots))
        row, column = cells.row[spots] + r * np.sin(angle), cells.column[spots] + r * np.cos(angle)
        weight = rng.exponential(1.0, len(spots)) * keep_in_cell(label, spots, row, column)
        size = phenotype.actin_puncta_radius * scale
        puncta = ndimage.gaussian_filter(splat(label.shape, row, column, weight), size, truncate=3)
        signal += 7000 * (2 * np.pi * size**2) * puncta
    return signal
