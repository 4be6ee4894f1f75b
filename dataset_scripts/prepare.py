"""Builds the Hugging Face dataset of a screen: Parquet files of its parts, illumination functions and a card.

    wsdino-prepare --raw data/simulated --output data/screen
    wsdino-prepare --raw BBBC021 --output data/bbbc021

A plate is the unit of work: one process reads it twice and writes one Parquet file for each part it has fields of. An
interrupted build continues with the next plate.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm.auto import tqdm

from wsdino.errors import UserError, command
from wsdino.files import write_text
from wsdino.settings import check_bounds, parse_settings, setting

from .archives import PlateArchives
from .bbbc021 import BBBC021_URL, COMPOUND_TABLE, IMAGE_TABLE, MOA_TABLE, default_source, fetch_tables
from .builder import build_plates, worker_count
from .card import build_summary, count_fields, dataset_card
from .dataset_folder import DatasetFolder
from .download import Downloader
from .image_paths import file_and_page, find_images
from .images import Z_RULES
from .layouts.plan import LayoutSettings, plan, read_fields, understand
from .plates import Plate, Preprocessing, illumination_name, image_size, natural_key, screen_features
from .screen import ScreenColumns

ADDED_SETTINGS = ("z", "scale", "drop_bad")


@dataclass
class PrepareSettings(LayoutSettings):
    """Settings of `wsdino-prepare` and of `build_dataset`; those of `LayoutSettings` say how `raw` is read."""

    output: str = setting("", "Folder of the dataset; plates of the same build that are done are kept.")
    plan: bool = setting(False, "Print what is understood of --raw; read no pixels and build nothing.")
    allow_missing: bool = setting(False, "Build what is there; count what is absent (a null image, a field left out).")
    illumination: bool = setting(True, "Divide images by the illumination function of their plate and channel.")
    filter_size: float | None = setting(
        None, "Size of its median filter, pixels; default: 320 for 1024 x 1280.", low=1, high=10_000
    )
    border: Literal["edge", "inside"] = setting("edge", "Its border: as CellProfiler 4.0 (edge) or 4.2 (inside).")
    resize: float = setting(0.5, "Factor of both sides.", low=0.01, high=4)
    interpolation: Literal["spline", "bicubic"] = setting(
        "spline", "Cubic of the resizing: as scikit-image since 0.19 (spline) or before (bicubic)."
    )
    bits: Literal[8, 16] = setting(16, "Depth of the raw images, which the dataset keeps.")
    scale: float | None = setting(None, "Factor of every raw value, which is then rounded: 65535 for 0 to 1.", above=0)
    drop_bad: bool = setting(False, "Leave out fields of noise, of one value, saturated, or with a channel twice.")
    plates: list[str] | None = setting(None, "Build only these plates.")
    download: bool = setting(False, "Fetch plate archives to --raw first, and the tables unless given or there.")
    base_url: str = setting(BBBC021_URL, "Folder of the archives and tables.")
    downloads: int = setting(3, "Archives fetched at a time.", low=1)
    keep_raw: bool = setting(False, "Keep the fetched archives.")
    source: str | None = setting(None, "Text of the column `source`; default: BBBC021v1, or the simulation's.")
    workers: int | None = setting(None, "Processes; default: all cores, or one for a small screen.", low=1)


def build_dataset(
    raw: str | Path,
    output: str | Path,
    *,
    columns: ScreenColumns | str | Path | None = None,
    table: pd.DataFrame | None = None,
    progress: bool = True,
    **settings: Any,
) -> None:
    """Build a dataset folder that `datasets.load_dataset` and the Hub understand.

    Parameters
    ----------
    raw, output : path
        Folders of the raw images and of the dataset.
    columns : ScreenColumns or path, optional
        Column mapping and channels of another screen.
    table : pandas.DataFrame, optional
        The image table, already read, instead of the file `image_csv`: one row per field, the columns that `columns`
        names (one column of file names or paths per channel), as text. For messages, its columns `_file` and `_line`
        say where each row came from.
    progress : bool
        Show bars and say what was built.
    **settings
        Other fields of `PrepareSettings`.

    Raises
    ------
    UserError
        A setting is out of bounds, or the tables, images, archives or folders cannot be used.
    """
    steps = PrepareSettings(raw=str(raw), output=str(output), **settings)
    check_bounds(steps)
    if steps.plates is not None and not steps.plates:
        raise UserError("--plates names none: name at least one, or leave it out for all.")
    if steps.z is not None and steps.z not in Z_RULES and not steps.z.isdecimal():
        raise UserError(f"--z is {steps.z!r}: use max, mean, or the number of a plane, from 0.")
    if isinstance(columns, str | Path):
        columns = ScreenColumns.from_json(columns)
    if columns is not None:
        _check_channels(columns.channels)
    say = print if progress else lambda text: None
    raw, downloader = Path(raw), Downloader(steps.base_url, raw) if steps.download else None
    if downloader is not None:
        wanted = columns or ScreenColumns()
        tables = {IMAGE_TABLE: wanted.image_columns(), MOA_TABLE: wanted.moa_table, COMPOUND_TABLE: ()}
        given = {IMAGE_TABLE: steps.image_csv, MOA_TABLE: steps.moa_csv}
        fetch_tables(downloader, {name: tables[name] for name in tables if not given.get(name)}, say)
    if not raw.is_dir():
        raise UserError(f"folder {raw} of raw images does not exist: give the folder that holds them")
    screen = understand(steps, columns, table)
    columns = screen.columns
    _check_channels(columns.channels)
    everything = read_fields(screen, steps)
    for note in screen.notes:
        say(note)
    named = everything if steps.plates is None else everything[everything["plate"].isin(steps.plates)]
    if absent := sorted(set(steps.plates or ()) - set(named["plate"])):
        raise UserError(f"{everything['table'][0]} has no plate {absent[0]!r}: choose among the plates it names")

    channels, plates_named = list(columns.channels), everything["plate"].nunique()
    preprocessing = Preprocessing(
        **{each.name: getattr(steps, each.name) for each in fields(Preprocessing) if each.name != "minimum_images"}
    )
    # What was added to the settings since is left out where it has no effect: earlier builds go on.
    used = {name: value for name, value in asdict(preprocessing).items() if value or name not in ADDED_SETTINGS}
    recipe = {
        "preprocessing": used,
        "channels": channels,
        "source": steps.source or default_source(raw, columns),
    }

    def locate(some: pd.DataFrame, folder: Path) -> pd.DataFrame:
        return find_images(some, folder, channels, steps.allow_missing, plates_named > 1)[0]

    chosen, size = named, None
    if downloader is None:
        chosen, shortened = find_images(named, raw, channels, steps.allow_missing, plates_named > 1)
        if shortened:
            file, path = next(iter(shortened.items()))
            say(f"{len(shortened):,} images were found by the end of their path, such as {path} for {file}")
        size = image_size(chosen, channels, preprocessing)
    plates = [
        Plate(name, rows.reset_index(drop=True), channels, preprocessing, recipe["source"], size)
        for name, rows in sorted(chosen.groupby("plate"), key=lambda pair: natural_key(pair[0]))
    ]
    if preprocessing.illumination:
        _check_illumination_names(plates)
    digests = {plate.name: _digest(recipe, plate) for plate in plates}
    folder = DatasetFolder(output)
    with folder.held():
        folder.begin(recipe, [plate.name for plate in plates])
        records = {name: record for name in digests if (record := folder.record(name, digests[name]))}
        if records:
            say(f"{len(records)} of {len(plates)} plates are built already")
        todo, archives, fetched = [plate for plate in plates if plate.name not in records], None, 0
        if downloader is not None:
            archives = PlateArchives(downloader, steps.downloads, steps.keep_raw)
            for name in records:
                if archives.folder(name).is_dir():  # an earlier run was stopped before it deleted them
                    archives.discard(name)
            sizes = archives.available([plate.name for plate in todo], steps.allow_missing)
            todo, fetched = [plate for plate in todo if plate.name in sizes], sum(sizes.values())
            if todo:
                say(archives.check_disk(folder.path, sizes, worker_count(steps.workers, todo)))

        def done(record: dict) -> None:
            records[record["plate"]] = record | {"digest": digests[record["plate"]]}
            folder.write_record(records[record["plate"]])

        with tqdm(
            total=fetched, desc="fetching", unit="B", unit_scale=True, disable=not (progress and fetched)
        ) as bar:
            if downloader is not None:
                downloader.tick = bar.update
            if todo:
                workers = worker_count(steps.workers, todo)
                build_plates(todo, folder.path, done, workers, archives, locate, progress)
        ordered = [records[plate.name] for plate in plates if plate.name in records]
        _check_records(ordered)
        folder.finish(ordered)
        counts = count_fields(folder.path, ordered, len(named), plates_named)
        write_text(folder.path / "README.md", dataset_card(recipe, columns.control_text, ordered, counts))
        folder.close(recipe, counts, ordered)
    for sentence in build_summary(folder.path, everything["table"][0], columns.control_text, recipe, ordered, counts):
        say(sentence)


def _check_channels(channels: list[str]) -> None:
    for channel in channels:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", channel):
            raise UserError(f"channel name {channel!r} cannot be a column: use letters, digits and _")
        if channel in screen_features([other for other in channels if other != channel]):
            raise UserError(f"channel name {channel!r} is that of another column: choose another name")


def _check_illumination_names(plates: list[Plate]) -> None:
    """Refuse plates and channels, such as `p_b` and `a` beside `p` and `b_a`, that would share a file."""
    names = pd.Series([illumination_name(plate.name, channel) for plate in plates for channel in plate.channels])
    if names.duplicated().any():
        raise UserError(
            f"two plates would both write {names[names.duplicated()].iloc[0]}: name the channels otherwise"
        )


def _check_records(records: list[dict]) -> None:
    """Refuse plates of different image sizes, and plates without any field."""
    if not any(record["rows"] for record in records):
        raise UserError("--drop_bad leaves no field: every one has a flaw; build without it to see which")
    sizes = {tuple(record["image_size"]): record["plate"] for record in records}
    if len(sizes) > 1:
        (one, here), (two, there) = list(sizes.items())[:2]
        raise UserError(
            f"images of plate {here} are {one[1]} x {one[0]} pixels and those of {there} {two[1]} x {two[0]}: build "
            "screens of different image sizes apart"
        )


def _digest(recipe: dict, plate: Plate) -> str:
    """SHA-256 of the settings, the plate's rows, and the sizes and times of its images, where they are known.

    An image that came or changed since gives another: what was built of the plate before is then out of date.
    """
    paths = [f"{channel}_path" for channel in plate.channels if f"{channel}_path" in plate.fields]
    files = [Path(file_and_page(file)[0]).stat() for name in paths for file in plate.fields[name] if file]
    states = [(state.st_size, state.st_mtime_ns) for state in files]
    rows = plate.fields.drop(columns=[*paths, "row", "table"]).to_csv()
    return hashlib.sha256(json.dumps([recipe, states]).encode() + rows.encode()).hexdigest()


@command("wsdino-prepare")
def main(argv: list[str] | None = None) -> None:
    """`wsdino-prepare`: build the dataset folder of a screen; flags as in `--help`."""
    parsed = parse_settings(
        PrepareSettings, argv, prog="wsdino-prepare", description="Build the Hugging Face dataset of a screen."
    )
    if parsed.plan:
        print(plan(parsed, parsed.resize, parsed.output))
        return
    if not parsed.output:
        raise UserError("--output names no folder: give one for the dataset, or --plan to see what is understood.")
    settings = vars(parsed)
    if settings["plates"] is not None:  # with spaces or commas between
        settings["plates"] = [name.strip() for each in settings["plates"] for name in each.split(",") if name.strip()]
    try:
        build_dataset(**settings)
    except KeyboardInterrupt:
        sys.stderr.write("\nwsdino-prepare: interrupted: run the command again to continue from here\n")
        raise


if __name__ == "__main__":
    main()
