"""Layouts of raw screens, by name: a function from a folder to an image table and what its columns mean.

A new layout is a function `read(source: Source) -> Screen` and one entry of `_layouts`, with a pattern of the files by
which its folder is known; `phenix.py` is an example, and docs/your_screen.md shows every one at work.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pandas as pd

from wsdino.errors import UserError

from ..plate_maps import with_wells
from ..screen import ScreenColumns
from ..tables import FILE, read_tables

# An image of a microscope; many write small previews beside.
IMAGE = re.compile(r"(?!.*_thumb[^/]*$).*\.(tiff?|png|jp2)", re.IGNORECASE)
DEEPEST = 12  # folders below the screen's: a link that leads upwards would never end


@dataclass
class Source:
    """Where a screen lies, and what the user says of it.

    Attributes
    ----------
    raw : pathlib.Path
    tables : list of pathlib.Path
        Image tables that were named; empty: the layout looks for its own.
    pattern : str or None
        Regular expression with named groups, for `folder`.
    encoding : str or None
        Of text tables.
    choose : dict
        "z" and "time" -> the one plane and the one time point that are read.
    notes : list of str
        Receives one sentence for everything that was not understood, left out or taken otherwise than it stands.
    """

    raw: Path
    tables: list[Path] = field(default_factory=list)
    pattern: str | None = None
    encoding: str | None = None
    choose: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def files(self) -> list[str]:
        """Every file below `raw`, relative to it and sorted, with `/`; an OME-Zarr plate counts as one."""
        found = []
        for folder, folders, names in os.walk(self.raw, followlinks=True):
            inside = Path(folder).relative_to(self.raw)
            zarrs = [name for name in folders if name.endswith(".zarr")]
            deeper = len(inside.parts) < DEEPEST
            folders[:] = [n for n in folders if deeper and n not in zarrs and not n.startswith(".")]
            prefix = f"{inside.as_posix()}/" if inside.parts else ""
            found += [prefix + name for name in (*names, *zarrs) if not name.startswith(".")]
        return sorted(found)

    @cached_property
    def table(self) -> pd.DataFrame:
        """The rows of the tables that were named: which layout they are of, their columns say."""
        return read_tables(self.tables, "image table", self.notes, self.encoding)

    def matching(self, pattern: str) -> list[str]:
        """The files whose whole relative path fits a regular expression, without regard to case."""
        compiled = re.compile(pattern, re.IGNORECASE)
        return [file for file in self.files if compiled.fullmatch(file)]


@dataclass
class Screen:
    """What was understood of a folder.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per field, as text; a column of paths per channel; `_file` and `_line`, where the row comes from.
    columns : ScreenColumns
        What the columns mean.
    layout : str
    notes : list of str
        What was not understood, left out or taken otherwise than it stands.
    pixel_size : float or None
        Micrometres, of the raw images.
    plate_maps : list of pathlib.Path
        Those that the layout found itself.
    """

    table: pd.DataFrame
    columns: ScreenColumns
    layout: str = ""
    notes: list[str] = field(default_factory=list)
    pixel_size: float | None = None
    plate_maps: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """How a layout is read, the files by which it is known, and what it is."""

    read: Callable[[Source], Screen]
    known_by: str
    what: str


LAYOUT_NAMES = ("auto", "bbbc021", "gallery", "load_data", "phenix", "imagexpress", "incell", "ome", "folder")


def _layouts() -> dict[str, Layout]:
    """Every layout by its name, in the order in which they are tried."""
    from . import file_names, load_data, ome, phenix

    return {
        "bbbc021": Layout(load_data.bbbc021, r"BBBC021_v1_image\.csv(\.gz)?", "BBBC021 and its official tables"),
        "gallery": Layout(load_data.gallery, load_data.GALLERY, "a project or source of the Cell Painting Gallery"),
        "load_data": Layout(load_data.load_data, load_data.LOAD_DATA, "CellProfiler's FileName_, PathName_ or URL_"),
        "phenix": Layout(phenix.phenix, phenix.INDEX, "Opera Phenix and Operetta, by Index.idx.xml"),
        "imagexpress": Layout(file_names.imagexpress, file_names.IMAGEXPRESS, "ImageXpress, by _A01_s1_w1 and .HTD"),
        "incell": Layout(file_names.incell, file_names.INCELL, "IN Cell Analyzer, by A - 01(fld 1 wv DAPI - DAPI)"),
        "ome": Layout(ome.ome, r".*\.(ome\.tiff?|ome|zarr)", "OME-TIFF and OME-Zarr plates, by their metadata"),
        "folder": Layout(file_names.folder, "", "any other, by --pattern with named groups"),
    }


def read_layout(source: Source, layout: str = "auto") -> Screen:
    """Read a folder by a layout's name, or by the first that knows it.

    Raises
    ------
    UserError
        The folder is missing, or no layout knows it; the sentence shows what lies there.
    """
    if not source.raw.is_dir():
        raise UserError(f"folder {source.raw} of raw images does not exist: give the folder that holds them")
    layouts = _layouts()
    if layout == "auto" and (source.tables or source.pattern):
        official = bool(source.tables) and ScreenColumns().plate in source.table.columns
        layout = "bbbc021" if official else "load_data" if source.tables else "folder"
    elif layout == "auto":
        layout = next((name for name, each in layouts.items() if each.known_by and source.matching(each.known_by)), "")
    if layout not in layouts:
        seen = ", ".join(file for file in source.files if IMAGE.fullmatch(file))[:200] or "no image"
        raise UserError(
            f"{source.raw} is of no layout that is known ({', '.join(layouts)}); it holds {seen}: say how its files "
            "are named with --layout folder --pattern (docs/your_screen.md)"
        )
    return replace(layouts[layout].read(source), layout=layout, notes=source.notes)


def channel_name(text: str) -> str:
    """A channel's name as a column of the dataset: `HOECHST 33342` is hoechst_33342, `OrigDNA` is dna."""
    name = re.sub(r"\W+", "_", re.sub(r"^(Image_)?Orig(?=[A-Z0-9])", "", text.strip()), flags=re.ASCII)
    name = name.strip("_").lower()
    return name if name[:1].isalpha() else f"ch_{name}".rstrip("_")


def screen_of(table: pd.DataFrame, channels: dict[str, tuple[str, str | None]], source: Source, **known) -> Screen:
    """A screen whose plate, well and site are found by the names of columns; a plate is its own batch for now."""
    table, found = with_wells(table, source.notes)
    for role in ("plate", "well"):
        if role not in found:
            raise UserError(
                f"{table[FILE].iloc[0] if len(table) else source.raw} has no column of the {role} (it has "
                f"{', '.join(table.columns[:12])}): name it in --columns"
            )
    columns = ScreenColumns(
        channels=channels, plate=found["plate"], well=found["well"], site=found.get("site"), replicate=None,
        site_pattern=r"(?:_s|f|fld |site)0*(\d+)", batch=found.get("batch"), batch_pattern="^(.*)$", table=None,
        image=None,
    )  # fmt: skip
    return Screen(table, columns, **known)
