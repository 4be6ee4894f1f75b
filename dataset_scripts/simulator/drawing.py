"""Draws one field of view of a monolayer of cells under one phenotype: nuclei, tubulin network and actin."""

from __future__ import annotations

import numpy as np

from .actin import draw_actin
from .cells import Cells, cell_map, expected_cells, place_cells
from .nuclei import draw_nuclei
from .optics import Optics, damage, photograph
from .phenotypes import Phenotype
from .surroundings import SURROUNDINGS, draw_surroundings
from .tubulin import draw_tubulin

MARGIN = 6  # pixels drawn around a crop: 68 + 2 * 6 = 80 is a fast size for Fourier transforms


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
        Shape of the raw image in pixels. The size of a cell does not depend on it: a smaller image holds fewer cells.
    phenotype : Phenotype
    optics : Optics
    scale : float
        Multiplies every length (1 = the raw pixels of BBBC021).

    Returns
    -------
    numpy.ndarray
        `(3, rows, columns)` uint16 in the order DNA, tubulin, actin, every value a multiple of 16.
    """
    cells = place_cells(rng, image_size, phenotype, optics, scale)
    return _draw(rng, cells, image_size, phenotype, optics, scale)


def draw_crops(
    rng: np.random.Generator,
    phenotype: Phenotype,
    optics: Optics,
    count: int,
    size: int = 68,
    jitter: float = 4.0,
) -> np.ndarray:
    """Place the cells of a field, large enough for about `count` of them, and draw crops around its nuclei.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of every random number: the same state draws the same crops.
    phenotype : Phenotype
    optics : Optics
    count : int
        Most crops to return, at least 1.
    size : int
        Side of a crop in raw pixels of BBBC021.
    jitter : float
        Largest distance in pixels, along either axis, of a crop's middle from its nucleus.

    Returns
    -------
    numpy.ndarray
        `(cells, 3, size, size)` uint16 in the order DNA, tubulin, actin: each crop lies wholly inside the field and is
        of another cell, in random order. Sparse phenotypes may give fewer than `count` cells, or none.
    """
    # Nuclei of complete crops lie in the middle of the field, which is to hold half as many cells again as are wanted.
    # A population sparser than a quarter of a monolayer would need too large a field: it gives fewer crops.
    per_pixel = max(expected_cells(1, 1, phenotype, optics), expected_cells(1, 1, Phenotype(density=0.25), Optics()))
    side = int(np.ceil(np.sqrt(1.5 * count / per_pixel))) + size
    cells = place_cells(rng, (side, side), phenotype, optics, 1.0)
    order = rng.permutation(len(cells.row))
    shift = rng.uniform(-jitter, jitter, (len(order), 2))
    middle = np.stack([cells.nucleus_row, cells.nucleus_column], axis=1)[order] + shift
    corner = np.rint(middle).astype(int) - size // 2
    corner = corner[((corner >= 0) & (corner <= side - size)).all(axis=1)][:count]
    # Only the crops are drawn, each with a margin for blurs, and so not what lies between them.
    crops = np.empty((len(corner), 3, size, size), np.uint16)
    inner = np.s_[MARGIN : MARGIN + size]
    window = (size + 2 * MARGIN, size + 2 * MARGIN)
    for crop, place in zip(crops, corner, strict=True):
        near = cells.around(place - MARGIN, window)
        crop[:] = _draw(rng, near, window, phenotype, optics, 1.0)[:, inner, inner]
        if rng.uniform() < optics.damaged:
            damage(rng, crop)
    return crops


def _draw(rng, cells: Cells, image_size, phenotype, optics, scale) -> np.ndarray:
    """The planes of one field with these cells."""
    label, depth, rim = cell_map(cells, image_size)
    dna, nuclear = draw_nuclei(rng, cells, phenotype, image_size, scale)
    tubulin = draw_tubulin(rng, cells, phenotype, label, depth, rim, nuclear, scale)
    actin = draw_actin(rng, cells, phenotype, label, depth, rim, scale)
    signals = (dna, tubulin, actin)
    if any(getattr(phenotype, name) for name in SURROUNDINGS):
        signals = draw_surroundings(rng, np.stack(signals), cells, phenotype, label, depth, scale)
    return photograph(rng, signals, optics, scale)
