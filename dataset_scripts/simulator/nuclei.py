"""The DNA channel: interphase, mitotic and fragmented nuclei."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .cells import Cells, ellipses, polar_window, waves, windows
from .phenotypes import Phenotype
from .textures import grain


def draw_nuclei(
    rng: np.random.Generator, cells: Cells, phenotype: Phenotype, image_size: tuple[int, int], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """DNA signal (grey levels) and a soft mask of the nuclei in [0, 1]: two float32 arrays of `image_size`."""
    signal = np.zeros(image_size, np.float32)
    mask = np.zeros(image_size, np.float32)
    fine = ndimage.gaussian_filter(rng.standard_normal(image_size, dtype=np.float32), 1.6 * scale)
    fine /= max(float(fine.std()), 1e-6)

    bodies = []  # row, column, radius, elongation, irregularity, brightness, ring, nucleoli; of some, angle and dome
    for i in range(len(cells.row)):
        y, x, r = cells.nucleus_row[i], cells.nucleus_column[i], cells.nucleus_radius[i]
        bright = phenotype.nucleus_brightness * np.exp(rng.normal(0, 0.18))
        draw = rng.uniform(size=3)
        if cells.rounded[i] and phenotype.figures and rng.uniform() < phenotype.figures:
            bodies += _figure(rng, y, x, scale)
        elif cells.monopolar[i]:
            bodies.append((y, x, 15.0 * scale, 1.1, 0.12, 3.0, True, 0))
        elif cells.rounded[i]:
            if draw[0] < 0.5:  # a metaphase plate
                bodies.append((y, x, 11.0 * scale, 3.0, 0.05, 3.2, False, 0))
            else:  # a condensed, dying nucleus
                bodies.append((y, x, 12.0 * scale, 1.2, 0.10, 2.8, False, 0))
        elif draw[1] < phenotype.fragmented:
            packing = phenotype.packing
            pieces = max(2, rng.poisson(phenotype.fragments * (1 + 3 * packing)))
            share = rng.dirichlet(np.full(pieces, 2.5 + 6 * packing))
            for part in share:
                away, angle = (1.15 - 0.2 * packing) * r * np.sqrt(rng.uniform(0.05, 1)), rng.uniform(0, 2 * np.pi)
                size = max((1.25 + 0.4 * packing) * r * np.sqrt(part), 2.2 * scale)
                place = (y + away * np.sin(angle), x + away * np.cos(angle))
                bodies.append((*place, size, 1.2, 0.08, 1.15 * bright, False, 0, np.nan, 0.6 * packing))
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

    plain = (np.nan, phenotype.nucleus_dome)
    table = np.array([body if len(body) == 10 else (*body, *plain) for body in bodies], dtype=np.float64)
    count = len(table)
    turn = rng.uniform(0, 2 * np.pi, count)
    outline = ellipses(table[:, 2], table[:, 3], np.where(np.isnan(table[:, 8]), turn, table[:, 8]))
    outline *= np.exp(np.clip(waves(rng, table[:, 4], (2, 5)), -0.6, 0.6))
    largest = int(np.ceil(outline.max())) + 3
    distance, bins = polar_window(largest)
    largest = len(distance) // 2
    if phenotype.chromatin:
        coarse = phenotype.chromatin_coarse
        chromatin = np.exp(phenotype.chromatin * grain(rng, image_size, 0.5 + 1.5 * coarse, (6 + 14 * coarse) * scale))
    for i in range(count):
        row, column = int(round(table[i, 0])), int(round(table[i, 1]))
        reach = int(np.ceil(outline[i].max())) + 2
        cut = windows(row, column, reach, largest, image_size)
        spots = rng.poisson(table[i, 7])
        places = rng.uniform(-0.55, 0.55, size=(spots, 2)) * table[i, 2]
        if cut is None:
            continue
        inside, around = cut
        edge = outline[i].astype(np.float32)[bins[around]]
        soft = np.clip((edge - distance[around]) / (1.6 * scale) + 0.5, 0, 1)
        if table[i, 6]:  # chromatin ring around a monopolar aster
            soft *= np.clip((distance[around] - 0.45 * edge) / (2.5 * scale) + 0.5, 0, 1)
        texture = 1 + phenotype.nucleus_texture * fine[inside]
        sphere = np.sqrt(np.maximum(1 - (distance[around] / edge) ** 2, 0))
        dome = 0.82 + 0.18 * sphere
        if table[i, 9]:
            dome += table[i, 9] * (1.2 * sphere - dome)
        body = 1750 * table[i, 5] * soft * texture * dome
        if phenotype.chromatin:
            body *= chromatin[inside]
        if phenotype.nucleus_rim:
            body *= 1 + phenotype.nucleus_rim * np.exp(-(((edge - distance[around]) / (2.5 * scale) - 0.5) ** 2))
        if spots:
            dy = np.arange(inside[0].start, inside[0].stop)[:, None] - row
            dx = np.arange(inside[1].start, inside[1].stop)[None] - column
            for py, px in places:
                width = phenotype.nucleolus_radius * scale
                body *= 1 - 0.45 * np.exp(-((dy - py) ** 2 + (dx - px) ** 2) / (2 * (0.7 * width) ** 2))
        signal[inside] = np.maximum(signal[inside], body)
        mask[inside] = np.maximum(mask[inside], soft)
    return signal, mask


def _figure(rng, row, column, scale) -> list[tuple]:
    """Bodies of a rounded cell's chromatin in anaphase, condensed, in prometaphase, or in apoptotic pieces."""
    kind = rng.integers(4)
    if kind == 0:  # two parallel plates
        angle, half = rng.uniform(0, 2 * np.pi), rng.uniform(4, 12) * scale
        long, bright = rng.uniform(1.8, 3), rng.uniform(2, 3.2)
        middles = [(row + way * half * np.sin(angle), column + way * half * np.cos(angle)) for way in (-1, 1)]
        return [(*place, 8 * scale, long, 0.06, bright, False, 0, angle + np.pi / 2, 0) for place in middles]
    if kind == 1:
        return [
            (row, column, rng.uniform(6, 14) * scale, rng.uniform(1, 1.4), 0.05, rng.uniform(2, 4), False, 0, 0, 0.5)
        ]
    # Many clumps of chromosomes around the middle, or a few round pieces.
    pieces, smallest, elongation = (rng.integers(6, 16), 3, 1.5) if kind == 2 else (rng.integers(3, 9), 1.5, 1.1)
    away, angle = 12 * scale * np.sqrt(rng.uniform(size=pieces)), rng.uniform(0, 2 * np.pi, pieces)
    size, bright = rng.uniform(smallest, 6, pieces) * scale, rng.uniform(1.5, 3.5, pieces)
    return [
        (row + a * np.sin(t), column + a * np.cos(t), s, elongation, 0.06, b, False, 0, t, 0.3)
        for a, t, s, b in zip(away, angle, size, bright, strict=True)
    ]
