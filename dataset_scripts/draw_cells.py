"""Draws one simulated field of view: nuclei, tubulin networks and actin of a monolayer under one phenotype.

The drawing follows what one sees in BBBC021 (MCF7 cells, 1280 x 1024 raw pixels): nuclei about 38 raw pixels across,
cell bodies about 100, a shot-noise-limited 12-bit camera whose numbers are stored shifted left by four bits. A
:class:`Phenotype` is a set of plain numbers, so that a dose is an interpolation between `Phenotype()` (untreated)
and the phenotype of a mechanism of action, and a compound a small deviation from its mechanism.

Cells are drawn into a generalised Voronoi map: every pixel belongs to the cell whose star-shaped outline it is
deepest in, so neighbours share borders as in a monolayer. Filaments are polylines in the cell's polar coordinates,
rasterised as weighted points and blurred to the width of a microtubule seen through the objective.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from scipy import ndimage

ANGLES = 720


@dataclass(frozen=True)
class Phenotype:
    """Appearance of one population of cells. Lengths are raw pixels at scale 1, shares lie in [0, 1].

    Numbers of the same name in two phenotypes can be interpolated, see :meth:`blend`.
    """

    density: float = 0.85  # cells, relative to a closed monolayer of cells of the untreated size
    clustering: float = 0.5  # 0 = even, 1 = islands with wide gaps between them
    cell_radius: float = 50.0
    cell_elongation: float = 1.25
    spikes: float = 0.10  # amplitude of the outline's irregularity, relative to the radius
    rounded: float = 0.03  # share of cells rounded up (mitotic, or dying)
    monopolar: float = 0.0  # share of the rounded ones with a monopolar aster inside a chromatin ring
    nucleus_radius: float = 18.5
    nucleus_elongation: float = 1.2
    nucleus_lobes: float = 0.03  # amplitude of the nuclear outline's irregularity
    nucleus_brightness: float = 1.0
    nucleus_texture: float = 0.10  # contrast of the chromatin's fine grain
    nucleus_offset: float = 0.12  # of the nucleus from the middle, relative to the cell radius
    nucleoli: float = 3.0  # dark spots a nucleus
    nucleolus_radius: float = 3.0
    binucleate: float = 0.03
    fragmented: float = 0.01  # share of cells whose nucleus is in pieces
    fragments: float = 5.0  # pieces of such a nucleus
    actin_body: float = 1.0
    actin_edge: float = 1.0
    actin_fibres: float = 8.0  # stress fibres a cell
    actin_puncta: float = 1.0  # bright spots a cell
    actin_puncta_radius: float = 2.0
    tubulin_diffuse: float = 1.0
    tubulin_filaments: float = 150.0  # a cell
    tubulin_length: float = 0.9  # of a filament, relative to the way from nucleus to edge
    tubulin_swirl: float = 1.3  # sd of the angle (radians) a filament winds around the nucleus
    tubulin_bundling: float = 0.05  # share of filaments that are thick bundles
    tubulin_perinuclear: float = 0.25  # brightness of the cloud on one side of the nucleus
    variability: float = 0.12  # log sd of sizes between cells of a population

    def blend(self, other: Phenotype, strength: float) -> Phenotype:
        """The phenotype `strength` (0 = this one, 1 = the other) of the way to `other`."""
        return Phenotype(
            **{
                f.name: getattr(self, f.name) + strength * (getattr(other, f.name) - getattr(self, f.name))
                for f in fields(self)
            }
        )

    def vary(self, rng: np.random.Generator, sd: float) -> Phenotype:
        """A phenotype whose every number is multiplied by exp(N(0, sd))."""
        return Phenotype(**{f.name: getattr(self, f.name) * float(np.exp(rng.normal(0, sd))) for f in fields(self)})


def mechanism_phenotypes() -> dict[str, Phenotype]:
    """Full-dose phenotypes of the twelve mechanisms annotated in BBBC021, after the descriptions in Caie 2010."""
    normal = Phenotype()
    return {
        "Actin disruptors": replace(
            normal, density=0.55, cell_radius=40, spikes=0.32, actin_edge=0.25, actin_body=0.7, actin_fibres=0,
            actin_puncta=16, actin_puncta_radius=3.2, binucleate=0.35, tubulin_swirl=0.3, nucleus_offset=0.2,
        ),
        "Aurora kinase inhibitors": replace(
            normal, density=0.50, cell_radius=72, nucleus_radius=29, nucleus_lobes=0.28, nucleus_brightness=0.85,
            variability=0.22, actin_fibres=14, tubulin_filaments=240, nucleoli=7,
        ),
        "Cholesterol-lowering": replace(
            normal, density=0.60, cell_radius=34, cell_elongation=2.6, spikes=0.22, actin_body=1.5, actin_edge=0.7,
            nucleus_radius=16, nucleus_elongation=1.5, tubulin_swirl=0.25, tubulin_filaments=90, actin_fibres=3,
        ),
        "DNA damage": replace(
            normal, density=0.50, cell_radius=70, nucleus_radius=25, nucleus_texture=0.30, nucleus_brightness=0.8,
            nucleoli=2, nucleolus_radius=5.0, actin_fibres=18, actin_edge=0.7,
        ),
        "DNA replication": replace(
            normal, density=0.55, cell_radius=60, nucleus_radius=24.5, nucleus_texture=0.05, nucleus_brightness=1.1,
            nucleoli=1.2, nucleolus_radius=7.0, clustering=0.3, actin_puncta=4, tubulin_filaments=180,
        ),
        "Eg5 inhibitors": replace(
            normal, density=0.55, rounded=0.55, monopolar=0.95, clustering=0.3, binucleate=0.1, fragmented=0.12,
        ),
        "Epithelial": replace(
            normal, density=0.95, clustering=0.95, cell_radius=38, spikes=0.03, cell_elongation=1.05, actin_edge=2.6,
            actin_fibres=0, actin_body=0.7, nucleus_radius=16.5, tubulin_swirl=1.6, rounded=0.01,
        ),
        "Kinase inhibitors": replace(
            normal, density=0.65, spikes=0.40, cell_elongation=1.8, cell_radius=52, actin_edge=0.5, actin_fibres=2,
            actin_body=0.8, tubulin_filaments=70, tubulin_bundling=0.15, tubulin_swirl=0.3, nucleus_elongation=1.45,
        ),
        "Microtubule destabilizers": replace(
            normal, density=0.55, fragmented=0.65, fragments=7, rounded=0.22, cell_radius=46, tubulin_filaments=12,
            tubulin_length=0.35, tubulin_diffuse=2.2, spikes=0.16, nucleus_lobes=0.10,
        ),
        "Microtubule stabilizers": replace(
            normal, density=0.55, fragmented=0.70, fragments=6, rounded=0.15, cell_radius=54, tubulin_filaments=45,
            tubulin_bundling=0.85, tubulin_swirl=2.4, tubulin_diffuse=0.6, nucleus_lobes=0.10,
        ),
        "Protein degradation": replace(
            normal, density=0.60, cell_radius=38, nucleus_radius=14.5, nucleus_offset=0.45, nucleus_brightness=1.3,
            nucleus_lobes=0.12, nucleoli=0, tubulin_perinuclear=2.6, tubulin_filaments=60, rounded=0.12, spikes=0.15,
        ),
        "Protein synthesis": replace(
            normal, density=0.60, cell_radius=42, nucleus_radius=15.5, nucleus_texture=0.03, nucleoli=0.2,
            nucleus_elongation=1.05, spikes=0.05, tubulin_filaments=45, tubulin_diffuse=1.3, actin_edge=0.6,
            actin_fibres=1, tubulin_length=0.7,
        ),
    }  # fmt: skip


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


def draw_field(
    rng: np.random.Generator,
    image_size: tuple[int, int],
    phenotype: Phenotype,
    optics: Optics,
    scale: float = 1.0,
) -> np.ndarray:
    """Draw the three channels of one field.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of every random number: the same state draws the same field.
    image_size : (rows, columns)
        Of the raw image. The size of a cell does not depend on it: a smaller image holds fewer cells.
    phenotype : Phenotype
    optics : Optics
    scale : float
        Multiplies every length (1 = the raw pixels of BBBC021).

    Returns
    -------
    numpy.ndarray
        `(3, rows, columns)` uint16 in the order DNA, tubulin, actin, every value a multiple of 16.
    """
    cells = _place_cells(rng, image_size, phenotype, optics, scale)
    label, depth, rim = _cell_map(cells, image_size)
    dna, nuclear = _draw_nuclei(rng, cells, phenotype, image_size, scale)
    tubulin = _draw_tubulin(rng, cells, phenotype, label, depth, nuclear, scale)
    actin = _draw_actin(rng, cells, phenotype, label, depth, rim, scale)

    light = _illumination(image_size, optics)
    planes = np.empty((3, *image_size), np.uint16)
    for channel, signal in enumerate((dna, tubulin, actin)):
        seen = ndimage.gaussian_filter(signal, optics.blur * scale, truncate=3, output=np.float32)
        counts = (seen * light * optics.gain[channel] + optics.background[channel]) / 16
        # Shot noise of a camera with a gain of about four electrons a count, and two counts of read noise.
        noise = rng.standard_normal(counts.shape, dtype=np.float32)
        counts += noise * np.sqrt(2.0 + 0.25 * np.maximum(counts, 0)).astype(np.float32)
        planes[channel] = np.clip(np.rint(counts), 0, 4095).astype(np.uint16) << 4
    return planes


@dataclass
class _Cells:
    """Geometry of the cells of one field, one entry a cell."""

    row: np.ndarray
    column: np.ndarray
    radius: np.ndarray
    outline: np.ndarray  # (cells, ANGLES) radius at each angle, pixels
    rounded: np.ndarray  # bool
    monopolar: np.ndarray  # bool
    brightness: np.ndarray
    angle: np.ndarray
    elongation: np.ndarray
    nucleus_row: np.ndarray
    nucleus_column: np.ndarray
    nucleus_radius: np.ndarray


def _ellipses(radius, elongation, angle) -> np.ndarray:
    """Radius at each angle of ellipses with the area of a circle of `radius`: `(count, ANGLES)`."""
    turned = np.arange(ANGLES)[None] * (2 * np.pi / ANGLES) - angle[:, None]
    long, short = np.sqrt(elongation)[:, None], 1 / np.sqrt(elongation)[:, None]
    return radius[:, None] / np.sqrt((np.cos(turned) / long) ** 2 + (np.sin(turned) / short) ** 2)


def _waves(rng, amplitude, harmonics) -> np.ndarray:
    """Random trigonometric polynomials of sd `amplitude`, one a row: smooth lobes."""
    theta = np.arange(ANGLES) * (2 * np.pi / ANGLES)
    orders = np.arange(*harmonics)
    size = rng.normal(size=(len(amplitude), len(orders))) * amplitude[:, None] * np.sqrt(2 / len(orders))
    phase = rng.uniform(0, 2 * np.pi, size=size.shape)
    # cos(k theta + phase), summed over k, as two matrix products.
    angles = orders[:, None] * theta
    return (size * np.cos(phase)) @ np.cos(angles) - (size * np.sin(phase)) @ np.sin(angles)


def _corners(rng, amplitude) -> np.ndarray:
    """A few pointed corners with concave sides between them, as of a cell that holds on to the glass."""
    theta = np.arange(ANGLES) * (2 * np.pi / ANGLES)
    height = rng.gamma(1.5, 1 / 1.5, size=(len(amplitude), 7)) * amplitude[:, None]
    height *= rng.uniform(size=height.shape) < 0.75
    where = rng.uniform(0, 2 * np.pi, size=height.shape)
    sharp = rng.uniform(8, 30, size=height.shape)
    bumps = np.exp(sharp[:, :, None] * (np.cos(theta - where[:, :, None]) - 1))
    return np.einsum("cs,cst->ct", height, bumps)


def _place_cells(rng, image_size, phenotype, optics, scale) -> _Cells:
    rows, columns = image_size
    mean_radius = phenotype.cell_radius * scale * optics.cell_size
    margin = 1.2 * mean_radius
    high, wide = rows + 2 * margin, columns + 2 * margin
    # Density counts cells of the untreated size: a drug that makes cells larger need not make them more.
    closed = np.pi * (0.80 * Phenotype.cell_radius * scale * optics.cell_size) ** 2
    wanted = rng.poisson(max(phenotype.density * optics.density, 0.02) * high * wide / closed)

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
    step = 0.09 * Phenotype.cell_radius * scale * 8  # one landscape knot a few cells
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
    waves = _waves(rng, 0.02 + 0.06 * flat, (2, 5)) + _waves(rng, 0.3 * phenotype.spikes * flat, (12, 40))
    waves += _corners(rng, 2.6 * phenotype.spikes * flat)
    outline = _ellipses(radius, elongation, angle) * np.exp(0.9 * np.tanh(waves / 0.9))
    outline *= (radius / np.sqrt((outline**2).mean(axis=1)))[:, None]  # corners must not make cells larger
    offset = np.where(rounded, 0, phenotype.nucleus_offset * radius * rng.uniform(0.3, 1.7, count))
    toward = rng.uniform(0, 2 * np.pi, count)
    nucleus_radius = phenotype.nucleus_radius * scale * optics.cell_size * np.exp(rng.normal(0, 0.8 * spread, count))
    return _Cells(
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


def _polar_window(reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance (pixels) and angle bin of every offset up to `reach`, for cutting windows from."""
    axis = np.arange(-reach, reach + 1)
    dy, dx = np.meshgrid(axis, axis, indexing="ij")
    distance = np.hypot(dy, dx).astype(np.float32)
    bins = np.rint(np.arctan2(dy, dx) * (ANGLES / (2 * np.pi))).astype(np.int64) % ANGLES
    return distance, bins


def _windows(row, column, reach, largest, image_size):
    """The slices of the image and of a polar window of half-width `largest` around (row, column), or None."""
    top, bottom = max(row - reach, 0), min(row + reach + 1, image_size[0])
    left, right = max(column - reach, 0), min(column + reach + 1, image_size[1])
    if top >= bottom or left >= right:
        return None
    inside = np.s_[top:bottom, left:right]
    around = np.s_[top - row + largest : bottom - row + largest, left - column + largest : right - column + largest]
    return inside, around


def _cell_map(cells: _Cells, image_size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which cell (-1 = none), how deep in it (0 = middle, 1 = outline), and the distance to its rim in pixels."""
    first = np.full(image_size, 2.0, np.float32)
    second = np.full(image_size, 2.0, np.float32)
    label = np.full(image_size, -1, np.int32)
    if len(cells.row):
        largest = int(np.ceil(cells.outline.max())) + 1
        distance, bins = _polar_window(largest)
        inverse = (1 / cells.outline).astype(np.float32)
        for i in range(len(cells.row)):
            reach = int(np.ceil(cells.outline[i].max())) + 1
            cut = _windows(int(cells.row[i]), int(cells.column[i]), reach, largest, image_size)
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


def _draw_nuclei(rng, cells: _Cells, phenotype: Phenotype, image_size, scale) -> tuple[np.ndarray, np.ndarray]:
    """DNA signal (grey levels) and the soft mask of the interphase nuclei."""
    signal = np.zeros(image_size, np.float32)
    mask = np.zeros(image_size, np.float32)
    fine = ndimage.gaussian_filter(rng.standard_normal(image_size, dtype=np.float32), 1.6 * scale)
    fine /= max(float(fine.std()), 1e-6)

    bodies = []  # row, column, radius, elongation, irregularity, brightness, ring, nucleoli
    for i in range(len(cells.row)):
        y, x, r = cells.nucleus_row[i], cells.nucleus_column[i], cells.nucleus_radius[i]
        bright = phenotype.nucleus_brightness * np.exp(rng.normal(0, 0.18))
        draw = rng.uniform(size=3)
        if cells.monopolar[i]:
            bodies.append((y, x, 15.0 * scale, 1.1, 0.12, 3.0, True, 0))
        elif cells.rounded[i]:
            if draw[0] < 0.5:  # a metaphase plate
                bodies.append((y, x, 11.0 * scale, 3.0, 0.05, 3.2, False, 0))
            else:  # a condensed, dying nucleus
                bodies.append((y, x, 12.0 * scale, 1.2, 0.10, 2.8, False, 0))
        elif draw[1] < phenotype.fragmented:
            pieces = max(2, rng.poisson(phenotype.fragments))
            share = rng.dirichlet(np.full(pieces, 2.5))
            for part in share:
                away, angle = 1.15 * r * np.sqrt(rng.uniform(0.05, 1)), rng.uniform(0, 2 * np.pi)
                size = max(1.25 * r * np.sqrt(part), 2.2 * scale)
                bodies.append(
                    (y + away * np.sin(angle), x + away * np.cos(angle), size, 1.2, 0.08, 1.15 * bright, False, 0)
                )
        elif draw[1] < phenotype.fragmented + phenotype.binucleate:
            angle = rng.uniform(0, 2 * np.pi)
            for side in (-0.8, 0.8):
                place = (y + side * r * np.sin(angle), x + side * r * np.cos(angle))
                bodies.append((*place, 0.82 * r, 1.2, phenotype.nucleus_lobes, bright, False, phenotype.nucleoli / 2))
        else:
            elongation = max(1.0, phenotype.nucleus_elongation * np.exp(rng.normal(0, 0.08)))
            bodies.append((y, x, r, elongation, phenotype.nucleus_lobes, bright, False, phenotype.nucleoli))
    if not bodies:
        return signal, mask

    table = np.array(bodies, dtype=np.float64)
    count = len(table)
    outline = _ellipses(table[:, 2], table[:, 3], rng.uniform(0, 2 * np.pi, count))
    outline *= np.exp(np.clip(_waves(rng, table[:, 4], (2, 5)), -0.6, 0.6))
    largest = int(np.ceil(outline.max())) + 3
    distance, bins = _polar_window(largest)
    for i in range(count):
        row, column = int(round(table[i, 0])), int(round(table[i, 1]))
        reach = int(np.ceil(outline[i].max())) + 2
        cut = _windows(row, column, reach, largest, image_size)
        spots = rng.poisson(table[i, 7])
        places = rng.uniform(-0.55, 0.55, size=(spots, 2)) * table[i, 2]
        if cut is None:
            continue
        inside, around = cut
        edge = outline[i].astype(np.float32)[bins[around]]
        soft = np.clip((edge - distance[around]) / (1.6 * scale) + 0.5, 0, 1)
        if table[i, 6]:  # chromatin ring round a monopolar aster
            soft *= np.clip((distance[around] - 0.45 * edge) / (2.5 * scale) + 0.5, 0, 1)
        grain = 1 + phenotype.nucleus_texture * fine[inside]
        dome = 0.82 + 0.18 * np.sqrt(np.maximum(1 - (distance[around] / edge) ** 2, 0))
        body = 1750 * table[i, 5] * soft * grain * dome
        if spots:
            dy = np.arange(inside[0].start, inside[0].stop)[:, None] - row
            dx = np.arange(inside[1].start, inside[1].stop)[None] - column
            for py, px in places:
                width = phenotype.nucleolus_radius * scale
                body *= 1 - 0.45 * np.exp(-((dy - py) ** 2 + (dx - px) ** 2) / (2 * (0.7 * width) ** 2))
        signal[inside] = np.maximum(signal[inside], body)
        mask[inside] = np.maximum(mask[inside], soft)
    return signal, mask


def _splat(image_size, row, column, weight) -> np.ndarray:
    """Sum of point weights at their nearest pixels."""
    i, j = np.rint(row).astype(np.int32), np.rint(column).astype(np.int32)
    inside = (i >= 0) & (i < image_size[0]) & (j >= 0) & (j < image_size[1]) & (weight > 0)
    flat = i[inside] * image_size[1] + j[inside]
    total = np.bincount(flat, weights=weight[inside], minlength=image_size[0] * image_size[1])
    return total.reshape(image_size).astype(np.float32)


def _keep_in_cell(label, owner, row, column) -> np.ndarray:
    """1 where a point lies in the cell that owns it, else 0."""
    i = np.clip(np.rint(row).astype(np.int32), 0, label.shape[0] - 1)
    j = np.clip(np.rint(column).astype(np.int32), 0, label.shape[1] - 1)
    return (label[i, j] == owner).astype(np.float32)


def _draw_tubulin(rng, cells: _Cells, phenotype: Phenotype, label, depth, nuclear, scale) -> np.ndarray:
    count = len(cells.row)
    body = np.where(label >= 0, np.append(cells.brightness, 0).astype(np.float32)[label], 0)
    dome = 0.45 + 0.55 * np.exp(-((depth / 0.55) ** 2))
    body *= np.where(np.append(cells.rounded, False)[label], 2.0, 1.0).astype(np.float32)  # they are thick
    signal = 1250 * phenotype.tubulin_diffuse * body * dome
    if not count:
        return signal

    per_cell = rng.poisson(phenotype.tubulin_filaments, count)
    per_cell = np.where(cells.rounded, 40, per_cell)
    # Cells that lie wholly outside the picture only push their neighbours.
    seen = np.bincount(label[label >= 0], minlength=count) > 0
    owner = np.repeat(np.arange(count), np.where(seen, per_cell, 0))
    total = len(owner)
    if not total:
        return signal
    aster = cells.rounded[owner]

    def column_of(values):
        return np.asarray(values, np.float32)[:, None]

    # Filaments wind outwards around the nucleus along the cell's ellipse; those of a rounded cell make an aster.
    points = max(int(1.3 * phenotype.cell_radius * scale), 16)
    t = ((np.arange(points) + 0.5) / points).astype(np.float32)[None]
    inner = np.where(aster, 0.05, cells.nucleus_radius[owner] / cells.radius[owner] * rng.uniform(0.5, 1.1, total))
    inner = inner + np.where(aster, 0, np.maximum(1 - inner, 0) * rng.uniform(0, 0.8, total) ** 2)
    outer = inner + (1.15 - inner) * np.where(aster, 0.6, phenotype.tubulin_length * rng.uniform(0.25, 1, total))
    wind = np.where(aster, 0, rng.normal(0, phenotype.tubulin_swirl, total))
    rho = column_of(inner) + column_of(outer - inner) * t
    # The same angle is a shorter way near the nucleus: most of the winding happens there.
    theta = column_of(rng.uniform(0, 2 * np.pi, total)) + column_of(wind) * np.sqrt(t)
    wave, phase = rng.uniform(np.pi, 4 * np.pi, total), rng.uniform(0, 2 * np.pi, total)
    theta += column_of(np.where(aster, 0, 0.05)) * np.sin(column_of(wave) * t + column_of(phase))
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
    # Equal mass for equal length: the points of a long filament stand farther apart.
    run = np.hypot(outer - inner, 0.6 * wind * (inner + outer)) * cells.radius[owner] / points
    weight = column_of(run * cells.brightness[owner] ** 0.8) * (1.1 - 0.6 * t)
    weight = weight * _keep_in_cell(label, owner[:, None], row, column)
    bundle = (rng.uniform(size=total) < phenotype.tubulin_bundling) & ~aster
    thin = _splat(label.shape, row[~bundle], column[~bundle], weight[~bundle])
    thick = _splat(label.shape, row[bundle], column[bundle], weight[bundle])
    signal += 880 * scale * ndimage.gaussian_filter(thin, 0.7 * scale, truncate=3)
    if bundle.any():
        signal += 5600 * scale * ndimage.gaussian_filter(thick, 1.6 * scale, truncate=3)

    # The cloud by the nucleus: microtubule organising centre, or an aggresome when it is strong.
    away = rng.uniform(0, 2 * np.pi, count)
    dy = cells.nucleus_row + 0.9 * cells.nucleus_radius * np.sin(away)
    dx = cells.nucleus_column + 0.9 * cells.nucleus_radius * np.cos(away)
    cloud = _splat(label.shape, dy, dx, np.where(cells.rounded, 0.3, phenotype.tubulin_perinuclear))
    width = 6.0 * scale
    signal += 3200 * (2 * np.pi * width**2) * ndimage.gaussian_filter(cloud, width, truncate=3)
    return signal * (1 - 0.2 * nuclear)


def _draw_actin(rng, cells: _Cells, phenotype: Phenotype, label, depth, rim, scale) -> np.ndarray:
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
        weight = (cells.brightness[owner] * rng.uniform(0.3, 1, len(owner)))[:, None] * _keep_in_cell(
            label, owner[:, None], row, column
        )
        fibres = _splat(label.shape, row.ravel(), column.ravel(), weight.ravel())
        signal += 2400 * scale * ndimage.gaussian_filter(fibres, 1.0 * scale, truncate=3)

    spots = np.repeat(np.arange(count), rng.poisson(phenotype.actin_puncta, count))
    if len(spots):
        r = cells.radius[spots] * np.sqrt(rng.uniform(0.02, 0.9, len(spots)))
        angle = rng.uniform(0, 2 * np.pi, len(spots))
        row, column = cells.row[spots] + r * np.sin(angle), cells.column[spots] + r * np.cos(angle)
        weight = rng.exponential(1.0, len(spots)) * _keep_in_cell(label, spots, row, column)
        size = phenotype.actin_puncta_radius * scale
        puncta = ndimage.gaussian_filter(_splat(label.shape, row, column, weight), size, truncate=3)
        signal += 7000 * (2 * np.pi * size**2) * puncta
    return signal


def _illumination(image_size, optics: Optics) -> np.ndarray:
    """Smooth light field with maximum 1: brightest at `optics.centre`, darker towards the corners."""
    row = np.linspace(0, 1, image_size[0], dtype=np.float32)[:, None] - optics.centre[0]
    column = np.linspace(0, 1, image_size[1], dtype=np.float32)[None] - optics.centre[1]
    square = row**2 + column**2
    return (1 - optics.vignette * square / max(float(square.max()), 1e-6)).astype(np.float32)
