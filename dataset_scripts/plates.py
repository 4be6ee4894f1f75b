"""Turns the raw images of one plate into finished rows of the dataset, in two passes of bounded memory.

The first pass sums a plate's images a channel (for the illumination function); the second corrects, halves and
encodes them field by field. Memory holds one sum a channel and one field, whatever the number of fields.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from .illumination import FULL_SCALE, correct_plane, illumination_levels
from .images import read_image
from .screen import ScreenError

PREVIEW_SIDE = 160


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


def find_file(raw: Path, file: str) -> Path | None:
    """Where a file of the table lies under `raw`: at its path, in its last folder (as in the zips), or flat."""
    if not file:
        return None
    parts = file.split("/")
    for tail in dict.fromkeys((file, "/".join(parts[-2:]), parts[-1])):
        if (raw / tail).is_file():
            return raw / tail
    return None


def present_images(
    fields: pd.DataFrame, raw: Path, channels: list[str], allow_missing: bool, table: str, progress: bool = False
) -> pd.DataFrame:
    """Which images of the fields lie under `raw`: one bool a field and channel.

    With `progress`, a bar is shown once it has taken two seconds, as it does on a cold or distant disk.

    Raises
    ------
    ScreenError
        One is absent, unless `allow_missing`.
    """
    bar = tqdm(total=len(fields) * len(channels), desc="looking for images", disable=not progress, delay=2)
    paths = pd.DataFrame(index=fields.index, columns=channels, dtype=object)
    with bar:
        for channel in channels:
            found = []
            for file in fields[f"{channel}_file"]:
                found.append(find_file(raw, file))
                bar.update()
            paths[channel] = found
    present = paths.notna()
    found = paths.stack().dropna()
    twice = found[found.duplicated(keep=False)]
    if len(twice):
        (one, _), (two, _) = twice.index[twice == twice.iloc[0]][:2]
        raise ScreenError(
            f"lines {fields.loc[one, 'row']} and {fields.loc[two, 'row']} of {table} both lead to {twice.iloc[0]}: "
            "keep the folders that the table names"
        )
    absent = int((~present).to_numpy().sum())
    if absent and not allow_missing:
        i = present.index[(~present.all(axis=1)).to_numpy()][0]
        channel = next(c for c in channels if not present.loc[i, c])
        name = fields.loc[i, f"{channel}_file"] or f"(none named for {channel})"
        raise ScreenError(
            f"{name} (line {fields.loc[i, 'row']} of {table}) is not in {raw}; {absent:,} of {present.size:,} images "
            "are absent: give the folder that holds them, or pass --allow_missing to build what is there"
        )
    return present


def read_plane(path: Path, bits: int = 16, size: tuple[int, int] | None = None, where: str = "") -> np.ndarray:
    """Read one grey image.

    Parameters
    ----------
    path : path
    bits : int
        16 or 8: the depth it must have.
    size : (rows, columns), optional
        The size it must have.
    where : str
        Names the row of the table in an error message.

    Returns
    -------
    numpy.ndarray
        `(rows, columns)` uint16 or uint8.

    Raises
    ------
    ScreenError
        It cannot be read (see :func:`dataset_scripts.images.read_image`), or has another depth or size.
    """
    wanted = f"{path}{where}"
    plane, mode = read_image(path, wanted)
    depth = 8 if plane.dtype == np.uint8 else 16 if plane.dtype == np.uint16 else 0
    if depth != bits:
        found, mend = {
            0: (f"of mode {mode}", ", as whole numbers without a sign"),
            8: ("8-bit", ", or build an 8-bit screen with --bits 8"),
            16: ("16-bit", ", or leave --bits 8 out"),
        }[depth]
        raise ScreenError(f"{wanted} is {found}, not {bits}-bit: give the original files{mend}")
    if size is not None and plane.shape != tuple(size):
        raise ScreenError(
            f"{wanted} is {plane.shape[1]} x {plane.shape[0]} pixels where the screen's first image is "
            f"{size[1]} x {size[0]}: all images of a screen must have one size"
        )
    return plane


def encode_png(plane: np.ndarray) -> bytes:
    """A lossless grey PNG of 8 or 16 bits.

    Camera noise gives deflate nothing to match, so "sub" filtering and run-length + Huffman coding alone make files
    3 to 5 % smaller than Pillow's fastest level at a quarter of its time (measured 6-8 against 19-29 ms for
    640 x 512 planes), which also decode faster.
    """
    depth = plane.dtype.itemsize
    rows, columns = plane.shape
    big = np.ascontiguousarray(plane.astype(">u2" if depth == 2 else np.uint8, copy=False)).view(np.uint8)
    big = big.reshape(rows, columns * depth)
    filtered = np.empty((rows, columns * depth + 1), np.uint8)
    filtered[:, 0] = 1
    filtered[:, 1 : depth + 1] = big[:, :depth]
    np.subtract(big[:, depth:], big[:, :-depth], out=filtered[:, depth + 1 :])
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    data = packer.compress(filtered) + packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", columns, rows, 8 * depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def make_preview(planes: list[np.ndarray | None]) -> bytes:
    """A small 8-bit RGB JPEG to look at: first channel blue, second green, third red (DNA, tubulin, actin).

    Each channel is stretched to its own 99.7th percentile, so brightness must not be compared between previews.
    """
    size = next(plane.shape for plane in planes if plane is not None)
    step = max(1, round(max(size) / PREVIEW_SIDE))
    small = (size[0] // step, size[1] // step)
    picture = np.zeros((*small, 3), np.uint8)
    for colour, plane in zip((2, 1, 0), planes, strict=False):
        if plane is None:
            continue
        cut = plane[: small[0] * step, : small[1] * step]
        mean = cut.reshape(small[0], step, small[1], step).mean(axis=(1, 3), dtype=np.float32)
        low, high = np.percentile(mean, (1, 99.7))
        picture[..., colour] = np.clip((mean - low) * (255 / max(high - low, 1e-6)), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def plate_levels(
    fields: pd.DataFrame,
    raw: Path,
    channels: list[str],
    preprocessing: Preprocessing,
    size: tuple[int, int],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """First pass: the illumination levels of every channel of a plate that has enough images.

    Parameters
    ----------
    fields : pandas.DataFrame
        The plate's rows of :func:`dataset_scripts.screen.read_screen`: all its fields, annotated or not.
    raw : path
        Folder of the images.
    channels : list of str
    preprocessing : Preprocessing
    size : (rows, columns)
        Every raw image must have it.
    tick : callable
        Called once a field and channel.
    """
    levels = {}
    for channel in channels:
        total, count = np.zeros(size, np.uint32), 0
        for record in fields.to_dict("records"):
            path = find_file(raw, record[f"{channel}_file"])
            if path is not None:
                total += read_plane(path, preprocessing.bits, size, _where(record))
                count += 1
            tick()
        if count >= preprocessing.minimum_images:
            # On the scale of 16 bits also for 8: the levels are whole numbers, and 256 of them would be steps.
            mean = total / count * (FULL_SCALE / (2**preprocessing.bits - 1))
            levels[channel] = illumination_levels(mean, preprocessing.filter_size, preprocessing.border)
    return levels


def plate_rows(
    fields: pd.DataFrame,
    raw: Path,
    channels: list[str],
    preprocessing: Preprocessing,
    functions: dict[str, np.ndarray],
    size: tuple[int, int],
    source: str,
) -> Iterator[dict]:
    """Second pass: the finished rows of a plate, images encoded. A missing channel is None."""
    for record in fields.to_dict("records"):
        planes: list[np.ndarray | None] = []
        row = {}
        for channel in channels:
            path = find_file(raw, record[f"{channel}_file"])
            plane = None
            if path is not None:
                plane = read_plane(path, preprocessing.bits, size, _where(record))
                plane = correct_plane(plane, functions.get(channel), preprocessing.resize, preprocessing.interpolation)
            planes.append(plane)
            name = f"{record['plate']}_{record['well']}_s{record['site']}_{channel}.png"
            row[channel] = None if plane is None else {"bytes": encode_png(plane), "path": name}
        if all(plane is None for plane in planes):
            continue
        row["preview"] = {"bytes": make_preview(planes), "path": None}
        for name in ("compound", "concentration", "treatment", "moa", "batch", "plate", "well", "site", "replicate"):
            row[name] = record[name]
        row["source"] = source
        for channel in channels:
            row[f"{channel}_file"] = record[f"{channel}_file"]
        row["table_number"], row["image_number"] = record["table_number"], record["image_number"]
        yield row


def levels_digest(levels: np.ndarray) -> str:
    """sha256 of the little-endian uint16 values of an illumination function's levels."""
    return hashlib.sha256(np.ascontiguousarray(levels, "<u2").tobytes()).hexdigest()


def _where(record: dict) -> str:
    return f" (line {record['row']} of the image table: plate {record['plate']}, well {record['well']})"
