"""Plate maps: joined by plate and well in every form that labs have them in; what has no partner is counted."""

import pandas as pd
import pytest
from layout_files import COMPOUNDS, PLATES, load_data, plate_map, write_rows

from dataset_scripts.layouts.plan import LayoutSettings, understand
from dataset_scripts.plate_maps import roles
from wsdino.errors import UserError


def compounds(screen):
    keys = [screen.columns.plate, screen.columns.well]
    return (
        screen.table.groupby(keys)[screen.columns.compound].agg(lambda names: "|".join(sorted(set(names)))).to_dict()
    )


WANTED = {(plate, well): name for plate in PLATES for well, (name, _, _) in COMPOUNDS.items()}
ROW = {"A": 1, "B": 2}


def by_row_and_column(folder):
    rows = [{"Row": ROW[w[0]], "Col": int(w[1:]), "Drug": c, "uM": d} for w, (c, d, _) in COMPOUNDS.items()]
    write_rows(folder / "map.tsv", rows, "\t")


def barcodes(folder):
    write_rows(folder / "barcodes.csv", [{"Assay_Plate_Barcode": p, "Plate_Map_Name": "layout7"} for p in PLATES])
    plate_map(folder / "layout7.txt", [None])


def as_excel(folder):
    plate_map(folder / "m.csv")
    pd.read_csv(folder / "m.csv").to_excel(folder / "map.xlsx", index=False)
    pd.read_csv(folder / "m.csv").to_parquet(folder / "map.parquet")
    (folder / "m.csv").unlink()
    (folder / "map.parquet").unlink()


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: plate_map(folder / "all.csv"),
        lambda folder: plate_map(folder / "all.csv", well=lambda w: f"{w[0]}{int(w[1:])}"),
        lambda folder: plate_map(folder / "all.csv.gz", well=lambda w: f"r{ROW[w[0]]:02d}c{w[1:]}"),
        lambda folder: plate_map(folder / "one_for_all.csv", [None]),
        lambda folder: [plate_map(folder / f"{plate}.csv", [None]) for plate in PLATES],
        by_row_and_column,
        barcodes,
        as_excel,
    ],
)
def test_every_form_of_a_plate_map(write, tmp_path):
    load_data(tmp_path / "raw")
    write(tmp_path / "maps") if write is not as_excel else ((tmp_path / "maps").mkdir(), write(tmp_path / "maps"))
    screen = understand(LayoutSettings(str(tmp_path / "raw"), plate_map=[str(tmp_path / "maps")]))
    assert compounds(screen) == WANTED
    assert screen.columns.concentration in ("Dose (µM)", "uM")


def test_rows_without_a_partner_are_counted_on_both_sides(tmp_path):
    load_data(tmp_path / "raw")
    rows = [{"Well": "A01", "Drug": "DMSO"}, {"Well": "H12", "Drug": "taxol"}]
    write_rows(tmp_path / "map.csv", rows)
    screen = understand(LayoutSettings(str(tmp_path / "raw"), plate_map=[str(tmp_path / "map.csv")]))
    assert len(screen.table) == 4 and set(screen.table["Metadata_Well"]) == {"A01"}
    told = next(note for note in screen.notes if note.startswith("plate map"))
    assert (
        "4 of 12" in told and "8 are not in it" in told and "plate P1, well A02" in told and "2 of its wells" in told
    )


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([{"Well": "H12", "Drug": "taxol"}], "is in the plate map"),
        ([{"Plate": "P9", "Well": "A01", "Drug": "taxol"}], "is in the plate map"),
        ([{"Drug": "taxol"}], "no column of wells"),
        ([{"Well": "A1", "Drug": "taxol"}, {"Well": "A01", "Drug": "DMSO"}], "line 3: well A01"),
    ],
)
def test_a_plate_map_that_does_not_fit_is_refused(rows, named, tmp_path):
    load_data(tmp_path / "raw")
    write_rows(tmp_path / "map.csv", rows)
    with pytest.raises(UserError) as error:
        understand(LayoutSettings(str(tmp_path / "raw"), plate_map=[str(tmp_path / "map.csv")]))
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        (
            "Metadata_Plate Metadata_Well Metadata_broad_sample Metadata_mmoles_per_liter",
            "plate well compound concentration",
        ),
        ("Assay_Plate_Barcode Plate_Map_Name", "plate map"),
        ("well_position gene_symbol", "well compound"),
        (
            "plate well drug dose_uM dose_unit mechanism of action".replace(" of ", "_of_"),
            "plate well compound concentration unit moa",
        ),
        ("Row Column Concentration_(µM) control_type", "row column concentration kind"),
    ],
)
def test_columns_are_known_by_their_names(columns, wanted):
    assert sorted(roles(columns.split())) == sorted(wanted.split())


@pytest.mark.parametrize(
    ("rows", "control"),
    [
        ({"A01": ("dmso", ""), "A02": ("taxol", ""), "B01": ("taxol", "")}, "dmso"),
        ({"A01": ("", ""), "A02": ("taxol", ""), "B01": ("taxol", "")}, ""),
        ({"A01": ("water", "negcon"), "A02": ("taxol", "trt"), "B01": ("taxol", "trt")}, {"pert_type": "negcon"}),
    ],
)
def test_the_control_is_found(rows, control, tmp_path):
    load_data(tmp_path / "raw")
    write_rows(tmp_path / "map.csv", [{"Well": w, "Drug": d, "pert_type": k} for w, (d, k) in rows.items()])
    screen = understand(LayoutSettings(str(tmp_path / "raw"), plate_map=[str(tmp_path / "map.csv")]))
    assert screen.columns.control == control
