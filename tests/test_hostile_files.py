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

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL
from PIL import Image
from test_rooms import ROOM_FILES, ROOT

import extract_profiles
import push_to_hub
import train_accelerate
from dataset_scripts import prepare, screen, tables
from dataset_scripts.simulator import simulate
from evaluation_wsdino import evaluate_profiles, report
from modeling_wsdino import WSDinoImageProcessor, convert_checkpoint
from modeling_wsdino.image_processing_wsdino import MAX_PIXELS
from wsdino.errors import UserError

TOKEN = "hf_aSecretThatMustNeverBeShown"


# ---------------------------------------------------------------------------------------------- nothing is executed


def test_no_call_trusts_remote_code_or_pickles():
    """What ruff's rules against executing data (S) do not know."""
    for path in [*ROOM_FILES, *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                # False, or what the user said with the flag of this name
                assert ast.unparse(node.value) in ("False", f"settings.{node.arg}", node.arg), path


class Bomb:
    """What unpickling executes: it makes a file."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (os.system, (f"touch '{self.place}'",))


@pytest.mark.parametrize(
    "name", ["dino.pth", "dino.safetensors", "folder/pytorch_model.bin", "folder/model.safetensors"]
)
@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("command", ["convert", "extract", "train"])
def test_no_network_file_is_unpickled(tiny_screen, tmp_path, refused, name, save, command):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    save({"cls_token": Bomb(tmp_path / "exploded")}, path)
    source = path if path.parent == tmp_path else path.parent
    if source != path:
        (source / "config.json").write_text(json.dumps({"model_type": "vit", "num_attention_heads": 2}))
    data = ["--dataset", tiny_screen]
    main, words = {
        "convert": (convert_checkpoint.main, [source, tmp_path / "converted"]),
        "extract": (extract_profiles.main, ["--model", source, *data, "--output", tmp_path / "p.parquet"]),
        "train": (train_accelerate.main, ["--init", source, *data, "--output_dir", tmp_path / "run", *SMALL]),
    }[command]
    # The demo's whitening needs random weights.
    words += {"train": ["--whiten_patches", "False"], "extract": ["--channels", "dna"]}.get(command, [])
    refused(main, *words, named=source)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists(), "the bomb is a dud"


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
    monkeypatch.setattr(tables, "MOST_BYTES", 100_000)
    (tmp_path / "image.csv.gz").write_bytes(gzip.compress(b"x" * 10**8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="image.csv.gz .*more than 100,000 bytes"):
        screen.read_screen(tmp_path / "image.csv.gz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


# ---------------------------------------------------------------------------------------------- names, tokens, code

NAMES = {
    "taxol": "<script>alert('compound')</script>",
    "MOA": '"><img src=x onerror=alert(1)>',
    "folder": "a b; touch pwned $(touch pwned) `touch pwned` & 'quoted' \"twice\" <b> %s {0} é\u202e",
}


def renamed_tables(raw, folder):
    """The flags of tables in which two compounds and a mechanism are renamed to what would harm."""
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


def test_published_code_is_the_shipped_files(hostile):
    """What a stranger executes with trust_remote_code: these files, to the byte as they are here, and no other."""
    folders = [path.parent for path in hostile.rglob("model.safetensors") if "checkpoints" not in path.parts]
    published = {
        "configuration_wsdino.py",
        "layers_wsdino.py",
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


@pytest.mark.parametrize("module", [train_accelerate, extract_profiles, push_to_hub])
def test_the_token_is_in_no_error(tmp_path, refused, monkeypatch, module):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    private = ["--dataset", "me/private"]
    words = {
        train_accelerate: [*private, "--output_dir", tmp_path / "run", *SMALL],
        extract_profiles: [*private, "--model", "me/private", "--output", tmp_path / "p.parquet"],
        push_to_hub: [tmp_path],
    }[module]
    assert TOKEN not in refused(module.main, *words, named="")
