"""Files and names made to harm: nothing of theirs is executed, allocated, followed out of its folder or shown."""

import ast
import csv
import gzip
import html
import json
import os
import pickle
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import extract_profiles
import push_to_hub
import train_accelerate
from dataset_scripts import ScreenError, prepare, screen
from dataset_scripts.simulator import simulate
from evaluation_wsdino import evaluate_profiles, report
from modeling_wsdino import WSDinoImageProcessor, convert_checkpoint
from modeling_wsdino.image_processing_wsdino import MAX_PIXELS

ROOT = Path(__file__).parents[1]
SHIPPED = [path for path in ROOT.glob("*.py")] + [
    path
    for room in ("modeling_wsdino", "pretraining_wsdino", "dataset_scripts", "evaluation_wsdino", "model_cards")
    for path in (ROOT / room).rglob("*.py")
]
SMALL = (
    "--channels dna --hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --batch_size 4 --tile_size 32 "
    "--global_crop_size 32 --local_crop_size 16 --local_crops 3 --num_prototypes 64 --head_hidden_dim 32 "
    "--head_bottleneck_dim 16 --max_steps 1"
).split()
TOKEN = "hf_aSecretThatMustNeverBeShown"


def refused(main, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    return said.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------------------- nothing is executed


def calls_of(path):
    """Dotted name and keyword names with constant values of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            yield node.lineno, ast.unparse(node.func), keywords


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_file_calls_what_executes_data(path):
    forbidden = ("eval", "exec", "compile", "os.system", "os.popen", "pd.read_pickle", "joblib.load", "yaml.load")
    for line, name, keywords in calls_of(path):
        assert name not in forbidden and not name.startswith(("pickle.load", "marshal.", "dill.")), f"line {line}"
        assert not keywords.get("shell") and not keywords.get("allow_pickle"), f"line {line}"
        assert not keywords.get("trust_remote_code"), f"line {line}"
        if name == "torch.load":
            assert keywords.get("weights_only") is True, f"line {line}"


class Bomb:
    """What unpickling executes: it makes a file, by which it is told."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (os.system, (f"touch '{self.place}'",))


def test_the_bomb_would_explode(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "name", ["dino.pth", "dino.safetensors", "folder/pytorch_model.bin", "folder/model.safetensors"]
)
@pytest.mark.parametrize("kind", ["pickle", "zip of a pickle"])
@pytest.mark.parametrize("command", ["convert", "extract", "train"])
def test_no_network_file_is_unpickled(tiny_screen, tmp_path, capsys, name, kind, command):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"cls_token": Bomb(tmp_path / "exploded")}))
    else:
        torch.save({"cls_token": Bomb(tmp_path / "exploded")}, path)
    source = path
    if path.parent != tmp_path:
        source = path.parent
        (source / "config.json").write_text(json.dumps({"model_type": "vit", "num_attention_heads": 2}))
    main, words = {
        "convert": (convert_checkpoint.main, [source, tmp_path / "converted"]),
        "extract": (
            extract_profiles.main,
            [
                *("--model", source, "--dataset", tiny_screen),
                *("--output", tmp_path / "p.parquet", "--channels", "dna"),
            ],
        ),
        "train": (
            train_accelerate.main,
            [*("--dataset", tiny_screen, "--output_dir", tmp_path / "run"), *SMALL, "--init", source]
            + ["--whiten_patches", "False"],
        ),
    }[command]
    assert str(source) in refused(main, words, capsys)
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------------------------------------- image bombs


def png_that_says(width, height):
    """A 16-bit gray PNG of a few bytes whose header claims a size."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def tiff_that_says(width, height):
    """A 16-bit gray TIFF of one strip that lies past its end."""
    tags = [(256, width), (257, height), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


@pytest.mark.parametrize("size", [(100_000, 100_000), (12_000, 12_000)], ids=str)
@pytest.mark.parametrize("make", [png_that_says, tiff_that_says])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_header_that_claims_an_absurd_size_is_refused_before_it_is_allocated(tmp_path, make, size):
    """The second size is above our limit and below Pillow's own."""
    (tmp_path / "field.tif").write_bytes(make(*size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"field.tif has more than {MAX_PIXELS:,} pixels"):
        WSDinoImageProcessor(tile_size=32).field_tiles(tmp_path / "field.tif")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB; the claimed pixels take 288 MB


def test_the_pages_of_a_file_count_together(tmp_path):
    """A page of five million pixels compresses to a few kilobytes; twenty-two of them are too many."""
    page = Image.fromarray(np.zeros((2_000, 2_500), np.uint8))
    page.save(tmp_path / "field.tif", save_all=True, append_images=[page] * 21, compression="tiff_adobe_deflate")
    assert (tmp_path / "field.tif").stat().st_size < 10**6
    with pytest.raises(ValueError, match=f"has more than {MAX_PIXELS:,} pixels"):
        WSDinoImageProcessor(tile_size=32).field_tiles(tmp_path / "field.tif")


def test_a_table_that_unpacks_to_more_than_any_screen_has(tmp_path, monkeypatch):
    """The limit is made small here; no more than it is ever unpacked."""
    monkeypatch.setattr(screen, "MOST_BYTES", 100_000)
    (tmp_path / "image.csv.gz").write_bytes(gzip.compress(b"x" * 10**8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ScreenError, match="image.csv.gz cannot be read as CSV .it holds more than 100,000 bytes"):
        screen.read_screen(tmp_path / "image.csv.gz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


# ---------------------------------------------------------------------------------------------- names, tokens, code

NAMES = {
    "taxol": "<script>alert('compound')</script>",
    "MOA": '"><img src=x onerror=alert(1)>',
    "folder": "a b; touch pwned $(touch pwned) `touch pwned` & 'quoted' \"twice\" <b> %s {0} é\u202e",
}


def renamed_tables(raw, folder):
    """The tables with one compound and one mechanism renamed to what would harm; returns the two new names."""
    folder.mkdir()
    with open(raw / "BBBC021_v1_moa.csv", newline="") as file:
        moas = list(csv.DictReader(file))
    with open(raw / "BBBC021_v1_image.csv", newline="") as file:
        images = list(csv.DictReader(file))
    treated = [row for row in moas if row["compound"] != "DMSO"]
    compound, moa = treated[0]["compound"], treated[-1]["moa"]
    other = next(row["compound"] for row in treated if row["compound"] != compound)
    new = {compound: NAMES["taxol"], other: "../../../escaped;$(touch pwned)"}
    for row in moas:
        row["compound"] = new.get(row["compound"], row["compound"])
        row["moa"] = NAMES["MOA"] if row["moa"] == moa else row["moa"]
    for row in images:
        row["Image_Metadata_Compound"] = new.get(row["Image_Metadata_Compound"], row["Image_Metadata_Compound"])
    for name, rows in (("BBBC021_v1_moa.csv", moas), ("BBBC021_v1_image.csv", images)):
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return ["--image_csv", folder / "BBBC021_v1_image.csv", "--moa_csv", folder / "BBBC021_v1_moa.csv"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The whole way, from images to repositories, with hostile names of folders, compounds and mechanisms."""
    place = tmp_path_factory.mktemp("hostile")
    folder = place / NAMES["folder"]
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HF_TOKEN", TOKEN)

        def command(main, *words):
            main([str(word) for word in words])

        command(simulate.main, folder / "raw", "--size", "tiny")
        tables = renamed_tables(folder / "raw", folder / "tables")
        command(prepare.main, "--raw", folder / "raw", "--output", folder / "built", *tables, "--workers", "1")
        run = folder / "run"
        command(train_accelerate.main, "--dataset", folder / "built", "--output_dir", run, *SMALL)
        command(extract_profiles.main, run, "--sets", "trained", "intensity")
        command(evaluate_profiles.main, run)
        command(report.main, run)
        command(push_to_hub.main, run, "--dry_run", folder / "hub")
    return place


def test_hostile_names_come_through_whole(hostile):
    run = hostile / NAMES["folder"] / "run"
    found = pd.read_parquet(run / "profiles" / "trained.parquet")
    assert NAMES["taxol"] in set(found["Metadata_Compound"]) and NAMES["MOA"] in set(found["Metadata_MOA"])
    assert (run / "report.html").is_file()


def test_hostile_names_write_nothing_outside_their_folder(hostile):
    """Neither a shell's command nor a path in a name had an effect."""
    assert [path.name for path in hostile.iterdir()] == [NAMES["folder"]]
    assert not [path for path in hostile.rglob("*") if path.name == "pwned" or "escaped" in path.name]
    assert not [path for path in hostile.parent.rglob("*escaped*")] and not (ROOT / "pwned").exists()


def test_hostile_names_are_text_in_the_report(hostile):
    page = (hostile / NAMES["folder"] / "run" / "report.html").read_text(encoding="utf-8")
    for name in (NAMES["taxol"], NAMES["MOA"]):
        assert name not in page
        assert html.escape(name) in page or html.escape(name, quote=False) in page or name in html.unescape(page)


def test_the_token_is_in_no_file(hostile):
    for path in hostile.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_published_code_is_its_four_files(hostile):
    """What a stranger executes with trust_remote_code: these files, to the byte as they are here, and no other."""
    folders = [path.parent for path in hostile.rglob("model.safetensors") if "checkpoints" not in path.parts]
    published = {
        "configuration_wsdino.py",
        "modeling_wsdino.py",
        "image_processing_wsdino.py",
        "pipeline_wsdino.py",
    }
    assert len(folders) >= 2
    for folder in folders:
        others = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", ".gitattributes"}
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert {name for name in names if "__pycache__" not in name} - others == published, folder
        for name in published:
            assert (folder / name).read_bytes() == (ROOT / "modeling_wsdino" / name).read_bytes()


@pytest.mark.parametrize("main", [train_accelerate.main, extract_profiles.main, push_to_hub.main])
def test_the_token_is_in_no_error(tmp_path, capsys, monkeypatch, main):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    words = {
        train_accelerate.main: ["--dataset", "me/private", "--output_dir", tmp_path / "run", *SMALL],
        extract_profiles.main: [
            "--model",
            "me/private",
            "--dataset",
            "me/private",
            "--output",
            tmp_path / "p.parquet",
        ],
        push_to_hub.main: [tmp_path],
    }[main]
    assert TOKEN not in refused(main, words, capsys)
