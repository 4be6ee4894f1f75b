"""A cache of drawn single cells: thousands of phenotypes, each under two optics, drawn by worker processes.

The folder holds parts of 100 phenotypes, `part-00000.npz` and so on, each written whole. A phenotype's cells depend on
the seed and on its own number alone, so the cache does not depend on how many processes drew it, and an interrupted
drawing continues where it stopped.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from wsdino.errors import UserError
from wsdino.files import claim_folder, locked, read_json, write_json, written_whole

from .drawing import draw_crops
from .optics import random_optics
from .phenotypes import Phenotype, mechanism_blend, random_phenotype

CHANNELS = ("dna", "tubulin", "actin")
PART = 100  # phenotypes per file
SOURCES = {"mechanisms": mechanism_blend, "ranges": random_phenotype}


@dataclass(frozen=True)
class DrawingSettings:
    """What a cache of drawn cells holds.

    Parameters
    ----------
    source : {"mechanisms", "ranges"}
        Phenotypes are blends of what the twelve mechanisms of BBBC021 look like (`mechanism_blend`), or every number
        is drawn from a wide range (`random_phenotype`), so that no mechanism is behind them.
    phenotypes : int
        Phenotypes to draw, at least 1.
    cells : int
        Most cells per phenotype and optics; sparse phenotypes have fewer, or none.
    size : int
        Side of a crop in raw pixels of BBBC021.
    seed : int
        Of every random draw.
    """

    source: Literal["mechanisms", "ranges"] = "mechanisms"
    phenotypes: int = 8_000
    cells: int = 4
    size: int = 68
    seed: int = 0


@dataclass(frozen=True)
class DrawnCells:
    """One channel of a cache.

    Parameters
    ----------
    planes : numpy.ndarray
        `(cells, size, size)` uint16.
    phenotype : numpy.ndarray
        `(cells,)` int64, row of `numbers`.
    optics : numpy.ndarray
        `(cells,)` int64, 0 or 1.
    numbers : numpy.ndarray
        `(phenotypes, numbers)` float32, in the order of `Phenotype`'s fields.
    """

    planes: np.ndarray
    phenotype: np.ndarray
    optics: np.ndarray
    numbers: np.ndarray


def draw_part(settings: DrawingSettings, first: int) -> dict[str, np.ndarray]:
    """Draw the cells of up to `PART` phenotypes from number `first` on, as the arrays of one file."""
    crops, phenotype, optics, numbers = [], [], [], []
    for index in range(first, min(first + PART, settings.phenotypes)):
        random = np.random.default_rng([settings.seed, index])
        drawn = SOURCES[settings.source](random)
        numbers.append(astuple(drawn))
        for which in range(2):
            cells = draw_crops(random, drawn, random_optics(random), settings.cells, settings.size)
            crops.append(cells)
            phenotype += [index] * len(cells)
            optics += [which] * len(cells)
    planes = np.concatenate(crops)
    return {
        **{name: planes[:, channel] for channel, name in enumerate(CHANNELS)},
        "phenotype": np.array(phenotype, np.int64),
        "optics": np.array(optics, np.int64),
        "numbers": np.array(numbers, np.float32),
    }


def _write_part(settings: DrawingSettings, first: int, path: Path) -> int:
    arrays = draw_part(settings, first)
    with written_whole(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)
    return len(arrays["optics"])


def _part_paths(settings: DrawingSettings, folder: Path) -> Iterator[tuple[int, Path]]:
    for number in range(-(-settings.phenotypes // PART)):
        yield number * PART, folder / f"part-{number:05d}.npz"


def draw_cells(folder: str | Path, settings: DrawingSettings, processes: int = 1) -> None:
    """Draw the cells of a cache that are not there yet, with a progress bar.

    Parameters
    ----------
    folder : str or Path
        New or empty, or holding a cache of the same settings.
    processes : int
        Worker processes.

    Raises
    ------
    UserError
        The folder holds something else, or cells drawn with other settings.
    """
    folder = Path(folder)
    described = folder / "drawing.json"
    wanted = asdict(settings) | {"numbers": [each.name for each in fields(Phenotype)]}
    with locked(folder.with_name(folder.name + ".lock"), f"Another process is drawing into {folder}: wait for it."):
        if claim_folder(folder, described.name, "drawn cells"):
            before = read_json(described, fix="name another folder")
            changed = [name for name, value in wanted.items() if before.get(name) != value]
            if changed:
                raise UserError(f"{folder} holds cells drawn with another {', '.join(changed)}: name another folder.")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(described, wanted)
        missing = [(first, path) for first, path in _part_paths(settings, folder) if not path.exists()]
        if not missing:
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
            firsts, paths = zip(*missing, strict=True)
            done = pool.map(_write_part, [settings] * len(missing), firsts, paths)
            with tqdm(desc="Drawing cells", unit="cell", total=None) as bar:
                for count in done:
                    bar.update(count)


def open_drawn_cells(folder: str | Path, channel: str) -> DrawnCells:
    """Read one channel of a whole cache into memory (about 9 kB per cell).

    Raises
    ------
    UserError
        The cache is absent, incomplete or empty, or has no such channel.
    """
    folder = Path(folder)
    if channel not in CHANNELS:
        raise UserError(f"--channels {channel}: drawn cells have the channels {', '.join(CHANNELS)}.")
    described = read_json(folder / "drawing.json", fix="draw the cells first")
    settings = DrawingSettings(**{each.name: described[each.name] for each in fields(DrawingSettings)})
    parts = []
    for _, path in _part_paths(settings, folder):
        if not path.exists():
            raise UserError(f"{path} is absent: draw the cells again, which continues where it stopped.")
        with np.load(path) as part:
            parts.append({name: part[name] for name in (channel, "phenotype", "optics", "numbers")})
    planes, phenotype, optics, numbers = (
        np.concatenate([part[name] for part in parts]) for name in (channel, "phenotype", "optics", "numbers")
    )
    if not len(planes):
        raise UserError(f"{folder} holds no cell: its phenotypes are too sparse to be drawn; choose others.")
    return DrawnCells(planes, phenotype, optics, numbers)
