"""The dataset builder: what `load_dataset` gives back, against plain loops over the raw files."""

import csv
import json

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from dataset_scripts.prepare import build_dataset, main
from dataset_scripts.screen import ScreenError
from dataset_scripts.simulate import simulate_screen

COLUMNS = {
    "dna", "tubulin", "actin", "preview", "compound", "concentration", "treatment", "moa", "batch", "plate", "well",
    "site", "replicate", "source",
}  # fmt: skip


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare") / "raw"
    return simulate_screen(folder, "tiny", 11, image_size=(64, 80), scale=0.25, progress=False)


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepare") / "dataset"
    build_dataset(raw, output, progress=False)
    return output


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def load(folder, part, tmp_path):
    return load_dataset(str(folder), part, split="train", cache_dir=str(tmp_path / "cache"))


def table_of(raw):
    with open(raw / "BBBC021_v1_image.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_parts_and_columns(raw, built, tmp_path):
    rows = table_of(raw)
    with open(raw / "BBBC021_v1_moa.csv", newline="") as file:
        moa = {(r["compound"], float(r["concentration"])): r["moa"] for r in csv.DictReader(file)}
    expected = {"annotated": 0, "dmso": 0, "unannotated": 0}
    for row in rows:
        key = row["Image_Metadata_Compound"], float(row["Image_Metadata_Concentration"])
        expected["dmso" if key[0] == "DMSO" else "annotated" if key in moa else "unannotated"] += 1
    for part, count in expected.items():
        assert len(load(built, part, tmp_path)) == count
    everything = load(built, "all", tmp_path)
    assert len(everything) == len(rows)
    assert COLUMNS <= set(everything.column_names)
    assert set(everything["source"]) == {"simulated, seed 11"}
    # Each row says what the table says of its file.
    by_file = {row["Image_PathName_DAPI"] + "/" + row["Image_FileName_DAPI"]: row for row in rows}
    for row in everything.remove_columns(["dna", "tubulin", "actin", "preview"]):
        source = by_file.pop(row["dna_file"])
        key = source["Image_Metadata_Compound"], float(source["Image_Metadata_Concentration"])
        assert (row["compound"], row["concentration"]) == key
        assert row["treatment"] == ("DMSO" if key[0] == "DMSO" else f"{key[0]}_{key[1]:g}")
        assert row["moa"] == moa.get(key, "")
        assert row["plate"] == source["Image_Metadata_Plate_DAPI"]
        assert row["batch"] == row["plate"].split("_")[0]
        assert row["well"] == source["Image_Metadata_Well_DAPI"]
        assert f"_s{row['site']}_" in row["dna_file"]
        assert row["replicate"] == int(source["Replicate"])
        assert row["image_number"] == int(source["ImageNumber"])
    assert not by_file


def test_planes_are_16_bit_and_halved(built, tmp_path):
    row = load(built, "annotated", tmp_path)[0]
    for channel in ("dna", "tubulin", "actin"):
        assert row[channel].mode == "I;16"
        assert np.asarray(row[channel]).shape == (32, 40)
    assert row["preview"].mode == "RGB"


def test_without_correction_or_resizing_planes_are_the_raw_ones(raw, tmp_path):
    build_dataset(raw, tmp_path / "plain", illumination=False, resize=1.0, progress=False)
    for row in load(tmp_path / "plain", "dmso", tmp_path):
        for channel in ("dna", "tubulin", "actin"):
            with Image.open(raw / row[f"{channel}_file"]) as image:
                assert (np.asarray(image) == np.asarray(row[channel])).all()


def test_missing_images(raw, tmp_path, capsys):
    import shutil

    some = tmp_path / "some"
    some.mkdir()
    rows = table_of(raw)[:5]
    for name in ("BBBC021_v1_image.csv", "BBBC021_v1_moa.csv", "simulation.json"):
        shutil.copy(raw / name, some)
    for i, row in enumerate(rows):
        # Flat, and the first field lacks its actin image.
        for channel in ("DAPI", "Tubulin", "Actin")[: 2 if i == 0 else 3]:
            shutil.copy(raw / row[f"Image_PathName_{channel}"] / row[f"Image_FileName_{channel}"], some)
    with pytest.raises(ScreenError, match=r"line \d+ of .*BBBC021_v1_image.csv.*--allow_missing"):
        build_dataset(some, tmp_path / "out", progress=False)
    build_dataset(some, tmp_path / "out", allow_missing=True)
    total = len(table_of(raw))
    assert f"of the {total:,} fields" in (said := capsys.readouterr().out)
    assert f"{total - 5:,} are absent and 1 lack a channel" in said
    data = load(tmp_path / "out", "all", tmp_path)
    assert len(data) == 5
    absent = [row["actin_file"] for row in data if row["actin"] is None]
    assert absent == [rows[0]["Image_PathName_Actin"] + "/" + rows[0]["Image_FileName_Actin"]]


def test_safe_to_repeat_and_restartable(raw, tmp_path):
    output = tmp_path / "out"
    build_dataset(raw, output, progress=False)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    build_dataset(raw, output, progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    # As if the process had died in one plate: its record is gone and its shard is cut.
    (output / ".build").mkdir()
    records = json.loads((output / "build.json").read_text())["plates"]
    for record in records[1:]:
        (output / ".build" / f"{record['plate']}.json").write_text(json.dumps(record))
    (output / "build.json").unlink()
    broken = output / next(iter(records[0]["shards"].values()))["path"]
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    build_dataset(raw, output, progress=False)
    assert broken.read_bytes() == content
    again = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    changed = {path for path in before if again[path] != before[path]}
    assert changed == {output / shard["path"] for shard in records[0]["shards"].values()}


def test_output_that_holds_something_else(raw, built, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ScreenError, match="something else"):
        build_dataset(raw, tmp_path, progress=False)
    with pytest.raises(ScreenError, match="other settings"):
        build_dataset(raw, built, resize=1.0, progress=False)


def test_command_names_the_mend(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--raw", str(tmp_path / "absent"), "--output", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "does not exist" in capsys.readouterr().err
