"""What the columns of a table mean, by their names, and what a plate map says of each well, joined to the images."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from wsdino.errors import UserError

from .tables import FILE, LINE, over_distinct, read_tables, row_letters, well_name

_DOSE = "(compound|drug|pert|final)?(conc|concentration|dose)"
# What a column may be called, in order of preference, once `Image_`, `Metadata_`, case and punctuation are dropped.
ROLES = {
    "plate": ("assayplatebarcode|platebarcode|barcode", "plate|plateid|platename"),
    "map": ("platemapname", "platemap|platemapid|layout"),
    "well": ("well|wellposition|wellid|wellname|position",),
    "row": ("row|wellrow|platerow",),
    "column": ("col|column|wellcol|wellcolumn|platecolumn",),
    "site": ("site|siteid|sitenumber", "field|fieldid|fov|fieldofview|imagefield"),
    "batch": ("batch|batchid|batchname", "week"),
    "compound": (
        *("compound|compoundname", "pertiname", "drug|drugname", "jcp2022|broadsample|compoundid|pertid"),
        *("gene|genesymbol|genename|symbol|targetgene", "perturbation|treatment"),
    ),
    "concentration": (f"{_DOSE}(in)?([unpm]?m|micromolar|nanomolar)?|micromolar", "mmolesperliter", "um|nm"),
    "unit": (f"{_DOSE}units?",),
    "moa": ("moa|mechanism|mechanismofaction", "pathway"),
    "kind": ("controltype", "perttype|welltype|role"),
}
SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".parquet", ".gz")
NEGATIVE = re.compile(r"neg(ative)?[\s_-]*(con|ctrl|control)?s?|vehicle|vehicle[\s_-]*control", re.IGNORECASE)


def roles(names: Iterable[str]) -> dict[str, str]:
    """Role -> column, for those roles of :data:`ROLES` that a column's name tells."""
    short = {}
    for name in names:
        plain = re.sub("[µμ]", "u", name).lower()
        short.setdefault(re.sub(r"[^a-z0-9]", "", re.sub(r"^(image_)?(metadata_)?", "", plain)), name)
    found = {}
    for role, patterns in ROLES.items():
        for pattern in patterns:
            if role not in found and (hit := next((key for key in short if re.fullmatch(pattern, key)), None)):
                found[role] = short[hit]
    return found


def with_wells(table: pd.DataFrame, notes: list[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """The table with wells as `A01` (made of row and column where there is no other), and the roles of its columns."""
    known = roles(table.columns)
    if "well" not in known and {"row", "column"} <= set(known):
        row = over_distinct(table[known["row"]], lambda text: row_letters(int(text)) if text.isdecimal() else text)
        table, known["well"] = table.assign(well=row + table[known["column"]]), "well"
    if "well" in known:
        given = table[known["well"]]
        table = table.assign(**{known["well"]: over_distinct(given, well_name)})
        if len(changed := given[table[known["well"]] != given]):
            notes.append(
                f"{len(changed):,} wells are read as A01: {changed.iloc[0]!r} is {well_name(changed.iloc[0])}"
            )
    return table, known


def join_plate_maps(images: pd.DataFrame, keys: tuple[str, str], paths: Iterable[str | Path], notes: list[str],
                    encoding: str | None = None) -> pd.DataFrame:  # fmt: skip
    """Give every image row the columns that the plate maps hold of its well.

    Parameters
    ----------
    images : pandas.DataFrame
        As text.
    keys : (str, str)
        Its columns of the plate and of the well.
    paths : paths
        Plate maps: tables by plate and well; by well, for every plate or for the one that the file is named after; or
        by well, with a barcode map (a table that names the map of each plate) among the paths. A folder stands for
        all tables below it.
    notes : list of str
        Receives what was joined, and how many rows of either side found no partner.
    encoding : str, optional
        Of text tables that are not UTF-8.

    Returns
    -------
    pandas.DataFrame
        The rows that have a partner. Where both sides have a column, an image row keeps what it says itself.

    Raises
    ------
    UserError
        A map names no wells, or two contents of one well; or nothing fits.
    """
    for key in keys:
        if key not in images:
            raise UserError(
                f"The image table has no column {key!r}, by which a plate map is joined: name it in --columns."
            )
    images = images.assign(_plate=images[keys[0]].str.strip(), _well=over_distinct(images[keys[1]], well_name))
    whole = _by_plate_and_well(paths, sorted(set(images["_plate"])), notes, encoding)
    facts = [name for name in whole.columns if name not in (FILE, LINE, "_plate", "_well")]
    distinct = whole.drop_duplicates(["_plate", "_well", *facts])
    if len(twice := distinct[distinct.duplicated(["_plate", "_well"])]):
        row = twice.iloc[0]
        raise UserError(
            f"{row[FILE]}, line {row[LINE]}: well {row['_well']} of plate {row['_plate']} holds something else above: "
            "keep one"
        )
    new = [fact for fact in facts if fact not in images]
    joined = images.merge(distinct[["_plate", "_well", *new]], how="outer", on=["_plate", "_well"], indicator=True)
    sides = {side: joined[joined["_merge"] == side] for side in ("both", "left_only", "right_only")}

    def first(side: str) -> str:
        return f"(first: plate {sides[side]['_plate'].iloc[0]}, well {sides[side]['_well'].iloc[0]})"

    if sides["both"].empty:
        raise UserError(f"No image {first('left_only')} is in the plate map {first('right_only')}: check both names.")
    said = f"plate map: {len(sides['both']):,} of {len(images):,} image rows are joined"
    if len(sides["left_only"]):
        said += f"; {len(sides['left_only']):,} are not in it and are left out {first('left_only')}"
    if len(sides["right_only"]):
        said += f"; {len(sides['right_only']):,} of its wells have no image {first('right_only')}"
    notes.append(said)
    return sides["both"].drop(columns=["_plate", "_well", "_merge"]).reset_index(drop=True)


def _by_plate_and_well(
    paths: Iterable[str | Path], plates: list[str], notes: list[str], encoding: str | None
) -> pd.DataFrame:
    """All plate maps below one another, with columns `_plate` and `_well`."""
    maps, barcodes = [], []
    for path in _tables(paths):
        table, known = with_wells(read_tables(path, "plate map", notes, encoding), notes)
        if "well" in known:
            maps.append((path, table.rename(columns={known["well"]: "_well"}), known))
        elif {"plate", "map"} <= set(known):
            barcodes.append(table[[known["plate"], known["map"]]].set_axis(["_plate", "_map"], axis=1))
        else:
            raise UserError(f"Plate map {path} has no column of wells (it has {', '.join(table.columns[:-2])}).")
    if not maps:
        raise UserError(f"There is no plate map in {', '.join(map(str, paths))}: give a table with a column of wells.")
    parts = []
    for path, table, known in maps:
        stem = path.name
        while Path(stem).suffix.lower() in SUFFIXES:
            stem = Path(stem).stem
        if "plate" in known and (not barcodes or set(table[known["plate"]]) & set(plates)):
            parts.append(table.assign(_plate=table[known["plate"]].str.strip()))
        elif barcodes:
            named = table.assign(_map=table[known["map"]] if "map" in known else stem)
            parts.append(named.merge(pd.concat(barcodes).drop_duplicates(), on="_map").drop(columns="_map"))
        elif len(maps) == 1:
            notes.append(f"{path} names no plate and is taken for each of {len(plates):,}")
            parts.append(table.merge(pd.DataFrame({"_plate": plates}), how="cross"))
        else:
            parts.append(table.assign(_plate=stem))
    return pd.concat(parts, ignore_index=True).fillna("")


def _tables(paths: Iterable[str | Path]) -> list[Path]:
    """The paths themselves, and for a folder all tables below it."""
    found = []
    for path in map(Path, paths):
        below = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES)
        found += below if path.is_dir() else [path]
    return found
