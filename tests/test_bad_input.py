"""Malformed input that once slipped through or ended in a traceback: now one sentence, status 2, nothing escapes."""

import csv
import json
import shutil

import pytest

from dataset_scripts import prepare, simulate
from evaluation_wsdino import report


def refused(main, words, capsys):
    """The one sentence that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and "error:" in said[-1], said
    return said[-1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "-1"],
        ["--scale", "0"],
        ["--scale", "nan"],
        ["--scale", "-2"],
        ["--scale", "inf"],
        ["--workers", "-1"],
        ["--workers", "0"],
        ["--image_size", "1", "1"],
    ],
    ids=" ".join,
)
def test_a_simulation_that_cannot_be_drawn(tmp_path, capsys, flags):
    assert flags[0].strip("-") in refused(simulate.main, [tmp_path / "raw", "--size", "tiny", *flags], capsys)
    assert not (tmp_path / "raw").exists()


def test_a_damaged_simulation_note(tmp_path, capsys):
    for content in ("{half", "[]", "\x00"):
        (tmp_path / "simulation.json").write_text(content)
        assert "simulation.json" in refused(simulate.main, [tmp_path, "--size", "tiny"], capsys)


@pytest.mark.parametrize(
    "flags",
    [
        ["--resize", "0"],
        ["--resize", "-1"],
        ["--resize", "nan"],
        ["--resize", "100"],
        ["--filter_size", "-5"],
        ["--filter_size", "0"],
        ["--filter_size", "nan"],
        ["--workers", "-1"],
    ],
    ids=" ".join,
)
def test_preprocessing_that_cannot_be_done(tiny_raw, tmp_path, capsys, flags):
    words = ["--raw", tiny_raw, "--output", tmp_path / "built", *flags]
    assert flags[0].strip("-") in refused(prepare.main, words, capsys)
    assert not (tmp_path / "built").exists()


def edited_screen(tiny_raw, folder, change):
    """A copy of the tables with `change(rows)` applied; the images stay where they are."""
    folder.mkdir()
    shutil.copy(tiny_raw / "BBBC021_v1_moa.csv", folder)
    with open(tiny_raw / "BBBC021_v1_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    with open(folder / "BBBC021_v1_image.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return ["--image_csv", folder / "BBBC021_v1_image.csv", "--moa_csv", folder / "BBBC021_v1_moa.csv"]


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "a\\b", "..", ".", "x" * 300, "nul\0l", "/etc"])
@pytest.mark.parametrize("column", ["Image_Metadata_Plate_DAPI", "Image_Metadata_Well_DAPI"])
def test_a_name_that_would_leave_its_folder(tiny_raw, tmp_path, capsys, name, column):
    """Plate names become file names: no name of a table may lead out of the dataset's folder."""
    if "\0" in name:
        name = name.replace("\0", "\x01")  # a CSV holds no NUL; other control characters are as bad

    def change(rows):
        old = rows[0][column]
        for row in rows:
            row[column] = name if row[column] == old else row[column]

    tables = edited_screen(tiny_raw, tmp_path / "tables", change)
    before = set(tmp_path.rglob("*"))
    said = refused(prepare.main, ["--raw", tiny_raw, "--output", tmp_path / "deep" / "er" / "built", *tables], capsys)
    assert "line 2" in said and column in said
    assert not [path for path in set(tmp_path.rglob("*")) - before if "escaped" in path.name]


@pytest.mark.parametrize("path", ["../../../etc", "/etc"])
def test_an_image_outside_the_raw_folder(tiny_raw, tmp_path, capsys, path):
    def change(rows):
        rows[3]["Image_PathName_DAPI"] = path
        rows[3]["Image_FileName_DAPI"] = "../secret.tif"

    tables = edited_screen(tiny_raw, tmp_path / "tables", change)
    said = refused(prepare.main, ["--raw", tiny_raw, "--output", tmp_path / "built", *tables], capsys)
    assert "line 5" in said and "leads out" in said


def test_a_negative_concentration(tiny_raw, tmp_path, capsys):
    def change(rows):
        treated = next(row for row in rows if row["Image_Metadata_Compound"] != "DMSO")
        treated["Image_Metadata_Concentration"] = "-1"

    tables = edited_screen(tiny_raw, tmp_path / "tables", change)
    said = refused(prepare.main, ["--raw", tiny_raw, "--output", tmp_path / "built", *tables], capsys)
    assert "Image_Metadata_Concentration" in said and "negative" in said


@pytest.mark.parametrize("content", ["{half", "[]", "{}", '"text"'])
def test_a_damaged_build_note(tiny_raw, tmp_path, capsys, content):
    (tmp_path / "build.json").write_text(content)
    assert "build.json" in refused(prepare.main, ["--raw", tiny_raw, "--output", tmp_path], capsys)
    assert (tmp_path / "build.json").read_text() == content


HOLLOW = {
    "format": 1,
    "simulated": True,
    "sources": [],
    "headline": {},
    "counts": {},
    "protocol": {},
    "sets": {"a": {}},
}


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe\x00", b"{half", json.dumps(HOLLOW | {"versions": {}}).encode()])
def test_results_that_are_none(tmp_path, capsys, content):
    (tmp_path / "results.json").write_bytes(content)
    assert "results.json" in refused(report.main, [tmp_path], capsys)
    assert not (tmp_path / "report.html").exists()
