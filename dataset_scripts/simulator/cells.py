"""Where the cells of one field lie and what shape each has: a monolayer of star-shaped outlines.

The outlines become a generalised Voronoi map: every pixel belongs to the cell whose outline it is deepest in, so that
neighbours share borders as in a monolayer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
from scipy import ndimage

from .optics import Optics
from .phenotypes import Phenotype

ANGLES = 720  # of an outline; a bin is half a degree


@dataclass
class Cells:
    """Geometry of the cells of one field: arrays with one entry per cell, in pixels and radians.

    Cells whose middle lies up to 1.2 radii outside the image are included, since they reach into it.
    """

    row: np.ndarray
    column: np.ndarray
    radius: np.ndarray
    outline: np.ndarray  # (cells, ANGLES) radius at each angle
    rounded: np.ndarray  # bool
    monopolar: np.ndarray  # bool
    brightness: np.ndarray  # relative to an average flat cell
    angle: np.ndarray  # of the long axis
    elongation: np.ndarray
    nucleus_row: np.ndarray
    nucleus_column: np.ndarray
    nucleus_radius: np.ndarray

    def around(self, corner: np.ndarray, image_size: tuple[int, int]) -> Cells:
        """The cells that reach into a window of `image_size` whose first pixel is `corner`, in its coordinates."""
        reach = self.outline.max(axis=1) + 1
        near = np.ones(len(self.row), bool)
        for place, start, side in zip((self.row, self.column), corner, image_size, strict=True):
            near &= (place + reach >= start) & (place - reach < start + side)
        cut = {field.name: getattr(self, field.name)[near] for field in fields(self)}
        for name, start in zip(("row", "column"), corner, strict=True):
            cut[name] = cut[name] - start
            cut[f"nucleus_{name}"] = cut[f"nucleus_{name}"] - start
        return Cells(**cut)


def expected_cells(high: float, wide: float, phenotype: Phenotype, optics: Optics, scale: float = 1.0) -> float:
    """Mean number of cells seeded on `high` x `wide` pixels.

    Density counts cells of the untreated size: a drug that makes cells larger does not make more of them.
    """
    closed = np.pi * (0.80 * Phenotype.cell_radius * scale * optics.cell_size) ** 2
    return max(phenotype.density * optics.density, 0.02) * high * wide / closed


def place_cells(
    rng: np.random.Generator, image_size: tuple[int, int], phenotype: Phenotype, optics: Optics, scale: float
) -> Cells:
    """Draw the places and shapes of the cells of one field; parameters as for `draw_field`."""
    rows, columns = image_size
    mean_radius = phenotype.cell_radius * scale * optics.cell_size
    margin = 1.2 * mean_radius
    high, wide = rows + 2 * margin, columns + 2 * margin
    wanted = rng.poisson(expected_cells(high, wide, phenotype, optics, scale))

    # Islands: candidates survive where a smooth random landscape is high.
    grid = ndimage.gaussian_filter(rng.normal(size=(24, 24)), 2.0, mode="wrap")
    grid = (grid - grid.mean()) / grid.std()
    threshold = -3 + 3.0 * phenotype.clustering
    nearest = 1.5 * Phenotype.nucleus_radius * scale * optics.cell_size
    # Crowded fields cannot take every candidate: the number of tries is bounded, the result still random.
    tries = 8 * wanted + 8
    candidates = rng.uniform(size=(tries, 2)) * (high, wide) - margin
    chosen = np.empty((wanted, 2))
    kept = 0
    step = 0.09 * Phenotype.cell_radius * scale * 8  # one knot of the landscape per few cells
    for place in candidates:
        if kept == wanted:
            break
        i, j = int((place[0] + margin) / step) % 24, int((place[1] + margin) / step) % 24
        if grid[i, j] < threshold:
            continue
        if kept and np.min(((chosen[:kept] - place) ** 2).sum(1)) < nearest**2:
            continue
        chosen[kept] = place
        kept += 1
    chosen = np.rint(chosen[:kept])
    count = kept

    spread = phenotype.variability
    size = np.exp(rng.normal(0, spread, count))
    radius = mean_radius * size
    rounded = rng.uniform(size=count) < phenotype.rounded
    monopolar = rounded & (rng.uniform(size=count) < phenotype.monopolar)
    angle = rng.uniform(0, 2 * np.pi, count)
    elongation = np.maximum(phenotype.cell_elongation * np.exp(rng.normal(0, 0.15, count)), 1.0)
    radius = np.where(rounded, 25.0 * scale * optics.cell_size * size**0.5, radius)
    elongation = np.where(rounded, 1.05, elongation)
    flat = np.where(rounded, 0.0, 1.0)
    lobes = waves(rng, 0.02 + 0.06 * flat, (2, 5)) + waves(
        rng, 0.3 * phenotype.spikes * (1 - phenotype.smoothness) * flat, (12, 40)
    )
    lobes += _corners(rng, 2.6 * phenotype.spikes * flat)
    outline = ellipses(radius, elongation, angle) * np.exp(0.9 * np.tanh(lobes / 0.9))
    outline *= (radius / np.sqrt((outline**2).mean(axis=1)))[:, None]  # corners must not make cells larger
    offset = np.where(rounded, 0, phenotype.nucleus_offset * radius * rng.uniform(0.3, 1.7, count))
    toward = rng.uniform(0, 2 * np.pi, count)
    nucleus_radius = phenotype.nucleus_radius * scale * optics.cell_size * np.exp(rng.normal(0, 0.8 * spread, count))
    return Cells(
        row=chosen[:, 0],
        column=chosen[:, 1],
        radius=radius,
        outline=outline,
        rounded=rounded,
        monopolar=monopolar,
        brightness=np.exp(rng.normal(0, 0.25, count)) * np.where(rounded, 2.2, 1.0),
        angle=angle,
        elongation=elongation,
        nucleus_row=chosen[:, 0] + offset * np.sin(toward),
        nucleus_column=chosen[:, 1] + offset * np.cos(toward),
        nucleus_radius=np.minimum(nucleus_radius, 0.8 * radius),
    )


def ellipses(radius: np.ndarray, elongation: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Radius at each angle of ellipses with the area of a circle of `radius`: `(count, ANGLES)`."""
    turned = np.arange(ANGLES)[None] * (2 * np.pi / ANGLES) - angle[:, None]
    long, short = np.sqrt(elongation)[:, None], 1 / np.sqrt(elongation)[:, None]
    return radius[:, None] / np.sqrt((np.cos(turned) / long) ** 2 + (np.sin(turned) / short) ** 2)


def waves(rng: np.random.Generator, amplitude: np.ndarray, harmonics: tuple[int, int]) -> np.ndarray:
    """Smooth lobes `(count, ANGLES)`: random trigonometric polynomials of sd `amplitude`, of orders `harmonics`."""
    theta = np.arange(ANGLES) * (2 * np.pi / ANGLES)
    orders = np.arange(*harmonics)
    size = rng.normal(size=(len(amplitude), len(orders))) * amplitude[:, None] * np.sqrt(2 / len(orders))
    phase = rng.uniform(0, 2 * np.pi, size=size.shape)
    # cos(k theta + phase), summed over k, as two matrix products.
    angles = orders[:, None] * theta
    return (size * np.cos(phase)) @ np.cos(angles) - (size * np.sin(phase)) @ np.sin(angles)


def _corners(rng, amplitude) -> np.ndarray:
    """A few pointed corners with concave sides between them, as of a cell that adheres to the glass."""
    theta = np.arange(ANGLES) * (2 * np.pi / ANGLES)
    height = rng.gamma(1.5, 1 / 1.5, size=(len(amplitude), 7)) * amplitude[:, None]
    height *= rng.uniform(size=height.shape) < 0.75
    where = rng.uniform(0, 2 * np.pi, size=height.shape)
    sharp = rng.uniform(8, 30, size=height.shape)
    total = np.zeros((len(amplitude), ANGLES))
    for corner in range(height.shape[1]):
        (some,) = np.nonzero(height[:, corner])  # a quarter are left out, and rounded cells have none
        away = np.cos(theta - where[some, corner, None]) - 1
        total[some] += height[some, corner, None] * np.exp(sharp[some, corner, None] * away)
    return total


def cell_map(cells: Cells, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Assign every pixel to a cell.

    Returns
    -------
    label : int32 array of `image_size`
        Index of the cell; -1 = none.
    depth : float32 array
        How deep in it the pixel lies: 0 = middle, 1 = outline, more = outside.
    rim : float32 array
        Distance to the cell's rim in pixels.
    """
    first = np.full(image_size, 2.0, np.float32)
    second = np.full(image_size, 2.0, np.float32)
    label = np.full(image_size, -1, np.int32)
    if len(cells.row):
        largest = int(np.ceil(cells.outline.max())) + 1
        distance, bins = polar_window(largest)
        largest = len(distance) // 2
        inverse = (1 / cells.outline).astype(np.float32)
        for i in range(len(cells.row)):
            reach = int(np.ceil(cells.outline[i].max())) + 1
            cut = windows(int(cells.row[i]), int(cells.column[i]), reach, largest, image_size)
            if cut is None:
                continue
            inside, around = cut
            d = distance[around] * inverse[i][bins[around]]
            # A rounded cell sits on top of its flat neighbours.
            if cells.rounded[i]:
                d = np.where(d < 1, 0.3 * d, d + 0.2)
            f = first[inside]
            second[inside] = np.minimum(second[inside], np.maximum(f, d))
            closer = d < f
            label[inside][closer & (d < 1)] = i
            first[inside] = np.minimum(f, d)
    label[first >= 1] = -1
    radius = np.append(cells.radius, 1.0).astype(np.float32)[label]
    rim = np.minimum((second - first) * 0.5, 1 - first) * radius
    return label, first, rim


def polar_window(reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance (pixels) and angle bin of every offset up to `reach` pixels or a little more.

    Windows around cells are cut from them; they are kept, so nothing may be written into them.
    """
    return _polar_window(reach + -reach % 16)


@lru_cache(maxsize=16)
def _polar_window(reach: int) -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(-reach, reach + 1)
    dy, dx = np.meshgrid(axis, axis, indexing="ij")
    distance = np.hypot(dy, dx).astype(np.float32)
    bins = np.rint(np.arctan2(dy, dx) * (ANGLES / (2 * np.pi))).astype(np.int64) % ANGLES
    return distance, bins


def windows(row: int, column: int, reach: int, largest: int, image_size: tuple[int, int]) -> tuple | None:
    """Slices of the image, and of a polar window of half-width `largest`, for `reach` pixels around (row, column).

    None where they lie outside the image.
    """
    top, bottom = max(row - reach, 0), min(row + reach + 1, image_size[0])
    left, right = max(column - reach, 0), min(column + reach + 1, image_size[1])
    if top >= bottom or left >= right:
        return None
    inside = np.s_[top:bottom, left:right]
    around = np.s_[top - row + largest : bottom - row + largest, left - column + largest : right - column + largest]
    return inside, around


def splat(image_size: tuple[int, int], row: np.ndarray, column: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Sum of point weights at their nearest pixels."""
    i, j = np.rint(row).astype(np.int32), np.rint(column).astype(np.int32)
    inside = (i >= 0) & (i < image_size[0]) & (j >= 0) & (j < image_size[1]) & (weight > 0)
    flat = i[inside] * image_size[1] + j[inside]
    total = np.bincount(flat, weights=weight[inside], minlength=image_size[0] * image_size[1])
    return total.reshape(image_size).astype(np.float32)


def keep_in_cell(label: np.ndarray, owner: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """1 where a point lies in the cell that owns it, otherwise 0."""
    i = np.clip(np.rint(row).astype(np.int32), 0, label.shape[0] - 1)
    j = np.clip(np.rint(column).astype(np.int32), 0, label.shape[1] - 1)
    return (label[i, j] == owner).astype(np.float32)
