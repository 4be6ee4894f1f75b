"""The DNA channel: interphase, mitotic and fragmented nuclei."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .cells import Cells, ellipses, polar_window, waves, windows
from .phenotypes import Phenotype


def draw_nuclei(
    rng: np.random.Generator, cells: Cells, phenotype: Phenotype, image_size: tuple[int, int], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """DNA signal (grey levels) and a soft mask of the nuclei in [0, 1]: two float32 arrays of `image_size`."""
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
    outline = ellipses(table[:, 2], table[:, 3], rng.uniform(0, 2 * np.pi, count))
    outline *= np.exp(np.clip(waves(rng, table[:, 4], (2, 5)), -0.6, 0.6))
    largest = int(np.ceil(outline.max())) + 3
    distance, bins = polar_window(largest)
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
