"""The dataset builder: what `load_dataset` gives back, against plain loops over the raw files."""

import csv
import hashlib
import json
import os
import re

import numpy as np
import pandas as pd
import pytest
from datasets import load_dataset
from PIL import Image

from dataset_scripts.prepare import build_dataset, main
from dataset_scripts.screen import ScreenError
from dataset_scripts.simulator.simulate import simulate_screen

COLUMNS = {
    "dna", "tubulin", "actin", "preview", "compound", "concentration", "treatment", "moa", "batch", "plate", "well",
    "site", "replicate", "source",
}  # fmt: skip
# Of small tables of other screens.
PLAIN_COLUMNS = {"plate": "P", "well": "W", "site": "S", "compound": "D", "concentration": "C", "replicate": None}


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


def test_an_image_that_came_later_is_built_in(raw, tmp_path):
    folder, late = copy_of(raw, tmp_path / "raw")
    content = late.read_bytes()
    late.unlink()
    build_dataset(folder, tmp_path / "out", allow_missing=True, progress=False)
    assert sum(row["tubulin"] is None for row in load(tmp_path / "out", "all", tmp_path)) == 1
    late.write_bytes(content)
    build_dataset(folder, tmp_path / "out", allow_missing=True, progress=False)
    assert not any(row["tubulin"] is None for row in load(tmp_path / "out", "all", tmp_path))


def test_two_rows_that_lead_to_one_file(tmp_path):
    """In a flat folder the plates' folders are gone: names that only differ by folder must not be mixed up."""
    from dataset_scripts import ScreenColumns

    Image.fromarray(np.full((20, 24), 500, np.uint16)).save(tmp_path / "A01.tif")
    (tmp_path / "t.csv").write_text("P,W,S,D,C,F\np1,A01,1,x,1,p1/A01.tif\np2,A01,1,x,1,p2/A01.tif\n")
    columns = ScreenColumns(channels={"dna": ("F", None)}, **PLAIN_COLUMNS)
    with pytest.raises(ScreenError, match="lines 2 and 3 of .*t.csv both lead to .*A01.tif"):
        build_dataset(tmp_path, tmp_path / "out", image_csv=tmp_path / "t.csv", columns=columns, progress=False)


def test_safe_to_repeat_and_restartable(raw, tmp_path):
    output = tmp_path / "out"
    build_dataset(raw, output, progress=False)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    build_dataset(raw, output, progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    # As if the process had died in one plate: its record is gone and its shard is cut.
    (output / ".build").mkdir()
    (output / ".build" / "recipe").write_text(json.dumps(json.loads((output / "build.json").read_text())["recipe"]))
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


def test_dying_in_the_middle_of_a_plate(raw, built, tmp_path, monkeypatch):
    """No shard is taken for whole: going on gives the bytes of an uninterrupted build."""
    from dataset_scripts import prepare

    real, rows = prepare.plate_rows, []

    def dies(*arguments):
        for row in real(*arguments):
            rows.append(row)
            if len(rows) == 40:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(prepare, "plate_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(raw, tmp_path / "out", progress=False)
    monkeypatch.undo()
    assert list((tmp_path / "out").rglob("*.partial"))
    done = {path.stem for path in (tmp_path / "out" / ".build").glob("*.json")}
    assert 0 < len(done) < 6
    with pytest.raises(ScreenError, match="other settings"):
        build_dataset(raw, tmp_path / "out", resize=1.0, progress=False)
    build_dataset(raw, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").rglob("*.partial"))
    for path in built.rglob("*"):
        if path.is_file():
            assert (tmp_path / "out" / path.relative_to(built)).read_bytes() == path.read_bytes(), path


def test_a_folder_that_another_build_holds_is_left_as_it_is(raw, built, tmp_path):
    from shutil import copytree

    from filelock import FileLock

    output = copytree(built, tmp_path / "out")
    (output / ".build").mkdir()
    with FileLock(output / ".build" / "lock"):
        with pytest.raises(ScreenError, match="another wsdino-prepare is building .*out"):
            build_dataset(raw, output, progress=False)
        assert [path.name for path in (output / ".build").iterdir()] == ["lock"]
    # Refused for other reasons, it is left as it was, too; and what a build leaves that died at once is no stranger.
    with pytest.raises(ScreenError, match="other settings"):
        build_dataset(raw, output, resize=1.0, progress=False)
    assert not (output / ".build").exists()
    (tmp_path / "new" / ".build").mkdir(parents=True)
    (tmp_path / "new" / ".build" / "lock").touch()
    build_dataset(raw, tmp_path / "new", plates=["Week1_1021"], illumination=False, progress=False)


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


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--plates", "", "plates names none"),
        ("--plates", ",", "plates names none"),
        ("--downloads", "0", "downloads is 0"),
        ("--workers", "0", "workers is 0"),
        ("--resize", "nan", "resize is nan"),
        ("--filter_size", "inf", "filter_size is inf"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_fetched(tmp_path, capsys, flag, value, message):
    folders = ["--raw", str(tmp_path / "raw"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main([*folders, "--download", "--base_url", "http://127.0.0.1:9/", flag, value])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def copy_of(raw, folder, rows=24):
    """A small copy of a screen: its first rows only."""
    folder.mkdir()
    kept = table_of(raw)[:rows]
    for row in kept:
        for channel in ("DAPI", "Tubulin", "Actin"):
            place = folder / row[f"Image_PathName_{channel}"]
            place.mkdir(parents=True, exist_ok=True)
            name = row[f"Image_FileName_{channel}"]
            (place / name).write_bytes((raw / row[f"Image_PathName_{channel}"] / name).read_bytes())
    with open(folder / "BBBC021_v1_image.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, kept[0])
        writer.writeheader()
        writer.writerows(kept)
    seen = {(row["Image_Metadata_Compound"], float(row["Image_Metadata_Concentration"])) for row in kept}
    lines = (raw / "BBBC021_v1_moa.csv").read_text().splitlines()
    parsed = [(line, line.replace('"', "").split(",")) for line in lines[1:]]
    lines = lines[:1] + [line for line, cells in parsed if (cells[0], float(cells[1])) in seen]
    (folder / "BBBC021_v1_moa.csv").write_text("\n".join(lines) + "\n")
    return folder, folder / kept[3]["Image_PathName_Tubulin"] / kept[3]["Image_FileName_Tubulin"]


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
        Image.fromarray(plane.astype(np.float32)).save(path)
    elif kind == "wrong size":
        Image.fromarray(plane[:-2]).save(path)
    elif kind == "colour":
        Image.fromarray(np.dstack([(plane >> 8).astype(np.uint8)] * 3)).save(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "is not in .*1 of 72 images are absent.*--allow_missing"),
        ("truncated", "is truncated or not an image.*fetch it again"),
        ("not an image", "is truncated or not an image.*fetch it again"),
        ("empty", "is truncated or not an image.*fetch it again"),
        ("8-bit", "is 8-bit, not 16-bit: give the original files, or build an 8-bit screen with --bits 8"),
        ("float", "is of mode F, not 16-bit: give the original files, as whole numbers without a sign$"),
        ("wrong size", "is 80 x 62 pixels where .* 80 x 64"),
        ("colour", "is not one grey channel"),
    ],
)
def test_bad_images_are_named_with_their_row(raw, tmp_path, kind, message, capsys):
    folder, bad = copy_of(raw, tmp_path / "raw")
    damage(bad, kind)
    with pytest.raises(SystemExit) as ended:
        main(["--raw", str(folder), "--output", str(tmp_path / "out")])
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("wsdino-prepare: error: ")
    assert bad.name in error and "line 5 of" in error
    assert re.search(message, error), error
    # What was written before is kept and no shard is half-written under its final name.
    assert not (tmp_path / "out" / "README.md").exists()
    from pyarrow import parquet

    for shard in (tmp_path / "out").rglob("*.parquet"):
        parquet.read_table(shard)


def test_16_bit_images_of_an_8_bit_screen(raw, tmp_path):
    folder, _ = copy_of(raw, tmp_path / "raw")
    with pytest.raises(ScreenError, match="is 16-bit, not 8-bit: give the original files, or leave --bits 8 out"):
        build_dataset(folder, tmp_path / "out", bits=8, progress=False)


def test_an_error_in_a_worker_process_is_the_same_sentence(raw, tmp_path):
    folder, bad = copy_of(raw, tmp_path / "raw")
    damage(bad, "truncated")
    with pytest.raises(ScreenError, match=f"{bad.name}.*truncated"):
        build_dataset(folder, tmp_path / "out", workers=2, progress=False)


def test_any_number_of_workers_builds_the_same_shards(raw, built, tmp_path):
    build_dataset(raw, tmp_path / "out", workers=2, progress=False)
    names = sorted(path.relative_to(built) for path in built.rglob("*") if path.suffix in (".parquet", ".png"))
    assert names == sorted(
        path.relative_to(tmp_path / "out")
        for path in (tmp_path / "out").rglob("*")
        if path.suffix in (".parquet", ".png")
    )
    for name in names:
        assert (built / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_illumination_is_the_paper_s_and_saved(raw, built, tmp_path):
    """Oracle: CellProfiler's steps written plainly, with scikit-image's resize."""
    from scipy import ndimage
    from skimage.morphology import disk
    from skimage.transform import resize

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


def test_card_is_what_the_hub_reads(built):
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(built / "README.md")
    configs = {config["config_name"]: config for config in card.data.to_dict()["configs"]}
    assert set(configs) == {"annotated", "dmso", "unannotated", "all"}
    assert configs["all"]["data_files"][0]["path"] == [
        f"data/{part}/train-*.parquet" for part in ("annotated", "dmso", "unannotated")
    ]
    assert configs["annotated"]["default"] is True
    infos = {info["config_name"]: info for info in card.data.to_dict()["dataset_info"]}
    names = [feature["name"] for feature in infos["all"]["features"]]
    for name in names:
        assert f"`{name}`" in card.text, name
    assert "{" not in card.text.replace("{caie", "").split("```")[0]
    assert "simulated" in card.text


def counted(rows):
    """What a card may say of these rows of a screen, by plain counting."""
    annotated = [row for row in rows if row["moa"] not in ("", "DMSO")]
    return [len({row[name] for row in some}) for name, some in (
        ("plate", rows), ("batch", rows), ("treatment", annotated), ("compound", annotated), ("moa", annotated),
    )]  # fmt: skip


@pytest.mark.parametrize("chosen", [None, 1, 3])
def test_the_card_counts_what_was_built(raw, tmp_path, chosen):
    plates = sorted({row["Image_Metadata_Plate_DAPI"] for row in table_of(raw)})
    build_dataset(
        raw, tmp_path / "out", plates=plates[:chosen], source="BBBC021v1", illumination=False, progress=False
    )
    rows = load(tmp_path / "out", "all", tmp_path).remove_columns(["dna", "tubulin", "actin", "preview"])
    held, batches, treatments, compounds, mechanisms = counted(list(rows))
    text = " ".join((tmp_path / "out" / "README.md").read_text().split("---\n")[-1].split())
    said = f"{held} plates" if chosen is None else f"{held} of the 6 plates"
    said += f", {batches} batch{'es' * (batches > 1)}; {treatments} annotated treatments of {compounds} compounds"
    assert f"{said} with {mechanisms} mechanisms of action. Source: BBBC021v1." in text
    assert f"Of the {len(rows)} fields that the source's table names on the plates asked for, 0 are absent" in text
    # What is true of all of BBBC021 is not said of a part.
    assert ("Of the whole of BBBC021, of which this is a part:" in text) == (chosen is not None)
    counts = json.loads((tmp_path / "out" / "build.json").read_text())["counts"]
    assert counts["fields"]["all"] == len(rows) and counts["plates"] == held and counts["plates_named"] == 6


def test_the_card_of_another_screen_says_nothing_of_bbbc021(tmp_path):
    from dataset_scripts import ScreenColumns

    for i in range(4):
        Image.fromarray(np.full((20, 24), 500 + i, np.uint16)).save(tmp_path / f"{i}.tif")
    lines = [f"p1,A0{i},1,{('vehicle', 'x')[i % 2]},1,{i}.tif" for i in range(4)]
    (tmp_path / "t.csv").write_text("P,W,S,D,C,F\n" + "\n".join(lines) + "\n")
    columns = ScreenColumns(channels={"er": ("F", None)}, control="vehicle", **PLAIN_COLUMNS)
    build_dataset(tmp_path, tmp_path / "out", image_csv=tmp_path / "t.csv", columns=columns, progress=False)
    card = (tmp_path / "out" / "README.md").read_text()
    text = " ".join(card.split("---\n")[-1].split())
    assert "1 plate, 1 batch; no treatment has a known mechanism of action." in text
    assert "The negative control is named DMSO here, and vehicle in the source." in text
    assert "| `annotated` |" not in text and "| `unannotated` | 2 |" in text
    for stranger in ("Caie", "taxol", "MCF7", "103", "broadinstitute", "cell-painting"):
        assert stranger not in card, stranger
    assert card.count("BBBC021") == 3  # examples in the description of columns


@pytest.mark.parametrize(
    ("name", "message"),
    [("moa", "that of another column"), ("preview", "that of another column"), ("a b", "cannot be a column")],
)
def test_a_channel_must_be_a_column_of_its_own(tmp_path, name, message):
    from dataset_scripts import RawScreen, ScreenColumns

    with pytest.raises(ScreenError, match=message):
        RawScreen(tmp_path, tmp_path / "t.csv", columns=ScreenColumns(channels={name: ("F", None)}))


def test_a_channel_must_not_be_another_one_s_file_column(tmp_path):
    from dataset_scripts import RawScreen, ScreenColumns

    columns = ScreenColumns(channels={"dna": ("F", None), "dna_file": ("G", None)})
    with pytest.raises(ScreenError, match="'dna_file' is that of another column"):
        RawScreen(tmp_path, tmp_path / "t.csv", columns=columns)


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


def test_a_damaged_record_of_a_plate_is_made_anew(raw, tmp_path):
    build_dataset(raw, tmp_path / "out", progress=False)
    content = json.loads((tmp_path / "out" / "build.json").read_text())
    (tmp_path / "out" / ".build").mkdir()
    (tmp_path / "out" / ".build" / "recipe").write_text(json.dumps(content["recipe"]))
    for record in content["plates"]:
        (tmp_path / "out" / ".build" / f"{record['plate']}.json").write_text("{")
    (tmp_path / "out" / "build.json").unlink()
    build_dataset(raw, tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out" / "build.json").read_text()) == content


def test_streaming_pushdown_and_nodes(built):
    from datasets.distributed import split_dataset_by_node

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


def test_builder_class_gives_the_same_rows(raw, built, tmp_path):
    from dataset_scripts import BBBC021

    builder = BBBC021(cache_dir=str(tmp_path / "own"), config_name="dmso", raw=raw)
    builder.download_and_prepare()
    made = {row["dna_file"]: row for row in builder.as_dataset(split="train")}
    expected = load(built, "dmso", tmp_path)
    assert len(made) == len(expected)
    for row in expected:
        other = made[row["dna_file"]]
        assert (np.asarray(row["tubulin"]) == np.asarray(other["tubulin"])).all()
        assert {k: row[k] for k in COLUMNS - {"dna", "tubulin", "actin", "preview"}} == {
            k: other[k] for k in COLUMNS - {"dna", "tubulin", "actin", "preview"}
        }


def test_the_builder_s_cache_is_of_the_files_as_they_are(raw, tmp_path):
    """Identical builders share a cache; an image replaced since, at the same path, is not served from it."""
    from dataset_scripts import BBBC021, RawScreen

    folder, image = copy_of(raw, tmp_path / "raw")

    def builder():
        return BBBC021(cache_dir=str(tmp_path / "own"), config_name="all", raw=folder)

    def plane_of(one):
        one.download_and_prepare()
        row = next(
            r for r in one.as_dataset(split="train") if r["tubulin_file"] == image.relative_to(folder).as_posix()
        )
        return np.asarray(row["tubulin"])

    first = builder()
    before = plane_of(first)
    assert first.config_id == builder().config_id
    assert first.config_id == BBBC021(config_name="all", screen=RawScreen(folder)).config_id
    assert first.config_id != BBBC021(config_name="all", raw=folder, source="other").config_id
    Image.fromarray(np.zeros((64, 80), np.uint16)).save(image)
    assert before.any() and not plane_of(builder()).any()


def test_a_rebuilt_folder_is_never_served_from_an_old_cache(raw, tmp_path):
    import shutil

    from dataset_scripts import open_fields, open_planes

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
    from dataset_scripts import ScreenColumns

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


def test_two_plates_whose_illumination_functions_have_one_name_are_refused(tmp_path):
    from dataset_scripts import ScreenColumns

    lines = ["P,W,S,D,C,F,G"]
    for i, plate in enumerate(["p", "p_b"]):
        for name in "fg":
            Image.fromarray(np.full((16, 16), 9, np.uint8)).save(tmp_path / f"{name}{i}.png")
        lines.append(f"{plate},A01,1,none,0,f{i}.png,g{i}.png")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    channels = {"a": ("F", None), "b_a": ("G", None)}
    columns = ScreenColumns(channels=channels, batch_pattern="(p)", control="none", **PLAIN_COLUMNS)
    given = {"image_csv": tmp_path / "table.csv", "columns": columns, "bits": 8, "resize": 1.0, "progress": False}
    sentence = "channel b_a of plate p and channel a of plate p_b would both write illumination/p_b_a.png"
    with pytest.raises(ScreenError, match=sentence):
        build_dataset(tmp_path, tmp_path / "out", **given)
    build_dataset(tmp_path, tmp_path / "out", illumination=False, **given)  # nothing of that name is written
    assert len(load(tmp_path / "out", "all", tmp_path)) == 2


def test_8_bit_screens_stay_8_bit_when_corrected_and_halved(tmp_path):
    """Oracle: the steps written plainly on a scale of 0 to 1, as CellProfiler holds images of any depth."""
    from scipy import ndimage
    from skimage.morphology import disk
    from skimage.transform import resize

    from dataset_scripts import ScreenColumns

    rng = np.random.default_rng(0)
    light = 0.6 + 0.4 * np.linspace(0, 1, 80)[None, :] * np.linspace(0.5, 1, 64)[:, None]
    planes = [(rng.gamma(4, 12, (64, 80)) * light).clip(0, 255).astype(np.uint8) for _ in range(10)]
    lines = ["P,W,S,D,C,F"]
    for i, plane in enumerate(planes):
        Image.fromarray(plane).save(tmp_path / f"{i}.png")
        lines.append(f"p1,A{i:02d},1,x,1,{i}.png")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    columns = ScreenColumns(channels={"er": ("F", None)}, **PLAIN_COLUMNS)
    build_dataset(tmp_path, tmp_path / "out", image_csv=tmp_path / "t.csv", columns=columns, bits=8, progress=False)

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
    from pathlib import Path

    import dataset_scripts

    text = (Path(dataset_scripts.__file__).parent / "other_screens.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (promise,) = re.findall(r"It prints `(.*)`\.", text)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "other_screens.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.splitlines()[-1] == promise


def test_worker_processes_may_read_the_documented_example(tmp_path, monkeypatch):
    """As spawned ones do with the file of the command: they must not begin the work again."""
    from pathlib import Path

    import dataset_scripts

    text = (Path(dataset_scripts.__file__).parent / "other_screens.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(
        compile(text.split("```python\n")[1].split("```")[0], "other_screens.md", "exec"), {"__name__": "__mp_main__"}
    )
    assert not list(tmp_path.iterdir())


def dies(task):
    """A worker process that is killed."""
    os._exit(9)


DEAD = "a worker process ended before its work was done: .*--workers.*; in a script, guard the call with if __name__"


def test_a_worker_process_that_is_killed_is_one_sentence(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dataset_scripts.prepare._build_plate", dies)
    with pytest.raises(SystemExit) as ended:
        main(["--raw", str(raw), "--output", str(tmp_path / "out"), "--workers", "2"])
    assert ended.value.code == 2
    assert re.fullmatch(f"wsdino-prepare: error: {DEAD}.*", capsys.readouterr().err.splitlines()[-1])


def test_plates_are_added_by_name_and_never_dropped_silently(raw, tmp_path):
    plates = sorted({row["Image_Metadata_Plate_DAPI"] for row in table_of(raw)})
    build_dataset(raw, tmp_path / "out", plates=plates[:1], progress=False)
    with pytest.raises(ScreenError, match=plates[0]):
        build_dataset(raw, tmp_path / "out", plates=plates[1:2], progress=False)
    build_dataset(raw, tmp_path / "out", plates=plates[:2], progress=False)
    assert set(load(tmp_path / "out", "all", tmp_path)["plate"]) == set(plates[:2])
    with pytest.raises(ScreenError, match="no plate 'Week77_1'"):
        build_dataset(raw, tmp_path / "other", plates=["Week77_1"], progress=False)


@pytest.mark.skipif(
    "WSDINO_BBBC021_METADATA" not in os.environ,
    reason="WSDINO_BBBC021_METADATA names no folder with the official tables",
)
def test_the_real_tables_and_fields(tmp_path, capsys):
    from pathlib import Path

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
