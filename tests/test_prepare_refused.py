"""What the builder refuses: the image, its row or the setting is named, and nothing half-written stays."""

import re

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from small_screens import PLAIN, copy_of, load, table_of

from dataset_scripts import ScreenColumns
from dataset_scripts.prepare import build_dataset, main
from wsdino.errors import UserError


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--plates", ""), ("--plates", ","), ("--downloads", "0"), ("--workers", "0"), ("--resize", "nan")]
    + [("--filter_size", "inf"), ("--base_url", "ftp://127.0.0.1/"), ("--columns", "absent.json")],
)
def test_impossible_settings_are_refused_before_anything_is_fetched(tmp_path, refused, flag, value):
    words = [
        "--raw",
        tmp_path / "raw",
        "--output",
        tmp_path / "out",
        "--download",
        "--base_url",
        "http://127.0.0.1:9/",
    ]
    refused(main, *words, flag, value, named=flag if flag != "--columns" else value)


def test_absent_images_are_refused(tmp_path, refused):
    refused(main, "--raw", tmp_path / "absent", "--output", tmp_path / "out", named="absent")


def damage(path, kind):
    with Image.open(path) as image:
        plane = np.asarray(image)
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "not an image":
        path.write_bytes(b"not an image at all")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "8-bit":
        Image.fromarray((plane >> 8).astype(np.uint8)).save(path)
    elif kind == "float":
        Image.fromarray(plane.astype(np.float32) / 3).save(path)  # whole numbers would be read
    elif kind == "wrong size":
        Image.fromarray(plane[:-2]).save(path)
    elif kind == "colour":
        Image.fromarray(np.dstack([(plane >> 8).astype(np.uint8)] * 3)).save(path)


DAMAGES = ["missing", "truncated", "not an image", "empty", "8-bit", "float", "wrong size", "colour"]


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_images_are_named_with_their_row(raw, tmp_path, kind, workers, capsys):
    if workers == "2" and kind != "truncated":
        pytest.skip("one kind tells that errors come back from worker processes")
    folder, bad = copy_of(raw, tmp_path / "raw")
    damage(bad, kind)
    with pytest.raises(SystemExit) as ended:
        main(["--raw", str(folder), "--output", str(tmp_path / "out"), "--workers", workers])
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("wsdino-prepare: error: ") and bad.name in error and "line 5" in error
    # What was written before is kept, and no file is half-written under its final name.
    assert not (tmp_path / "out" / "README.md").exists()
    for file in (tmp_path / "out").rglob("*.parquet"):
        parquet.read_table(file)


def test_16_bit_images_of_an_8_bit_screen(raw, tmp_path):
    folder, _ = copy_of(raw, tmp_path / "raw")
    with pytest.raises(UserError, match="--bits"):
        build_dataset(folder, tmp_path / "out", bits=8, progress=False)


@pytest.mark.parametrize("names", [["moa"], ["preview"], ["a b"], ["../dna"], ["dna", "dna_file"]])
def test_a_channel_must_be_a_column_of_its_own(tmp_path, names):
    columns = ScreenColumns(channels={name: (name.upper(), None) for name in names})
    with pytest.raises(UserError, match=re.escape(repr(names[-1]))):
        build_dataset(tmp_path, tmp_path / "out", image_csv=tmp_path / "t.csv", columns=columns)


def test_a_screen_without_its_control_is_told_so(raw, tmp_path, capsys):
    folder, _ = copy_of(raw, tmp_path / "raw")
    table = folder / "BBBC021_v1_image.csv"
    table.write_text(table.read_text().replace("DMSO", "dmso"))
    build_dataset(folder, tmp_path / "out", illumination=False)
    assert "no field is of the control 'DMSO'" in capsys.readouterr().out


def test_plates_may_be_named_with_spaces_between(raw, tmp_path):
    plates = sorted({row["Image_Metadata_Plate_DAPI"] for row in table_of(raw)})[:2]
    folders = ["--raw", str(raw), "--output", str(tmp_path / "out")]
    main([*folders, "--no_illumination", "--plates", ", ".join(plates)])
    assert set(load(tmp_path / "out", "all", tmp_path)["plate"]) == set(plates)


def test_two_plates_whose_illumination_functions_have_one_name_are_refused(tmp_path):

    lines = ["P,W,S,D,C,F,G"]
    for i, plate in enumerate(["p", "p_b"]):
        for name in "fg":
            Image.fromarray(np.full((16, 16), 9, np.uint8)).save(tmp_path / f"{name}{i}.png")
        lines.append(f"{plate},A01,1,none,0,f{i}.png,g{i}.png")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    channels = {"a": ("F", None), "b_a": ("G", None)}
    columns = ScreenColumns(channels=channels, batch_pattern="(p)", control="none", **PLAIN)
    given = {"image_csv": tmp_path / "table.csv", "columns": columns, "bits": 8, "resize": 1.0, "progress": False}
    with pytest.raises(UserError, match="illumination/p_b_a.png"):
        build_dataset(tmp_path, tmp_path / "out", **given)
    build_dataset(tmp_path, tmp_path / "out", illumination=False, **given)  # nothing of that name is written
    assert len(load(tmp_path / "out", "all", tmp_path)) == 2
