"""Reads the tables of a screen (one row per field, and the mechanisms of action) into one tidy table of fields.

The default column mapping is that of the official `BBBC021_v1_image.csv` and `BBBC021_v1_moa.csv`; another screen
brings its own `ScreenColumns`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pandas as pd

from wsdino.errors import UserError
from wsdino.files import read_json

from .image_paths import portable_path
from .table_rules import TableRules
from .tables import common_names, over_distinct, read_doses, read_tables, spelling, well_name

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
    plate, well, compound : str
        Column names.
    concentration : str or None
        Column of the dose, with its unit if it has one; None where there are no doses: a treatment is a compound.
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
    control : str, list of str, or dict
        Name or names of the negative control in the compound column, "" for an empty cell; or another column and its
        value. Such rows become "DMSO" at concentration 0.
    moa_table : (str, str or None, str)
        Columns of compound, concentration and mechanism in the MOA table; None where it names compounds alone.
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
    concentration: str | None = "Image_Metadata_Concentration"
    site: str | None = None
    site_pattern: str = r"_s(\d+)"
    replicate: str | None = "Replicate"
    moa: str | None = None
    batch: str | None = None
    batch_pattern: str = r"^([^_]+)"
    table: str | None = "TableNumber"
    image: str | None = "ImageNumber"
    control: str | list[str] | dict[str, str] = "DMSO"
    moa_table: tuple[str, str | None, str] = ("compound", "concentration", "moa")

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
        fits = isinstance(names, list | tuple) and len(names) == 3
        if not fits or not all(isinstance(n, str) or (n is None and i == 1) for i, n in enumerate(names)):
            raise UserError(
                f"{path}: 'moa_table' is {names!r}: name three columns: compound, concentration, mechanism"
            )
        texts = {name: hint for name, hint in get_type_hints(cls).items() if hint in (str, str | None)}
        control = content.get("control", "")
        several = (
            control
            if isinstance(control, list)
            else [*control, *control.values()]
            if isinstance(control, dict)
            else [control]
        )
        if (
            not several
            or len(several) > 2
            and isinstance(control, dict)
            or not all(isinstance(each, str) for each in several)
        ):
            raise UserError(
                f"{path}: 'control' is {control!r}: give a name, a list of names, or one column and its value"
            )
        for name, value in content.items():
            if name not in (*texts, "channels", "control", "moa_table"):
                raise UserError(f"{path}: {name!r} is unknown: use {', '.join(texts)}, channels, control or moa_table")
            if name in texts and not isinstance(value, texts[name]):
                raise UserError(f"{path}: {name!r} is {value!r}: give a text{', or null' * (texts[name] is not str)}")
        return cls(**content | {"channels": pairs, "moa_table": tuple(names)})

    @property
    def control_text(self) -> str:
        """The control as a flag says it."""
        if isinstance(self.control, dict):
            return " ".join(f"{column}={value}" for column, value in self.control.items())
        return self.control if isinstance(self.control, str) else ", ".join(self.control)

    def image_columns(self) -> list[str]:
        """The columns that the image table must have."""
        wanted = [self.plate, self.well, self.compound, *(self.control if isinstance(self.control, dict) else ())]
        wanted += [c for c in (self.concentration, self.site, self.replicate, self.moa, self.batch) if c]
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
    """`compound_concentration` with a number of up to six significant digits; the compound alone where that is NaN."""
    return compound if compound == "DMSO" or np.isnan(concentration) else f"{compound}_{concentration:g}"


def read_screen(
    image_csv: str | Path,
    moa_csv: str | Path | None = None,
    columns: ScreenColumns | None = None,
    table: pd.DataFrame | None = None,
    merge_names: bool = False,
    notes: list[str] | None = None,
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
    merge_names : bool
        Take spellings of a compound that differ in case or spaces, and doses of it within 5 %, for the most frequent.
    notes : list of str, optional
        Receives what was taken otherwise than it stands, and those spellings and doses.

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
    notes = [] if notes is None else notes
    table = read_tables(image_csv, "image table", notes) if table is None else table.fillna("")
    rules = TableRules(table, image_csv)
    rules.require(columns.image_columns())
    fields = pd.DataFrame({"row": rules.lines.astype(int), "table": rules.files})
    fields["plate"], wells = rules.name(columns.plate), rules.name(columns.well)
    fields["well"] = over_distinct(wells, well_name)
    if len(otherwise := wells[wells != fields["well"]]):
        first = otherwise.iloc[0]
        notes.append(f"{len(otherwise):,} wells are written otherwise: {first!r} is {well_name(first)}")
    compound, control = _compounds_and_control(rules, columns, merge_names)
    fields["concentration"] = _doses(rules, columns.concentration, control, notes)
    names, doses, told = common_names(compound, fields["concentration"])
    if merge_names:
        compound, fields["concentration"] = names, doses
    notes += [f"{'merged' if merge_names else 'not merged (--merge_names would)'}: {sentence}" for sentence in told]
    fields["compound"] = compound.mask(control, "DMSO")
    rules.refuse(fields["concentration"] < 0, f"column {columns.concentration!r} is negative: correct the table")
    for channel, pair in columns.channels.items():
        fields[f"{channel}_file"] = _file_paths(rules, channel, *pair[:2])
    _number_pages(fields, columns)
    named = pd.concat([fields[f"{channel}_file"].rename("file").reset_index() for channel in columns.channels])
    named = named[named["file"] != ""]
    hashes = named.assign(file=named["file"].map(hash)).drop_duplicates()  # of two million paths in a second
    if hashes["file"].duplicated().any():
        files = named.drop_duplicates().set_index("index")["file"]
        rules.unique(files, "name the same file {}: correct the table".format)

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
    for name in ("plate", "batch"):
        joined = fields[name].str.contains("|", regex=False)
        rules.refuse(
            joined,
            lambda row, name=name: f"{name} {fields[name][row]!r} holds a |, which joins several names: rename it",
        )
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
        key = fields["treatment"] if columns.moa_table[1] else fields["compound"]
        if merge_names:
            spelled = {spelling(name): name for name in key.unique()}
            known = {spelled.get(spelling(name), name): moa for name, moa in known.items()}
        absent = sorted(set(known) - set(key) - {"DMSO"})
        if absent and not columns.moa_table[1]:
            notes.append(
                f"{moa_csv}: {len(absent):,} of {len(known):,} compounds have no image, such as {absent[0]!r}"
            )
        elif absent:
            raise UserError(
                f"{moa_csv}: {len(absent)} annotated treatment(s) have no image in {image_csv}, the first is "
                f"{absent[0]!r}: correct the compound's name or concentration, or take the line out"
            )
        fields["moa"] = key.map(known).fillna("")
    fields.loc[control, "moa"] = "DMSO"
    rules.one_value(fields, ["treatment"], "moa", "{treatment!r}", "keep one")
    fields["part"] = np.where(control, "dmso", np.where(fields["moa"] == "", "unannotated", "annotated"))
    return fields


def read_mechanisms(moa_csv: str | Path, columns: ScreenColumns | None = None) -> dict[str, str]:
    """Treatment -> mechanism of action, from a table of compound, concentration (if it has one) and mechanism.

    Raises
    ------
    UserError
        The table cannot be read, lacks a column or a value, or names two mechanisms for one treatment.
    """
    columns = columns or ScreenColumns()
    rules = TableRules(read_tables(moa_csv, "MOA table"), moa_csv)
    compound, concentration, moa = columns.moa_table
    rules.require(name for name in columns.moa_table if name)
    names = rules.text(compound)
    control = names.isin([columns.control] if isinstance(columns.control, str) else list(columns.control))
    doses = _doses(rules, concentration if columns.concentration else None, control, [])
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


def _compounds_and_control(
    rules: TableRules, columns: ScreenColumns, merge_names: bool
) -> tuple[pd.Series, pd.Series]:
    """The compounds as they stand, and which rows are the negative control."""
    compound = rules.text(columns.compound, empty=True)
    if isinstance(columns.control, dict):
        ((column, value),) = columns.control.items()
        control = rules.text(column, empty=True) == value
    else:
        names = [columns.control] if isinstance(columns.control, str) else columns.control
        same = spelling if merge_names else str
        control = over_distinct(compound, same).isin([same(name) for name in names])
    rules.refuse(
        (compound == "") & ~control,
        f'column {columns.compound!r} is empty: name the compound, or say that this is the control (--control "")',
    )
    rules.refuse(
        (compound == "DMSO") & ~control,
        f"'DMSO' beside the control {columns.control!r}: name it as the control (--control), or rename it",
    )
    return compound, control


def _doses(rules: TableRules, column: str | None, control: pd.Series, notes: list[str]) -> pd.Series:
    """Doses, 0 of the control, whose cells many screens leave empty; NaN without a column, but for the control."""
    if column is None:
        return pd.Series(np.nan, control.index).mask(control, 0.0)
    return read_doses(rules.table[column].mask(control, "0"), column, rules.place, notes)


def _file_paths(rules: TableRules, channel: str, file_column: str, folder_column: str | None) -> pd.Series:
    """Folder and name of a channel's images, with forward slashes; "" where the table names none."""
    parts = [
        over_distinct(rules.text(column, empty=True), _portable) for column in (folder_column, file_column) if column
    ]
    for part in parts:
        rules.refuse(
            over_distinct(part, lambda text: re.search(r"[\x00-\x1f]", text) is not None).astype(bool),
            lambda row, part=part: f"the {channel} file {part[row]!r} cannot name a file: correct the table",
        )
    whole = parts[0] if len(parts) == 1 else (parts[0] + "/" + parts[1]).str.lstrip("/").where(parts[1] != "", "")
    return whole.astype("str")  # which holds two million paths in half of what Python's own texts take


def _portable(text: str) -> str:
    """`portable_path`, looked for only where a name holds something to be dropped."""
    return portable_path(text) if re.search(r"[/\\:]|^\.*$", text) else text
