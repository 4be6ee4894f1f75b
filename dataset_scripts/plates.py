"""Builds one plate of the dataset from its raw images, in two passes of bounded memory.

The first pass sums the plate's images per channel (for the illumination function); the second corrects, halves and
encodes them field by field. Memory holds one sum per channel and some encoded fields, whatever the number of fields.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from wsdino.files import digest, written_whole

from .illumination import FULL_SCALE, correct_plane, illumination_function, illumination_levels
from .images import read_plane
from .png import encode_png, make_preview
from .screen import PARTS

ROWS_PER_GROUP = 32
COPIED = ("compound", "concentration", "treatment", "moa", "batch", "plate", "well", "site", "replicate")


@dataclass(frozen=True)
class Preprocessing:
    """How raw planes become the dataset's planes.

    Attributes
    ----------
    illumination : bool
        Divide by the plate's illumination function.
    filter_size : float or None
        Size of its median filter; None = 320 for 1024 x 1280 raw pixels, in proportion for smaller images.
    border : str
        "edge" (CellProfiler 4.0, the paper's) or "inside" (4.2 and later).
    resize : float
        Factor of both sides.
    interpolation : str
        "spline" (order 3 of scikit-image 0.19 and later) or "bicubic" (of earlier ones).
    minimum_images : int
        A plate and channel with fewer images is not corrected: their mean still shows the cells themselves, and
        dividing by it would erase them.
    bits : int
        16 or 8: what the raw images must be. 8-bit images stay 8-bit.
    """

    illumination: bool = True
    filter_size: float | None = None
    border: str = "edge"
    resize: float = 0.5
    interpolation: str = "spline"
    minimum_images: int = 8
    bits: int = 16


@dataclass(frozen=True)
class Plate:
    """All that a worker process needs to build one plate.

    Attributes
    ----------
    name : str
    fields : pandas.DataFrame
        The plate's rows of `dataset_scripts.image_paths.find_images`: all its fields, annotated or not.
    channels : list of str
    preprocessing : Preprocessing
    source : str
        Text of the column `source`.
    image_size : (rows, columns) or None
        Size that every raw image must have; None for that of the plate's first image.
    """

    name: str
    fields: pd.DataFrame
    channels: list[str]
    preprocessing: Preprocessing
    source: str
    image_size: tuple[int, int] | None = None


def natural_key(name: str) -> list[str | int]:
    """Sorts numbers inside names by value: Week2 before Week10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def screen_features(channels: list[str]):
    """The dataset's columns for the given channel names, as `datasets.Features`.

    Labels are strings: integer ids would leak an order.
    """
    import datasets  # takes a second to import

    text, number, image = datasets.Value("string"), datasets.Value("int32"), datasets.Image()
    features = dict.fromkeys([*channels, "preview"], image)
    features |= {"compound": text, "concentration": datasets.Value("float64")}
    features |= dict.fromkeys(["treatment", "moa", "batch", "plate", "well"], text)
    features |= dict.fromkeys(["site", "replicate"], number)
    features |= dict.fromkeys(["source", *(f"{channel}_file" for channel in channels)], text)
    features |= dict.fromkeys(["table_number", "image_number"], number)
    return datasets.Features(features)


def illumination_name(plate: str, channel: str) -> str:
    """Path, inside the dataset, of the levels of a plate's illumination function."""
    return f"illumination/{plate}_{channel}.png"


def build_plate(plate: Plate, output: Path) -> dict:
    """Write one plate's Parquet files (`data/<part>/<plate>.parquet`) and illumination levels.

    Parameters
    ----------
    plate : Plate
    output : path
        Folder of the dataset.

    Returns
    -------
    dict
        The plate's record: its image size, rows per part, fields that lack a channel, and its files with their sizes
        and hashes.

    Raises
    ------
    UserError
        An image is damaged, or of another size or depth than it must have.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = plate.fields[[f"{channel}_path" for channel in plate.channels]]
    size = plate.image_size
    if size is None:
        size = read_plane(Path(paths.to_numpy()[paths.to_numpy() != ""][0]), plate.preprocessing.bits).shape
    levels = plate_levels(plate, size) if plate.preprocessing.illumination else {}
    functions = {channel: illumination_function(level) for channel, level in levels.items()}
    saved, shards, rows = {}, {}, {}
    for channel, level in levels.items():
        name = illumination_name(plate.name, channel)
        with written_whole(output / name) as partial:
            partial.write_bytes(encode_png(level))
        saved[channel] = {"file": _file_record(output, name), "sha256": levels_digest(level)}
    schema = screen_features(plate.channels).arrow_schema
    for part in PARTS:
        chosen = plate.fields[plate.fields["part"] == part]
        if chosen.empty:
            continue
        name, rows[part], waiting = f"data/{part}/{plate.name}.parquet", len(chosen), []
        with written_whole(output / name) as partial:
            with pq.ParquetWriter(partial, schema, compression="none") as writer:  # PNGs are compressed
                for row in plate_rows(plate, chosen, functions, size):
                    waiting.append(row)
                    if len(waiting) == ROWS_PER_GROUP:
                        writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                        waiting = []
                if waiting:
                    writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
        shards[part] = _file_record(output, name)
    return {
        "plate": plate.name,
        "image_size": [int(side) for side in size],
        "rows": rows,
        "fields_incomplete": int((paths == "").any(axis=1).sum()),
        "shards": shards,
        "functions": saved,
    }


def plate_levels(plate: Plate, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """First pass: the illumination levels of every channel of a plate that has enough images.

    Parameters
    ----------
    plate : Plate
    size : (rows, columns)
        Every raw image must have it.

    Returns
    -------
    dict
        Channel -> `(rows, columns)` uint16 of `dataset_scripts.illumination.illumination_levels`.
    """
    levels, steps = {}, plate.preprocessing
    for channel in plate.channels:
        total, count = np.zeros(size, np.uint32), 0
        for record in plate.fields.to_dict("records"):
            if record[f"{channel}_path"]:
                total += _raw_plane(record, channel, steps.bits, size)
                count += 1
        if count >= steps.minimum_images:
            # On the scale of 16 bits also for 8: the levels are whole numbers, and 256 of them would be steps.
            mean = total / count * (FULL_SCALE / (2**steps.bits - 1))
            levels[channel] = illumination_levels(mean, steps.filter_size, steps.border)
    return levels


def plate_rows(
    plate: Plate, fields: pd.DataFrame, functions: dict[str, np.ndarray], size: tuple[int, int]
) -> Iterator[dict]:
    """Second pass: finished rows of the dataset, images encoded; a missing channel is None.

    Parameters
    ----------
    plate : Plate
    fields : pandas.DataFrame
        The rows of `plate.fields` that are asked for.
    functions : dict
        Channel -> `(rows, columns)` float32 illumination function; a channel without one is not corrected.
    size : (rows, columns)
        Every raw image must have it.
    """
    steps = plate.preprocessing
    for record in fields.to_dict("records"):
        planes, row = [], {}
        for channel in plate.channels:
            plane = None
            if record[f"{channel}_path"]:
                plane = _raw_plane(record, channel, steps.bits, size)
                plane = correct_plane(plane, functions.get(channel), steps.resize, steps.interpolation)
            planes.append(plane)
            name = f"{record['plate']}_{record['well']}_s{record['site']}_{channel}.png"
            row[channel] = None if plane is None else {"bytes": encode_png(plane), "path": name}
        row["preview"] = {"bytes": make_preview(planes), "path": None}
        copied = (*COPIED, *(f"{channel}_file" for channel in plate.channels), "table_number", "image_number")
        yield row | {name: record[name] for name in copied} | {"source": plate.source}


def levels_digest(levels: np.ndarray) -> str:
    """SHA-256 of the little-endian uint16 values of an illumination function's levels, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(levels, "<u2").tobytes()).hexdigest()


def _raw_plane(record: dict, channel: str, bits: int, size: tuple[int, int]) -> np.ndarray:
    where = f" (line {record['row']} of {record['table']}: plate {record['plate']}, well {record['well']})"
    return read_plane(Path(record[f"{channel}_path"]), bits, size, where)


def _file_record(output: Path, name: str) -> dict:
    return {"path": name, "bytes": (output / name).stat().st_size, "sha256": digest(output / name)}
