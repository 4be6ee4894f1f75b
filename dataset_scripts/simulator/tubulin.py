"""The tubulin channel.

Filaments are polylines in the cell's polar coordinates, rasterised as weighted points and blurred to the width of a
microtubule seen through the objective.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .cells import Cells, keep_in_cell, splat
from .phenotypes import Phenotype
from .textures import strokes


def draw_tubulin(
    rng: np.random.Generator,
    cells: Cells,
    phenotype: Phenotype,
    label: np.ndarray,
    depth: np.ndarray,
    rim: np.ndarray,
    nuclear: np.ndarray,
    scale: float,
) -> np.ndarray:
    """Tubulin signal in grey levels; `label`, `depth`, `rim` are of `cell_map`, `nuclear` masks the nuclei."""
    count = len(cells.row)
    body = np.where(label >= 0, np.append(cells.brightness, 0).astype(np.float32)[label], 0)
    dome = 0.45 + 0.55 * np.exp(-((depth / 0.55) ** 2))
    body *= np.where(np.append(cells.rounded, False)[label], 2.0, 1.0).astype(np.float32)  # they are thick
    signal = 1250 * phenotype.tubulin_diffuse * body * dome
    if not count:
        return signal
    if phenotype.tubulin_network:
        signal += 1100 * phenotype.tubulin_network * body * dome * _network(rng, cells, phenotype, label, scale)
    if phenotype.tubulin_edge:
        signal += 2200 * phenotype.tubulin_edge * body * np.exp(-((rim / (2.5 * scale)) ** 2))

    per_cell = rng.poisson(phenotype.tubulin_filaments, count)
    per_cell = np.where(cells.rounded, 40, per_cell)
    # Cells that lie wholly outside the picture only push their neighbours.
    seen = np.bincount(label[label >= 0], minlength=count) > 0
    owner = np.repeat(np.arange(count), np.where(seen, per_cell, 0))
    total = len(owner)
    if not total:
        return signal
    aster = cells.rounded[owner]
    # Filaments wind outwards around the nucleus along the cell's ellipse; those of a rounded cell make an aster.
    points = max(int(1.3 * phenotype.cell_radius * scale), 16)
    t = ((np.arange(points) + 0.5) / points).astype(np.float32)[None]
    inner = np.where(aster, 0.05, cells.nucleus_radius[owner] / cells.radius[owner] * rng.uniform(0.5, 1.1, total))
    inner = inner + np.where(aster, 0, np.maximum(1 - inner, 0) * rng.uniform(0, 0.8, total) ** 2)
    outer = inner + (1.15 - inner) * np.where(aster, 0.6, phenotype.tubulin_length * rng.uniform(0.25, 1, total))
    wind = np.where(aster, 0, rng.normal(0, phenotype.tubulin_swirl, total))
    start = rng.uniform(0, 2 * np.pi, total)
    wave, phase = rng.uniform(np.pi, 4 * np.pi, total), rng.uniform(0, 2 * np.pi, total)
    bundle = (rng.uniform(size=total) < phenotype.tubulin_bundling) & ~aster
    # Equal mass for equal length: the points of a long filament stand farther apart.
    run = np.hypot(outer - inner, 0.6 * wind * (inner + outer)) * cells.radius[owner] / points
    numbers = (owner, inner, outer, wind, start, wave, phase, np.where(aster, 0, 0.05))
    # Filaments none of whose few sample points comes near the picture are left out: they would add nothing to it.
    row, column = _paths(cells, *numbers, np.linspace(0, 1, 7, dtype=np.float32)[None])
    near = np.ones(row.shape, bool)
    for place, side in ((row, label.shape[0]), (column, label.shape[1])):
        near &= (place > -0.5 * phenotype.cell_radius * scale) & (place < side + 0.5 * phenotype.cell_radius * scale)
    near = near.any(axis=1)
    owner, run, bundle = owner[near], run[near], bundle[near]
    row, column = _paths(cells, *(each[near] for each in numbers), t)
    weight = column_of(run * cells.brightness[owner] ** 0.8) * (1.1 - 0.6 * t)
    weight = weight * keep_in_cell(label, owner[:, None], row, column)
    thin = splat(label.shape, row[~bundle], column[~bundle], weight[~bundle])
    thick = splat(label.shape, row[bundle], column[bundle], weight[bundle])
    signal += 880 * scale * ndimage.gaussian_filter(thin, 0.7 * scale, truncate=3)
    if bundle.any():
        signal += 5600 * scale * ndimage.gaussian_filter(thick, 1.6 * scale, truncate=3)

    # The cloud by the nucleus: microtubule organising centre, or an aggresome when it is strong.
    away = rng.uniform(0, 2 * np.pi, count)
    dy = cells.nucleus_row + 0.9 * cells.nucleus_radius * np.sin(away)
    dx = cells.nucleus_column + 0.9 * cells.nucleus_radius * np.cos(away)
    cloud = splat(label.shape, dy, dx, np.where(cells.rounded, 0.3, phenotype.tubulin_perinuclear))
    width = 6.0 * scale
    signal += 3200 * (2 * np.pi * width**2) * ndimage.gaussian_filter(cloud, width, truncate=3)
    return signal * (1 - 0.2 * nuclear) * (1 - phenotype.nuclear_shadow * nuclear)


def column_of(values: np.ndarray) -> np.ndarray:
    """One float32 number per filament, as a column beside the filaments' points."""
    return np.asarray(values, np.float32)[:, None]


def _paths(cells: Cells, owner, inner, outer, wind, start, wave, phase, waviness, t) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns `(filaments, points)` of filaments at the parts `t` of their way."""
    rho = column_of(inner) + column_of(outer - inner) * t
    # The same angle is a shorter way near the nucleus: most of the winding happens there.
    theta = column_of(start) + column_of(wind) * np.sqrt(t)
    theta += column_of(waviness) * np.sin(column_of(wave) * t + column_of(phase))
    sine, cosine = np.sin(theta), np.cos(theta)
    tilt, long = cells.angle[owner], np.sqrt(cells.elongation[owner])
    along = cosine * column_of(np.cos(tilt)) + sine * column_of(np.sin(tilt))
    across = sine * column_of(np.cos(tilt)) - cosine * column_of(np.sin(tilt))
    r = column_of(cells.radius[owner]) * rho
    r /= np.sqrt((along * column_of(1 / long)) ** 2 + (across * column_of(long)) ** 2)
    toward = np.clip(1.2 - rho, 0, 1)  # around the nucleus near it, around the cell's middle far from it
    row = column_of(cells.row[owner]) + toward * column_of((cells.nucleus_row - cells.row)[owner]) + r * sine
    column = column_of(cells.column[owner]) + r * cosine
    column += toward * column_of((cells.nucleus_column - cells.column)[owner])
    return row, column


def _network(rng, cells: Cells, phenotype: Phenotype, label, scale) -> np.ndarray:
    """A dense network of short filaments with mean about 1: around the nucleus, along the cell, or in between."""
    spacing = (0.25 * (1 - phenotype.tubulin_sparsity) ** 2 + 0.012) / scale**2
    where = np.flatnonzero((rng.random(label.shape, dtype=np.float32) < spacing) & (label >= 0))
    owner = label.ravel()[where]
    row, column = np.divmod(where, label.shape[1])
    around = np.arctan2(row - cells.nucleus_row[owner], column - cells.nucleus_column[owner]) + np.pi / 2
    # Directions are mixed as unit vectors of the doubled angle, since a filament has no head.
    share = phenotype.tubulin_order
    mixed = (1 - share) * np.exp(2j * around) + share * np.exp(2j * cells.angle[owner])
    angle = 0.5 * np.angle(mixed) + rng.normal(0, 0.35, len(where))
    length, width = rng.uniform(4, 12) * scale, rng.uniform(0.5, 0.8) * scale
    weight = rng.exponential(1 / (2 * np.pi * length * width * spacing), len(where))
    return strokes(label, where, angle, weight, length, width)
