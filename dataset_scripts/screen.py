"""Reads the tables of a screen (one row per field, and the mechanisms of action) into one tidy table of fields.

The default column mapping is that of the official `BBBC021_v1_image.csv` and `BBBC021_v1_moa.csv`; another screen
brings its own `ScreenColumns`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pandas as pd

from wsdino.errors import UserError
from wsdino.files import read_json

from .image_paths import portable_path
from .table_rules import TableRules
from .tables import read_tables

PARTS = ("annotated", "dmso", "unannotated")
NO_MECHANISM = ("NA", "N/A", "NaN", "nan", "None", "null", "<NA>")  # as R, pandas and others write an empty cell


@dataclass(frozen=True)
class ScreenColumns:
    """Which columns of an image table hold what.

    Attributes
    ----------
    channels : dict
        Channel name -> (column of the file name, column of the folder or None), or three values with the number of
        the plane in a file that holds several, from 0. Channels of a row that share a file without such numbers are
        its planes in their order. The order is kept; 1 to N channels.
    plate, well, compound, concentration : str
        Column names.
    site, replicate : str or None
        Column names. Without a site column the site is read from the first channel's file name by `site_pattern`;
        without a replicate column the replicate is 1.
    moa : str or None
        Column of the mechanism in the image table itself, for a screen without a separate MOA table. NA, N/A, NaN,
        nan, None, null and <NA> count as empty, here and in the MOA table.
    batch : str or None
        Column of the batch; without one, the first group of `batch_pattern` in the plate's name.
    table, image : str or None
        Columns that trace a row back to the source's own numbering.
    control : str
        Name of the negative control in the compound column; such rows become "DMSO" at concentration 0.
    moa_table : (str, str, str)
        Columns of compound, concentration and mechanism in the MOA table.
    """

    channels: dict[str, tuple[str, str | None] | tuple[str, str | None, int | None]] = field(
        default_factory=lambda: {
            "dna": ("Image_FileName_DAPI", "Image_PathName_DAPI"),
            "tubulin": ("Image_FileName_Tubulin", "Image_PathName_Tubulin"),
            "actin": ("Image_FileName_Actin", "Image_PathName_Actin"),
        }
    )
    plate: str = "Image_Metadata_Plate_DAPI"
    well: str = "Image_Metadata_Well_DAPI"
    compound: str = "Image_Metadata_Compound"
    concentration: str = "Image_Metadata_Concentration"
    site: str | None = None
    site_pattern: str = r"_s(\d+)"
    replicate: str | None = "Replicate"
    moa: str | None = None
    batch: str | None = None
    batch_pattern: str = r"^([^_]+)"
    table: str | None = "TableNumber"
    image: str | None = "ImageNumber"
    control: str = "DMSO"
    moa_table: tuple[str, str, str] = ("compound", "concentration", "moa")

    @classmethod
    def from_json(cls, path: str | Path) -> ScreenColumns:
        """Read a mapping from a JSON object with these names.

        Each channel is a file column, [file, folder], or an object with `file`, `folder` and `page`.

        Raises
        ------
        UserError
            The file is missing or no such mapping.
        """
        see = "see dataset_scripts/other_screens.md"
        content = read_json(path, needs=["channels"], fix=f"give a JSON file with a column mapping, {see}")
        channels, names = content["channels"], content.get("moa_table", cls.moa_table)
        if not isinstance(channels, dict) or not channels:
            raise UserError(f"{path}: 'channels' is {channels!r}: give every channel its column, {see}")
        pairs = {name: _channel(each) for name, each in channels.items()}
        if wrong := [name for name, pair in pairs.items() if pair is None]:
            raise UserError(
                f"{path}: channel {wrong[0]!r} needs a file column, a pair of file and folder column, or an object "
                "with file, folder and page"
            )
        if not isinstance(names, list | tuple) or len(names) != 3 or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"{path}: 'moa_table' is {names!r}: name three columns: compound, concentration, mechanism"
            )
        texts = {name: hint for name, hint in get_type_hints(cls).items() if hint in (str, str | None)}
        for name, value in content.items():
            if name not in (*texts, "channels", "moa_table"):
                raise UserError(f"{path}: {name!r} is unknown: use {', '.join(texts)}, channels or moa_table")
            if name in texts and not isinstance(value, texts[name]):
                raise UserError(f"{path}: {name!r} is {value!r}: give a text{', or null' * (texts[name] is not str)}")
        return cls(**content | {"channels": pairs, "moa_table": tuple(names)})

    def image_columns(self) -> list[str]:
        """The columns that the image table must have."""
        wanted = [self.plate, self.well, self.compound, self.concentration]
        wanted += [c for c in (self.site, self.replicate, self.moa, self.batch) if c]
        return wanted + [c for pair in self.channels.values() for c in pair[:2] if c]


def _channel(each: object) -> tuple | None:
    """A channel of a column mapping as (file, folder) or (file, folder, page); None for anything else."""
    if isinstance(each, dict) and set(each) <= {"file", "folder", "page"}:
        found = (each.get("file"), each.get("folder"), each.get("page"))
    elif isinstance(each, list) and len(each) == 2:
        found = (*each, None)
    else:
        found = (each, None, None)
    kinds = isinstance(found[0], str), isinstance(found[1], str | None), isinstance(found[2], int | None)
    if not all(kinds) or (found[2] or 0) < 0:
        return None
    return found[:2] if found[2] is None else found


def treatment_name(compound: str, concentration: float) -> str:
    """`compound_concentration` with a number of up to six significant digits, or "DMSO"."""
    return "DMSO" if compound == "DMSO" else f"{compound}_{concentration:g}"


def read_screen(
    image_csv: str | Path,
    moa_csv: str | Path | None = None,
    columns: ScreenColumns | None = None,
    table: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Read and check the tables of a screen.

    Parameters
    ----------
    image_csv, moa_csv : path
        In any form that `dataset_scripts.tables.read_tables` knows. `moa_csv` may be None where the image table has a
        MOA column, or nothing is annotated.
    columns : ScreenColumns, optional
        Default: the official BBBC021 names.
    table : pandas.DataFrame, optional
        The image table itself, already read from `image_csv`: one row per field, the columns that `columns` names, as
        text. The columns `_file` and `_line`, where present, say for messages where each row came from.

    Returns
    -------
    pandas.DataFrame
        One row per field, in the order of the table: `row` (its line in the CSV, the header being line 1), `table`
        (its file), `plate, well, site, replicate, batch, compound, concentration, treatment, moa, part, table_number,
        image_number` and, per channel, `<channel>_file` (folder/name, with forward slashes) and
        `<channel>_page` and `<channel>_pages` (see `_number_pages`). `part` is "dmso" for
        the control, "annotated" where a mechanism is known, else "unannotated" (moa "").

    Raises
    ------
    UserError
        Missing file or column, a value that cannot be read, two rows that name the same file or the same site, a
        plate of two batches, a well of two treatments, a treatment of two mechanisms, or an annotated treatment that
        no image shows.
    """
    columns = columns or ScreenColumns()
    table = read_tables(image_csv, "image table") if table is None else table.fillna("").astype(str)
    rules = TableRules(table, image_csv)
    rules.require(columns.image_columns())
    if table.empty:
        raise UserError(f"{image_csv} has a header but no rows: give the table of a screen with images")

    fields = pd.DataFrame({"row": rules.lines.astype(int), "table": rules.files})
    fields["plate"], fields["well"] = rules.name(columns.plate), rules.name(columns.well)
    fields["compound"] = rules.text(columns.compound)
    control = fields["compound"] == columns.control
    rules.refuse(
        (fields["compound"] == "DMSO") & ~control,
        f"'DMSO' beside the control {columns.control!r}: name it as the control in the column mapping, or rename it "
        "in the table",
    )
    fields.loc[control, "compound"] = "DMSO"
    # Many screens leave the concentration of the control empty.
    fields["concentration"] = rules.numbers(
        columns.concentration, rules.table[columns.concentration].mask(control, "0")
    )
    rules.refuse(fields["concentration"] < 0, f"column {columns.concentration!r} is negative: correct the table")
    for channel, pair in columns.channels.items():
        fields[f"{channel}_file"] = _file_paths(rules, channel, *pair[:2])
    _number_pages(fields, columns)
    named = [fields[f"{channel}_file"].rename("file").reset_index() for channel in columns.channels]
    files = pd.concat(named).drop_duplicates().set_index("index")["file"]
    rules.unique(files[files != ""], "name the same file {}: correct the table".format)

    if columns.site:
        fields["site"] = rules.whole(columns.site)
    else:
        first = next(iter(columns.channels.values()))[0]
        found = rules.found(rules.table[first], columns.site_pattern, "site_pattern", "site number", first)
        fields["site"] = rules.whole(f"{first} by site_pattern", found)
    fields["replicate"] = rules.whole(columns.replicate) if columns.replicate else 1
    if columns.batch:
        fields["batch"] = rules.text(columns.batch)
    else:
        fields["batch"] = rules.found(fields["plate"], columns.batch_pattern, "batch_pattern", "batch", "plate")
    for name, column in (("table_number", columns.table), ("image_number", columns.image)):
        fields[name] = rules.whole(column) if column in rules.table else 0
    fields["treatment"] = [
        treatment_name(*pair) for pair in zip(fields["compound"], fields["concentration"], strict=True)
    ]
    # Plates 1, 2, 3 of every batch would be merged, and corrected for illumination as one.
    fix = "give plates names of their own, such as batch_plate"
    rules.one_value(fields, ["plate"], "batch", "the batch of plate {plate!r}", fix)
    what = "the treatment of well {well!r} of plate {plate!r}"
    rules.one_value(fields, ["plate", "well"], "treatment", what, f"{fix}, or every well one treatment")
    rules.unique(
        fields[["plate", "well", "site"]],
        "are both site {0[site]} of well {0[well]} of plate {0[plate]}: number the sites of a well, and keep one "
        "plane of a focus stack".format,
    )
    fields["moa"] = rules.text(columns.moa, empty=True, none=NO_MECHANISM) if columns.moa else ""
    if moa_csv is not None:
        known = read_mechanisms(moa_csv, columns)
        absent = sorted(set(known) - set(fields["treatment"]) - {"DMSO"})
        if absent:
            raise UserError(
                f"{moa_csv}: {len(absent)} annotated treatment(s) have no image in {image_csv}, the first is "
                f"{absent[0]!r}: correct the compound's name or concentration, or take the line out"
            )
        fields["moa"] = fields["treatment"].map(known).fillna("")
    fields.loc[control, "moa"] = "DMSO"
    rules.one_value(fields, ["treatment"], "moa", "{treatment!r}", "keep one")
    fields["part"] = np.where(control, "dmso", np.where(fields["moa"] == "", "unannotated", "annotated"))
    return fields


def read_mechanisms(moa_csv: str | Path, columns: ScreenColumns | None = None) -> dict[str, str]:
    """Treatment name -> mechanism of action, from a table of compound, concentration and mechanism.

    Raises
    ------
    UserError
        The table cannot be read, lacks a column or a value, or names two mechanisms for one treatment.
    """
    columns = columns or ScreenColumns()
    rules = TableRules(read_tables(moa_csv, "MOA table"), moa_csv)
    compound, concentration, moa = columns.moa_table
    rules.require(columns.moa_table)
    names = rules.text(compound)
    control = names == columns.control
    doses = rules.numbers(concentration, rules.table[concentration].mask(control, "0"))
    treatments = [treatment_name(*pair) for pair in zip(names.mask(control, "DMSO"), doses, strict=True)]
    known = pd.DataFrame({"treatment": treatments, "moa": rules.text(moa, none=NO_MECHANISM)})
    rules.one_value(known, ["treatment"], "moa", "{treatment!r}", "keep one")
    return dict(zip(known["treatment"], known["moa"], strict=True))


def _number_pages(fields: pd.DataFrame, columns: ScreenColumns) -> None:
    """Add `<channel>_page`, the plane's number in its file (-1 in a file of one plane), and `<channel>_pages`.

    The latter is how many planes the file must hold where the order of the channels stands for their numbers, else 0.
    """
    files = {channel: fields[f"{channel}_file"] for channel in columns.channels}
    for number, (channel, pair) in enumerate(columns.channels.items()):
        same = [(files[other] == files[channel]).astype(int) for other in files]
        shared = (sum(same) > 1) & (files[channel] != "")
        page = pair[2] if len(pair) > 2 else None
        fields[f"{channel}_page"] = np.where(shared, sum(same[:number]), -1) if page is None else page
        fields[f"{channel}_pages"] = np.where(shared, sum(same), 0) if page is None else 0


def _file_paths(rules: TableRules, channel: str, file_column: str, folder_column: str | None) -> pd.Series:
    """Folder and name of a channel's images, with forward slashes; "" where the table names none."""
    path = rules.text(file_column, empty=True)
    if folder_column:
        path = (rules.text(folder_column, empty=True) + "/" + path).where(path != "", "")
    path = path.map(portable_path)
    rules.refuse(
        path.str.contains(r"[\x00-\x1f]", regex=True),
        lambda row: f"the {channel} file {path[row]!r} cannot name a file: correct the table",
    )
    return path
