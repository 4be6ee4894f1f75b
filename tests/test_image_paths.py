"""Tables written on another machine: the right file is found by the end of its path, and never another plate's."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dataset_scripts.image_paths import find_images, portable_path
from dataset_scripts.prepare import main
from wsdino.errors import UserError

FOLDER = "2023_Batch1/images/PlateA"
LAYOUT = {"plate": "Plate", "well": "Well", "site": "Site", "compound": "Drug", "concentration": "uM"}
LAYOUT |= {"replicate": None, "batch_pattern": "^(.*)$"}


@pytest.mark.parametrize(
    ("text", "portable"),
    [
        ("a/b/c.tif", "a/b/c.tif"),
        ("C:\\lab\\a.tif", "lab/a.tif"),
        ("Z:/lab//a.tif", "lab/a.tif"),
        ("\\\\nas01\\screens\\a.tif", "nas01/screens/a.tif"),
        ("file:///C:/my%20lab/a.tif", "my lab/a.tif"),
        ("s3://bucket/key/a.tif", "key/a.tif"),
        ("https://host:8080/x/a.tif?signature=1/2", "x/a.tif"),
        ("../../x/./y/../a.tif", "x/a.tif"),
        ("/a.tif", "a.tif"),
        ("12:30.tif", "12:30.tif"),
        ("", ""),
    ],
)
def test_paths_lose_what_only_one_machine_knows(text, portable):
    assert portable_path(text) == portable


def write(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16, 16), level, np.uint16)).save(path)


@pytest.fixture
def build(tmp_path):
    """Build a table of rows with the columns `File` and `Folder`, and return the levels of its planes by treatment."""

    def run(rows, raw, folder="Folder", **changes):
        pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
        channel = ["File", folder] if folder else "File"
        (tmp_path / "c.json").write_text(json.dumps(LAYOUT | {"channels": {"dna": channel}} | changes))
        words = ["--raw", raw, "--image_csv", tmp_path / "t.csv", "--columns", tmp_path / "c.json"]
        main([str(word) for word in (*words, "--output", tmp_path / "out", "--resize", 1, "--no_illumination")])
        from dataset_scripts import open_fields

        fields = open_fields(tmp_path / "out", ["all"])
        return {f"{fields['plate'][i]} {fields['well'][i]}": fields.image(i, "dna").max() for i in range(len(fields))}

    return run


def rows_of(plate, folder, drugs=("DMSO", "taxol"), **more):
    return [
        {"Plate": plate, "Well": f"A0{i}", "Site": 1, "Drug": drug, "uM": i, "File": f"r01c0{i}.tif", "Folder": folder}
        | more
        for i, drug in enumerate(drugs)
    ]


@pytest.mark.parametrize(
    "folder",
    [
        f"C:\\Users\\lab\\{FOLDER}",
        f"Z:\\{FOLDER}",
        f"\\\\nas01\\screens\\{FOLDER}",
        f"s3://bucket/project/{FOLDER}",
        f"file:///C:/lab/{FOLDER}",
        "..\\images\\PlateA",
        f"/home/ubuntu/bucket/{FOLDER}/",
    ],
)
@pytest.mark.parametrize("raw", ["", "2023_Batch1", "2023_Batch1/images", FOLDER])
def test_paths_of_other_machines(build, tmp_path, folder, raw, capsys):
    for i in range(2):
        write(tmp_path / "raw" / FOLDER / f"r01c0{i}.tif", 100 + i)
    if folder.startswith("..") and raw == "":  # its own folder would be beside a folder that is not named
        folder = f"..\\{FOLDER}"
    levels = build(rows_of("PlateA", folder), tmp_path / "raw" / raw)
    assert levels == {"PlateA A00": 100, "PlateA A01": 101}
    if folder.startswith("/home"):
        assert "2 images were found by the end of their path" in capsys.readouterr().out


PHENIX = {plate: f"{batch}/images/{plate}__2021-05-01T10_00_00-Measurement 1/Images"
          for plate, batch in (("BR0001", "2021_Batch1"), ("BR0002", "2021_Batch2"))}  # fmt: skip
CLUSTER = "/home/ubuntu/bucket/projects/cpg/"


def phenix_rows(*plates):
    return [row for plate in plates for row in rows_of(plate, f"{CLUSTER}{PHENIX[plate]}/")]


@pytest.fixture
def phenix(tmp_path):
    """Two plates whose files and last folders have the same names."""
    for number, folder in enumerate(PHENIX.values()):
        for i in range(2):
            write(tmp_path / "raw" / folder / f"r01c0{i}.tif", 100 * number + i)
    return tmp_path / "raw"


def test_plates_whose_files_have_the_same_names(build, phenix):
    expected = {f"{plate} A0{i}": 100 * number + i for number, plate in enumerate(PHENIX) for i in range(2)}
    assert build(phenix_rows(*PHENIX), phenix) == expected


@pytest.mark.parametrize("plates", [("BR0002",), tuple(PHENIX)], ids=["one plate", "both"])
@pytest.mark.parametrize("deeper", [0, 1], ids=["measurement", "Images"])
def test_another_plate_s_file_is_never_taken(build, phenix, capsys, plates, deeper):
    """--raw is the folder of the first plate, where files of the second one's names lie."""
    raw = phenix / PHENIX["BR0001"]
    with pytest.raises(SystemExit) as ended:
        build(phenix_rows(*plates), raw if deeper else raw.parent)
    assert ended.value.code == 2 and "BR0002" in capsys.readouterr().err


def test_a_bare_name_is_taken_only_where_it_tells_plates_apart(tmp_path):
    def found(names, plates=("P1", "P2")):
        for name in names:
            write(tmp_path / name, 1)
        rows = [{"plate": plate, "dna_file": f"lab/{plate}/{name}"} for plate, name in zip(plates, names, strict=True)]
        fields = pd.DataFrame(rows).assign(row=2, table="t.csv")
        return len(find_images(fields, tmp_path, ["dna"], True, len(set(plates)) > 1)[0])

    assert found(["P1_A01.tif", "P2_A01.tif"]) == 2
    assert found([f"A0{i}_1BEDC2073-A983-4B98-95E9-84466707A25{i}.tif" for i in range(2)]) == 2
    assert found(["A01.tif", "A02.tif"], ["P1", "P1"]) == 2
    with pytest.raises(UserError, match="none of the 2 images"):
        found(["A03.tif", "A04.tif"])


def test_no_file_outside_the_raw_folder_is_read(build, tmp_path, capsys):
    write(tmp_path / "outside" / "r01c00.tif", 7)
    write(tmp_path / "outside" / "r01c01.tif", 7)
    (tmp_path / "raw").mkdir()
    with pytest.raises(SystemExit) as ended:
        build(rows_of("P1", "../outside"), tmp_path / "raw")
    assert ended.value.code == 2 and "outside/r01c00.tif" in capsys.readouterr().err
