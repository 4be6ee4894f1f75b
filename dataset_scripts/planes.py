"""Opens a dataset, and reads one channel of it as one memory-mapped array, through an explicit, checked cache.

Decoding a PNG costs a few milliseconds a plane, every epoch and in every process; a memory map costs a page fault.
The cache holds one `.npy` a channel, written once beside its name and renamed when complete, under a lock that dies
with its process: two processes may start at once, and one may die while writing. Whoever writes a cache first removes
those that nobody opened for 30 days, and what died half-written. A process that still maps one keeps its pages: on
Linux and macOS a removed file lives as long as a map of it, on Windows a mapped file cannot be removed and is left.
All of the folder may be deleted by hand at any time; it is made anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from .images import read_image
from .screen import ScreenError

UNUSED_DAYS, HALF_WRITTEN_DAYS = 30, 1


def load_part(path, part: str):
    """One part of a dataset folder or Hub id, as `load_dataset(path, part, split="train")` but never of another time.

    The datasets library knows a local folder by its name and its card alone: images that changed under an unchanged
    card, and those of another folder of the same name and card, it would take from its cache. Here the state of the
    card and of the part's data files (place, name, size and time) names the cache, and becomes part of the dataset's
    fingerprint. Other files of the folder, such as a run kept there, change nothing.

    Parameters
    ----------
    path : str or path
    part : str
        Name of a configuration.

    Returns
    -------
    datasets.Dataset

    Raises
    ------
    ValueError, OSError, datasets.exceptions.DatasetsError
        As `load_dataset` does.
    """
    import datasets

    folder = Path(path).expanduser()
    if not folder.is_dir():
        return datasets.load_dataset(str(path), part, split="train")
    folder = folder.resolve()
    data_files = datasets.load_dataset_builder(str(folder), part).config.data_files or {}
    files = {str(folder / "README.md"), *(file for split in data_files.values() for file in split)}
    state = [(file, info.st_size, info.st_mtime_ns) for file in sorted(files) if (info := _stat(file))]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"wsdino_{digest}"
    dataset = datasets.load_dataset(str(folder), part, split="train", cache_dir=str(cache))
    try:
        os.utime(cache)  # used today
        for old in cache.parent.glob("wsdino_" + "[0-9a-f]" * 16):
            if time.time() - old.stat().st_mtime > UNUSED_DAYS * 86400:
                shutil.rmtree(old)
    except OSError:  # another process was faster, or a cache that others may only read
        pass
    # The library's own fingerprint is of names alone, too, and other caches go by it.
    dataset._fingerprint = hashlib.sha256(f"{dataset._fingerprint} {digest}".encode()).hexdigest()[:16]
    return dataset


def _stat(file: str) -> os.stat_result | None:
    """None where there is no such file: a folder needs no card, and a link may lead nowhere."""
    try:
        return os.stat(file)
    except OSError:
        return None


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
        Show a progress bar, and the cache's size, while it is written.

    Returns
    -------
    numpy.ndarray
        `(fields, rows, columns)` uint16 (uint8 for an 8-bit screen: nothing is rescaled; read the dtype).

    Raises
    ------
    ScreenError
        No such channel, no rows, a field without this channel, images of different sizes or depths, or a cache that
        cannot be written.
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
                _prune(folder)
                try:
                    _write(dataset, channel, target, note, progress)
                except OSError as error:
                    raise ScreenError(
                        f"{target} cannot be written ({error.strerror}): free some space, or name another folder "
                        "(HF_DATASETS_CACHE)"
                    ) from error
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
    try:
        os.utime(note)  # used today
    except OSError:  # a cache that others may only read
        pass
    return planes


def _prune(folder: Path) -> None:
    """Remove caches that nobody opened for long, and what a writer that died left; nothing else."""
    for path in folder.iterdir():
        own = re.fullmatch(r"(\w+-\w+-\d+)(\.json|\.npy\.partial)", path.name)
        try:
            days = (time.time() - path.stat().st_mtime) / 86400
            if own and days > (UNUSED_DAYS if own[2] == ".json" else HALF_WRITTEN_DAYS):
                path.unlink()
                if own[2] == ".json":  # its note: no process takes the planes for whole from now on
                    (folder / f"{own[1]}.npy").unlink()
        except OSError:  # another process was faster, or has it open on Windows
            continue


def _sample_digest(planes: np.ndarray) -> str:
    """sha256 of up to 16 planes spread over the cache: all of it would cost seconds at every start."""
    digest = hashlib.sha256()
    for i in np.unique(np.linspace(0, len(planes) - 1, 16).astype(int)):
        digest.update(planes[i].tobytes())
    return digest.hexdigest()


def _decoded(dataset, channel: str, progress: bool):
    import datasets

    encoded = dataset.select_columns([channel]).with_format(None).cast_column(channel, datasets.Image(decode=False))
    bar = tqdm(range(len(dataset)), desc=f"caching {channel}", unit="plane", disable=not progress, mininterval=0.5)
    for i in bar:
        value = encoded[i][channel]
        if value is None:
            raise ScreenError(f"row {i} has no {channel} image: filter the rows that lack it before training")
        source = io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]
        plane, mode = read_image(source, f"row {i}: {channel} image")
        if plane.dtype not in (np.uint8, np.uint16):
            raise ScreenError(f"row {i}: {channel} image is of mode {mode}, not 8 or 16 bits: build the dataset so")
        if i == 0:
            bar.set_description(f"caching {channel}, {len(dataset) * plane.nbytes / 1e9:.2f} GB")
        yield plane


def _write(dataset, channel: str, target: Path, note: Path, progress: bool) -> None:
    partial = target.with_name(target.name + ".partial")
    first = None
    # Written as a file and not through a map: a full disk is then an error, and not the end of the process (SIGBUS).
    with open(partial, "wb") as file:
        for i, plane in enumerate(_decoded(dataset, channel, progress)):
            if first is None:
                first = plane
                header = {"descr": plane.dtype.str, "fortran_order": False, "shape": (len(dataset), *plane.shape)}
                np.lib.format.write_array_header_1_0(file, header)
            if plane.shape != first.shape or plane.dtype != first.dtype:
                raise ScreenError(
                    f"row {i}: {channel} is {plane.dtype} of shape {plane.shape} where row 0 is {first.dtype} of "
                    f"shape {first.shape}: all fields must have one size and depth"
                )
            file.write(np.ascontiguousarray(plane))
    planes = np.load(partial, mmap_mode="r")
    sample = _sample_digest(planes)
    del planes
    size = partial.stat().st_size
    os.replace(partial, target)
    partial = note.with_name(note.name + ".partial")
    partial.write_text(json.dumps({"bytes": size, "sample": sample}))
    os.replace(partial, note)
