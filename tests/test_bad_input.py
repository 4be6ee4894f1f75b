"""Malformed input to every command: exit status 2, the culprit is named, and nothing is written."""

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
from conftest import SMALL
from PIL import Image

import extract_profiles
import push_to_hub
import train_accelerate
from dataset_scripts import prepare
from dataset_scripts.simulator import simulate
from evaluation_wsdino import evaluate_profiles, report
from modeling_wsdino import convert_checkpoint


def spoil(path, content):
    """Give a file another content: bytes, or a function of what it held."""
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)


def half(content):
    return content[: len(content) // 2]


def with_values(**values):
    """A JSON object with other values."""
    return lambda content: json.dumps(json.loads(content) | values).encode()


JSON_DAMAGE = {"half": half, "empty": b"", "a list": b"[]", "no UTF-8": b"\xff\xfe\x00", "no keys": b"{}"}


def damaged(cases):
    """Parametrize `content` by a dictionary of damages."""
    return pytest.mark.parametrize("content", list(cases.values()), ids=list(cases))


# ---------------------------------------------------------------------------------------------- flags

SIMULATING = ["seed -1", "scale 0", "scale nan", "scale inf", "workers 0", "image_size 1 1"]
PREPARING = ["resize 0", "resize nan", "resize 100", "filter_size -5", "filter_size nan", "workers -1"]
TRAINING = [
    *("learning_rate nan", "learning_rate inf", "learning_rate -1", "weight_decay nan", "max_grad_norm -1"),
    *("koleo_weight nan", "drop_path_rate 1.5", "student_temperature nan", "center_momentum nan"),
    *("global_crop_area nan nan", "max_intensity nan", "num_train_epochs 0", "hidden_size 0", "hidden_size 33"),
    *("num_attention_heads -2", "patch_size 0", "head_hidden_dim 0", "local_crop_size 17", "max_steps -1"),
    *("stop_after_epoch 0", "num_threads -3", "seed -1", "channels mitochondria", "channels dna dna"),
    *("channels ../dna", "weak_label phase_of_the_moon", "exclude_compounds unobtainium", "pair_constraint galaxy"),
    *("mixed_precision int4", "subset nonsense", "dataset /no/such/folder", "init /no/such/checkpoint.pth"),
]
EXTRACTING = [
    *("batch_size 0", "num_workers -1", "sets imagined", "channels mitochondria", "parts annotated annotated"),
    *("parts nonsense", "device abacus", "dataset /no/such/folder", "nuclear_channel mitochondria"),
]
EVALUATING = ["k 0", "k -3", "metric hamming"]


def named_by(flags):
    """What the message must name: the unknown word or path, otherwise the flag."""
    flag, value = flags.split()[:2]
    known = value in ("nan", "inf", "dna")
    return value if value.strip("./").replace("_", "").isalpha() and not known or "/" in value else flag


@pytest.mark.parametrize("flags", SIMULATING)
def test_a_simulation_that_cannot_be_drawn(tmp_path, refused, flags):
    refused(simulate.main, tmp_path / "raw", "--size", "tiny", *f"--{flags}".split(), named=flags.split()[0])


@pytest.mark.parametrize("flags", PREPARING)
def test_preprocessing_that_cannot_be_done(tiny_raw, tmp_path, refused, flags):
    words = ["--raw", tiny_raw, "--output", tmp_path / "built", *f"--{flags}".split()]
    refused(prepare.main, *words, named=flags.split()[0])


@pytest.mark.parametrize("flags", TRAINING)
def test_training_that_cannot_be_done(tiny_screen, tmp_path, refused, flags):
    words = ["--dataset", tiny_screen, "--output_dir", tmp_path / "run", *SMALL, *f"--{flags}".split()]
    refused(train_accelerate.main, *words, named=named_by(flags))


@pytest.mark.parametrize("flags", EXTRACTING)
def test_an_extraction_that_cannot_be_done(run, refused, flags):
    refused(extract_profiles.main, run, *f"--{flags}".split(), named=named_by(flags))


@pytest.mark.parametrize("flags", EVALUATING)
def test_an_evaluation_that_cannot_be_done(run, refused, flags):
    refused(evaluate_profiles.main, run, *f"--{flags}".split(), named=flags.split()[0])


def test_a_model_without_a_place_for_its_profiles(run, refused):
    refused(extract_profiles.main, run, "--model", "facebook/x", named="--output")


@pytest.mark.parametrize("name", ["x" * 300, "file/below"], ids=["a very long name", "below a file"])
def test_a_run_folder_that_cannot_be_made(tiny_screen, tmp_path, refused, name):
    (tmp_path / "file").write_text("not a folder")
    words = ["--dataset", tiny_screen, "--output_dir", tmp_path / name, *SMALL]
    refused(train_accelerate.main, *words, named=name[:40])


@pytest.mark.parametrize("module", [extract_profiles, evaluate_profiles, report, push_to_hub])
def test_a_run_that_is_absent(tmp_path, refused, module):
    words = ["--dry_run", tmp_path / "hub"] if module is push_to_hub else []
    refused(module.main, tmp_path / "absent", *words, named="absent")


# ---------------------------------------------------------------------------------------------- tables and images


def edited_screen(tiny_raw, folder, change):
    """The flags of a copy of the tables with `change(rows)` applied; the images stay where they are."""
    folder.mkdir()
    shutil.copy(tiny_raw / "BBBC021_v1_moa.csv", folder)
    with open(tiny_raw / "BBBC021_v1_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    with open(folder / "BBBC021_v1_image.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    tables = ["--image_csv", folder / "BBBC021_v1_image.csv", "--moa_csv", folder / "BBBC021_v1_moa.csv"]
    return ["--raw", tiny_raw, "--output", folder.parent / "deep" / "built", "--workers", "1", *tables]


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "a\\b", "..", ".", "x" * 300, "bell\x07", "/etc"])
@pytest.mark.parametrize("column", ["Image_Metadata_Plate_DAPI", "Image_Metadata_Well_DAPI"])
def test_a_name_that_would_leave_its_folder(tiny_raw, tmp_path, refused, name, column):
    """Plate names become file names: no name of a table may lead out of the dataset's folder."""

    def change(rows):
        old = rows[0][column]
        for row in rows:
            row[column] = name if row[column] == old else row[column]

    refused(prepare.main, *edited_screen(tiny_raw, tmp_path / "tables", change), named=column)


VALUES = {
    "Image_Metadata_Concentration": ["nan", "inf", "-1", "much", ""],
    "Image_Metadata_Compound": [""],
    "Image_Metadata_Plate_DAPI": [""],
    "Image_FileName_Tubulin": ["absent.tif", "../../secret.tif", "/etc/passwd"],
}


@pytest.mark.parametrize("column, value", [(column, value) for column, values in VALUES.items() for value in values])
def test_a_value_of_the_table_that_cannot_be_used(tiny_raw, tmp_path, refused, column, value):
    def change(rows):
        next(row for row in rows if row["Image_Metadata_Compound"] != "DMSO")[column] = value

    name = Path(value).name if column.startswith("Image_FileName") else column
    refused(prepare.main, *edited_screen(tiny_raw, tmp_path / "tables", change), named=name)


TABLES = {
    "empty": b"",
    "half a line": lambda content: content[:-30],
    "no UTF-8": lambda content: content.replace(b"DMSO", b"\xff\xfe", 1),
    "a NUL": lambda content: content.replace(b"DMSO", b"DM\0SO", 1),
    "no rows": lambda content: content.splitlines()[0] + b"\n",
    "no header": lambda content: content.split(b"\n", 1)[1],
    "a column short": lambda content: content.replace(b"Image_Metadata_Compound", b"Image_Metadata_Nothing"),
    "a line twice": lambda content: content + content.splitlines()[1] + b"\n",
    "gzip of nothing": b"\x1f\x8b\x08\x00",
}


@damaged(TABLES)
def test_a_damaged_table(tiny_raw, tmp_path, refused, content):
    table = tmp_path / "BBBC021_v1_image.csv"
    shutil.copy(tiny_raw / table.name, table)
    spoil(table, content)
    words = ["--raw", tiny_raw, "--output", tmp_path / "built", "--image_csv", table]
    refused(prepare.main, *words, named=table.name)


def image_file(array, kind="png"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


IMAGES = {
    "half": half,
    "empty": b"",
    "text": b"image",
    "the header alone": lambda content: content[:8],
    "colour": image_file(np.zeros((128, 160, 3), np.uint8)),
    "another size": image_file(np.zeros((60, 80), np.uint16)),
}


@damaged(IMAGES)
def test_a_damaged_image_of_the_screen(tiny_raw, tmp_path, capsys, content):
    """Whole plates may stay for the next attempt, but the folder is no dataset."""
    raw = Path(shutil.copytree(tiny_raw, tmp_path / "raw"))
    image = sorted(raw.rglob("*.tif"))[7]
    spoil(image, content)
    with pytest.raises(SystemExit) as ended:
        prepare.main(["--raw", str(raw), "--output", str(tmp_path / "built"), "--workers", "1"])
    assert ended.value.code == 2 and image.name in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "built" / "README.md").exists()


# ---------------------------------------------------------------------------------------------- what commands wrote


@pytest.mark.parametrize("content", [b'{"half', b"", b"[]", b"\xff\xfe\x00"])
@pytest.mark.parametrize("name", ["simulation.json", "build.json"])
def test_a_damaged_note_of_a_folder(tiny_raw, tmp_path, refused, name, content):
    (tmp_path / name).write_bytes(content)
    module, words = {
        "simulation.json": (simulate, [tmp_path, "--size", "tiny"]),
        "build.json": (prepare, ["--raw", tiny_raw, "--output", tmp_path]),
    }[name]
    refused(module.main, *words, named=name)


@damaged(JSON_DAMAGE | {"arguments of another type": b'{"arguments": 3}'})
@pytest.mark.parametrize("command", ["train", "extract"])
def test_damaged_settings_of_a_run(run, tiny_screen, refused, command, content):
    spoil(run / "settings.json", content)
    resumed = ["--dataset", tiny_screen, "--output_dir", run, *SMALL, "--resume"]
    main, words = (train_accelerate.main, resumed) if command == "train" else (extract_profiles.main, [run])
    refused(main, *words, named="settings.json")


@damaged({"half": half, "empty": b"", "magic alone": b"PAR1"})
def test_a_damaged_dataset(tiny_screen, tmp_path, refused, content):
    screen = Path(shutil.copytree(tiny_screen, tmp_path / "screen"))
    for part in (screen / "data" / "annotated").glob("*.parquet"):
        spoil(part, content)
    words = ["--dataset", screen, "--output_dir", tmp_path / "run", *SMALL]
    refused(train_accelerate.main, *words, named=str(screen))


NETWORKS = {
    "weights: half": ("model.safetensors", half),
    "weights: text": ("model.safetensors", b"weights"),
    "weights: a header of 2**62 bytes": ("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
    **{f"config: {name}": ("config.json", content) for name, content in JSON_DAMAGE.items() if name != "no keys"},
    "config: text for a number": ("config.json", with_values(hidden_size="384")),
    "config: null": ("config.json", with_values(hidden_size=None)),
    "config: zero": ("config.json", with_values(patch_size=0)),
    "config: NaN": ("config.json", with_values(layer_norm_eps=float("nan"))),
    "config: an absurd width": ("config.json", with_values(hidden_size=2**40)),
    "config: another width than the weights": ("config.json", with_values(hidden_size=64)),
    "config: another architecture": ("config.json", with_values(model_type="bert")),
}


@damaged(NETWORKS)
@pytest.mark.parametrize("command", ["convert", "extract", "train"])
def test_a_damaged_network(run, tiny_screen, tmp_path, refused, command, content):
    model = run / "dna" / "model"
    spoil(model / content[0], content[1])
    data = ["--dataset", tiny_screen]
    main, words = {
        "convert": (convert_checkpoint.main, [model, tmp_path / "converted"]),
        "extract": (extract_profiles.main, ["--model", model, *data, "--output", tmp_path / "p.parquet"]),
        "train": (train_accelerate.main, [*data, "--output_dir", tmp_path / "next", *SMALL, "--init", model]),
    }[command]
    # The demo's whitening needs random weights.
    words += {"train": ["--whiten_patches", "False"], "extract": ["--channels", "dna"]}.get(command, [])
    refused(main, *words, named="model")


PROCESSORS = {
    **{name: content for name, content in JSON_DAMAGE.items() if name != "no keys"},
    "text for a number": with_values(tile_size="32"),
    "tiles of 10^9 pixels": with_values(tile_size=10**9),
}


@damaged(PROCESSORS)
def test_a_damaged_image_processor(run, tiny_screen, tmp_path, refused, content):
    spoil(run / "dna" / "model" / "preprocessor_config.json", content)
    words = ["--model", run / "dna" / "model", "--dataset", tiny_screen, "--output", tmp_path / "p.parquet"]
    refused(extract_profiles.main, *words, named="")


CHECKPOINTS = {
    "text": b"weights",
    "empty": b"",
    "a pickled number": pickle.dumps(3),
    "no state dict": {"epoch": 3},
    "a list": [torch.zeros(3)],
    "no network": {"teacher": {"weight": torch.zeros(3)}},
    "text for weights": {"cls_token": "abc", "pos_embed": "abc", "patch_embed.proj.weight": "abc"},
    "one dimension too few": {"cls_token": torch.zeros(4), "pos_embed": torch.zeros(4)},
}


@damaged(CHECKPOINTS)
def test_a_damaged_checkpoint_file(tmp_path, refused, content):
    path = tmp_path / "dino.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    refused(convert_checkpoint.main, path, tmp_path / "converted", named="dino.pth")


def edited(change):
    """A Parquet file with another table."""

    def edit(content):
        return change(pd.read_parquet(io.BytesIO(content))).to_parquet()

    return edit


def with_one(column, value):
    """A Parquet file with another value in row 3 of a column."""

    def change(table):
        table[column] = table[column].astype(object) if isinstance(value, str) else table[column]
        table.loc[3, column] = value
        return table

    return edited(change)


PROFILES = {
    "half": half,
    "text": b"profiles",
    "no rows": edited(lambda table: table[:0]),
    "no features": edited(lambda table: table[[name for name in table if name.startswith("Metadata_")]]),
    "no compounds": edited(lambda table: table.drop(columns="Metadata_Compound")),
    "no controls": edited(lambda table: table[table["Metadata_Compound"] != "DMSO"]),
    "NaN": with_one("dna_0000", float("nan")),
    "infinity": with_one("dna_0001", float("inf")),
    "text for a number": edited(lambda table: table.assign(dna_0000=table["dna_0000"].astype(str))),
    "a field twice": edited(lambda table: pd.concat([table, table[:1]])),
    "no treatment": with_one("Metadata_Treatment", ""),
    "a treatment of two compounds": with_one("Metadata_Compound", "another"),
}


@damaged(PROFILES)
def test_damaged_profiles(run, refused, content):
    for path in sorted((run / "profiles").rglob("*.parquet")):
        if path.is_file():
            spoil(path, content)
    refused(evaluate_profiles.main, run, named="trained")


@damaged(JSON_DAMAGE | {"sets of another type": with_values(sets={"trained": 3})})
@pytest.mark.parametrize("module", [report, push_to_hub])
def test_damaged_results(run, tmp_path, refused, module, content):
    spoil(run / "results.json", content)
    words = ["--parts", "models", "--dry_run", tmp_path / "hub"] if module is push_to_hub else []
    refused(module.main, run, *words, named="results.json")


@damaged(JSON_DAMAGE | {"null": with_values(hidden_size=None)})
def test_a_damaged_model_is_not_published(run, tmp_path, refused, content):
    spoil(run / "dna" / "model" / "config.json", content)
    words = ["--parts", "models", "--dry_run", tmp_path / "hub"]
    refused(push_to_hub.main, run, *words, named="config.json")
