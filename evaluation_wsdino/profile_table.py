"""A table of profiles: read from a run or from another program, named in one way, and checked once.

It follows the cytomining convention: `Metadata_*` columns, then numeric features named `<channel>_<index>`, one row
per field of view (or well, or cell). Once it is read, the `Metadata_Compound` of negative controls is "DMSO".
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from wsdino.errors import UserError, first_line
from wsdino.settings import setting

CONTROL = "DMSO"
_NEEDED = ("Metadata_Plate", "Metadata_Compound", "Metadata_Treatment")
_FOR_ALL_OR_NONE = ("Metadata_Batch", "Metadata_Well", "Metadata_Site")
# Names, without the prefix Metadata_ and in small letters, under which other programs write what a score needs.
_ALIASES = {
    "Metadata_Plate": ("plate", "assay_plate_barcode"),
    "Metadata_Well": ("well", "well_position"),
    "Metadata_Site": ("site", "field", "fieldid"),
    "Metadata_Batch": ("batch",),
    "Metadata_Compound": ("compound", "gene", "pert_iname", "broad_sample", "jcp2022"),
    "Metadata_Treatment": ("treatment",),
    "Metadata_Concentration": ("concentration", "mmoles_per_liter"),
    "Metadata_MOA": ("moa",),
}
# Where other programs mark negative controls: column and value, in small letters.
_CONTROL_MARKS = (("control_type", "negcon"), ("pert_type", "negcon"))
# What tells rows apart; a table per well has no site, one per field no cell.
PLACE = ("Metadata_Plate", "Metadata_Well", "Metadata_Site", "Metadata_Cell")
_NO_FEATURES = ("ImageNumber", "ObjectNumber", "TableNumber")


@dataclass
class TableSettings:
    """How a table of profiles is read."""

    compound_column: str | None = setting(None, "Column of the compound, or the gene, of each row.")
    treatment_column: str | None = setting(None, "Column of the treatment; otherwise compound and concentration.")
    moa_column: str | None = setting(None, "Column of the mechanism of action.")
    batch_column: str | None = setting(None, "Column of the batch.")
    controls: list[str] = setting([], "Negative controls by name, instead of DMSO.")
    control_column: str | None = setting(None, "Column that --controls names values of; the compound's if not given.")
    compartments: bool = setting(
        False, "Normalize the Cells, Cytoplasm and Nuclei features of a CellProfiler table each alone."
    )


def feature_columns(profiles: pd.DataFrame) -> dict[str, list[str]]:
    """`{channel: [column, ...]}` of the feature columns, in the order in which the table holds them."""
    channels = {}
    for column in profiles.columns:
        if not str(column).startswith("Metadata_"):
            channels.setdefault(str(column).rpartition("_")[0] or str(column), []).append(column)
    return channels


def features_of(profiles: pd.DataFrame) -> np.ndarray:
    """The features of all channels, float64 of shape (rows, features)."""
    return profiles[[column for names in feature_columns(profiles).values() for column in names]].to_numpy(np.float64)


def is_named(names: pd.Series) -> pd.Series:
    """Which values of a column name something: those not missing and not blank."""
    return names.notna() & (names.astype(str).str.strip() != "")


def read_profiles(
    path: str | Path,
    settings: TableSettings | None = None,
    labels: pd.DataFrame | None = None,
    *,
    relabel: bool = False,
) -> pd.DataFrame:
    """The checked table of one file.

    Parameters
    ----------
    path : str or Path
        Parquet, or a CSV or TSV that may be compressed: `profiles/<set>.parquet` of a run, or a table that
        CellProfiler, pycytominer or DeepProfiler wrote.
    labels : pandas.DataFrame, optional
        A table that was read before, of the same screen: where this one names no compound, treatment or batch, its
        labels are taken from that by plate and well, and rows that it does not have are left out.
    relabel : bool
        Take the labels from there in any case.

    Returns
    -------
    pandas.DataFrame
        Columns as in the module's docstring. Features of another program become one group `features` (or its
        compartments); those with missing values and those that are text are left out, which `attrs["note"]` says.

    Raises
    ------
    UserError
        The file cannot be read, or `check_profiles` refuses it.
    """
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            profiles = pd.read_parquet(path)
        else:
            profiles = pd.read_csv(path, sep=None if ".tsv" in path.suffixes else ",", low_memory=False,
                                   engine="python" if ".tsv" in path.suffixes else None)  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run wsdino-extract first.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable Parquet or CSV file ({first_line(error)}).") from None
    profiles = _with_metadata(profiles, settings or TableSettings(), path.name)
    if labels is not None and (relabel or not {*_NEEDED, "Metadata_Batch"} <= set(profiles.columns)):
        profiles = _labelled(profiles, labels, path.name)
    features = [str(column) for column in profiles.columns if not str(column).startswith("Metadata_")]
    if not all(re.search(r"._\d+$", name) for name in features):
        profiles = _with_groups(profiles, (settings or TableSettings()).compartments)
    check_profiles(profiles, path.name)
    return profiles


def _with_metadata(profiles: pd.DataFrame, settings: TableSettings, source: str) -> pd.DataFrame:
    """The table with the metadata columns under their names here, and controls marked."""
    profiles = profiles.rename(columns=lambda name: str(name).removeprefix("Image_"))
    found = {re.sub("^metadata_", "", name.lower()): name for name in reversed(profiles.columns)}

    def column(flag: str, name: str) -> str:
        key = re.sub("^metadata_", "", name.lower())
        if key not in found:
            raise UserError(f"{source} has no column {name}: --{flag} must name one of its columns.")
        return found[key]

    named = {}
    for target, names in _ALIASES.items():
        flag = f"{target.removeprefix('Metadata_').lower()}_column"
        if getattr(settings, flag, None):
            named[target] = profiles[column(flag, getattr(settings, flag))]
        elif target not in profiles.columns and (present := [found[name] for name in names if name in found]):
            named[target] = profiles[present[0]]
    profiles = profiles.assign(**named).drop(columns=[c for c in profiles if c in _NO_FEATURES])
    if "Metadata_Compound" not in profiles.columns:
        return profiles
    compound = profiles["Metadata_Compound"]
    if settings.controls:
        marks = profiles[column("control_column", settings.control_column)] if settings.control_column else compound
        control = marks.astype(str).isin(settings.controls)
        if not control.any():
            raise UserError(f"{source} has no row of --controls {' '.join(settings.controls)}.")
    else:
        control = compound.isna() & False
        for name, value in _CONTROL_MARKS:
            if name in found:
                control |= profiles[found[name]].astype(str).str.lower() == value
    treatment = profiles.get("Metadata_Treatment")
    if treatment is None:
        dose = profiles.get("Metadata_Concentration")
        treatment = compound if dose is None else compound.astype(str) + "_" + dose.map("{:g}".format)
        treatment = treatment.mask(compound == CONTROL, CONTROL)
    marked = {"Metadata_Compound": compound, "Metadata_Treatment": treatment}
    return profiles.assign(**{name: values.mask(control, CONTROL) for name, values in marked.items()})


def place_of(profiles: pd.DataFrame, names: tuple[str, ...] = PLACE) -> pd.MultiIndex:
    """Where each row lies: plate, well (A1 as A01), and site and cell where the table has them, as text."""
    columns = [profiles[name].astype(str) for name in names if name in profiles.columns]
    wells = r"^([A-Za-z]{1,2})0*(\d+)$"
    columns = [
        column.str.replace(wells, lambda found: f"{found[1].upper()}{int(found[2]):02d}", regex=True)
        if column.name == "Metadata_Well" else column for column in columns
    ]  # fmt: skip
    return pd.MultiIndex.from_arrays(columns, names=[column.name for column in columns])


def _labelled(profiles: pd.DataFrame, labels: pd.DataFrame, source: str) -> pd.DataFrame:
    """The table with every other metadata column of `labels`, joined by plate and well; rows without one left out."""
    wells = PLACE[:2]
    for name in wells:
        if name not in profiles.columns or name not in labels.columns:
            raise UserError(f"{source} has no column {name}, by which it could be joined to the other profiles.")
    of_well = labels.assign(place=place_of(labels, wells)).drop_duplicates("place").set_index("place")
    of_well = of_well[[name for name in labels if name.startswith("Metadata_") and name not in PLACE]]
    place = place_of(profiles, wells)
    known = place.isin(of_well.index)
    if not known.any():
        raise UserError(f"{source} shares no plate and well with the other profiles: check how both name them.")
    features = profiles[[name for name in profiles if not name.startswith("Metadata_") or name in PLACE]]
    found = of_well.loc[place[known]].set_index(profiles.index[known])
    return pd.concat([found, features[known]], axis=1).reset_index(drop=True)


def _with_groups(profiles: pd.DataFrame, compartments: bool) -> pd.DataFrame:
    """Another program's features as `<group>_<index>`, without those that are text or have missing values."""
    metadata = [name for name in profiles.columns if name.startswith("Metadata_")]
    features = profiles.drop(columns=metadata)
    numbers = features.select_dtypes("number").astype(np.float64)
    whole = numbers.loc[:, np.isfinite(numbers).all()]
    groups = [name.partition("_")[0] if compartments else "features" for name in whole.columns]
    names = [f"{group}_{index:04d}" for index, group in enumerate(groups)]
    table = pd.concat([profiles[metadata], whole.set_axis(names, axis=1)], axis=1)
    texts, missing = features.shape[1] - numbers.shape[1], numbers.shape[1] - whole.shape[1]
    table.attrs["note"] = (
        f"{whole.shape[1]} features in {len(set(groups))} group{'s' * (len(set(groups)) > 1)}; left out: {missing} "
        f"with missing values, {texts} that are text."
    )
    return table


def check_profiles(profiles: pd.DataFrame, source: str = "the profile table") -> None:
    """Refuse a table without the columns needed, or with a number not finite, a name missing or a field twice.

    Raises
    ------
    UserError
        Naming `source`, the row (from 0) and the column.
    """
    for column in _NEEDED:
        if column not in profiles.columns:
            raise UserError(f"{source} has no column {column}: write it as extract_profiles.py does.")
    if not len(profiles):
        raise UserError(f"{source} has no rows: extract at least one DMSO and one treated field.")
    columns = [column for names in feature_columns(profiles).values() for column in names]
    if not columns:
        raise UserError(f"{source} has no feature columns, named like dna_0000.")
    for column in columns:
        if not pd.api.types.is_numeric_dtype(profiles[column]):
            raise UserError(f"{source}, column {column}, is not numeric: features are numbers.")
    bad = ~np.isfinite(profiles[columns].to_numpy(np.float64))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise UserError(
            f"{source}, row {row}, column {columns[column]}, is not a finite number ({bad.any(axis=1).sum()} such "
            "rows): extract those fields again or leave them out."
        )
    unnamed = set()
    for column in _NEEDED + tuple(name for name in _FOR_ALL_OR_NONE if name in profiles.columns):
        empty = ~is_named(profiles[column])
        if empty.all() and column in _FOR_ALL_OR_NONE:
            unnamed.add(column)
        elif empty.any():
            row = int(np.flatnonzero(empty)[0])
            raise UserError(f"{source}, row {row}, has no {column}: every field needs one.")
    for column in ("Metadata_Batch", "Metadata_Plate"):
        if column in profiles.columns:
            names = profiles[column].astype(str)
            several = names.str.contains("|", regex=False).to_numpy()
            if several.any():
                row = int(several.argmax())
                raise UserError(
                    f'{source}, row {row}, has the {column} {names.iloc[row]!r}, but "|" joins the names of several: '
                    "rename it."
                )
    keys = ("Metadata_Source", *PLACE)
    keys = [column for column in keys if column in profiles.columns and column not in unnamed]
    if "Metadata_Well" in keys and "Metadata_Site" in keys:
        twice = profiles.duplicated(keys).to_numpy()
        if twice.any():
            field = profiles.groupby(keys, dropna=False, sort=False).ngroup().to_numpy()
            first, second = np.flatnonzero(field == field[twice.argmax()])[:2]
            raise UserError(
                f"{source}, rows {first} and {second}, are the same plate, well and site: keep one row per field."
            )
