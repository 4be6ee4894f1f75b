"""Reads the tables of a screen (one row a field, and the mechanisms of action) into one tidy table of fields.

The default column mapping is that of the official `BBBC021_v1_image.csv` and `BBBC021_v1_moa.csv`; another screen
brings its own :class:`ScreenColumns`.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import warnings
import zlib
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path

import numpy as np
import pandas as pd

from wsdino.errors import UserError

PARTS = ("annotated", "dmso", "unannotated")
NO_MECHANISM = ("NA", "N/A", "NaN", "nan", "None", "null", "<NA>")  # as R, pandas and others write an empty cell

MOST_BYTES = 1_000_000_000  # of a table, unpacked: 300 times BBBC021's; a larger .gz is a bomb
MOST_WHOLE = 2**31 - 1  # of a site, a replicate, a number of the source: the dataset's columns are int32


ScreenError = UserError  # the old name, until every file uses the new one


@dataclass(frozen=True)
class ScreenColumns:
    """Which columns of an image-level CSV hold what.

    Attributes
    ----------
    channels : dict
        Channel name -> (column of the file name, column of the folder or None). The order is kept; 1 to N channels.
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

    channels: dict[str, tuple[str, str | None]] = field(
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
    def from_json(cls, path) -> ScreenColumns:
        """Read a mapping from a JSON object with these names; each channel is a file column or [file, folder]."""
        try:
            content = json.loads(Path(path).read_text())
            channels = content.pop("channels")
            pairs = {name: tuple(each) if isinstance(each, list) else (each, None) for name, each in channels.items()}
            if isinstance(content.get("moa_table"), list):
                content["moa_table"] = tuple(content["moa_table"])
            columns = cls(channels=pairs, **content)
        except FileNotFoundError as error:
            raise ScreenError(f"column mapping {path} does not exist: give the path of a JSON file") from error
        except KeyError as error:
            raise ScreenError(f"{path} has no {error}: name at least one channel and its file column") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ScreenError(
                f"{path} is not a column mapping ({error}): see dataset_scripts/other_screens.md"
            ) from error
        named = [len(pair) == 2 and isinstance(pair[0], str) for pair in columns.channels.values()]
        named += [pair[1] is None or isinstance(pair[1], str) for pair in columns.channels.values() if len(pair) == 2]
        if not named or not all(named):
            raise ScreenError(f"{path}: each channel needs a file column, or a pair of file and folder column")
        for each in dataclass_fields(cls):
            value, optional = getattr(columns, each.name), each.type == "str | None"
            if each.type.startswith("str") and not isinstance(value, str) and not (optional and value is None):
                raise ScreenError(f"{path}: {each.name!r} is {value!r}: give a text{', or null' * optional}")
        named = columns.moa_table
        if not (isinstance(named, tuple) and len(named) == 3 and all(isinstance(name, str) for name in named)):
            raise ScreenError(
                f"{path}: 'moa_table' is {named!r}: give three column names, of compound, concentration and mechanism"
            )
        return columns

    def image_columns(self) -> list[str]:
        """The columns that the image table must have."""
        wanted = [self.plate, self.well, self.compound, self.concentration]
        wanted += [c for c in (self.site, self.replicate, self.moa, self.batch) if c]
        return wanted + [c for pair in self.channels.values() for c in pair if c]


def treatment_name(compound: str, concentration: float) -> str:
    """`compound_concentration` with a number of up to six significant digits, or "DMSO"."""
    return "DMSO" if compound == "DMSO" else f"{compound}_{concentration:g}"


def read_screen(
    image_csv, moa_csv=None, columns: ScreenColumns | None = None, table: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Read and check the tables of a screen.

    Parameters
    ----------
    image_csv, moa_csv : path
        Plain or gzipped CSV. `moa_csv` may be None where the image table has a MOA column, or nothing is annotated.
    columns : ScreenColumns, optional
        Default: the official BBBC021 names.
    table : pandas.DataFrame, optional
        The image table itself, already read from `image_csv`: one row per field, the columns that `columns` names, as
        text. `table_line`, where present, is the line of each row in its file (default: its position, plus 2).

    Returns
    -------
    pandas.DataFrame
        One row a field, in the order of the table: `row` (line number in the CSV, the header being line 1), `plate,
        well, site, replicate, batch, compound, concentration, treatment, moa, part, table_number, image_number` and
        `<channel>_file` (folder/name, with forward slashes) a channel. `part` is "dmso" for the control, "annotated"
        where a mechanism is known, else "unannotated" (moa "").

    Raises
    ------
    ScreenError
        Missing file or column, a value that cannot be read, two rows naming the same file or the same site, a plate
        of two batches, a well of two treatments, a treatment of two mechanisms, or an annotated treatment that no
        image shows.
    """
    columns = columns or ScreenColumns()
    image_csv = Path(image_csv)
    if table is None:
        raw = _read_csv(image_csv, "image table")
    else:
        raw = table.reset_index(drop=True).fillna("").astype(str)
    _require(raw, columns.image_columns(), image_csv)
    if raw.empty:
        raise ScreenError(f"{image_csv} has a header but no rows: give the table of a screen with images")

    fields = pd.DataFrame({"row": np.arange(len(raw)) + 2})
    for name in ("plate", "well"):
        fields[name] = _names(raw, getattr(columns, name), image_csv)
    fields["compound"] = _text(raw, columns.compound, image_csv)
    control = fields["compound"] == columns.control
    if (other := (fields["compound"] == "DMSO") & ~control).any():
        raise ScreenError(
            f"{image_csv}, line {fields['row'][other.idxmax()]}: 'DMSO' beside the control {columns.control!r}: name "
            "it as the control in the column mapping, or rename it in the table"
        )
    fields.loc[control, "compound"] = "DMSO"
    fields["concentration"] = _doses(raw, columns.concentration, control, image_csv)
    if (fields["concentration"] < 0).any():
        row = fields["row"][(fields["concentration"] < 0).idxmax()]
        raise ScreenError(f"{image_csv}, line {row}: column {columns.concentration!r} is negative: mend the table")

    for channel, (file_column, folder_column) in columns.channels.items():
        path = _text(raw, file_column, image_csv, empty=True).str.replace("\\", "/")
        if folder_column:
            folder = _text(raw, folder_column, image_csv, empty=True).str.replace("\\", "/").str.strip("/")
            path = (folder + "/" + path).str.lstrip("/").where(path != "", "")
        # Also a drive of Windows, wherever this is read, and what no file can be named.
        outside = path.str.contains(r"^/|^[^/]*:|[\x00-\x1f]", regex=True)
        outside |= path.str.split("/").map(lambda parts: ".." in parts)
        if outside.any():
            row = fields["row"][outside.idxmax()]
            raise ScreenError(
                f"{image_csv}, line {row}: the {channel} file {path[row - 2]!r} leads out of the image folder: "
                "name files inside it"
            )
        fields[f"{channel}_file"] = path
    named = pd.concat([fields[f"{channel}_file"] for channel in columns.channels])
    twice = named[(named != "") & named.duplicated(keep=False)]
    if len(twice):
        rows = " and ".join(str(fields["row"][i]) for i in twice.index[twice == twice.iloc[0]][:2])
        raise ScreenError(f"{image_csv}: lines {rows} name the same file {twice.iloc[0]}: mend the table")

    if columns.site:
        fields["site"] = _whole(raw, columns.site, image_csv)
    else:
        file_column = next(iter(columns.channels.values()))[0]
        found = _first_group(raw[file_column].astype(str), columns.site_pattern, "site_pattern")
        if found.isna().any():
            row = fields["row"][found.isna().idxmax()]
            raise ScreenError(
                f"{image_csv}, line {row}: no site number ({columns.site_pattern}) in {file_column} "
                f"{raw[file_column][row - 2]!r}: name the site's column in the column mapping"
            )
        name = f"{file_column} by site_pattern"
        fields["site"] = _whole(found.to_frame(name), name, image_csv)
    fields["replicate"] = _whole(raw, columns.replicate, image_csv) if columns.replicate else 1
    if columns.batch:
        fields["batch"] = _text(raw, columns.batch, image_csv)
    else:
        found = _first_group(fields["plate"], columns.batch_pattern, "batch_pattern")
        if found.isna().any():
            row = fields["row"][found.isna().idxmax()]
            raise ScreenError(
                f"{image_csv}, line {row}: no batch ({columns.batch_pattern}) in plate {fields['plate'][row - 2]!r}"
                f": name the batch's column in the column mapping"
            )
        fields["batch"] = found
    for name, column in (("table_number", columns.table), ("image_number", columns.image)):
        fields[name] = _whole(raw, column, image_csv) if column in raw else 0

    fields["treatment"] = [
        treatment_name(*pair) for pair in zip(fields["compound"], fields["concentration"], strict=True)
    ]
    # Plates 1, 2, 3 of every batch would be merged, and corrected for illumination as one.
    mend = "give plates names of their own, such as batch_plate"
    _refuse_two(fields, ["plate"], "batch", "the batch of plate {plate!r}", mend, image_csv)
    what = "the treatment of well {well!r} of plate {plate!r}"
    _refuse_two(fields, ["plate", "well"], "treatment", what, f"{mend}, or a well one treatment", image_csv)
    twice = fields.index[fields.duplicated(["plate", "well", "site"], keep=False)]
    if len(twice):
        plate, well, site = fields.loc[twice[0], ["plate", "well", "site"]]
        same = (fields["plate"] == plate) & (fields["well"] == well) & (fields["site"] == site)
        rows = " and ".join(str(row) for row in fields["row"][same][:2])
        raise ScreenError(
            f"{image_csv}: lines {rows} are both site {site} of well {well} of plate {plate}: number the sites of a "
            "well, and keep one plane of a focus stack"
        )
    fields["moa"] = _text(raw, columns.moa, image_csv, empty=True, none=NO_MECHANISM) if columns.moa else ""
    if moa_csv is not None:
        known = read_mechanisms(moa_csv, columns)
        absent = sorted(set(known) - set(fields["treatment"]) - {"DMSO"})
        if absent:
            raise ScreenError(
                f"{moa_csv}: {len(absent)} annotated treatment(s) have no image in {image_csv}, the first is "
                f"{absent[0]!r}: mend the compound's name or concentration, or take the line out"
            )
        fields["moa"] = fields["treatment"].map(known).fillna("")
    fields.loc[control, "moa"] = "DMSO"
    _refuse_two(fields, ["treatment"], "moa", "{treatment!r}", "keep one", image_csv)
    fields["part"] = np.where(control, "dmso", np.where(fields["moa"] == "", "unannotated", "annotated"))
    return fields


def read_mechanisms(moa_csv, columns: ScreenColumns | None = None) -> dict[str, str]:
    """Treatment name -> mechanism of action, from a table of compound, concentration and mechanism."""
    columns = columns or ScreenColumns()
    table = _read_csv(Path(moa_csv), "MOA table")
    compound, concentration, moa = columns.moa_table
    _require(table, columns.moa_table, moa_csv)
    names = _text(table, compound, moa_csv)
    doses = _doses(table, concentration, names == columns.control, moa_csv)
    treatments = [
        treatment_name("DMSO" if name == columns.control else name, dose)
        for name, dose in zip(names, doses, strict=True)
    ]
    mechanisms = _text(table, moa, moa_csv, none=NO_MECHANISM)
    known: dict[str, str] = {}
    for line, (treatment, mechanism) in enumerate(zip(treatments, mechanisms, strict=True), start=2):
        if known.setdefault(treatment, mechanism) != mechanism:
            raise ScreenError(
                f"{moa_csv}, line {line}: {treatment!r} is {mechanism!r} here and {known[treatment]!r} above: keep one"
            )
    return known


def _read_csv(path: Path, what: str) -> pd.DataFrame:
    if not path.is_file():
        raise ScreenError(f"{what} {path} does not exist: give its path (plain or .gz)")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it holds more than {MOST_BYTES:,} bytes")
        if b"\0" in content:  # which some versions of pandas take for a cell's end
            raise ValueError(f"line {content[: content.index(0)].count(10) + 1} holds a NUL")
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # of rows that are longer than the header
            table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, index_col=False)
    except (ValueError, OSError, EOFError, zlib.error, pd.errors.ParserWarning) as error:
        reason = " ".join(str(error).split())
        raise ScreenError(
            f"{what} {path} cannot be read as CSV ({reason}): save it as CSV in UTF-8, or fetch it again"
        ) from error
    short = table.isna().any(axis=1)  # empty cells are text here, so only those that the line lacks
    if short.any():
        raise ScreenError(f"{what} {path}, line {int(short.idxmax()) + 2}: fewer values than columns: fetch it again")
    return table


def _require(table: pd.DataFrame, columns, path) -> None:
    for column in columns:
        if column not in table:
            raise ScreenError(
                f"{path} has no column {column!r} (it has {', '.join(map(str, table.columns))}): name one of these in "
                "the column mapping (dataset_scripts/other_screens.md), or fetch the table again"
            )


def _refuse_two(fields: pd.DataFrame, keys: list[str], name: str, what: str, mend: str, path) -> None:
    """Refuse two values of the column `name` for one of the columns `keys`."""
    first = fields.groupby(keys)[name].transform("first")
    if (other := fields[name] != first).any():
        i = other.idxmax()
        row = fields.loc[i]
        raise ScreenError(
            f"{path}, line {row['row']}: {what.format(**row)} is {row[name]!r} here and {first[i]!r} above: {mend}"
        )


def _text(table: pd.DataFrame, column: str, path, empty: bool = False, none: tuple[str, ...] = ()) -> pd.Series:
    """Stripped text; what stands in `none` counts as empty, which is refused unless `empty`."""
    text = table[column].astype(str).str.strip()
    text = text.mask(text.isin(none), "")
    if not empty and (text == "").any():
        line = int((text == "").idxmax()) + 2
        raise ScreenError(f"{path}, line {line}: column {column!r} is empty: fill it in, or take the line out")
    return text.astype(object)


def _names(table: pd.DataFrame, column: str, path) -> pd.Series:
    """Text that may become a file's name, and so may not lead out of a folder."""
    names = _text(table, column, path)
    bad = names.str.contains(r"[/\\\x00-\x1f]", regex=True) | names.isin([".", ".."]) | (names.str.len() > 100)
    if bad.any():
        i = int(bad.idxmax())
        raise ScreenError(
            f"{path}, line {i + 2}: column {column!r} is {names[i][:40]!r}, which cannot name a file: "
            "give a short name without slashes"
        )
    return names


def _numbers(table: pd.DataFrame, column: str, path) -> pd.Series:
    numbers = pd.to_numeric(table[column], errors="coerce")
    bad = ~np.isfinite(numbers)
    if bad.any():
        i = int(bad.idxmax())
        raise ScreenError(f"{path}, line {i + 2}: column {column!r} is {table[column][i]!r}, which is not a number")
    return numbers


def _doses(table: pd.DataFrame, column: str, control: pd.Series, path) -> pd.Series:
    """Numbers, 0 for the control, whose concentration many screens leave empty."""
    return _numbers(table[column].mask(control, "0").to_frame(), column, path)


def _whole(table: pd.DataFrame, column: str, path) -> pd.Series:
    numbers = _numbers(table, column, path)
    if (bad := (numbers != numbers.round()) | (numbers.abs() > MOST_WHOLE)).any():
        i = int(bad.idxmax())
        raise ScreenError(
            f"{path}, line {i + 2}: column {column!r} is {table[column][i]!r}, which is not a whole number of at most "
            f"{MOST_WHOLE:,}"
        )
    return numbers.astype(int)


def _first_group(text: pd.Series, pattern: str, name: str) -> pd.Series:
    """What the pattern's first group finds in each text, NaN where it finds nothing."""
    try:
        return text.str.extract(pattern).iloc[:, 0]
    except (ValueError, TypeError, re.error) as error:
        raise ScreenError(f"{name} {pattern!r} ({error}): give a regular expression with a group") from error


def channel_pattern(name: str) -> bool:
    """True for a channel name that can be a column of the dataset (letters, digits, underscores)."""
    return re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) is not None
