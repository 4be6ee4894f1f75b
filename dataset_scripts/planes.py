"""Reads one channel of a dataset as one memory-mapped array, through an explicit, checked cache.

Decoding a PNG costs a few milliseconds per plane, in every epoch and every process; a memory map costs a page fault.
The cache holds one `.npy` per channel, written beside its name and renamed when complete, under a lock that dies with
its process: two processes may start at once, and one may die while writing. Before a cache is written, caches unused
for 30 days and leftovers of interrupted writes are removed. A process that still maps a removed file keeps its pages
on Linux and macOS; on Windows a mapped file cannot be removed and is left. The folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from wsdino.errors import UserError
from wsdino.files import read_json, write_json, written_whole

from .open_dataset import Fields, Planes

UNUSED_DAYS, HALF_WRITTEN_DAYS = 30, 1


def open_planes(
    fields: Fields, channel: str, cache_dir: str | Path | None = None, progress: bool = True
) -> np.ndarray:
    """All planes of one channel as a read-only memory map.

    Parameters
    ----------
    fields : Fields
        Every one of which has an image of this channel. They keep their order.
    channel : str
    cache_dir : path, optional
        Default: `wsdino_planes` in the datasets cache. The file's name holds the fields' fingerprint, so another
        selection or version of the dataset gets another file.
    progress : bool
        Show a progress bar, and the cache's size, while it is written.

    Returns
    -------
    numpy.ndarray
        `(fields, rows, columns)` uint16 (uint8 for an 8-bit screen: nothing is rescaled; read the dtype).

    Raises
    ------
    UserError
        A field without this channel, images of different sizes or depths, or a cache that cannot be written.
    """
    import datasets

    folder = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "wsdino_planes"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{channel}-{fields.fingerprint}-{len(fields)}"
    target, note = folder / f"{name}.npy", folder / f"{name}.json"
    planes = _open_checked(target, note, len(fields))
    if planes is None:
        with FileLock(folder / f"{name}.lock"):
            planes = _open_checked(target, note, len(fields))
            if planes is None:
                _prune(folder)
                try:
                    _write(fields, channel, target, note, progress)
                except OSError as error:
                    raise UserError(
                        f"{target} cannot be written ({error.strerror}): free some space, or name another folder "
                        "(HF_DATASETS_CACHE)"
                    ) from error
                planes = _open_checked(target, note, len(fields))
    return planes


def _open_checked(target: Path, note: Path, count: int) -> np.ndarray | None:
    """The memory map, if its note says that it is complete and its size and a sample agree with it."""
    try:
        known = read_json(note, fix="write it anew")
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
    """Remove caches unused for long and leftovers of interrupted writes, and nothing else."""
    for path in folder.iterdir():
        own = re.fullmatch(r"(\w+-\w+-\d+)(\.json|\.npy\.partial)", path.name)
        try:
            days = (time.time() - path.stat().st_mtime) / 86400
            if own and days > (UNUSED_DAYS if own[2] == ".json" else HALF_WRITTEN_DAYS):
                path.unlink()
                if own[2] == ".json":  # its note, without which no process takes the planes for whole
                    (folder / f"{own[1]}.npy").unlink()
        except OSError:  # another process was faster, or has it open on Windows
            continue


def _sample_digest(planes: np.ndarray) -> str:
    """sha256 of up to 16 planes spread over the cache: all of it would cost seconds at every start."""
    digest = hashlib.sha256()
    for i in np.unique(np.linspace(0, len(planes) - 1, 16).astype(int)):
        digest.update(planes[i].tobytes())
    return digest.hexdigest()


def _write(fields: Fields, channel: str, target: Path, note: Path, progress: bool) -> None:
    planes = Planes(fields, channel)
    header = {"descr": planes.like.dtype.str, "fortran_order": False, "shape": (len(planes), *planes.like.shape)}
    what = f"caching {channel}, {len(planes) * planes.like.nbytes / 1e9:.2f} GB"
    # Written as a file and not through a map: a full disk is then an error, and not the end of the process (SIGBUS).
    with written_whole(target) as partial:
        with open(partial, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for plane in tqdm(planes, desc=what, unit="plane", disable=not progress, mininterval=0.5):
                file.write(np.ascontiguousarray(plane))
        content = {"bytes": partial.stat().st_size, "sample": _sample_digest(np.load(partial, mmap_mode="r"))}
    write_json(note, content)
