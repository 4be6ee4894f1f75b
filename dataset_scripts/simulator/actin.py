"""The actin channel: cell bodies, edges, stress fibres and puncta."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .cells import ANGLES, Cells, keep_in_cell, splat
from .phenotypes import Phenotype
from .textures import blur, gaussian, grain, spots, strokes


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
    if phenotype.actin_mesh:
        flat = ~np.append(cells.rounded, True)[label]
        signal *= np.maximum(1 + phenotype.actin_mesh * (_mesh(rng, cells, phenotype, flat, label, scale) - flat), 0)
    if phenotype.actin_cortex:
        belt = np.exp(-((rim / (rng.uniform(4, 9) * scale)) ** 2))
        signal += 3500 * phenotype.actin_cortex * body * belt * np.maximum(patches, 0.3) ** 2
    if phenotype.actin_ruffles:
        # Bare glass within some pixels marks a free edge; ruffles stand there in patches.
        free = blur((label < 0).astype(np.float32), gaussian(label.shape, 5 * scale))
        signal += 9000 * phenotype.actin_ruffles * body * free * np.maximum(grain(rng, label.shape, 2, 12 * scale), 0)
    if phenotype.actin_specks:
        specks = (rng.random(label.shape, dtype=np.float32) < rng.uniform(0.005, 0.05) / scale**2) * body
        specks *= rng.standard_exponential(label.shape, dtype=np.float32)
        signal += 2500 * phenotype.actin_specks * spots(specks, rng.uniform(0.5, 0.9) * scale)
    if phenotype.filopodia:
        signal += _filopodia(rng, cells, phenotype, label, scale)

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

    dotted = np.repeat(np.arange(count), rng.poisson(phenotype.actin_puncta, count))
    if len(dotted):
        r = cells.radius[dotted] * np.sqrt(rng.uniform(0.02, 0.9, len(dotted)))
        angle = rng.uniform(0, 2 * np.pi, len(dotted))
        row, column = cells.row[dotted] + r * np.sin(angle), cells.column[dotted] + r * np.cos(angle)
        weight = rng.exponential(1.0, len(dotted)) * keep_in_cell(label, dotted, row, column)
        size = phenotype.actin_puncta_radius * scale
        puncta = ndimage.gaussian_filter(splat(label.shape, row, column, weight), size, truncate=3)
        signal += 7000 * (2 * np.pi * size**2) * puncta
    return signal


def _mesh(rng, cells: Cells, phenotype: Phenotype, flat, label, scale) -> np.ndarray:
    """A fine mesh with mean about 1 whose strands have all directions, or follow the cells' long axes."""
    spacing = rng.uniform(0.04, 0.15) / scale**2
    where = np.flatnonzero((rng.random(label.shape, dtype=np.float32) < spacing) & flat)
    bend = grain(rng, label.shape, 2, 25 * scale).ravel()[where]
    axis = cells.angle[label.ravel()[where]] + 0.3 * bend
    mixed = phenotype.actin_order * np.exp(2j * axis)
    mixed += (1 - phenotype.actin_order) * np.exp(2j * rng.uniform(0, np.pi, len(where)))
    length, width = rng.uniform(2, 12) * scale, rng.uniform(0.5, 0.8) * scale
    weight = rng.exponential(1 / (2 * np.pi * length * width * spacing), len(where))
    return strokes(label, where, 0.5 * np.angle(mixed), weight, length, width)


def _filopodia(rng, cells: Cells, phenotype: Phenotype, label, scale) -> np.ndarray:
    """Thin straight spikes that start at the outlines of flat cells and lead outwards."""
    owner = np.repeat(np.arange(len(cells.row)), np.where(cells.rounded, 0, rng.poisson(phenotype.filopodia)))
    angle = rng.integers(ANGLES, size=len(owner))
    long = rng.uniform(4, 14, len(owner)) * scale
    t = np.linspace(-0.2, 1, max(int(16 * scale), 8))[None]
    r = cells.outline[owner, angle][:, None] + long[:, None] * t
    theta = (angle * (2 * np.pi / ANGLES) + rng.normal(0, 0.03, len(owner)))[:, None]
    weight = (long * cells.brightness[owner] * rng.uniform(0.3, 1, len(owner)))[:, None] * np.maximum(1 - t, 0.2)
    row, column = cells.row[owner][:, None] + r * np.sin(theta), cells.column[owner][:, None] + r * np.cos(theta)
    drawn = splat(label.shape, row.ravel(), column.ravel(), (weight / t.size).ravel())
    return 9000 * scale * blur(drawn, gaussian(label.shape, 0.8 * scale))
