"""The dataset builder: what `load_dataset` gives back, against plain loops over the raw files."""

import csv
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from scipy import ndimage
from skimage.morphology import disk
from skimage.transform import resize
from small_screens import load, plain_screen, table_of

import dataset_scripts
from dataset_scripts import ScreenColumns, open_fields, open_planes
from dataset_scripts.prepare import build_dataset
from wsdino.errors import UserError

COLUMNS = {
    "dna", "tubulin", "actin", "preview", "compound", "concentration", "treatment", "moa", "batch", "plate", "well",
    "site", "replicate", "source",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


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
    some = tmp_path / "some"
    some.mkdir()
    rows = table_of(raw)[:5]
    for name in ("BBBC021_v1_image.csv", "BBBC021_v1_moa.csv", "simulation.json"):
        shutil.copy(raw / name, some)
    for i, row in enumerate(rows):
        # Flat, and the first field lacks its actin image.
        for channel in ("DAPI", "Tubulin", "Actin")[: 2 if i == 0 else 3]:
            shutil.copy(raw / row[f"Image_PathName_{channel}"] / row[f"Image_FileName_{channel}"], some)
    with pytest.raises(UserError, match=r"BBBC021_v1_image.csv, line \d+.*--allow_missing"):
        build_dataset(some, tmp_path / "out", progress=False)
    build_dataset(some, tmp_path / "out", allow_missing=True)
    total = len(table_of(raw))
    assert f"of the {total:,} fields" in (said := capsys.readouterr().out)
    assert f"{total - 5:,} are absent and 1 lack a channel" in said
    data = load(tmp_path / "out", "all", tmp_path)
    assert len(data) == 5
    absent = [row["actin_file"] for row in data if row["actin"] is None]
    assert absent == [rows[0]["Image_PathName_Actin"] + "/" + rows[0]["Image_FileName_Actin"]]


def test_illumination_is_the_paper_s_and_saved(raw, built, tmp_path):
    """Oracle: CellProfiler's steps written plainly, with scikit-image's resize."""
    record = json.loads((built / "build.json").read_text())["plates"][0]
    radius = int(320 * min(64 / 1024, 80 / 1280) / 2.35 + 0.5)
    rows = [row for row in table_of(raw) if row["Image_Metadata_Plate_DAPI"] == record["plate"]]
    images = {}
    for row in rows:
        name = row["Image_PathName_Actin"] + "/" + row["Image_FileName_Actin"]
        with Image.open(raw / name) as image:
            images[name] = np.asarray(image).astype(float) / 65535
    mean = sum(images.values()) / len(images)
    average = (mean * 65535 + 1e-6).astype(np.uint16)
    smooth = ndimage.median_filter(average, footprint=disk(radius), mode="nearest").astype(float)
    minimum = np.sort(smooth[smooth > 0])[int((smooth > 0).sum() * 0.02)]
    function = np.maximum(smooth, minimum) / minimum

    with Image.open(built / record["functions"]["actin"]["file"]["path"]) as image:
        levels = np.asarray(image)
    digest = hashlib.sha256(levels.astype("<u2").tobytes()).hexdigest()
    assert digest == record["functions"]["actin"]["sha256"]
    np.testing.assert_allclose(levels / levels.min(), function, rtol=1e-6)
    checked = 0
    for row in load(built, "all", tmp_path):
        if row["actin_file"] in images:
            corrected = np.clip(images[row["actin_file"]] / function, 0, 1)
            expected = np.rint(resize(corrected, (32, 40), order=3, mode="symmetric") * 65535)
            assert np.abs(np.asarray(row["actin"]).astype(int) - expected).max() <= 1
            checked += 1
    assert checked == len(rows)


def test_no_plane_is_stored_twice(built):
    from pyarrow import parquet

    seen = set()
    for shard in built.rglob("*.parquet"):
        for name in parquet.read_table(shard, columns=["dna_file"])["dna_file"].to_pylist():
            assert name not in seen
            seen.add(name)


def test_streaming_pushdown_and_nodes(built):
    stream = load_dataset(str(built), "all", split="train", streaming=True)
    total = sum(1 for _ in stream.select_columns(["treatment"]))
    assert total == sum(
        sum(record["rows"].values()) for record in json.loads((built / "build.json").read_text())["plates"]
    )
    narrow = load_dataset(str(built), "dmso", split="train", streaming=True, columns=["dna", "plate"])
    row = next(iter(narrow))
    assert set(row) == {"dna", "plate"} and np.asarray(row["dna"]).dtype == np.uint16
    halves = [
        [row["dna_file"] for row in split_dataset_by_node(stream.select_columns(["dna_file"]), rank=r, world_size=2)]
        for r in range(2)
    ]
    assert not set(halves[0]) & set(halves[1])
    assert len(halves[0]) + len(halves[1]) == total


def test_a_rebuilt_folder_is_never_served_from_an_old_cache(raw, tmp_path):
    first = tmp_path / "out"
    build_dataset(raw, first, illumination=False, progress=False)
    before = np.array(open_planes(open_fields(first, ["dmso"]), "actin", tmp_path / "planes", progress=False))
    shutil.rmtree(first)
    build_dataset(raw, first, illumination=True, progress=False)
    data = load(first, "dmso", tmp_path)
    after = open_planes(open_fields(first, ["dmso"]), "actin", tmp_path / "planes", progress=False)
    assert (after != before).any()
    assert all((after[i] == np.asarray(data[i]["actin"])).all() for i in range(len(data)))


@pytest.mark.parametrize("bits", [8, 16])
def test_five_channels_of_another_screen(tmp_path, bits):
    rng = np.random.default_rng(0)
    names = ("dna", "er", "rna", "agp", "mito")
    lines = ["Plate,Well,Site,Drug,Dose," + ",".join(f"File_{name}" for name in names)]
    for i in range(12):
        files = []
        for name in names:
            plane = rng.integers(0, 2**bits, (20, 24)).astype(np.uint8 if bits == 8 else np.uint16)
            Image.fromarray(plane).save(tmp_path / f"{name}{i}.png")
            files.append(f"{name}{i}.png")
        drug = ("none", "aspirin", "ibuprofen")[i % 3]
        lines.append(f"run{i // 6}-plate{i // 6},A{i:02d},1,{drug},{i % 3}," + ",".join(files))
    (tmp_path / "load_data.csv").write_text("\n".join(lines) + "\n")
    columns = ScreenColumns(
        channels={name: (f"File_{name}", None) for name in names},
        plate="Plate",
        well="Well",
        site="Site",
        compound="Drug",
        concentration="Dose",
        replicate=None,
        batch_pattern=r"^(run\d+)",
        control="none",
    )
    build_dataset(
        tmp_path,
        tmp_path / "out",
        image_csv=tmp_path / "load_data.csv",
        columns=columns,
        bits=bits,
        resize=1.0,
        illumination=False,
        source="my screen",
        progress=False,
    )
    data = load(tmp_path / "out", "all", tmp_path)
    assert len(data) == 12 and set(data["source"]) == {"my screen"} and set(data["batch"]) == {"run0", "run1"}
    for row in data:
        for name in names:
            with Image.open(tmp_path / row[f"{name}_file"]) as image:
                assert (np.asarray(image) == np.asarray(row[name])).all()


def test_8_bit_screens_stay_8_bit_when_corrected_and_halved(tmp_path):
    """Oracle: the steps written plainly on a scale of 0 to 1, as CellProfiler holds images of any depth."""
    rng = np.random.default_rng(0)
    light = 0.6 + 0.4 * np.linspace(0, 1, 80)[None, :] * np.linspace(0.5, 1, 64)[:, None]
    planes = [(rng.gamma(4, 12, (64, 80)) * light).clip(0, 255).astype(np.uint8) for _ in range(10)]
    build_dataset(tmp_path, tmp_path / "out", bits=8, **plain_screen(tmp_path, planes))

    images = np.array(planes) / 255
    average = (images.mean(axis=0) * 65535 + 1e-6).astype(np.uint16)
    smooth = ndimage.median_filter(average, footprint=disk(9), mode="nearest").astype(float)
    function = np.maximum(smooth, np.sort(smooth.ravel())[int(smooth.size * 0.02)])
    function /= function.min()
    assert function.max() > 1.3
    for image, row in zip(images, load(tmp_path / "out", "unannotated", tmp_path), strict=True):
        found = np.asarray(row["er"])
        assert row["er"].mode == "L" and found.dtype == np.uint8
        expected = resize(np.clip(image / function, 0, 1), (32, 40), order=3, mode="symmetric") * 255
        assert np.abs(found - expected).max() <= 0.51


def test_the_documented_example_runs(tmp_path, monkeypatch, capsys):
    text = (Path(dataset_scripts.__file__).parent / "other_screens.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (promise,) = re.findall(r"It prints `(.*)`\.", text)
    monkeypatch.chdir(tmp_path)
    # Spawned worker processes read the file of the command, and must not begin the work again.
    exec(compile(code, "other_screens.md", "exec"), {"__name__": "__mp_main__"})
    assert not list(tmp_path.iterdir())
    exec(compile(code, "other_screens.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.splitlines()[-1] == promise


@pytest.mark.skipif(
    "WSDINO_BBBC021_METADATA" not in os.environ,
    reason="WSDINO_BBBC021_METADATA names no folder with the official tables",
)
def test_the_real_tables_and_fields(tmp_path, capsys):
    folder = Path(os.environ["WSDINO_BBBC021_METADATA"])
    image = next(folder.glob("BBBC021_v1_image.csv*"))
    build_dataset(
        folder / "fields",
        tmp_path / "out",
        image_csv=image,
        moa_csv=folder / "BBBC021_v1_moa.csv",
        allow_missing=True,
    )
    said = capsys.readouterr().out
    present = len(list((folder / "fields").glob("*.tif")))
    assert f"of the 13,200 fields in {image}, {13200 - present:,} are absent" in said
    data = load(tmp_path / "out", "all", tmp_path)
    assert len(data) == present and set(data["source"]) == {"BBBC021v1"}
    for row in data:
        for channel in ("dna", "tubulin", "actin"):
            if row[channel] is not None:
                assert np.asarray(row[channel]).shape == (512, 640)


def test_a_table_in_memory_builds_what_its_file_builds(raw, built, tmp_path):
    table = pd.read_csv(raw / "BBBC021_v1_image.csv", dtype=str, keep_default_na=False)
    build_dataset(raw, tmp_path / "out", table=table, moa_csv=raw / "BBBC021_v1_moa.csv", progress=False)
    for path in built.rglob("*.parquet"):
        assert (tmp_path / "out" / path.relative_to(built)).read_bytes() == path.read_bytes()
