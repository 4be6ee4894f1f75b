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
from .image_paths import file_and_page
from .images import read_plane
from .png import encode_png, make_preview
from .quality import MEASURES, flaws, measure_plane
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
    z : str or None
        What becomes of planes of different focus: "max", "mean" or a plane's number.
    scale : float or None
        Multiplies every raw value, which is then rounded.
    drop_bad : bool
        Leave out fields with a flaw (see `dataset_scripts.quality`).
    """

    illumination: bool = True
    filter_size: float | None = None
    border: str = "edge"
    resize: float = 0.5
    interpolation: str = "spline"
    minimum_images: int = 8
    bits: int = 16
    z: str | None = None
    scale: float | None = None
    drop_bad: bool = False


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
    measures = [f"quality_{channel}_{measure}" for channel in channels for measure in MEASURES]
    features |= dict.fromkeys([*measures, "quality_alike"], datasets.Value("float32")) | {"quality": text}
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
        size = image_size(plate.fields, plate.channels, plate.preprocessing)
    levels = plate_levels(plate, size) if plate.preprocessing.illumination else {}
    functions = {channel: illumination_function(level) for channel, level in levels.items()}
    saved, shards, rows, flawed, dropped = {}, {}, {}, 0, []
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
        name, waiting, written = f"data/{part}/{plate.name}.parquet", [], 0
        with written_whole(output / name) as partial:
            with pq.ParquetWriter(partial, schema, compression="none") as writer:  # PNGs are compressed
                for row in plate_rows(plate, chosen, functions, size):
                    flawed += bool(row["quality"])
                    if row["quality"] and plate.preprocessing.drop_bad:
                        dropped.append({key: row[key] for key in ("well", "site", "quality")})
                        continue
                    waiting.append(row)
                    written += 1
                    if len(waiting) == ROWS_PER_GROUP:
                        writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                        waiting = []
                if waiting:
                    writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
        if written:
            shards[part], rows[part] = _file_record(output, name), written
        else:
            (output / name).unlink()
    return {
        "plate": plate.name,
        "image_size": [int(side) for side in size],
        "rows": rows,
        "fields_incomplete": int((paths == "").any(axis=1).sum()),
        "fields_flawed": flawed,
        "dropped": dropped,
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
                total += _raw_plane(record, channel, steps, size)
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
        raw = {c: _raw_plane(record, c, steps, size) for c in plate.channels if record[f"{c}_path"]}
        measured = {channel: measure_plane(plane) for channel, plane in raw.items()}
        planes, row = [], {}
        row["quality"], row["quality_alike"] = flaws(measured, raw)
        for channel in plate.channels:
            plane = None
            if channel in raw:
                plane = correct_plane(raw[channel], functions.get(channel), steps.resize, steps.interpolation)
            planes.append(plane)
            row |= {f"quality_{channel}_{name}": measured.get(channel, {}).get(name) for name in MEASURES}
            name = f"{record['plate']}_{record['well']}_s{record['site']}_{channel}.png"
            row[channel] = None if plane is None else {"bytes": encode_png(plane), "path": name}
        row["preview"] = {"bytes": make_preview(planes), "path": None}
        copied = (*COPIED, *(f"{channel}_file" for channel in plate.channels), "table_number", "image_number")
        yield row | {name: record[name] for name in copied} | {"source": plate.source}


def levels_digest(levels: np.ndarray) -> str:
    """SHA-256 of the little-endian uint16 values of an illumination function's levels, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(levels, "<u2").tobytes()).hexdigest()


def image_size(fields: pd.DataFrame, channels: list[str], steps: Preprocessing) -> tuple[int, int]:
    """Rows and columns of the first image of located fields."""
    record = fields.iloc[0].to_dict()
    return _raw_plane(record, next(channel for channel in channels if record[f"{channel}_path"]), steps).shape


def _raw_plane(record: dict, channel: str, steps: Preprocessing, size: tuple[int, int] | None = None) -> np.ndarray:
    where = f" (line {record['row']} of {record['table']}: plate {record['plate']}, well {record['well']})"
    file, page = file_and_page(record[f"{channel}_path"])
    page = record[f"{channel}_page"] if page is None else page
    return read_plane(
        Path(file),
        steps.bits,
        size,
        where,
        page=None if page < 0 else page,
        pages=record[f"{channel}_pages"],
        z=steps.z,
        scale=steps.scale,
    )


def _file_record(output: Path, name: str) -> dict:
    return {"path": name, "bytes": (output / name).stat().st_size, "sha256": digest(output / name)}
