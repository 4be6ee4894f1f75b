"""From the flags of a build to a screen that is understood, and the plan that shows it before a pixel is read."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, replace
from pathlib import Path

import pandas as pd
from PIL import Image

from wsdino.errors import UserError
from wsdino.settings import setting

from ..bbbc021 import IMAGE_TABLE, MOA_TABLE, find_table
from ..image_paths import ImageFinder, file_and_page
from ..plate_maps import NEGATIVE, join_plate_maps, roles
from ..screen import ScreenColumns, read_screen
from ..tables import FILE, LINE, read_tables
from . import LAYOUT_NAMES, Screen, Source, read_layout

BYTES_PER_PIXEL = 1.36  # of a 16-bit plane as PNG: 444 kB for 640 x 512, measured on BBBC021


@dataclass
class LayoutSettings:
    """How a raw folder is read: what its layout and the names of columns do not say."""

    raw: str = setting(MISSING, "Folder of the raw images, and of the tables that come with them.")
    layout: str = setting("auto", f"How the raw screen is laid out: {', '.join(LAYOUT_NAMES)}.")
    image_csv: list[str] | None = setting(None, "Image tables, of any form; default: those of the layout.")
    moa_csv: str | None = setting(None, f"MOA table, of any form; default: {MOA_TABLE} in --raw, or none.")
    plate_map: list[str] | None = setting(None, "Plate maps and barcode maps, or folders of them.")
    columns: str | None = setting(None, "JSON file that says which column is what: docs/your_screen.md.")
    pattern: str | None = setting(None, "--layout folder: regular expression of a path, with groups (?P<well>...).")
    encoding: str | None = setting(None, "Of text tables that are not UTF-8, such as cp1252.")
    z: str | None = setting(None, "Of planes of different focus: a plane's number, or, in one file, max or mean.")
    time: str | None = setting(None, "The time point that is read, where there are several.")
    channels: list[str] | None = setting(None, "Only these channels, in this order; NEW=OLD gives another name.")
    compound_column: str | None = setting(None, "Column of the compound, gene or other perturbation.")
    concentration_column: str | None = setting(None, 'Column of the dose; "" where there is none.')
    moa_column: str | None = setting(None, "Column of the mechanism of action.")
    batch_column: str | None = setting(None, "Column of the batch; default: by its name, or every plate its own.")
    control: list[str] | None = setting(None, 'Names of the negative control, "" for an empty cell, or COLUMN=VALUE.')
    merge_names: bool = setting(
        False, "Merge a compound's spellings, and its doses within 5 %, into the most frequent."
    )


def understand(
    settings: LayoutSettings, given: ScreenColumns | None = None, table: pd.DataFrame | None = None
) -> Screen:
    """Read a folder by its layout, join the plate maps, and settle what each column means.

    Parameters
    ----------
    settings : LayoutSettings
    given : ScreenColumns, optional
        What the columns mean, where it is known.
    table : pandas.DataFrame, optional
        The image table, where it is read already.

    Raises
    ------
    UserError
        No layout fits, a table cannot be read, or a flag names a column or channel that is not there.
    """
    choose = {axis: value for axis in ("z", "time") if (value := getattr(settings, axis)) is not None}
    named = [settings.image_csv] if isinstance(settings.image_csv, str | Path) else settings.image_csv or ()
    raw, paths = Path(settings.raw), [Path(path) for path in named]
    source = Source(raw, paths, settings.pattern, settings.encoding, choose)
    if given is None and settings.columns:
        given = ScreenColumns.from_json(settings.columns)
    if table is not None:
        text = table.astype(object).where(table.notna(), "").astype(str)  # as a table that was read from a file
        screen = Screen(text, given or ScreenColumns(), "table", source.notes)
    elif given is not None:
        table = read_tables(paths or find_table(IMAGE_TABLE, raw), "image table", source.notes, settings.encoding)
        screen = Screen(table, given, "columns", source.notes)
    else:
        screen = read_layout(source, settings.layout)
    if maps := settings.plate_map or screen.plate_maps:
        keys = screen.columns.plate, screen.columns.well
        screen.table = join_plate_maps(screen.table, keys, maps, screen.notes, settings.encoding)
    if screen.layout not in ("table", "columns", "bbbc021"):
        _by_name(screen)
    screen.columns = _as_flags_say(screen, settings)
    return screen


def _as_flags_say(screen: Screen, settings: LayoutSettings) -> ScreenColumns:
    columns = screen.columns
    for role in ("compound", "concentration", "moa", "batch"):
        column = getattr(settings, f"{role}_column")
        if column and column not in screen.table:
            raise UserError(f"--{role}_column is {column!r}, and the tables have {', '.join(_facts(screen.table))}")
        if column is not None:
            columns = replace(columns, **{role: column or None})
    if settings.channels:
        pairs = [(new, old or new) for new, _, old in (text.partition("=") for text in settings.channels)]
        for _, old in pairs:
            if old not in columns.channels:
                raise UserError(f"--channels names {old!r}, and the screen has {', '.join(columns.channels)}")
        columns = replace(columns, channels={new: columns.channels[old] for new, old in pairs})
    if settings.control is not None:
        column, equals, value = settings.control[0].partition("=") if settings.control else ("", "", "")
        by_column = len(settings.control) == 1 and equals and column in screen.table
        columns = replace(columns, control={column: value} if by_column else settings.control)
    return columns


def _facts(table: pd.DataFrame) -> list[str]:
    return [name for name in table.columns if name not in (FILE, LINE)]


def _by_name(screen: Screen) -> None:
    """Settle compound, dose, mechanism, batch and control by the names of columns, and by what stands in them."""
    table, columns = screen.table, screen.columns
    known = roles(_facts(table))
    compound, control = known.get("compound", ""), "DMSO"
    values = sorted(set(table[compound].str.strip())) if compound else []
    kinds = sorted(set(table[known["kind"]])) if "kind" in known else []
    if negative := [kind for kind in kinds if NEGATIVE.fullmatch(kind)]:
        control = {known["kind"]: negative[0]}
    elif "DMSO" not in values:
        control = next((value for value in values if value.casefold() == "dmso"), "" if "" in values else "DMSO")
    if "unit" in known and "concentration" in known:
        dose = known["concentration"]
        screen.table = table.assign(
            **{dose: table[dose].where(table[dose] == "", table[dose] + " " + table[known["unit"]])}
        )
    screen.columns = replace(
        columns, compound=compound, concentration=known.get("concentration"), moa=known.get("moa"),
        batch=known.get("batch", columns.batch), control=control,
    )  # fmt: skip


def read_fields(screen: Screen, settings: LayoutSettings) -> pd.DataFrame:
    """The fields of a screen that is understood, as `dataset_scripts.screen.read_screen` checks them.

    Raises
    ------
    UserError
        No column says what a well was treated with, or the tables break a rule.
    """
    if not screen.columns.compound:
        raise UserError(
            f"no column of {settings.raw} says what a well was treated with: join a plate map (--plate_map), or name "
            "the column (--compound_column)"
        )
    table, moa_csv = Path(str(screen.table[FILE].iloc[0])) if FILE in screen.table else settings.raw, settings.moa_csv
    if moa_csv is None and screen.columns == ScreenColumns():
        moa_csv = find_table(MOA_TABLE, settings.raw, Path(table).parent)
    return read_screen(table, moa_csv, screen.columns, screen.table, settings.merge_names, screen.notes)


def plan(settings: LayoutSettings, resize: float, output: str = "") -> str:
    """What is understood of a raw folder, as a table; no pixel is read and nothing is written.

    Parameters
    ----------
    settings : LayoutSettings
    resize : float
        Factor of both sides.
    output : str
        Folder of the dataset, whose disk is looked at; default: that of the raw folder.

    Raises
    ------
    UserError
        The folder is not understood. What its tables break is a line of the plan.
    """
    screen, raw = understand(settings), Path(settings.raw)
    columns, channels = screen.columns, list(screen.columns.channels)
    lines = [("layout", screen.layout), ("rows", f"{len(screen.table):,}"), ("channels", ", ".join(channels))]
    if screen.pixel_size:
        lines.append(("pixel size", f"{screen.pixel_size:g} µm"))
    try:
        fields = read_fields(screen, settings)
    except UserError as error:
        lines.append(("refused", str(error)))
    else:
        lines += _counts(fields, columns) + _images(fields, channels, raw, resize, Path(output or settings.raw))
    lines += [("note", note) for note in screen.notes]
    lines += [(f"first row: {name}", str(value)) for name, value in screen.table.iloc[0].items() if str(value)]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _counts(fields: pd.DataFrame, columns: ScreenColumns) -> list[tuple[str, str]]:
    sites, treated = fields.groupby(["plate", "well"]).size(), fields[fields["part"] != "dmso"]
    known = fields[fields["part"] == "annotated"]
    return [
        ("plates", f"{fields['plate'].nunique():,} in {fields['batch'].nunique():,} batches"),
        ("wells", f"{len(sites):,}, {_range(sites.groupby(level=0).size())} per plate"),
        ("sites", f"{len(fields):,}, {_range(sites)} per well"),
        ("compounds", f"{treated['compound'].nunique():,}, by the column {columns.compound!r}"),
        ("treatments", f"{treated['treatment'].nunique():,}, by the dose {columns.concentration or '(none)'!r}"),
        (
            "mechanisms",
            f"{known['moa'].nunique():,} of {len(known):,} fields, by the column {columns.moa or '(none)'!r}",
        ),
        ("control", f"{len(fields) - len(treated):,} fields, which are {columns.control_text!r}"),
    ]


def _range(counts: Iterable[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _images(
    fields: pd.DataFrame, channels: list[str], raw: Path, resize: float, output: Path
) -> list[tuple[str, str]]:
    """How many images are there, their size by the header of the first, and the disk that the dataset takes."""
    finder, found, first = ImageFinder(raw, fields["plate"].nunique() > 1), 0, None
    for channel in channels:
        for file, plate in zip(fields[f"{channel}_file"].tolist(), fields["plate"].tolist(), strict=True):
            if file and (path := finder.find(file, plate)) is not None:
                found, first = found + 1, first or path
    images = len(fields) * len(channels)
    lines = [("images", f"{found:,} of {images:,} are there, {images - found:,} are absent")]
    if finder.shortened:
        file, path = next(iter(finder.shortened.items()))
        lines.append(
            ("shortened", f"{len(finder.shortened):,} are found by the end of their path, as {path} for {file}")
        )
    try:
        with Image.open(file_and_page(str(first))[0]) as image:
            width, height = image.size
    except (OSError, ValueError):
        return lines
    place = next(path for path in (output.resolve() / "x").parents if path.exists())
    needed, free = found * width * height * resize**2 * BYTES_PER_PIXEL / 1e9, shutil.disk_usage(place).free / 1e9
    lines.append(("image size", f"{width} x {height} pixels, --resize {resize:g}"))
    return [*lines, ("disk", f"about {needed:,.3g} GB are needed, {free:,.0f} GB are free")]
