"""The simulator: official layout, determinism, and the facts of the real camera."""

import csv
import hashlib
import json
import os
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from dataset_scripts.simulator.simulate import main, simulate_screen
from wsdino.errors import UserError

HEADER = [
    "TableNumber", "ImageNumber", "Image_FileName_DAPI", "Image_PathName_DAPI", "Image_FileName_Tubulin",
    "Image_PathName_Tubulin", "Image_FileName_Actin", "Image_PathName_Actin", "Image_Metadata_Plate_DAPI",
    "Image_Metadata_Well_DAPI", "Replicate", "Image_Metadata_Compound", "Image_Metadata_Concentration",
]  # fmt: skip


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return simulate_screen(tmp_path_factory.mktemp("screen") / "raw", size="tiny", seed=5, progress=False)


def rows_of(folder):
    with open(folder / "BBBC021_v1_image.csv", newline="") as file:
        return list(csv.DictReader(file))


def mechanisms_of(folder):
    with open(folder / "BBBC021_v1_moa.csv", newline="") as file:
        return {(r["compound"], float(r["concentration"])): r["moa"] for r in csv.DictReader(file)}


def digest_of(folder):
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def test_writes_the_official_tables_and_every_file_they_name(screen):
    rows = rows_of(screen)
    assert list(rows[0]) == HEADER
    for row in rows:
        for channel in ("DAPI", "Tubulin", "Actin"):
            path = screen / row[f"Image_PathName_{channel}"] / row[f"Image_FileName_{channel}"]
            assert path.is_file()
            assert row[f"Image_PathName_{channel}"].split("/") == [
                row["Image_Metadata_Plate_DAPI"].split("_")[0],
                row["Image_Metadata_Plate_DAPI"],
            ]
    on_disk = {path.name for path in screen.rglob("*.tif")}
    assert len(on_disk) == 3 * len(rows)


def test_images_are_12_bit_data_shifted_left_by_four(screen):
    for row in rows_of(screen)[:12]:
        for channel in ("DAPI", "Tubulin", "Actin"):
            with Image.open(screen / row[f"Image_PathName_{channel}"] / row[f"Image_FileName_{channel}"]) as image:
                assert image.mode == "I;16"
                plane = np.asarray(image)
            assert plane.shape == (128, 160)
            assert plane.dtype == np.uint16
            assert not (plane % 16).any()
            assert 300 < np.percentile(plane, 2) < 1700
            assert plane.max() > 1.5 * np.median(plane)


def test_layout_has_what_the_scores_need(screen):
    rows, moa = rows_of(screen), mechanisms_of(screen)
    batches_of_compound, batches_of_moa, compounds_of_moa = defaultdict(set), defaultdict(set), defaultdict(set)
    doses = defaultdict(set)
    dmso_plates, plates = set(), set()
    for row in rows:
        compound, dose = row["Image_Metadata_Compound"], float(row["Image_Metadata_Concentration"])
        batch = row["Image_Metadata_Plate_DAPI"].split("_")[0]
        plates.add(row["Image_Metadata_Plate_DAPI"])
        if compound == "DMSO":
            assert dose == 0
            dmso_plates.add(row["Image_Metadata_Plate_DAPI"])
            continue
        batches_of_compound[compound].add(batch)
        if (compound, dose) in moa:
            batches_of_moa[moa[compound, dose]].add(batch)
            compounds_of_moa[moa[compound, dose]].add(compound)
            doses[compound].add(dose)
    assert dmso_plates == plates
    everywhere = [compound for compound, batches in batches_of_compound.items() if len(batches) == 3]
    assert len(everywhere) == 1
    assert all(len(b) == 1 for c, b in batches_of_compound.items() if c != everywhere[0])
    assert sum(len(batches) == 1 for batches in batches_of_moa.values()) == 2
    assert all(len(compounds) >= 2 for compounds in compounds_of_moa.values())
    assert all(len(each) >= 2 for each in doses.values())
    assert moa["DMSO", 0.0] == "DMSO"
    labels = [row["Image_Metadata_Compound"] for row in rows]
    assert sum(a == b for a, b in zip(labels, labels[1:], strict=False)) < 0.4 * len(labels)


def test_same_seed_same_bytes_for_any_number_of_workers(tmp_path):
    changes = dict(seed=3, progress=False, image_size=(40, 48), scale=0.3)
    one = simulate_screen(tmp_path / "one", "tiny", workers=1, **changes)
    changes["fields_per_well"] = 2
    two = simulate_screen(tmp_path / "two", "tiny", workers=2, **changes)
    assert digest_of(one) == digest_of(two)
    other = simulate_screen(tmp_path / "other", "tiny", **{**changes, "seed": 4})
    assert digest_of(other) != digest_of(one)


def test_marks_itself_and_is_safe_to_repeat(screen, tmp_path):
    truth = json.loads((screen / "simulation.json").read_text())
    assert truth["source"] == "simulated, seed 5"
    before = digest_of(screen)
    simulate_screen(screen, size="tiny", seed=5, progress=False)
    assert digest_of(screen) == before
    with pytest.raises(UserError, match="another simulation"):
        simulate_screen(screen, size="tiny", seed=6, progress=False)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        simulate_screen(tmp_path, size="tiny")


def test_the_command_sets_size_scale_and_difficulty(tmp_path):
    command = [str(tmp_path), "--size", "tiny", "--image_size", "40", "48", "--scale", "0.3", "--workers", "1"]
    main([*command, "--nuisance", "0"])
    known = json.loads((tmp_path / "simulation.json").read_text())
    design = known["design"]
    assert (design["image_size"], design["scale"], design["nuisance"]) == ([40, 48], 0.3, 0)
    gains = {tuple(optics["gain"]) for optics in known["truth"]["optics"].values()}
    assert gains == {(1.0, 1.0, 1.0)}  # no plate differs from another


def test_an_interruption_is_one_sentence(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dataset_scripts.simulator.simulate._write_well", interrupted)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "raw"), "--size", "tiny", "--image_size", "40", "48", "--workers", "1"])
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith(
        "wsdino-simulate: interrupted: run the command again to continue from here\n"
    )


def dies(task):
    """A worker process that is killed."""
    os._exit(9)


def test_a_worker_process_that_is_killed_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dataset_scripts.simulator.simulate._write_well", dies)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "raw"), "--size", "tiny", "--workers", "2"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("wsdino-simulate: error: a worker process ended before its work was done: ")


def test_an_interrupted_simulation_is_finished_with_the_same_bytes(tmp_path, monkeypatch):
    from dataset_scripts.simulator import simulate

    changes = dict(seed=3, progress=False, image_size=(40, 48), scale=0.3, workers=1)
    whole = simulate_screen(tmp_path / "whole", "tiny", **changes)
    drawn, real = [], simulate._write_well

    def dies(task):
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(task)
        real(task)

    monkeypatch.setattr(simulate, "_write_well", dies)
    with pytest.raises(KeyboardInterrupt):
        simulate_screen(tmp_path / "cut", "tiny", **changes)
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "simulation.json").exists()
    with pytest.raises(UserError, match="unfinished"):
        simulate_screen(tmp_path / "cut", "tiny", **{**changes, "seed": 4})
    simulate_screen(tmp_path / "cut", "tiny", **changes)
    assert digest_of(tmp_path / "cut") == digest_of(whole)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": "giant"}, "giant"),
        ({"image_size": (8, 8)}, "image_size"),
        ({"mechanisms": ("Magic",)}, "Magic"),
        ({"colour": 3}, "colour"),
        ({"batches": 0}, "batches"),
        ({"batches": 1, "compounds": 30}, "wells"),
    ],
)
def test_bad_designs_are_named(changes, named, tmp_path):
    with pytest.raises(UserError, match=named):
        simulate_screen(tmp_path / "raw", **{"size": "tiny", **changes})


def test_command_ends_with_one_sentence(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "--size", "tiny"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("wsdino-simulate: error:") and "Traceback" not in error


def test_official_plate_map_is_reproduced(tmp_path):
    """Plates, wells, sites, file names and labels of the given tables; only the pictures are new."""
    lines, number = [",".join(HEADER)], 0
    wells = [("B02", "DMSO", 0), ("C03", "taxol", 0.3), ("D04", "taxol", 0.001), ("E05", "nobody knows", 7)]
    for plate in ("Week1_22123", "Week10_40111"):
        for well, compound, dose in wells:
            for site in (1, 2):
                number += 1
                files = ",".join(f"{well}_s{site}_w{w}{number}.tif,{plate.split('_')[0]}/{plate}" for w in (1, 2, 4))
                lines.append(f"1,{number},{files},{plate},{well},1,{compound},{dose}")
    image, moa = tmp_path / "image.csv", tmp_path / "moa.csv"
    image.write_text("\n".join(lines) + "\n")
    moa.write_text('"compound",concentration,"moa"\n"taxol",0.3,"Microtubule stabilizers"\n"DMSO",0.0,"DMSO"\n')
    folder = simulate_screen(
        tmp_path / "raw", "tiny", 1, plate_map=(image, moa), image_size=(40, 50), scale=0.25, progress=False
    )
    assert (folder / "BBBC021_v1_image.csv").read_text() == image.read_text()
    assert (folder / "BBBC021_v1_moa.csv").read_text() == moa.read_text()
    for row in rows_of(folder):
        for channel in ("DAPI", "Tubulin", "Actin"):
            with Image.open(folder / row[f"Image_PathName_{channel}"] / row[f"Image_FileName_{channel}"]) as picture:
                assert picture.size == (50, 40)
    strength = json.loads((folder / "simulation.json").read_text())["truth"]["strength"]
    assert strength["DMSO"] == 0
    assert strength["taxol_0.3"] == 1
    assert strength["taxol_0.001"] < 0.3 and strength["nobody knows_7"] <= 0.3


IMAGE_LINE = "1,1,{dna},{folder},B02_s1_w2.tif,Week1/Week1_1,B02_s1_w4.tif,Week1/Week1_1,Week1_1,B02,1,DMSO,0"


@pytest.mark.parametrize(
    ("dna", "folder"),
    [
        ("B02_s1_w1.tif", "../../outside"),
        ("../B02_s1_w1.tif", "Week1"),
        ("..\\..\\..\\B02_s1_w1.tif", "Week1"),
        ("B02_s1_w1.tif", "C:\\Week1"),
    ],
)
def test_a_plate_map_writes_images_inside_the_folder_only(tmp_path, dna, folder):
    """Whatever leads out of it is dropped from a path, as for the paths of other machines."""
    image, moa = tmp_path / "image.csv", tmp_path / "moa.csv"
    image.write_text(",".join(HEADER) + "\n" + IMAGE_LINE.format(dna=dna, folder=folder) + "\n")
    moa.write_text('"compound",concentration,"moa"\n"DMSO",0.0,"DMSO"\n')
    main([str(tmp_path / "a" / "raw"), "--plate_map", str(image), str(moa), "--image_size", "40", "48"])
    assert {path.name for path in tmp_path.iterdir()} == {"image.csv", "moa.csv", "a"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["raw"]
    assert len(list((tmp_path / "a" / "raw").rglob("*.tif"))) == 3


@pytest.mark.parametrize(
    ("dna", "folder", "message"),
    [
        ("B02_s1_w1\0.tif", "Week1", "the dna file|cannot be read as CSV"),
        ("", "Week1", "no site number"),
        ("B02_s1_w1.tif", "Week1,,Week1", "no tubulin image is named"),
        ("BBBC021_v1_moa_s1_.csv", "", "is not the name of a TIFF"),
        ("simulation_s1_.json", "", "is not the name of a TIFF"),
    ],
)
def test_a_plate_map_that_names_no_image_to_draw_is_refused(tmp_path, dna, folder, message, capsys):
    image, moa = tmp_path / "image.csv", tmp_path / "moa.csv"
    line = IMAGE_LINE.format(dna=dna, folder=folder)
    if folder.count(","):  # it names the tubulin image as well
        line = line.replace("B02_s1_w2.tif,Week1/Week1_1,", "", 1)
    image.write_text(",".join(HEADER) + "\n" + line + "\n")
    moa.write_text('"compound",concentration,"moa"\n"DMSO",0.0,"DMSO"\n')
    before = {path for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "a" / "raw"), "--plate_map", str(image), str(moa), "--image_size", "40", "48"])
    assert ended.value.code == 2
    import re

    error = capsys.readouterr().err
    assert re.search(f"image.csv.*{message}", error), error
    # Nothing is left behind, so the corrected map may go to the same folder.
    assert {path for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": float("nan")}, "scale is nan: give"),
        ({"scale": float("inf")}, "scale is inf: give"),
        ({"nuisance": float("nan")}, "nuisance is nan: give"),
        ({"nuisance": float("inf")}, "nuisance is inf: give"),
        ({"nuisance": -1.0}, "nuisance is -1.0: give"),
        ({"image_size": (64, 10**6)}, "image_size .*: give two whole numbers"),
        ({"image_size": (64, 8)}, "image_size .*: give two whole numbers"),
        ({"image_size": (64.5, 80)}, "image_size .*: give two whole numbers"),
        ({"image_size": (64,)}, "image_size .*: give two whole numbers"),
        ({"image_size": 64}, "image_size .*: give two whole numbers"),
        ({"batches": float("nan")}, "batches is nan: give a whole number"),
        ({"batches": 0}, "batches is 0: give a whole number"),
        ({"replicates": 10**9}, "replicates is 1000000000: give a whole number"),
        ({"fields_per_well": 2.5}, "fields_per_well is 2.5: give a whole number"),
        ({"inactive": -1}, "inactive is -1: give a whole number"),
        ({"compounds": 200, "batches": 50}, "801 compounds.*512"),
        ({"mechanisms": ["Magic"]}, "mechanism 'Magic' is unknown"),
        ({"seed": 1.5}, "seed is 1.5: give a whole number"),
        ({"seed": -1}, "seed is -1: give a whole number"),
    ],
)
def test_impossible_designs_are_refused_in_a_sentence(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        simulate_screen(tmp_path / "raw", "tiny", **changes)
    assert not (tmp_path / "raw").exists()
