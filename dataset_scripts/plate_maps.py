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
        wells = over_distinct(table[known["well"]], well_name)
        if len(changed := table[known["well"]][wells != table[known["well"]]]):
            notes.append(
                f"{len(changed):,} wells are written otherwise: {changed.iloc[0]!r} is {well_name(changed.iloc[0])}"
            )
        table = table.assign(**{known["well"]: wells})
    return table, known


def join_plate_maps(images: pd.DataFrame, paths: Iterable[str | Path], notes: list[str],
                    encoding: str | None = None) -> pd.DataFrame:  # fmt: skip
    """Give every image row the columns that the plate maps hold of its well.

    Parameters
    ----------
    images : pandas.DataFrame
        As text, with a column of the plate and one of the well.
    paths : paths
        Plate maps: tables by plate and well; by well, for every plate or for the one that the file is named after; or
        by well, with a barcode map (a table that names the map of each plate) among the paths. A folder stands for
        all tables below it.
    notes : list of str
        Receives what was joined, and how many rows of either side found no partner.

    Returns
    -------
    pandas.DataFrame
        The rows that have a partner. Where both sides have a column, an image row keeps what it says itself.

    Raises
    ------
    UserError
        A map names no wells, no plate or two contents of one well; or nothing fits.
    """
    files = [each for path in map(Path, paths) for each in (_tables_below(path) if path.is_dir() else [path])]
    images, own = with_wells(images, notes)
    if not {"plate", "well"} <= set(own):
        raise UserError(
            "The image table names no plate and well, so no plate map can be joined: see docs/your_screen.md."
        )
    maps, barcodes = [], None
    for path in files:
        table, known = with_wells(read_tables(path, "plate map", notes, encoding), notes)
        if "well" in known:
            maps.append((path, table, known))
        elif {"plate", "map"} <= set(known):
            plain = table[[known["plate"], known["map"]]].set_axis(["plate", "map"], axis=1)
            barcodes = pd.concat([barcodes, plain])
        else:
            raise UserError(
                f"Plate map {path} has no column of wells (its columns are {', '.join(table.columns[:-2])})."
            )
    plates = set(images[own["plate"]])
    parts = []
    for path, table, known in maps:
        content = table.rename(columns={known["well"]: "_well"})
        stem = re.sub(r"\.(gz|csv|tsv|txt|xlsx|parquet)", "", path.name, flags=re.IGNORECASE)
        if "plate" in known and set(table[known["plate"]]) & plates:
            parts.append(content.rename(columns={known["plate"]: "_plate"}))
            continue
        if barcodes is not None:
            key = content[known["map"]] if "map" in known and "plate" not in known else stem
            content = content.assign(_map=key).merge(barcodes.drop_duplicates(), left_on="_map", right_on="map")
            parts.append(content.rename(columns={"plate": "_plate"}).drop(columns=["_map", "map"]))
        elif "plate" in known:
            parts.append(content.rename(columns={known["plate"]: "_plate"}))
        elif len(maps) == 1:
            notes.append(f"{path} names no plate and is taken for all {len(plates)} plates")
            parts.append(content.merge(pd.DataFrame({"_plate": sorted(plates)}), how="cross"))
        else:
            parts.append(content.assign(_plate=next((plate for plate in plates if plate == stem), stem)))
    if not parts:
        raise UserError(f"No plate map is among {', '.join(map(str, files[:3])) or 'the folders given'}: name one.")
    whole = pd.concat(parts, ignore_index=True).fillna("")
    keys, facts = ["_plate", "_well"], [c for c in whole.columns if c not in (FILE, LINE, "_plate", "_well")]
    distinct = whole.drop_duplicates([*keys, *facts])
    if len(twice := distinct[distinct.duplicated(keys)]):
        row = twice.iloc[0]
        raise UserError(
            f"{row[FILE]}, line {row[LINE]}: well {row['_well']} of plate {row['_plate']} holds something else above"
        )
    facts = [fact for fact in facts if fact not in images]
    right = distinct[[*keys, *facts]].assign(_partner=True)
    joined = images.merge(right, how="left", left_on=[own["plate"], own["well"]], right_on=keys)
    alone = joined["_partner"].isna()
    wells = set(zip(images[own["plate"]], images[own["well"]], strict=True))
    idle = [pair for pair in zip(distinct["_plate"], distinct["_well"], strict=True) if pair not in wells]
    if alone.all():
        image, line = images.iloc[0], distinct.iloc[0] if len(distinct) else None
        other = (
            "no plate that the barcode map names" if line is None else f"plate {line['_plate']}, well {line['_well']}"
        )
        raise UserError(
            f"The plate map fits no image: the first image is of plate {image[own['plate']]}, well "
            f"{image[own['well']]}, and the first line of {files[0]} of {other}."
        )
    said = f"plate map: {(~alone).sum():,} of {len(joined):,} image rows joined"
    if alone.any():
        first = joined[alone].iloc[0]
        said += f"; {alone.sum():,} are not in it, left out (first: {first[own['plate']]} {first[own['well']]})"
    notes.append(said + (f"; {len(idle):,} of its lines have no image (first: {' '.join(idle[0])})" if idle else ""))
    return joined[~alone].drop(columns=[*keys, "_partner"]).reset_index(drop=True)


def _tables_below(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.rglob("*") if re.search(r"\.(csv|tsv|txt|xlsx|parquet)(\.gz)?$", p.name, re.IGNORECASE)
    )
