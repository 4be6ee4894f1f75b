"""Malformed input over every command, the pipeline and the metric: one sentence, status 2, nothing half-written."""

import csv
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import extract_profiles
import push_to_hub
import train_accelerate
from dataset_scripts import prepare
from dataset_scripts.simulator import simulate
from evaluation_wsdino import evaluate_profiles, report
from evaluation_wsdino.not_same_compound.not_same_compound import not_same_compound
from modeling_wsdino import (
    WSDinoFeatureExtractionPipeline,
    WSDinoImageProcessor,
    WSDinoModel,
    convert_checkpoint,
)


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


# ---------------------------------------------------------------------------------------------- a finished run

SMALL = (
    "--channels dna --hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --batch_size 4 --tile_size 32 "
    "--global_crop_size 32 --local_crop_size 16 --local_crops 3 --num_prototypes 64 --head_hidden_dim 32 "
    "--head_bottleneck_dim 16 --max_steps 1"
).split()


@pytest.fixture(scope="session")
def finished(tiny_screen, tmp_path_factory):
    """A run of one step, extracted and evaluated; tests work on copies."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train_accelerate.main(["--dataset", str(tiny_screen), "--output_dir", str(run), *SMALL])
    extract_profiles.main([str(run), "--sets", "trained"])
    evaluate_profiles.main([str(run)])
    return run


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def outputs(folder):
    """Every file and its content, by which nothing half-written goes unseen."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def spoilt(path, content):
    """A file with another content: bytes, or a function of what it held."""
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)


def half(content):
    return content[: len(content) // 2]


def with_values(**values):
    """A JSON object with other values."""

    def change(content):
        return json.dumps(json.loads(content) | values).encode()

    change.__name__ = f"with {values}"
    return change


def said_of(content):
    """What a damage is called in the list of tests."""
    return content.__name__ if callable(content) else repr(content)


# ---------------------------------------------------------------------------------------------- training

TRAINING = {
    "learning_rate nan": "learning_rate",
    "learning_rate inf": "learning_rate",
    "learning_rate -1": "learning_rate",
    "final_learning_rate nan": "final_learning_rate",
    "final_learning_rate -1": "final_learning_rate",
    "weight_decay nan": "weight_decay",
    "final_weight_decay -1": "final_weight_decay",
    "max_grad_norm nan": "max_grad_norm",
    "koleo_weight nan": "koleo_weight",
    "drop_path_rate nan": "drop_path_rate",
    "drop_path_rate 1.5": "drop_path_rate",
    "initializer_range inf": "initializer_range",
    "student_temperature nan": "student_temperature",
    "center_momentum nan": "center_momentum",
    "global_crop_area nan nan": "global_crop_area",
    "max_intensity nan": "max_intensity",
    "epochs 0": "epochs",
    "epochs 1000000000000": "epochs",
    "batch_size 1000000000": "batch_size",
    "hidden_size 0": "hidden_size",
    "hidden_size 2000000000": "hidden_size",
    "hidden_size 33": "hidden_size",
    "num_hidden_layers 1000000": "num_hidden_layers",
    "num_attention_heads -2": "num_attention_heads",
    "patch_size 0": "patch_size",
    "num_prototypes 1000000000000": "num_prototypes",
    "head_hidden_dim 0": "head_hidden_dim",
    "head_hidden_dim 1000000000": "head_hidden_dim",
    "head_bottleneck_dim -1": "head_bottleneck_dim",
    "local_crops 1000000000": "local_crops",
    "global_crop_size 8000000": "global_crop_size",
    "local_crop_size 17": "local_crop_size",
    "tile_size 4000": "tile_size",
    "max_steps -1": "max_steps",
    "stop_after_epoch 0": "stop_after_epoch",
    "freeze_last_layer_epochs -1": "freeze_last_layer_epochs",
    "warmup_teacher_temperature_epochs -1": "warmup_teacher_temperature_epochs",
    "num_threads -3": "num_threads",
    "num_workers 100000": "num_workers",
    "seed 99999999999999999999999": "seed",
    "channels mitochondria": "mitochondria",
    "channels dna dna": "channels",
    "channels ../dna": "../dna",
    "weak_label phase_of_the_moon": "phase_of_the_moon",
    "exclude_compounds unobtainium": "unobtainium",
    "pair_constraint galaxy": "pair_constraint",
    "mixed_precision int4": "mixed_precision",
    "part nonsense": "nonsense",
    "dataset /no/such/folder": "/no/such/folder",
    "init /no/such/checkpoint.pth": "/no/such/checkpoint.pth",
}


@pytest.mark.parametrize("flags", TRAINING)
def test_training_that_cannot_be_done(tiny_screen, tmp_path, capsys, flags):
    words = ["--dataset", tiny_screen, "--output_dir", tmp_path / "run", *SMALL, *f"--{flags}".split()]
    assert TRAINING[flags] in refused(train_accelerate.main, words, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["x" * 300, "file/below"], ids=["a very long name", "below a file"])
def test_a_run_folder_that_cannot_be_made(tiny_screen, tmp_path, capsys, name):
    (tmp_path / "file").write_text("not a folder")
    words = ["--dataset", tiny_screen, "--output_dir", tmp_path / name, *SMALL]
    assert name[:40] in refused(train_accelerate.main, words, capsys)
    assert outputs(tmp_path) == {tmp_path / "file": b"not a folder"}


@pytest.mark.parametrize("content", [half, b"[]", b"{}", b'{"arguments": 3}', b"\xff\xfe\x00", b""], ids=said_of)
@pytest.mark.parametrize("command", ["train", "extract"])
def test_damaged_settings_of_a_run(run, tiny_screen, capsys, command, content):
    spoilt(run / "settings.json", content)
    before = outputs(run)
    words = ["--dataset", tiny_screen, "--output_dir", run, *SMALL, "--resume"] if command == "train" else [run]
    main = train_accelerate.main if command == "train" else extract_profiles.main
    assert "settings.json" in refused(main, words, capsys)
    assert outputs(run) == before


@pytest.mark.parametrize("content", [half, b"", b"PAR1"], ids=["half", "empty", "magic"])
def test_a_damaged_dataset(tiny_screen, tmp_path, capsys, content):
    screen = Path(shutil.copytree(tiny_screen, tmp_path / "screen"))
    for shard in (screen / "data" / "annotated").glob("*.parquet"):
        spoilt(shard, content)
    said = refused(train_accelerate.main, ["--dataset", screen, "--output_dir", tmp_path / "run", *SMALL], capsys)
    assert str(screen) in said and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- networks

UNTOUCHED = ("--whiten_patches", "False")  # the demo's, which needs random weights
NETWORKS = {
    "weights: half": ("model.safetensors", half),
    "weights: empty": ("model.safetensors", b""),
    "weights: text": ("model.safetensors", b"weights"),
    "weights: a header of 2**62 bytes": ("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
    "config: half": ("config.json", half),
    "config: a list": ("config.json", b"[]"),
    "config: a number": ("config.json", b"3"),
    "config: empty": ("config.json", b""),
    "config: no UTF-8": ("config.json", b"\xff\xfe{}"),
    "config: text for a number": ("config.json", with_values(hidden_size="384")),
    "config: a list for a number": ("config.json", with_values(num_hidden_layers=[2])),
    "config: null": ("config.json", with_values(hidden_size=None)),
    "config: zero": ("config.json", with_values(patch_size=0)),
    "config: negative": ("config.json", with_values(num_hidden_layers=-1)),
    "config: NaN": ("config.json", with_values(layer_norm_eps=float("nan"))),
    "config: an absurd width": ("config.json", with_values(hidden_size=2**40)),
    "config: an absurd depth": ("config.json", with_values(num_hidden_layers=10**9)),
    "config: an absurd image": ("config.json", with_values(image_size=8 * 10**6)),
    "config: an absurd MLP": ("config.json", with_values(mlp_ratio=1e12)),
    "config: another width than the weights": ("config.json", with_values(hidden_size=64)),
    "config: another architecture": ("config.json", with_values(model_type="bert")),
    "config: channels that are no names": ("config.json", with_values(channel_names=["../dna"])),
}


# Training names the channels itself, so their names in the config do not matter to it.
@pytest.mark.parametrize(
    "command, damage",
    [
        (command, damage)
        for command in ("convert", "extract", "train")
        for damage in NETWORKS
        if command != "train" or "channels" not in damage
    ],
)
def test_a_damaged_network(run, tiny_screen, tmp_path, capsys, command, damage):
    file, content = NETWORKS[damage]
    model = run / "dna" / "model"
    spoilt(model / file, content)
    before = outputs(tmp_path)
    main, words = {
        "convert": (convert_checkpoint.main, [model, tmp_path / "converted"]),
        "extract": (
            extract_profiles.main,
            ["--model", model, "--dataset", tiny_screen, "--output", tmp_path / "p.parquet", "--channels", "dna"],
        ),
        "train": (
            train_accelerate.main,
            [*("--dataset", tiny_screen, "--output_dir", tmp_path / "next"), *SMALL, "--init", model, *UNTOUCHED],
        ),
    }[command]
    assert "model" in refused(main, words, capsys)
    assert outputs(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [half, b"[]", b"3", b"", with_values(tile_size="32"), with_values(tile_size=10**9)],
    ids=said_of,
)
def test_a_damaged_image_processor(run, tiny_screen, tmp_path, capsys, content):
    spoilt(run / "dna" / "model" / "preprocessor_config.json", content)
    before = outputs(tmp_path)
    words = ["--model", run / "dna" / "model", "--dataset", tiny_screen, "--output", tmp_path / "p.parquet"]
    said = refused(extract_profiles.main, words, capsys)
    assert "tile_size" in said or "preprocessor_config.json" in said or "tiles" in said
    assert outputs(tmp_path) == before


CHECKPOINTS = {
    "text": b"weights",
    "empty": b"",
    "half a zip": None,
    "a pickled number": pickle.dumps(3),
    "no state dict": {"epoch": 3},
    "a list": [torch.zeros(3)],
    "no network": {"teacher": {"weight": torch.zeros(3)}},
    "text for weights": {"cls_token": "abc", "pos_embed": "abc", "patch_embed.proj.weight": "abc"},
    "one dimension too few": {"cls_token": torch.zeros(4), "pos_embed": torch.zeros(4)},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_file_that_is_none(tmp_path, capsys, kind):
    path, content = tmp_path / "dino.pth", CHECKPOINTS[kind]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content or {"cls_token": torch.zeros(1000)}, path)
        if content is None:
            spoilt(path, half)
    before = outputs(tmp_path)
    assert "dino.pth" in refused(convert_checkpoint.main, [path, tmp_path / "converted"], capsys)
    assert outputs(tmp_path) == before


# ---------------------------------------------------------------------------------------------- profiles, report, push


def edited(change):
    """A Parquet file with another table."""

    def edit(content):
        table = change(pd.read_parquet(io.BytesIO(content)))
        return table.to_parquet()

    return edit


def with_one(column, value):
    def change(table):
        table[column] = table[column].astype(object) if isinstance(value, str) else table[column]
        table.loc[3, column] = value
        return table

    return edited(change)


PROFILES = {
    "half": half,
    "empty": b"",
    "text": b"profiles",
    "no rows": edited(lambda table: table[:0]),
    "no features": edited(lambda table: table[[name for name in table if name.startswith("Metadata_")]]),
    "no compounds": edited(lambda table: table.drop(columns="Metadata_Compound")),
    "no controls": edited(lambda table: table[table["Metadata_Compound"] != "DMSO"]),
    "controls alone": edited(lambda table: table[table["Metadata_Compound"] == "DMSO"]),
    "NaN": with_one("dna_0000", float("nan")),
    "infinity": with_one("dna_0001", float("inf")),
    "text for a number": edited(lambda table: table.assign(dna_0000=table["dna_0000"].astype(str))),
    "a field twice": edited(lambda table: pd.concat([table, table[:1]])),
    "no treatment": with_one("Metadata_Treatment", ""),
    "a treatment of two compounds": with_one("Metadata_Compound", "another"),
}


@pytest.mark.parametrize("damage", PROFILES)
def test_profiles_that_are_none(run, tmp_path, capsys, damage):
    for path in (run / "profiles").glob("*.parquet"):
        spoilt(path, PROFILES[damage])
    before = outputs(tmp_path)
    assert "trained" in refused(evaluate_profiles.main, [run], capsys) or damage == "controls alone"
    assert outputs(tmp_path) == before


@pytest.mark.parametrize("flags", ["--k 0", "--k -3", "--metric hamming", "--align coral --align_by well"])
def test_an_evaluation_that_cannot_be_done(run, capsys, flags):
    before = outputs(run)
    assert flags.split()[0] in refused(evaluate_profiles.main, [run, *flags.split()], capsys) or "align" in flags
    assert outputs(run) == before


RESULTS = [half, b"[]", b"3", b"null", b"{}", b"", b"\xff\xfe", with_values(sets=3), with_values(sets={"trained": 3})]


@pytest.mark.parametrize("content", RESULTS, ids=said_of)
@pytest.mark.parametrize("main", [report.main, push_to_hub.main], ids=["report", "push"])
def test_damaged_results(run, tmp_path, capsys, main, content):
    spoilt(run / "results.json", content)
    before = outputs(tmp_path)
    words = [run] if main is report.main else [run, "--parts", "models", "--dry_run", tmp_path / "hub"]
    assert "results.json" in refused(main, words, capsys)
    assert {path: text for path, text in outputs(tmp_path).items() if "hub" not in path.parts} == before


@pytest.mark.parametrize("content", [half, b"[]", b"{}", b"3", with_values(hidden_size=None)], ids=said_of)
def test_a_damaged_model_is_not_published(run, tmp_path, capsys, content):
    spoilt(run / "dna" / "model" / "config.json", content)
    words = [run, "--parts", "models", "--dry_run", tmp_path / "hub"]
    assert "config.json" in refused(push_to_hub.main, words, capsys)


@pytest.mark.parametrize("main", [extract_profiles.main, evaluate_profiles.main, report.main, push_to_hub.main])
def test_a_run_that_is_not_there(tmp_path, capsys, main):
    words = ["--dry_run", tmp_path / "hub"] if main is push_to_hub.main else []
    assert "absent" in refused(main, [tmp_path / "absent", *words], capsys)
    assert not outputs(tmp_path)


EXTRACTION = {
    "--model facebook/x": "--output",
    "--batch_size 0": "batch_size",
    "--shard_fields 0": "shard_fields",
    "--num_workers -1": "num_workers",
    "--sets imagined": "imagined",
    "--channels mitochondria": "mitochondria",
    "--parts annotated annotated": "annotated",
    "--parts nonsense": "nonsense",
    "--device abacus": "abacus",
    "--dataset /no/such/folder": "/no/such/folder",
    "--nuclear_channel mitochondria --sets intensity": "mitochondria",
}


@pytest.mark.parametrize("flags", EXTRACTION)
def test_an_extraction_that_cannot_be_done(run, capsys, flags):
    before = outputs(run)
    assert EXTRACTION[flags] in refused(extract_profiles.main, [run, *flags.split()], capsys)
    assert outputs(run) == before


# ---------------------------------------------------------------------------------------------- raw screens


def tiff(**changes):
    file = io.BytesIO()
    Image.fromarray(np.zeros((128, 160), np.uint16)).save(file, "tiff")
    return file.getvalue()


def png_of(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


IMAGES = {
    "half": half,
    "empty": b"",
    "text": b"image",
    "the header alone": lambda content: content[:8],
    "colour": png_of(np.zeros((128, 160, 3), np.uint8)),
    "another size": png_of(np.zeros((60, 80), np.uint16)),
}


@pytest.mark.parametrize("damage", IMAGES)
def test_an_image_of_the_screen_that_is_none(tiny_raw, tmp_path, capsys, damage):
    raw = Path(shutil.copytree(tiny_raw, tmp_path / "raw"))
    images = sorted(path for path in raw.rglob("*.tif"))
    spoilt(images[7], IMAGES[damage])
    words = ["--raw", raw, "--output", tmp_path / "built", "--workers", "1"]
    assert images[7].name in refused(prepare.main, words, capsys)
    assert not (tmp_path / "built" / "README.md").exists()


TABLES = {
    "empty": b"",
    "half a line": lambda content: content[:-30],
    "no UTF-8": lambda content: content.replace(b"DMSO", b"\xff\xfe", 1),
    "a NUL": lambda content: content.replace(b"DMSO", b"DM\0SO", 1),
    "no rows": lambda content: content.splitlines()[0] + b"\n",
    "no header": lambda content: content.split(b"\n", 1)[1],
    "a column short": lambda content: content.replace(b"Image_Metadata_Compound", b"Image_Metadata_Nothing"),
    "a line twice": lambda content: content + content.splitlines()[1] + b"\n",
    "JSON": b'{"table": []}',
    "gzip of nothing": b"\x1f\x8b\x08\x00",
}


@pytest.mark.parametrize("damage", TABLES)
def test_a_table_that_is_none(tiny_raw, tmp_path, capsys, damage):
    table = tmp_path / "BBBC021_v1_image.csv"
    shutil.copy(tiny_raw / table.name, table)
    spoilt(table, TABLES[damage])
    words = ["--raw", tiny_raw, "--output", tmp_path / "built", "--image_csv", table]
    assert table.name in refused(prepare.main, words, capsys)
    assert not (tmp_path / "built").exists()


VALUES = {
    "Image_Metadata_Concentration": ["nan", "inf", "-1", "much", ""],
    "Image_Metadata_Compound": [""],
    "Image_Metadata_Plate_DAPI": [""],
    "Image_FileName_Tubulin": ["absent.tif"],
}


@pytest.mark.parametrize("column, value", [(column, value) for column, values in VALUES.items() for value in values])
def test_a_value_of_the_table_that_is_none(tiny_raw, tmp_path, capsys, column, value):
    def change(rows):
        treated = [row for row in rows if row["Image_Metadata_Compound"] != "DMSO"]
        treated[0][column] = value

    tables = edited_screen(tiny_raw, tmp_path / "tables", change)
    words = ["--raw", tiny_raw, "--output", tmp_path / "built", "--workers", "1", *tables]
    said = refused(prepare.main, words, capsys)
    assert column in said or value and value in said
    assert not (tmp_path / "built" / "README.md").exists()


@pytest.mark.parametrize("note", ["recipe", "plate"])
@pytest.mark.parametrize("content", [half, b"[]", b"3", b"{}", b""], ids=said_of)
def test_damaged_notes_of_an_interrupted_build(tiny_raw, tmp_path, capsys, note, content):
    """The note of the settings is needed; that of a plate costs that plate's work alone."""
    built = tmp_path / "built"
    prepare.main(["--raw", str(tiny_raw), "--output", str(built), "--workers", "1"])
    build = json.loads((built / "build.json").read_text())
    (built / "build.json").unlink()
    work = built / ".build"
    work.mkdir()
    (work / "recipe").write_text(json.dumps(build["recipe"]))
    for record in build["plates"]:
        (work / f"{record['plate']}.json").write_text(json.dumps(record))
    spoilt(work / "recipe" if note == "recipe" else next(work.glob("*.json")), content)
    words = ["--raw", tiny_raw, "--output", built, "--workers", "1"]
    if note == "recipe":
        assert "recipe" in refused(prepare.main, words, capsys)
    else:
        prepare.main([str(word) for word in words])
        assert json.loads((built / "build.json").read_text())["plates"] == build["plates"]


# ---------------------------------------------------------------------------------------------- pipeline and metric


def pipeline_input(tmp_path, kind):
    field = np.full((64, 80), 700, np.uint16)
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (64, 80)).astype(np.uint16)).save(file, "tiff")
    files = {
        "half a TIFF": half(file.getvalue()),
        "half a PNG": half(png_of(np.random.default_rng(0).integers(0, 2**16, (64, 80)).astype(np.uint16))),
        "an empty file": b"",
        "text": b"image",
        "a colour PNG": png_of(np.zeros((64, 80, 3), np.uint8)),
        "an 8-bit palette": None,
    }
    if kind in files:
        path = tmp_path / "field.tif"
        if files[kind] is None:
            Image.new("P", (80, 64)).save(path, "png")
        else:
            path.write_bytes(files[kind])
        return path
    return {
        "no file": tmp_path / "absent.tif",
        "a folder": tmp_path,
        "a number": 3,
        "None": None,
        "text that names nothing": "field 7",
        "booleans": field > 3,
        "complex numbers": field.astype(complex),
        "objects": field.astype(object),
        "NaN": np.full((64, 80), np.nan),
        "infinity": np.full((64, 80), np.inf),
        "floats that are scaled already": np.full((64, 80), 0.5),
        "no pixels": field[:0],
        "one dimension": field[0],
        "five dimensions": field[None, None, None],
        "a field smaller than its tiles": field[:20],
        "two channels for a model of one": np.stack([field, field]),
        "channels by unknown names": {"mitochondria": field},
    }[kind]


INPUTS = (
    *("half a TIFF", "half a PNG", "an empty file", "text", "a colour PNG", "an 8-bit palette", "no file", "a folder"),
    *("a number", "None", "text that names nothing", "booleans", "complex numbers", "objects", "NaN", "infinity"),
    *("floats that are scaled already", "no pixels", "one dimension", "five dimensions"),
    *("a field smaller than its tiles", "two channels for a model of one", "channels by unknown names"),
)


@pytest.fixture(scope="session")
def extract(finished):
    model = WSDinoModel.from_pretrained(finished / "dna" / "model")
    processor = WSDinoImageProcessor.from_pretrained(finished / "dna" / "model")
    return WSDinoFeatureExtractionPipeline(model=model, image_processor=processor, device="cpu")


@pytest.mark.parametrize("kind", INPUTS)
def test_a_field_that_is_none(extract, tmp_path, kind):
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        extract(pipeline_input(tmp_path, kind))
    assert type(raised.value) in (ValueError, FileNotFoundError), "an error of the library's own"
    assert "\n" not in str(raised.value).strip() and len(str(raised.value)) > 20


GOOD = {
    "profiles": np.random.default_rng(0).normal(size=(6, 4)),
    "moas": list("aabbcc"),
    "compounds": list("uvwxyz"),
    "batches": list("121212"),
}
METRIC = {
    "too few labels": ({"moas": list("aabb")}, "references"),
    "too many compounds": ({"compounds": list("uvwxyzq")}, "compounds"),
    "an empty label": ({"moas": [*"aabbc", ""]}, "references"),
    "no label": ({"compounds": [*"uvwxy", None]}, "compounds"),
    "an empty batch": ({"batches": [*"12121", ""]}, "batches"),
    "NaN": ({"profiles": np.full((6, 4), np.nan)}, "predictions"),
    "infinity": ({"profiles": np.full((6, 4), np.inf)}, "predictions"),
    "a zero vector": ({"profiles": np.zeros((6, 4))}, "predictions"),
    "ragged": ({"profiles": [[1.0]] * 5 + [[1.0, 2.0]]}, "predictions"),
    "text": ({"profiles": [["a"] * 4] * 6}, "predictions"),
    "no dimensions": ({"profiles": np.zeros((6, 0))}, "predictions"),
    "one dimension": ({"profiles": np.zeros(6)}, "predictions"),
    "k of zero": ({"k": 0}, "k is"),
    "k of one and a half": ({"k": 1.5}, "k is"),
    "k that is text": ({"k": "many"}, "k is"),
    "k that is not a number": ({"k": float("nan")}, "k is"),
    "an unknown distance": ({"metric": "hamming"}, "metric"),
    "an unknown batch rule": ({"batch_rule": "any"}, "batch_rule"),
    "an unknown exclusion": ({"exclude": "all"}, "exclude"),
}


@pytest.mark.parametrize("kind", METRIC)
def test_a_metric_that_cannot_be_computed(kind):
    change, word = METRIC[kind]
    with pytest.raises(ValueError, match=word) as raised:
        not_same_compound(**(GOOD | change))
    assert "\n" not in str(raised.value)


def test_the_count(request, capsys):
    """More than sixty malformed inputs, over every command, the pipeline and the metric."""
    cases = [item for item in request.session.items if item.path == request.path and item.name != "test_the_count"]
    if request.config.getoption("keyword") or any("::" in word for word in request.config.args):
        pytest.skip("only some of the cases were asked for")
    with capsys.disabled():
        print(f" {len(cases)} malformed inputs ", end="")
    assert len(cases) >= 60
