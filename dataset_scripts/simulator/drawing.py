"""Draws one field of view of a monolayer of cells under one phenotype: nuclei, tubulin network and actin."""

from __future__ import annotations

import numpy as np

from .actin import draw_actin
from .cells import Cells, cell_map, place_cells
from .nuclei import draw_nuclei
from .optics import Optics, photograph
from .phenotypes import Phenotype
from .tubulin import draw_tubulin


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
    return _draw(rng, image_size, phenotype, optics, scale)[0]


def _draw(rng, image_size, phenotype, optics, scale) -> tuple[np.ndarray, Cells]:
    """The planes of one field, and the geometry of the cells in it."""
    cells = place_cells(rng, image_size, phenotype, optics, scale)
    label, depth, rim = cell_map(cells, image_size)
    dna, nuclear = draw_nuclei(rng, cells, phenotype, image_size, scale)
    tubulin = draw_tubulin(rng, cells, phenotype, label, depth, nuclear, scale)
    actin = draw_actin(rng, cells, phenotype, label, depth, rim, scale)
    return photograph(rng, (dna, tubulin, actin), optics, scale), cells
