"""Screens from their tables to checked fields: no dose, several controls, doses and names that vary."""

import json

import numpy as np
import pandas as pd
import pytest

from dataset_scripts.layouts.plan import LayoutSettings, plan, read_fields, understand
from dataset_scripts.prepare import main
from wsdino.errors import UserError


def rows(*treatments, plate="P1", **more):
    """One row per treatment, which is (compound, dose, mechanism), each in a well of its own."""
    return [
        {
            "Plate": plate,
            "Well": f"A{i:02d}",
            "Site": 1,
            "Drug": d,
            "uM": u,
            "MOA": m,
            "FileName_DNA": f"{plate}{i}.tif",
        }
        | more
        for i, (d, u, m) in enumerate(treatments, start=1)
    ]


@pytest.fixture
def fields(tmp_path):
    """The fields of a table, and what was said of it."""

    def read(table, **settings):
        pd.DataFrame(table).to_csv(tmp_path / "t.csv", index=False)
        given = LayoutSettings(str(tmp_path), image_csv=[str(tmp_path / "t.csv")], **settings)
        screen = understand(given)
        return read_fields(screen, given), screen.notes

    return read


GENES = [("AURKB", "", "mitosis"), ("no-guide", "", ""), ("non-targeting", "", ""), ("HDAC3", "", "")]


@pytest.mark.parametrize("how", ["flags", "mapping"])
def test_genes_have_no_dose_and_two_controls(fields, tmp_path, how):
    table = [{k.replace("Drug", "Gene"): v for k, v in row.items() if k != "uM"} for row in rows(*GENES)]
    settings = {"control": ["no-guide", "non-targeting"]}
    if how == "mapping":
        mapping = {"channels": {"dna": "FileName_DNA"}, "plate": "Plate", "well": "Well", "site": "Site"}
        mapping |= {"compound": "Gene", "concentration": None, "moa": "MOA", "replicate": None} | settings
        (tmp_path / "c.json").write_text(json.dumps(mapping))
        settings = {"columns": str(tmp_path / "c.json")}
    found, _ = fields(table, **settings)
    assert found["treatment"].tolist() == ["AURKB", "DMSO", "DMSO", "HDAC3"]
    assert found["part"].tolist() == ["annotated", "dmso", "dmso", "unannotated"]
    assert np.isnan(found["concentration"]).tolist() == [True, False, False, True]


def test_a_control_by_another_column(fields):
    table = rows(("water", "", ""), ("taxol", 1, "mt"))
    for row, kind in zip(table, ("negcon", "trt"), strict=True):
        row["pert_type"] = kind
    for settings in ({}, {"control": ["pert_type=negcon"]}):
        assert fields(table, **settings)[0]["part"].tolist() == ["dmso", "annotated"]


def test_an_empty_compound_is_the_control_or_refused(fields):
    table = rows(("", "", ""), ("BRD-1", 5, "EGFR inhibitor"))
    assert fields(table)[0]["treatment"].tolist() == ["DMSO", "BRD-1_5"]
    with pytest.raises(UserError, match="t.csv, line 2: .*'Drug' is empty.*--control"):
        fields(table, control=["DMSO"])


VARIED = [
    *rows(
        ("DMSO", "0", ""), ("dmso", "0", ""), ("taxol", "10", "mt"), ("taxol", "9.9997", "mt"), ("Taxol ", "1", "mt")
    ),
    *rows(("DMSO", "0", ""), ("taxol", "10", "mt"), ("taxol", "1", "mt"), ("MG-132", str(0.1 + 0.2), "p"), plate="P2"),
]


def test_a_drug_is_never_silently_two(fields):
    found, said = fields(VARIED)
    assert {"dmso_0", "Taxol_1", "taxol_9.9997", "MG-132_0.3"} <= set(found["treatment"])
    told = " ".join(sentence for sentence in said if "--merge_names" in sentence)
    assert all(word in told for word in ("'dmso'", "'Taxol'", "9.9997"))
    merged, said = fields(VARIED, merge_names=True)
    assert set(merged["treatment"]) == {"DMSO", "taxol_10", "taxol_1", "MG-132_0.3"}
    assert (merged["part"] == "dmso").sum() == 3 and sum(sentence.startswith("merged") for sentence in said) == 3
    assert (merged.groupby("treatment")["concentration"].nunique() == 1).all()


@pytest.mark.parametrize("column", ["Plate", "Batch"])
def test_a_bar_in_a_name_is_refused_before_training(fields, column):
    table = [row | {"Batch": "b"} | {column: "a|b"} for row in rows(("DMSO", 0, ""))]
    with pytest.raises(UserError, match="t.csv, line 2: .*'a|b'"):
        fields(table)


def test_mechanisms_of_compounds_without_doses(fields, tmp_path):
    (tmp_path / "moa.tsv").write_text("broad_sample\tmoa\ntaxol\tmt\nunused\tother\n")
    mapping = {
        "channels": {"dna": "FileName_DNA"},
        "plate": "Plate",
        "well": "Well",
        "site": "Site",
        "compound": "Drug",
    }
    mapping |= {"concentration": "uM", "replicate": None, "moa_table": ["broad_sample", None, "moa"]}
    (tmp_path / "c.json").write_text(json.dumps(mapping))
    table = rows(("DMSO", 0, ""), ("taxol", 1, ""), ("taxol", 10, ""))
    found, said = fields(table, columns=str(tmp_path / "c.json"), moa_csv=str(tmp_path / "moa.tsv"))
    assert found["moa"].tolist() == ["DMSO", "mt", "mt"] and any("'unused'" in sentence for sentence in said)


def test_annotated_and_dmso_rows_in_two_tables_of_different_columns(tmp_path):
    """The tables of the original release: absolute paths in the column of names, and the mechanism beside them."""
    paths = []
    for name, drug, dose, moa in (("annotated", "taxol", 0.3, "mt"), ("dmso", "DMSO", 0, "DMSO")):
        row = {"Image_Metadata_Plate_DAPI": "Week1_1", "Image_Metadata_Well_DAPI": f"B0{len(paths)}", "Replicate": 1}
        row |= {"Image_Metadata_Compound": drug, "Image_Metadata_Concentration": dose, "MoA": moa, f"only_{name}": 0}
        for number, channel in enumerate(("DAPI", "Tubulin", "Actin")):
            row[f"Image_FileName_{channel}"] = f"/lab/Week1_1/B0{len(paths)}_s1_w{number}.tif"
            row[f"Image_PathName_{channel}"] = "Week1/Week1_1"
        paths.append(str(tmp_path / f"{name}.csv"))
        pd.DataFrame([row]).to_csv(paths[-1], index=False)
    given = LayoutSettings(str(tmp_path), layout="bbbc021", image_csv=paths)
    found = read_fields(understand(given), given)
    assert found["part"].tolist() == ["annotated", "dmso"] and found["batch"].tolist() == ["Week1", "Week1"]
    assert [file.endswith("dmso.csv") for file in found["table"]] == [False, True]


def test_a_plan_says_what_a_build_would_refuse(tmp_path):
    table = rows(("DMSO", 0, ""), ("taxol", "high", "mt"))
    pd.DataFrame(table).to_csv(tmp_path / "t.csv", index=False)
    said = plan(LayoutSettings(str(tmp_path), image_csv=[str(tmp_path / "t.csv")]), 0.5)
    assert "refused" in said and "t.csv, line 3" in said and "'high'" in said


def test_a_build_needs_an_output(tmp_path, refused):
    refused(main, "--raw", tmp_path, named="--output")


@pytest.mark.slow
def test_the_plan_of_400_000_fields(tmp_path, capsys):
    """Memory in a process of its own is measured by hand; here the counts of a large table are right."""
    plates, wells = (
        [f"P{i:03d}" for i in range(100)],
        [f"{row}{i:02d}" for row in "ABCDEFGHIJKLMNOP" for i in range(1, 25)],
    )
    table = pd.MultiIndex.from_product([plates, wells, range(1, 11)], names=["Plate", "Well", "Site"]).to_frame(
        index=False
    )
    table["Drug"] = np.where(table["Well"].str.endswith("01"), "DMSO", table["Well"])
    table["FileName_DNA"] = table["Plate"] + "/" + table["Well"] + "_" + table["Site"].astype(str) + ".tif"
    table.to_parquet(tmp_path / "t.parquet")
    main(["--raw", str(tmp_path), "--image_csv", str(tmp_path / "t.parquet"), "--plan"])
    said = capsys.readouterr().out
    assert "384,000, 10 per well" in said and "38,400, 384 per plate" in said and "16,000 fields" in said
