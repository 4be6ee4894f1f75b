"""Reads one channel of a dataset as one memory-mapped array, through an explicit, checked cache.

Decoding a PNG costs a few milliseconds a plane, every epoch and in every process; a memory map costs a page fault.
The cache holds one `.npy` a channel, written once beside its name and renamed when complete, under a lock that dies
with its process: two processes may start at once, and one may die while writing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from .images import read_image
from .screen import ScreenError


def fields_with(dataset, channels):
    """The fields that have an image in every one of `channels`, in order; the dataset itself if all have.

    Raises
    ------
    ScreenError
        Where no field has them all.
    """
    encoded = dataset.select_columns(list(channels)).flatten_indices() if dataset._indices else dataset
    present = np.ones(len(dataset), dtype=bool)
    for channel in channels:
        present &= encoded.data.column(channel).is_valid().to_numpy()
    if not present.any():
        raise ScreenError(f"no field of the dataset has an image in {' and '.join(channels)}: choose other channels")
    return dataset if present.all() else dataset.select(np.flatnonzero(present))


def open_planes(dataset, channel: str, cache_dir=None, progress: bool = True) -> np.ndarray:
    """All planes of one channel as a read-only memory map.

    Parameters
    ----------
    dataset : datasets.Dataset
        With an `Image()` column `channel`. Rows keep their order.
    channel : str
    cache_dir : path, optional
        Default: `wsdino_planes` in the datasets cache. The file's name holds the dataset's fingerprint, so another
        selection or version of the dataset gets another file.
    progress : bool
        Show a progress bar while the cache is written.

    Returns
    -------
    numpy.ndarray
        `(fields, rows, columns)` uint16 (uint8 for an 8-bit screen: nothing is rescaled; read the dtype).

    Raises
    ------
    ScreenError
        No such channel, no rows, a field without this channel, or images of different sizes or depths.
    """
    import datasets

    if channel not in dataset.column_names:
        images = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
        raise ScreenError(f"the dataset has no channel {channel!r}: choose among {', '.join(images)}")
    if not len(dataset):
        raise ScreenError("the dataset has no rows: choose another part or another filter")
    folder = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "wsdino_planes"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{channel}-{dataset._fingerprint}-{len(dataset)}"
    target, note = folder / f"{name}.npy", folder / f"{name}.json"
    planes = _open_checked(target, note, len(dataset))
    if planes is None:
        with FileLock(folder / f"{name}.lock"):
            planes = _open_checked(target, note, len(dataset))
            if planes is None:
                _write(dataset, channel, target, note, progress)
                planes = _open_checked(target, note, len(dataset))
    return planes


def _open_checked(target: Path, note: Path, count: int) -> np.ndarray | None:
    """The memory map, if its note says that it is complete and its size and head agree with it."""
    try:
        known = json.loads(note.read_text())
        if target.stat().st_size != known["bytes"]:
            return None
        planes = np.load(target, mmap_mode="r")
    except (OSError, ValueError, KeyError):
        return None
    if len(planes) != count or _sample_digest(planes) != known.get("sample"):
        return None
    return planes


def _sample_digest(planes: np.ndarray) -> str:
    """sha256 of up to 16 planes spread over the cache: all of it would cost seconds at every start."""
    digest = hashlib.sha256()
    for i in np.unique(np.linspace(0, len(planes) - 1, 16).astype(int)):
        digest.update(planes[i].tobytes())
    return digest.hexdigest()


def _decoded(dataset, channel: str, progress: bool):
    import datasets

    encoded = dataset.select_columns([channel]).with_format(None).cast_column(channel, datasets.Image(decode=False))
    for i in tqdm(range(len(dataset)), desc=f"caching {channel}", unit="plane", disable=not progress, mininterval=0.5):
        value = encoded[i][channel]
        if value is None:
            raise ScreenError(f"row {i} has no {channel} image: filter the rows that lack it before training")
        source = io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]
        plane, mode = read_image(source, f"row {i}: {channel} image")
        if plane.dtype not in (np.uint8, np.uint16):
            raise ScreenError(f"row {i}: {channel} image is of mode {mode}, not 8 or 16 bits: build the dataset so")
        yield plane


def _write(dataset, channel: str, target: Path, note: Path, progress: bool) -> None:
    partial = target.with_name(target.name + ".partial")
    planes = None
    for i, plane in enumerate(_decoded(dataset, channel, progress)):
        if planes is None:
            planes = np.lib.format.open_memmap(partial, "w+", plane.dtype, (len(dataset), *plane.shape))
        if plane.shape != planes.shape[1:] or plane.dtype != planes.dtype:
            raise ScreenError(
                f"row {i}: {channel} is {plane.dtype} of shape {plane.shape} where row 0 is {planes.dtype} of shape "
                f"{planes.shape[1:]}: all fields must have one size and depth"
            )
        planes[i] = plane
    planes.flush()
    sample = _sample_digest(planes)
    del planes
    size = partial.stat().st_size
    os.replace(partial, target)
    partial = note.with_name(note.name + ".partial")
    partial.write_text(json.dumps({"bytes": size, "sample": sample}))
    os.replace(partial, note)
