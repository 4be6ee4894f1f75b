"""From the flags of a build to a screen that is understood, and the plan that shows it before a pixel is read."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from PIL import Image

from wsdino.errors import UserError
from wsdino.settings import setting

from ..plate_maps import NEGATIVE, join_plate_maps, roles
from ..screen import ScreenColumns
from ..tables import FILE, LINE, read_tables
from . import LAYOUT_NAMES, Screen, Source, read_layout

BYTES_PER_PIXEL = 1.36  # of a 16-bit plane as PNG: 444 kB for 640 x 512, measured on BBBC021


@dataclass
class LayoutSettings:
    """How a raw folder is read: the flags that say what the layout and the column names do not."""

    layout: str = setting("auto", f"how the raw screen is laid out: {', '.join(LAYOUT_NAMES)}")
    image_csv: list[str] = setting([], "image tables: CSV, TSV, Parquet or Excel, plain or gzipped")
    plate_map: list[str] = setting([], "plate maps and barcode maps, or folders of them")
    columns: str | None = setting(None, "JSON file that says which column is what")
    pattern: str | None = setting(None, "--layout folder: regular expression of a path, with groups (?P<well>...)")
    encoding: str | None = setting(None, "of text tables that are not UTF-8, such as cp1252")
    z: str | None = setting(None, "the one focus plane that is read, where there are several")
    time: str | None = setting(None, "the one time point that is read, where there are several")
    channels: list[str] = setting([], "only these channels, in this order; NEW=OLD names one anew")
    compound_column: str | None = setting(None, "column of the compound, gene or other perturbation")
    concentration_column: str | None = setting(None, 'column of the dose; "" where there is none')
    moa_column: str | None = setting(None, "column of the mechanism of action")
    batch_column: str | None = setting(None, "column of the batch")
    control: list[str] = setting([], 'names of the negative control, "" for an empty cell, or COLUMN=VALUE')
    plan: bool = setting(False, "print what is understood, read no pixel and build nothing")


def understand(raw: str | Path, settings: LayoutSettings) -> Screen:
    """Read a folder by its layout, join the plate maps, and settle what each column means.

    Raises
    ------
    UserError
        No layout fits, a table cannot be read, or a flag names a column or channel that is not there.
    """
    choose = {axis: value for axis in ("z", "time") if (value := getattr(settings, axis)) is not None}
    tables = [Path(path) for path in settings.image_csv]
    source = Source(Path(raw), tables, settings.pattern, settings.encoding, choose)
    if settings.columns and tables:
        screen = Screen(read_tables(tables, "image table", source.notes, settings.encoding),
                        ScreenColumns.from_json(settings.columns), "columns", source.notes)  # fmt: skip
    else:
        screen = read_layout(source, settings.layout)
    if maps := settings.plate_map or screen.plate_maps:
        screen.table = join_plate_maps(screen.table, maps, screen.notes, settings.encoding)
    if screen.layout not in ("columns", "bbbc021"):
        screen.columns = _by_name(screen.table, screen.columns)
    given = {name: getattr(settings, f"{name}_column") for name in ("compound", "concentration", "moa", "batch")}
    given = {name: value or None for name, value in given.items() if value is not None}
    for name, column in given.items():
        if column is not None and column not in screen.table:
            raise UserError(f"--{name}_column is {column!r}, and the tables have {', '.join(_facts(screen.table))}")
    columns = replace(screen.columns, **given)
    if settings.channels:
        pairs = [(new, old or new) for new, _, old in (text.partition("=") for text in settings.channels)]
        for _, old in pairs:
            if old not in columns.channels:
                raise UserError(f"--channels names {old!r}, and the screen has {', '.join(columns.channels)}")
        columns = replace(columns, channels={new: columns.channels[old] for new, old in pairs})
    if settings.control:
        column, equals, value = settings.control[0].partition("=")
        named = len(settings.control) == 1 and equals and column in screen.table
        columns = replace(columns, control={column: value} if named else settings.control)
    screen.columns = columns
    return screen


def _facts(table: pd.DataFrame) -> list[str]:
    return [name for name in table.columns if name not in (FILE, LINE)]


def _by_name(table: pd.DataFrame, columns: ScreenColumns) -> ScreenColumns:
    """Compound, dose, mechanism, batch and control by the names of columns, and by what stands in them."""
    known = roles(_facts(table))
    compound = known.get("compound", "")
    control: str | dict[str, str] = "DMSO"
    values = set(table[compound].str.strip()) if compound else set()
    negative = (
        [value for value in sorted(set(table[known["kind"]])) if NEGATIVE.fullmatch(value)] if "kind" in known else []
    )
    if negative:
        control = {known["kind"]: negative[0]}
    elif "DMSO" not in values:
        control = next(
            (value for value in sorted(values) if value.casefold() == "dmso"), "" if "" in values else "DMSO"
        )
    return replace(columns, compound=compound, concentration=known.get("concentration"), moa=known.get("moa"),
                   batch=known.get("batch", columns.batch), control=control)  # fmt: skip


def describe(screen: Screen, fields: pd.DataFrame | None, present: int | None, resize: float, raw: Path,
             output: Path | None = None) -> str:  # fmt: skip
    """The plan as text: what was understood, what is absent, the first row in full, and the disk it takes.

    Parameters
    ----------
    screen : Screen
    fields : pandas.DataFrame or None
        As `read_screen` gives them; None where it refused.
    present : int or None
        Images that are there, if they were looked for.
    resize : float
        Factor of both sides.
    raw, output : path
    """
    columns, table, channels = screen.columns, screen.table, list(screen.columns.channels)
    images = len(table) * len(channels)
    lines = [("layout", screen.layout), ("rows", f"{len(table):,}"), ("channels", ", ".join(channels))]
    if fields is not None:
        sites, treated = fields.groupby(["plate", "well"]).size(), fields[fields["part"] != "dmso"]
        known = fields[fields["part"] == "annotated"]
        lines += [
            ("plates", f"{fields['plate'].nunique():,} in {fields['batch'].nunique():,} batches"),
            ("wells", f"{len(sites):,}, {_range(sites.groupby(level=0).size())} per plate"),
            ("sites", f"{len(fields):,}, {_range(sites)} per well"),
            ("compounds", f"{treated['compound'].nunique():,}, by the column {columns.compound!r}"),
            ("treatments", f"{treated['treatment'].nunique():,}, by the dose {columns.concentration or '(none)'!r}"),
            ("mechanisms", f"{known['moa'].nunique():,} of {len(known):,} fields, by the column {columns.moa!r}"),
            ("control", f"{len(fields) - len(treated):,} fields, which are {columns.control!r}"),
        ]
    if screen.pixel_size:
        lines.append(("pixel size", f"{screen.pixel_size:g} µm"))
    if present is not None:
        lines.append(("images", f"{present:,} of {images:,} are there, {images - present:,} are absent"))
    if fields is not None and (size := _first_size(raw, fields, channels)):
        needed = images * size[0] * size[1] * resize**2 * BYTES_PER_PIXEL / 1e9
        place = next(path for path in (Path(output or raw).resolve() / "x").parents if path.exists())
        free = shutil.disk_usage(place).free / 1e9
        lines.append(("image size", f"{size[1]} x {size[0]} pixels, --resize {resize:g}"))
        lines.append(("disk", f"about {needed:,.2f} GB are needed, {free:,.0f} GB are free"))
    lines += [("note", note) for note in screen.notes]
    lines += [(f"first row: {name}", str(value)) for name, value in table.iloc[0].items() if str(value)]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _range(counts: Iterable[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _first_size(raw: Path, fields: pd.DataFrame, channels: list[str]) -> tuple[int, int] | None:
    """Rows and columns of the first image that is there, from its header."""
    for file in fields.iloc[:20][[f"{channel}_file" for channel in channels]].to_numpy().ravel():
        try:
            with Image.open(raw / file) as image:
                return image.height, image.width
        except (OSError, ValueError):
            continue
    return None
