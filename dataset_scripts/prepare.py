"""Builds the Hugging Face dataset of a screen: Parquet shards of its parts, illumination functions and a card.

    wsdino-prepare --raw data/simulated --output data/screen
    wsdino-prepare --raw BBBC021 --output data/bbbc021

A plate is the unit of work: one process reads it twice, writes one shard for each part it has rows of, and last a
small record; a plate is done only if its record is there and fits the present settings, so an interrupted build
continues with the next plate. The shards of a part are numbered by plate.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from .card import count_fields, dataset_card
from .download import BBBC021_URL, TABLES, Downloader, archive_name, check_archive, extract_archive
from .illumination import illumination_function
from .plates import (
    Preprocessing,
    encode_png,
    find_file,
    levels_digest,
    plate_levels,
    plate_rows,
    present_images,
    read_plane,
)
from .processes import process_pool, shared_queue, usable_cores
from .screen import PARTS, ScreenColumns, ScreenError

ROWS_A_GROUP = 32
_TICKS = None  # in a worker process: the queue that counts images for the progress bar


@dataclass(frozen=True)
class PlateTask:
    """All that a worker process needs to build one plate."""

    plate: str
    fields: pd.DataFrame
    targets: dict[str, str]  # part -> shard
    digest: str  # of the settings and the plate's rows of the table: what a finished plate must agree with
    raw: Path
    output: Path
    channels: list[str]
    preprocessing: Preprocessing
    source: str
    image_size: tuple[int, int] | None  # None: that of the plate's first image
    allow_missing: bool
    table: str  # name of the image table, for messages


def build_dataset(
    raw,
    output,
    *,
    image_csv=None,
    moa_csv=None,
    columns: ScreenColumns | None = None,
    table: pd.DataFrame | None = None,
    allow_missing: bool = False,
    illumination: bool = True,
    filter_size: float | None = None,
    border: str = "edge",
    resize: float = 0.5,
    interpolation: str = "spline",
    bits: int = 16,
    plates: list[str] | None = None,
    source: str | None = None,
    download: bool = False,
    base_url: str = BBBC021_URL,
    downloads: int = 3,
    keep_raw: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Build a dataset folder that `datasets.load_dataset` and the Hub understand.

    Parameters
    ----------
    raw : path
        Folder of the raw images (and of the two tables, unless given); with `download`, where they are fetched to.
    output : path
        Made if missing; a finished plate of the same build is kept, anything else in the folder is an error.
    image_csv, moa_csv : path, optional
        Plain or gzipped tables; default: the official names in `raw`.
    columns : ScreenColumns, optional
        Column mapping and channels of another screen.
    table : pandas.DataFrame, optional
        The image table, already read, instead of `image_csv`: one row per field, the columns that `columns` names (one
        column of file names or paths per channel), as text. For messages, `table_file` and `table_line` say where each
        row came from.
    allow_missing : bool
        Build what is there: a missing channel becomes a null image, a field without images is left out and counted.
    illumination, filter_size, border, resize, interpolation, bits
        See :class:`dataset_scripts.plates.Preprocessing`.
    plates : list of str, optional
        Build only these plates.
    source : str, optional
        Text of the column `source`; default: what the simulator wrote, "BBBC021v1", or the folder's name for columns
        of another screen.
    download : bool
        Fetch tables and plate archives first. A table that is given, or there already, is used as it is. A plate is
        fetched, built and its raw images deleted before many others are fetched, so the disk holds a few raw plates
        at a time.
    base_url : str
        Folder of the tables and archives.
    downloads : int
        Archives fetched at a time.
    keep_raw : bool
        Keep the archives.
    workers : int, optional
        Processes; default: the cores this process may use.
    progress : bool

    Raises
    ------
    ScreenError
        The tables, images, archives or folders are not what they must be.
    """
    from .bbbc021 import RawScreen

    output, raw = Path(output), Path(raw)
    if not 0.01 <= resize <= 4:
        raise ScreenError(f"resize is {resize}: give a factor of both sides from 0.01 to 4")
    if filter_size is not None and not 1 <= filter_size <= 10_000:
        raise ScreenError(f"filter_size is {filter_size}: give a size of 1 to 10,000 pixels")
    if workers is not None and workers < 1:
        raise ScreenError(f"workers is {workers}: give 1 or more processes")
    if downloads < 1:
        raise ScreenError(f"downloads is {downloads}: give 1 or more archives at a time")
    if plates is not None and not plates:
        raise ScreenError("plates names none: name at least one, or leave it out for all")
    columns = columns or ScreenColumns()
    downloader, fetched = None, 0
    if download:
        downloader = Downloader(base_url, raw)
        wanted = (image_csv, columns.image_columns()), (moa_csv, columns.moa_table), (None, ())
        for name, (given, header) in zip(TABLES, wanted, strict=True):
            if given is None or not Path(given).is_file():
                _fetch_table(downloader, name, header, progress)
    preprocessing = Preprocessing(illumination, filter_size, border, resize, interpolation, bits=bits)
    screen = RawScreen(
        raw,
        image_csv and Path(image_csv),
        moa_csv and Path(moa_csv),
        columns,
        preprocessing,
        allow_missing,
        plates,
        source,
        to_come=download,
        progress=progress,
        table=table,
    )
    if illumination:
        _check_illumination_names(screen)
    recipe, work = screen.recipe, output / ".build"
    with _alone(output, work):
        _open_output(output, work, recipe, screen.plate_names())
        tasks = _plate_tasks(screen, output)
        done = {task.plate for task in tasks if _plate_done(task)}
        todo = [task for task in tasks if task.plate not in done]
        if progress and done:
            print(f"{len(done)} of {len(tasks)} plates are built already")
        if downloader is not None:
            for plate in done:
                if _unpacked(downloader, plate).is_dir():  # an earlier run was stopped before it deleted them
                    _delete_raw(downloader, plate, keep_raw)
            todo, absent, fetched = _check_archives(
                downloader, todo, output, allow_missing, keep_raw, workers, downloads, progress
            )
            tasks = [task for task in tasks if task.plate not in absent]
            if not tasks:
                raise ScreenError(f"{base_url} has none of the plates asked for: check --plates and --base_url")
        received = tqdm(total=fetched, desc="fetching", unit="B", unit_scale=True, disable=not (progress and fetched))
        if downloader is not None:
            downloader.tick = received.update
        with received:
            _run(todo, workers, progress, downloader, downloads, keep_raw)

        records = [json.loads(_record_of(task).read_text()) for task in tasks]
        sizes = {tuple(record["image_size"]): record["plate"] for record in records}
        if len(sizes) > 1:
            (one, here), (two, there) = list(sizes.items())[:2]
            raise ScreenError(
                f"images of plate {here} are {one[1]} x {one[0]} pixels and those of {there} {two[1]} x {two[0]}: "
                "build screens of different image sizes apart"
            )
        _number_shards(output, records)
        _remove_strangers(output, records)
        counts = count_fields(output, screen, records)
        _write_bytes(output / "README.md", dataset_card(screen, records, counts, recipe).encode())
        _write_json(output / "build.json", {"recipe": recipe, "counts": counts, "plates": records})
        shutil.rmtree(work)
        if progress:
            _report(output, screen, records, counts)


def _fetch_table(downloader: Downloader, name: str, columns, progress: bool) -> None:
    """Fetch a table of these columns, unless one is there: it may be the user's own, or edited."""
    for path in (downloader.folder / name, downloader.folder / f"{name}.gz"):
        if path.is_file():
            if progress and not downloader.holds(name):
                print(f"{path} is not as fetched from {downloader.base_url}, and used as it is: remove it to fetch it")
            return
    # The compound table is of no use here, and some copies of the screen lack it.
    if name == "BBBC021_v1_compound.csv" and downloader.sizes([name])[name] is None:
        return

    def check(partial: Path) -> None:
        """Refuse, before its hash is remembered, a page that a network's login or a proxy answers with."""
        try:
            header = list(pd.read_csv(partial, nrows=0))
        except ValueError:
            header = []
        if not header or header[0].startswith("<") or not set(columns) <= set(header):
            raise ScreenError(
                f"{downloader.base_url}{name} is not that table (its header is {', '.join(header)[:60]!r}): log in to "
                "the network if it wants that, or check --base_url and --columns"
            )

    downloader.fetch(name, check)


def _illumination_name(plate: str, channel: str) -> str:
    return f"illumination/{plate}_{channel}.png"


def _check_illumination_names(screen) -> None:
    """Refuse plates and channels, such as `p_b` and `a` beside `p` and `b_a`, that would share a file."""
    owners = {}
    for plate in screen.plate_names():
        for channel in screen.channels:
            name = _illumination_name(plate, channel)
            other, seen = owners.setdefault(name, (plate, channel))
            if other != plate:
                raise ScreenError(
                    f"channel {seen} of plate {other} and channel {channel} of plate {plate} would both write {name}: "
                    "name the channels otherwise"
                )


def _plate_tasks(screen, output: Path) -> list[PlateTask]:
    tasks = []
    for plate in screen.plate_names():
        fields = screen.plate_fields(plate)
        targets = {part: f"data/{part}/{plate}.parquet" for part in PARTS if (fields["part"] == part).any()}
        tasks.append(
            PlateTask(
                plate,
                fields,
                targets,
                screen.digest(fields),
                screen.raw,
                output,
                screen.channels,
                screen.preprocessing,
                screen.source,
                screen.image_size,
                screen.allow_missing,
                str(screen.image_csv),
            )
        )
    return tasks


def _open_output(output: Path, work: Path, recipe: dict, plates: list[str]) -> None:
    """Accept a new folder, or the same dataset, finished or interrupted; and note that a build of it has begun."""
    finished, begun, records = output / "build.json", work / "recipe", []
    try:
        if begun.is_file():
            before = json.loads(begun.read_text())
            held = {path.stem for path in work.glob("*.json")}
        elif finished.is_file():
            build = json.loads(finished.read_text())
            before, records = build["recipe"], build["plates"]
            held = {record["plate"] for record in records}
        else:
            before, held = recipe, set()
        held_source = before["source"]
    except (ValueError, KeyError, TypeError) as error:
        note = begun if begun.is_file() else finished
        raise ScreenError(f"{note} is damaged ({error}): remove {output} and build it anew") from error
    if before != recipe:
        raise ScreenError(
            f"{output} holds a dataset of other settings or another source ({held_source}): "
            "choose another folder, or remove this one"
        )
    if others := sorted(held - set(plates)):
        raise ScreenError(
            f"{output} holds plate {others[0]}, which is not among the plates to build now: name it too (--plates), "
            "or choose another folder"
        )
    for record in records:
        _write_json(work / f"{record['plate']}.json", record)
    _write_json(begun, recipe)


@contextmanager
def _alone(output: Path, work: Path):
    """Hold a dataset folder, new or of this program, while it is built: two builds would write the same files."""
    if output.exists() and not output.is_dir():
        raise ScreenError(f"{output} is a file: give a folder for the dataset")
    ours = (output / "build.json").is_file() or (work / "recipe").is_file()
    if not ours and output.exists() and any(path != work for path in output.iterdir()):
        raise ScreenError(f"{output} holds something else than a dataset of this program: choose another folder")
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ScreenError(
            f"another wsdino-prepare is building {output}: wait for its end, or choose another folder"
        ) from error
    try:
        yield
    except BaseException:
        if not (work / "recipe").is_file():  # refused before it began
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        lock.release()


def _record_of(task: PlateTask) -> Path:
    return task.output / ".build" / f"{task.plate}.json"


def _plate_done(task: PlateTask) -> bool:
    """A plate is done if its record fits the present settings and its files are whole."""
    if not _record_of(task).is_file():
        return False
    try:
        known = json.loads(_record_of(task).read_text())
        files = [*known["shards"].values(), *(function["file"] for function in known["functions"].values())]
        return known["digest"] == task.digest and all(
            (task.output / file["path"]).is_file() and (task.output / file["path"]).stat().st_size == file["bytes"]
            for file in files
        )
    except (ValueError, KeyError, TypeError, AttributeError):  # damaged: the plate is built anew
        return False


def _write_json(path: Path, content) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, path)


def _file_record(output: Path, name: str) -> dict:
    content = output / name
    digest = hashlib.sha256()
    with open(content, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"path": name, "bytes": content.stat().st_size, "sha256": digest.hexdigest()}


def _build_plate(task: PlateTask) -> None:
    """Both passes of one plate; its record is written last."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from .bbbc021 import screen_features

    present = present_images(task.fields, task.raw, task.channels, task.allow_missing, task.table)
    fields = task.fields[present.any(axis=1)]
    if fields.empty:
        raise ScreenError(f"{task.raw} holds no image of plate {task.plate}: take it out of --plates")
    size = task.image_size
    if size is None:
        first = fields.iloc[0]
        path = next(p for c in task.channels if (p := find_file(task.raw, first[f"{c}_file"])) is not None)
        size = read_plane(path, task.preprocessing.bits).shape
    levels = {}
    if task.preprocessing.illumination:
        levels = plate_levels(fields, task.raw, task.channels, task.preprocessing, size, _tick)
    saved = {}
    for channel, level in levels.items():
        name = _illumination_name(task.plate, channel)
        _write_bytes(task.output / name, encode_png(level))
        saved[channel] = {"file": _file_record(task.output, name), "sha256": levels_digest(level)}
    functions = {channel: illumination_function(level) for channel, level in levels.items()}

    schema = screen_features(task.channels).arrow_schema
    shards, rows_written = {}, {}
    for part, name in task.targets.items():
        chosen = fields[fields["part"] == part]
        if chosen.empty:
            continue
        path = task.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        rows = []
        with pq.ParquetWriter(partial, schema, compression="none") as writer:  # PNGs are compressed
            for row in plate_rows(chosen, task.raw, task.channels, task.preprocessing, functions, size, task.source):
                rows.append(row)
                _tick(len(task.channels))
                if len(rows) == ROWS_A_GROUP:
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                    rows = []
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        os.replace(partial, path)
        shards[part] = _file_record(task.output, name)
        rows_written[part] = len(chosen)
    record = {
        "plate": task.plate,
        "digest": task.digest,
        "image_size": [int(side) for side in size],
        "rows": rows_written,
        "images_absent": int((~present).to_numpy().sum()),
        "fields_absent": int((~present.any(axis=1)).sum()),
        "fields_incomplete": int((present.any(axis=1) & ~present.all(axis=1)).sum()),
        "shards": shards,
        "functions": saved,
    }
    _write_json(_record_of(task), record)


def _number_shards(output: Path, records: list[dict]) -> None:
    """Give the plates' shards their final names, `train-0000i-of-0000n`: only now is it known how many there are."""
    for part in PARTS:
        members = [record for record in records if part in record["shards"]]
        for i, record in enumerate(members):
            shard = record["shards"][part]
            name = f"data/{part}/train-{i:05d}-of-{len(members):05d}.parquet"
            if shard["path"] != name:
                # By way of the plate's own name, so that renumbering cannot overwrite another plate's shard.
                own = f"data/{part}/{record['plate']}.parquet"
                os.replace(output / shard["path"], output / own)
                shard["path"] = own
                _write_json(output / ".build" / f"{record['plate']}.json", record)
        for i, record in enumerate(members):
            shard = record["shards"][part]
            name = f"data/{part}/train-{i:05d}-of-{len(members):05d}.parquet"
            if shard["path"] != name:
                os.replace(output / shard["path"], output / name)
                shard["path"] = name
                _write_json(output / ".build" / f"{record['plate']}.json", record)


def _write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _tick(count: int = 1) -> None:
    if _TICKS is not None:
        _TICKS.put(count)


def _share_ticks(ticks) -> None:
    global _TICKS
    _TICKS = ticks


class _Here:
    """Runs a task in this process: starting others costs more than building a small screen."""

    def __init__(self, bar):
        self.put = bar.update

    def submit(self, function, *arguments) -> Future:
        future = Future()
        try:
            _share_ticks(self)
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        finally:
            _share_ticks(None)
        return future


def _run(tasks, workers, progress, downloader=None, downloads=1, keep_raw=False) -> None:
    """Build plates in processes, with a progress bar of images; fetch each plate first, if there is a downloader."""
    if not tasks:
        return
    images = sum(len(task.fields) * len(task.channels) for task in tasks)
    workers = _worker_count(workers, tasks)
    total = images * (2 if tasks[0].preprocessing.illumination else 1)
    bar = tqdm(
        total=total,
        desc="preparing planes",
        unit="plane",
        position=0 if downloader is None else 1,
        disable=not progress,
        mininterval=0.5,
    )
    with ExitStack() as stack:
        stack.callback(bar.close)
        ticks = shared_queue() if workers > 1 else None
        if ticks is None:
            pool = _Here(bar)
        else:
            pool = stack.enter_context(process_pool(workers, _share_ticks, (ticks,)))
        failures = _work_off(tasks, pool, workers, bar, ticks, downloader, downloads, keep_raw)
        if not failures:
            bar.update(total - bar.n)  # ticks still under way from the processes
    if failures:
        more = f" ({len(failures) - 1} more plates failed)" if len(failures) > 1 else ""
        raise ScreenError(f"{failures[0]}{more}; the plates that are built are kept")


def _work_off(tasks, pool, workers, bar, ticks, downloader, downloads, keep_raw) -> list[ScreenError]:
    """Build every task; returns the errors of single plates that others need not stop for (when downloading)."""
    fetchers = ThreadPoolExecutor(downloads)
    waiting, fetching, building, failures = deque(tasks), {}, {}, []
    try:
        while waiting or fetching or building:
            while waiting and (downloader is None or len(fetching) + len(building) < workers + downloads):
                task = waiting.popleft()
                if downloader is None:
                    building[pool.submit(_build_plate, task)] = task
                else:
                    fetching[fetchers.submit(_fetch_plate, downloader, task.plate)] = task
            wait([*fetching, *building], timeout=0.2, return_when=FIRST_COMPLETED)
            while ticks is not None and not ticks.empty():
                bar.update(ticks.get())
            for future in [future for future in fetching if future.done()]:
                task = fetching.pop(future)
                if error := future.exception():
                    if not isinstance(error, ScreenError):
                        raise error
                    failures.append(error)
                    continue
                building[pool.submit(_build_plate, replace(task, raw=future.result()))] = task
            for future in [future for future in building if future.done()]:
                task = building.pop(future)
                if error := future.exception():
                    if downloader is None or not isinstance(error, ScreenError):
                        raise error
                    failures.append(error)
                if downloader is not None:
                    _delete_raw(downloader, task.plate, keep_raw or error is not None)
    except BaseException:
        for future in [*fetching, *building]:
            future.cancel()
        raise
    finally:
        if downloader is not None:
            downloader.stopped.set()
        fetchers.shutdown(wait=True, cancel_futures=True)
    return failures


def _worker_count(workers: int | None, tasks: list[PlateTask]) -> int:
    if workers is None:
        rows, columns = tasks[0].image_size or (1024, 1280)
        pixels = sum(len(task.fields) for task in tasks) * rows * columns
        workers = usable_cores() if pixels > 2e7 else 1
    return max(1, min(workers, len(tasks)))


def _fetch_plate(downloader: Downloader, plate: str) -> Path:
    """Fetch, check and unpack one plate; returns the folder of its images."""
    archive = downloader.fetch(archive_name(plate), check_archive)
    folder = _unpacked(downloader, plate)
    extract_archive(archive, folder)
    return folder


def _delete_raw(downloader: Downloader, plate: str, keep_archive: bool) -> None:
    """Delete a plate's unpacked images, and first its archive: while the folder is there, this is not done."""
    if not keep_archive:
        (downloader.folder / archive_name(plate)).unlink(missing_ok=True)
    shutil.rmtree(_unpacked(downloader, plate), ignore_errors=True)


def _unpacked(downloader: Downloader, plate: str) -> Path:
    return downloader.folder / "plates" / plate


def _check_archives(downloader, tasks, output, allow_missing, keep_raw, workers, downloads, progress):
    """Ask for every archive's size, say what is needed, and leave out plates that the server lacks."""
    names = {task.plate: archive_name(task.plate) for task in tasks}
    sizes = downloader.sizes(list(names.values()))
    absent = {plate for plate, name in names.items() if sizes[name] is None}
    if absent and not allow_missing:
        first = sorted(absent)[0]
        raise ScreenError(
            f"{downloader.base_url}{names[first]} does not exist ({len(absent)} of {len(names)} plates are absent): "
            "check --plates and --base_url, or pass --allow_missing to go on without"
        )
    todo = [task for task in tasks if task.plate not in absent]
    if not todo:
        return todo, absent, 0
    largest = max(sizes[names[task.plate]] for task in todo)
    fetched = sum(sizes[names[task.plate]] for task in todo)
    at_once = min(_worker_count(workers, todo) + downloads, len(todo))
    # A guess on the safe side: unpacked TIFFs take twice their archive, and the halved, compressed planes of the
    # dataset less than half of it. Both folders may be on one disk.
    shares = {}
    for folder, share in (
        (downloader.folder, at_once * largest * 3 + (fetched if keep_raw else 0)),
        (output, fetched * 0.5),
    ):
        shares.setdefault(folder.stat().st_dev, [folder, 0])[1] += share
    disks = [(folder, needed / 1e9, shutil.disk_usage(folder).free / 1e9) for folder, needed in shares.values()]
    if progress:
        said = " and ".join(
            f"about {needed:,.2f} GB at {folder} (free {free:,.2f} GB)" for folder, needed, free in disks
        )
        print(
            f"{len(todo)} plates to fetch from {downloader.base_url}, {at_once} at a time: {fetched / 1e9:,.2f} GB; "
            f"disk space needed {said}" + (f"; {len(absent)} plates are absent there" if absent else "")
        )
    for folder, needed, free in disks:
        if needed > free:
            raise ScreenError(
                f"{folder} has {free:,.2f} GB free and about {needed:,.2f} GB are needed: free some, give another "
                "folder, or fetch fewer plates at a time (--plates, --downloads, --workers)"
            )
    return todo, absent, fetched


def _remove_strangers(output: Path, records: list[dict]) -> None:
    """Drop what an interrupted build left half-written."""
    kept = {file["path"] for record in records for file in record["shards"].values()}
    kept |= {function["file"]["path"] for record in records for function in record["functions"].values()}
    for folder in ("data", "illumination"):
        for path in sorted((output / folder).rglob("*")) if (output / folder).is_dir() else ():
            if path.is_file() and path.relative_to(output).as_posix() not in kept:
                path.unlink()


def _report(output: Path, screen, records, counts) -> None:
    rows = {part: counts["fields"][part] for part in PARTS}
    print(f"{output}: " + ", ".join(f"{count:,} {part}" for part, count in rows.items()) + " fields")
    if not rows["dmso"]:
        print(
            f"no field is of the control {screen.columns.control!r}, on which profiles are whitened: if the screen "
            "has one, name it in the column mapping"
        )
    if counts["fields_absent"] or counts["fields_incomplete"]:
        print(
            f"of the {counts['fields_named']:,} fields in {screen.image_csv}, {counts['fields_absent']:,} are absent "
            f"and {counts['fields_incomplete']:,} lack a channel (null image)"
        )
    uncorrected = [
        f"{record['plate']} {channel}"
        for record in records
        for channel in screen.channels
        if channel not in record["functions"]
    ]
    if uncorrected and screen.preprocessing.illumination:
        print(
            f"not corrected for illumination, for fewer than {screen.preprocessing.minimum_images} images: "
            + ", ".join(uncorrected[:6])
            + (f" and {len(uncorrected) - 6} more" if len(uncorrected) > 6 else "")
        )


def main(argv=None) -> None:
    """`wsdino-prepare`: build the dataset folder of a screen."""
    parser = argparse.ArgumentParser(prog="wsdino-prepare", description="Build a screen's Hugging Face dataset.")
    parser.add_argument("--raw", required=True, help="folder of the raw images, and of the two official tables")
    parser.add_argument("--output", required=True, help="folder of the dataset to write")
    parser.add_argument("--image_csv", help="image table, plain or .gz (default: BBBC021_v1_image.csv in --raw)")
    parser.add_argument("--moa_csv", help="MOA table, plain or .gz (default: BBBC021_v1_moa.csv in --raw)")
    parser.add_argument(
        "--columns", help="JSON column mapping of another screen (see dataset_scripts/other_screens.md)"
    )
    parser.add_argument("--allow_missing", action="store_true", help="build what is there, say what is absent")
    parser.add_argument("--no_illumination", action="store_true", help="skip the illumination correction")
    parser.add_argument("--filter_size", type=float, help="size of the median filter (default: 320 at 1024 x 1280)")
    parser.add_argument(
        "--border",
        default="edge",
        choices=("edge", "inside"),
        help="median at the border: as CellProfiler 4.0 (edge) or 4.2 (inside) (default: %(default)s)",
    )
    parser.add_argument("--resize", type=float, default=0.5, help="factor of both sides (default: %(default)s)")
    parser.add_argument(
        "--interpolation",
        default="spline",
        choices=("spline", "bicubic"),
        help="cubic of the resizing: as scikit-image since 0.19 (spline) or before (bicubic) (default: %(default)s)",
    )
    parser.add_argument("--bits", type=int, default=16, choices=(8, 16), help="of the raw images (default: 16)")
    parser.add_argument("--plates", help="build only these, separated by commas")
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch the plate archives to --raw first, and the tables unless given or there",
    )
    parser.add_argument("--base_url", default=BBBC021_URL, help="folder of the archives (default: %(default)s)")
    parser.add_argument("--downloads", type=int, default=3, help="archives fetched at a time (default: %(default)s)")
    parser.add_argument("--keep_raw", action="store_true", help="keep the fetched archives")
    parser.add_argument("--source", help="text of the column `source` (default: BBBC021v1, or the simulation's)")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    args = parser.parse_args(argv)
    try:
        build_dataset(
            args.raw,
            args.output,
            image_csv=args.image_csv,
            moa_csv=args.moa_csv,
            columns=ScreenColumns.from_json(args.columns) if args.columns else None,
            allow_missing=args.allow_missing,
            illumination=not args.no_illumination,
            filter_size=args.filter_size,
            border=args.border,
            resize=args.resize,
            interpolation=args.interpolation,
            bits=args.bits,
            plates=None if args.plates is None else [name.strip() for name in args.plates.split(",") if name.strip()],
            source=args.source,
            download=args.download,
            base_url=args.base_url,
            downloads=args.downloads,
            keep_raw=args.keep_raw,
            workers=args.workers,
        )
    except (ScreenError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted: run the command again to go on from here\n")


if __name__ == "__main__":
    main()
