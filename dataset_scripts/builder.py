"""Builds the plates of a dataset in processes, each one fetched first where its images are still on a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from wsdino.errors import UserError

from .archives import PlateArchives
from .plates import Plate, build_plate
from .processes import process_pool, usable_cores


def worker_count(asked: int | None, plates: list[Plate]) -> int:
    """Processes to use: no more than plates, and one for a small screen, which ends before others have started."""
    if asked is None:
        rows, columns = plates[0].image_size or (1024, 1280)
        asked = usable_cores() if sum(len(plate.fields) for plate in plates) * rows * columns > 2e7 else 1
    return max(1, min(asked, len(plates)))


def build_plates(
    plates: list[Plate],
    output: Path,
    done: Callable[[dict], None],
    workers: int,
    archives: PlateArchives | None = None,
    locate: Callable[[pd.DataFrame, Path], pd.DataFrame] | None = None,
    progress: bool = True,
) -> None:
    """Build plates; memory and disk hold a few at a time.

    Parameters
    ----------
    plates : list of Plate
    output : path
        Folder of the dataset.
    done : callable
        Called with the record of each plate that is built.
    workers : int
        Processes; one works in this process.
    archives : PlateArchives, optional
        Where plates are fetched from.
    locate : callable, optional
        With `archives`: finds the images of a plate's fields in the folder it was unpacked to.
    progress : bool
        Show a bar of plates.

    Raises
    ------
    UserError
        A plate cannot be built. Local plates that had not begun are left; plates that are fetched go on, so that one
        bad archive costs no night.
    """
    failures: list[UserError] = []
    alone = threading.Lock()
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(plates), desc="preparing", unit="plate", disable=not progress))
        pool = stack.enter_context(process_pool(workers)) if workers > 1 else None

        def build(plate: Plate) -> dict:
            if pool is not None:
                return pool.submit(build_plate, plate, output).result()
            with alone:
                return build_plate(plate, output)

        def fetch_and_build(plate: Plate) -> dict:
            folder = archives.fetch(plate.name)
            try:
                record = build(replace(plate, fields=locate(plate.fields, folder)))
            except BaseException:
                archives.discard(plate.name, built=False)
                raise
            archives.discard(plate.name)
            return record

        if archives is None and pool is None:
            for plate in plates:
                done(build(plate))
                bar.update()
            return
        work, at_once = (build, workers) if archives is None else (fetch_and_build, workers + archives.downloads)
        threads = ThreadPoolExecutor(at_once)
        try:
            for future in as_completed([threads.submit(work, plate) for plate in plates]):
                try:
                    done(future.result())
                except UserError as error:
                    if archives is None:
                        raise
                    failures.append(error)
                bar.update()
        finally:
            if archives is not None:
                archives.downloader.stopped.set()
            threads.shutdown(wait=True, cancel_futures=True)
    if failures:
        more = f" ({len(failures) - 1} more plates failed)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{more}; the plates that are built are kept")
