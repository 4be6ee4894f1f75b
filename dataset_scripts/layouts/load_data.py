"""Screens that come with an image table: BBBC021's own, CellProfiler's load_data, the Cell Painting Gallery's tree."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from wsdino.errors import UserError

from ..plate_maps import roles
from ..screen import ScreenColumns
from ..tables import FILE, over_distinct, read_tables
from . import Screen, Source, channel_name, screen_of

LOAD_DATA = r"(.*/)?(\w*load_data\w*|image)\.(csv|csv\.gz|parquet)"
GALLERY = r"(.*/)?load_data_csv/.+/load_data\w*\.(csv|csv\.gz|parquet)"
PLATE_MAPS = r"(.*/)?metadata/platemaps/({})/(barcode_platemap\.csv|platemap/[^/]+\.(txt|csv|tsv))"
NOT_RAW = re.compile(r"illum|outlines?$|mask|overlay|thumb", re.IGNORECASE)


def bbbc021(source: Source) -> Screen:
    """BBBC021's tables, also in several pieces; a mechanism in the image table counts where no table of them is."""
    paths = source.tables or [source.raw / file for file in source.matching(r"BBBC021_v1_image\.csv(\.gz)?")[:1]]
    if not paths:
        raise UserError(f"{source.raw} holds no BBBC021_v1_image.csv (or .gz): put it there, or name it (--image_csv)")
    table = _rows(source, paths)
    beside = [path for folder in {source.raw, Path(paths[0]).parent} for path in folder.glob("BBBC021_v1_moa.csv*")]
    return Screen(table, ScreenColumns(moa=None if beside else roles(table.columns).get("moa")))


def load_data(source: Source) -> Screen:
    """CellProfiler's `FileName_X` and `PathName_X`, or `URL_X`: raw images and illumination functions told apart."""
    paths = source.tables or _preferred(source, LOAD_DATA)
    if not paths:
        raise UserError(f"{source.raw} holds no load_data table: name it with --image_csv")
    return _by_columns(_rows(source, paths), source)


def gallery(source: Source) -> Screen:
    """`workspace/load_data_csv/<batch>/<plate>/load_data.csv` and `metadata/platemaps/<batch>`, of all batches."""
    paths = _preferred(source, GALLERY)
    if not paths:
        raise UserError(f"{source.raw} holds no workspace/load_data_csv: give the folder of a project or of a source")
    table = read_tables(paths, "image table", source.notes, source.encoding)
    if "batch" not in roles(table.columns):
        table["Metadata_Batch"] = over_distinct(table[FILE], lambda file: Path(file).parts[-3])
    screen = _by_columns(table, source)
    batches = "|".join(map(re.escape, sorted(set(table[screen.columns.batch]))))
    screen.plate_maps = [source.raw / file for file in source.matching(PLATE_MAPS.format(batches))]
    return screen


def _rows(source: Source, paths: list[Path]) -> pd.DataFrame:
    """The tables that were named, which may have been read to find the layout, or those that the layout found."""
    return source.table if source.tables else read_tables(paths, "image table", source.notes, source.encoding)


def _preferred(source: Source, pattern: str) -> list[Path]:
    """One table per folder: the one of the shortest name, for `load_data_with_illum` repeats the rows of others."""
    best: dict[Path, Path] = {}
    for path in sorted(
        map(Path, source.matching(pattern)), key=lambda path: (len(path.name.split(".")[0]), path.name)
    ):
        best.setdefault(path.parent, source.raw / path)
    return sorted(best.values())


def _by_columns(table: pd.DataFrame, source: Source) -> Screen:
    channels, left_out = {}, []
    for column in table.columns:
        match = re.fullmatch(r"(?:Image_)?(FileName|URL)_(.+)", column)
        if match and NOT_RAW.search(match[2]):
            left_out.append(column)
        elif match and match[1] == "FileName":
            folder = column.replace("FileName", "PathName")
            channels[channel_name(match[2])] = (column, folder if folder in table else None)
        elif match and column.replace("URL", "FileName") not in table:
            channels[channel_name(match[2])] = (column, None)
    if not channels:
        raise UserError(
            f"{table[FILE].iloc[0] if len(table) else source.raw} has no column FileName_ or URL_ of a channel (it "
            f"has {', '.join(table.columns[:12])}): name the channels' columns in --columns"
        )
    if left_out:
        source.notes.append(f"columns that are no raw image are left out: {', '.join(left_out)}")
    return screen_of(table, channels, source)
