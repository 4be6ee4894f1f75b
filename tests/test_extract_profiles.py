"""Extraction against plain loops; kills, several processes, changed inputs; other tools read what it writes."""

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

import extract_profiles
from dataset_scripts.open_dataset import METADATA, Planes, open_fields
from evaluation_wsdino.baselines import nuclear_features
from evaluation_wsdino.shards import ProfileFile
from modeling_wsdino import (
    WSDinoConfig,
    WSDinoImageProcessor,
    WSDinoModel,
    build_combined_repository,
    build_repository,
)
from pretraining_wsdino import TrainingArguments

ROOT = Path(__file__).parents[1]
CHANNELS = ["dna", "tubulin", "actin"]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}


def make_model(channels=(), seed=0):
    torch.manual_seed(seed)
    model = WSDinoModel(WSDinoConfig(**SIZE, channel_names=list(channels))).eval()
    with torch.no_grad():  # weights large enough for fields to differ
        for parameter in model.parameters():
            parameter.mul_(5).add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def finished(tiny_screen, tmp_path_factory):
    """A run folder as training leaves it, with random networks."""
    folder = tmp_path_factory.mktemp("extraction") / "run"
    arguments = TrainingArguments(channels=CHANNELS, init="random", seed=5)
    for seed, channel in enumerate(CHANNELS):
        build_repository(folder / channel / "model", make_model([channel], seed), WSDinoImageProcessor(tile_size=32))
    build_combined_repository(folder / "model", {channel: folder / channel / "model" for channel in CHANNELS})
    content = {"arguments": asdict(arguments), "dataset": {"path": str(tiny_screen)}}
    (folder / "settings.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run to write into."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def extract(*words):
    extract_profiles.main([str(word) for word in words])


def features_of(table, channel=None):
    return table[[name for name in table if not name.startswith("Metadata_") and name.startswith(channel or "")]]


def screen_rows(screen, parts=("annotated", "dmso")):
    """Rows of the built dataset's own Parquet files with images as arrays, read without `datasets`."""
    for part in parts:
        for path in sorted((screen / "data" / part).glob("*.parquet")):
            for row in pq.read_table(path).to_pylist():
                for channel in CHANNELS:
                    with Image.open(io.BytesIO(row[channel]["bytes"])) as image:
                        row[channel] = np.array(image)
                yield row


def plain_features(model, plane, corners, size=32, lower=False):
    """One tile after the other through the whole network, and NumPy's median."""
    tiles = []
    for top, left in corners:
        tile = np.minimum(plane[top : top + size, left : left + size].astype(np.float64), 10_000) / 10_000
        with torch.no_grad():
            tokens = model(torch.tensor(tile, dtype=torch.float32)[None, None].expand(1, 3, -1, -1)).last_hidden_state
        tiles.append(tokens[0, 0].double().numpy())
    return np.sort(tiles, axis=0)[(len(tiles) - 1) // 2] if lower else np.median(tiles, axis=0)


PAPER = ((0, 8), (0, 40), (32, 8), (32, 40))  # the four 32-pixel tiles in the middle of 64 x 80


# ------------------------------------------------------------------------------------------- what is extracted


def test_every_set_of_a_run_equals_a_plain_loop(run, tiny_screen):
    extract(run, "--batch_size", 7, "--shard_fields", 30)
    assert sorted(path.name for path in (run / "profiles").iterdir()) == [
        "count.parquet",
        "intensity.parquet",
        "trained.parquet",
        "untrained.parquet",
    ]
    tables = {name: pd.read_parquet(run / "profiles" / f"{name}.parquet") for name in ("trained", "intensity")}
    untrained = pd.read_parquet(run / "profiles" / "untrained.parquet")
    rows = list(screen_rows(tiny_screen))
    names = {**METADATA}
    for name, table in (*tables.items(), ("untrained", untrained)):
        assert len(table) == len(rows), name
        for column, metadata in names.items():
            assert table[f"Metadata_{metadata}"].tolist() == [row[column] for row in rows], (name, column)
    trained = {channel: WSDinoModel.from_pretrained(run / channel / "model").eval() for channel in CHANNELS}
    torch.manual_seed(5)
    random = WSDinoModel(WSDinoConfig(**SIZE)).eval()
    for channel in CHANNELS:
        expected = np.stack([plain_features(trained[channel], row[channel], PAPER) for row in rows])
        np.testing.assert_allclose(features_of(tables["trained"], channel), expected, atol=2e-4)
        expected = np.stack([plain_features(random, row[channel], PAPER) for row in rows[:5]])
        np.testing.assert_allclose(features_of(untrained, channel)[:5], expected, atol=2e-4)
    assert features_of(tables["trained"]).columns.tolist() == [f"{c}_{i:04d}" for c in CHANNELS for i in range(32)]
    assert (features_of(tables["trained"]).dtypes == np.float32).all()


def test_intensity_features_against_a_second_library(run, tiny_screen):
    from scipy import stats

    extract(run, "--sets", "intensity")
    table = pd.read_parquet(run / "profiles" / "intensity.parquet")
    for number, row in enumerate(list(screen_rows(tiny_screen))[:6]):
        for channel in CHANNELS:
            scaled = row[channel].astype(np.float64).ravel() / 10_000
            scores = stats.scoreatpercentile(scaled, [1, 5, 25, 50, 75, 95, 99])
            clipped = sum(value > 1 for value in scaled.tolist()) / scaled.size
            expected = [scaled.mean(), scaled.std(), stats.skew(scaled), *scores, clipped]
            np.testing.assert_allclose(features_of(table, channel).iloc[number], expected, rtol=2e-4)


def test_checkpoints_of_all_channels(run, tiny_screen, capsys):
    """Teachers of the steps that every channel keeps; student, head and the steps of one channel are left alone."""
    teachers = {}
    for number, channel in enumerate(CHANNELS):
        for step in (20, 40) if channel == "actin" else (10, 20, 40):
            folder = run / channel / "checkpoints" / f"step_{step:08d}"
            folder.mkdir(parents=True)
            for seed, file in ((1, "model"), (2, "model_1")):
                teacher = make_model([channel], seed + 10 * step + 100 * number)
                state = {f"backbone.{name}": tensor for name, tensor in teacher.state_dict().items()}
                save_file(state | {"head.mlp.0.weight": torch.zeros(3)}, folder / f"{file}.safetensors")
            teachers[channel, step] = teacher
    (run / "dna" / "checkpoints" / "step_00000050.partial").mkdir()
    extract(run, "--sets", "trained", "--checkpoints")
    paths = sorted((run / "profiles" / "checkpoints").iterdir())
    assert [path.name for path in paths] == ["step_00000020.parquet", "step_00000040.parquet"]
    rows = list(screen_rows(tiny_screen))[:4]
    for path, step in zip(paths, (20, 40), strict=True):
        table = pd.read_parquet(path)
        for channel in CHANNELS:
            expected = np.stack([plain_features(teachers[channel, step], row[channel], PAPER) for row in rows])
            np.testing.assert_allclose(features_of(table, channel)[:4], expected, atol=2e-4)
    with open(run / "actin" / "checkpoints" / "step_00000020" / "model_1.safetensors", "r+b") as file:
        file.truncate(500)
    said = refused(capsys, run, "--sets", "trained", "--checkpoints")
    assert "step_00000020" in said and "remove that checkpoint" in said


def test_the_count_is_of_the_nuclear_stain_whatever_was_trained(run, tiny_screen, tmp_path, capsys):
    extract(run, "--sets", "count", "--channels", "tubulin")
    table = pd.read_parquet(run / "profiles" / "count.parquet")
    rows = list(screen_rows(tiny_screen))
    assert features_of(table).columns.tolist() == [f"dna_{index:04d}" for index in range(10)]
    assert table["Metadata_Well"].tolist() == [row["well"] for row in rows]
    for number in range(0, len(rows), 7):
        expected = nuclear_features(rows[number]["dna"], 10_000)
        np.testing.assert_array_equal(features_of(table).iloc[number], expected)
    extract(run, "--sets", "count", "--nuclear_channel", "actin")
    assert features_of(pd.read_parquet(run / "profiles" / "count.parquet")).columns[0] == "actin_0000"
    assert "--nuclear_channel lipids" in refused(capsys, run, "--nuclear_channel", "lipids")
    # A screen without a column dna is not counted in another stain unasked.
    kept = ("tubulin", *METADATA)
    features = Features({name: ImageFeature() if name == "tubulin" else Value("string") for name in kept})
    content = {name: [row[name] if name == "tubulin" else str(row[name]) for row in rows[:4]] for name in kept}
    (tmp_path / "other").mkdir()
    Dataset.from_dict(content, features=features).to_parquet(tmp_path / "other" / "train.parquet")
    (run / "profiles" / "count.parquet").unlink()
    words = ("--dataset", tmp_path / "other", "--parts", "default", "--channels", "tubulin")
    extract(run, *words, "--sets", "count", "intensity")
    assert "--nuclear_channel" in capsys.readouterr().out
    assert not (run / "profiles" / "count.parquet").exists()
    assert len(pd.read_parquet(run / "profiles" / "intensity.parquet")) == 4


def test_any_model_gives_what_the_run_gives(run, tiny_screen, tmp_path):
    """A channel's repository, the combined one and an original checkpoint: the same features to the bit."""
    extract(run, "--sets", "trained")
    expected = pd.read_parquet(run / "profiles" / "trained.parquet")
    common = ("--dataset", tiny_screen, "--output", tmp_path / "p.parquet")
    extract("--model", run / "model", *common)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "p.parquet"), expected)
    extract("--model", run / "model", *common, "--channels", "actin")
    ours = pd.read_parquet(tmp_path / "p.parquet")
    pd.testing.assert_frame_equal(features_of(ours), features_of(expected, "actin"))
    extract("--model", run / "tubulin" / "model", *common, "--parts", "dmso", "--pictures", tmp_path / "pictures")
    ours = pd.read_parquet(tmp_path / "p.parquet")
    control = expected[expected["Metadata_Compound"] == "DMSO"].reset_index(drop=True)
    pd.testing.assert_frame_equal(features_of(ours), features_of(control, "tubulin"))
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["attention_tubulin.png", "fields_tubulin.png"]
    torch.save(make_model(seed=2).to_dino_state_dict(), tmp_path / "dino.pth")
    with pytest.raises(SystemExit):  # a head is 64 wide in DINO, where this network has two of 16
        extract("--model", tmp_path / "dino.pth", *common, "--channels", "actin")


def test_a_network_that_knows_no_channel_takes_each(tiny_screen, tmp_path):
    """As ImageNet's: one network for every channel."""
    model = make_model(seed=3)
    build_repository(tmp_path / "imagenet", model, WSDinoImageProcessor(tile_size=32))
    output = tmp_path / "p.parquet"
    extract(
        "--model", tmp_path / "imagenet", "--dataset", tiny_screen, "--output", output, "--channels", "dna", "actin"
    )
    table = pd.read_parquet(output)
    for number, row in enumerate(list(screen_rows(tiny_screen))[:4]):
        for channel in ("dna", "actin"):
            expected = plain_features(model, row[channel], PAPER)
            np.testing.assert_allclose(features_of(table, channel).iloc[number], expected, atol=2e-4)


def vit_features(vit, plane):
    """The four tiles of a field, gray as RGB, through transformers' own ViT."""
    tiles = [np.minimum(plane[t : t + 32, left : left + 32].astype(np.float64), 10_000) / 10_000 for t, left in PAPER]
    pixels = torch.tensor(np.stack(tiles), dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    with torch.no_grad():
        return np.median(vit(pixels).last_hidden_state[:, 0].double().numpy(), axis=0)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder as of facebook/dino-vits8, with the image processor's file of that kind, and its network."""
    torch.manual_seed(8)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, image_size=32, patch_size=8
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5).add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("vit") / "vit"
    model.save_pretrained(folder)
    own = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.4] * 3, "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    return folder, model


def test_a_transformers_vit_gives_its_own_features(vit, tiny_screen, tmp_path):
    folder, model = vit
    output = tmp_path / "p.parquet"
    extract("--model", folder, "--dataset", tiny_screen, "--output", output, "--channels", "dna", "tubulin")
    table = pd.read_parquet(output)
    assert features_of(table).shape == (108, 128)
    for number, row in enumerate(list(screen_rows(tiny_screen))[:5]):
        for channel in ("dna", "tubulin"):
            expected = vit_features(model, row[channel])
            # Its LayerNorms' epsilon is 1e-12, ours DINO's 1e-6.
            np.testing.assert_allclose(features_of(table, channel).iloc[number], expected, atol=2e-3)


@pytest.mark.parametrize("kind", ["bare", "full"])
def test_an_original_checkpoint_file_is_extracted(kind, tiny_screen, tmp_path):
    """As DINO publishes it, and as its training, or that of WS-DINO, leaves it: there the teacher's is taken."""
    torch.manual_seed(4)
    size = SIZE | {"hidden_size": 64, "num_attention_heads": 1}  # DINO's heads are 64 wide
    model, other = (WSDinoModel(WSDinoConfig(**size)).eval() for _ in range(2))
    state = model.to_dino_state_dict()
    if kind == "full":
        teacher = {f"module.backbone.{name}": tensor for name, tensor in state.items()}
        teacher["module.head.mlp.0.weight"] = torch.zeros(3)
        student = {f"module.backbone.{name}": tensor for name, tensor in other.to_dino_state_dict().items()}
        state = {"student": student, "teacher": teacher, "epoch": 7}
    torch.save(state, tmp_path / "dino.pth")
    output = tmp_path / "p.parquet"
    extract("--model", tmp_path / "dino.pth", "--dataset", tiny_screen, "--output", output, "--channels", "actin")
    table = features_of(pd.read_parquet(output))
    for number, row in enumerate(list(screen_rows(tiny_screen))[:4]):
        np.testing.assert_allclose(table.iloc[number], plain_features(model, row["actin"], PAPER), atol=2e-4)


@pytest.mark.slow
def test_models_and_datasets_by_their_hub_ids(run, vit, tiny_screen, tmp_path):
    """A channel's repository, a transformers ViT and the screen itself, from a Hub-like server, then offline."""

    def files(folder):
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    folders = {
        ("model", "lab/wsdino-dna"): run / "dna" / "model",
        ("model", "lab/vit"): vit[0],
        ("dataset", "lab/screen"): tiny_screen,
    }
    extract(run, "--sets", "trained", "--channels", "dna")
    expected = pd.read_parquet(run / "profiles" / "trained.parquet")
    with HubServer("hf_token") as hub:
        for name, folder in folders.items():
            hub.put(*name, files(folder))
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        script = ("extract_profiles.py", "--dataset", "lab/screen", "--output")
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_DATASETS_OFFLINE": "0"}
        for environment in (settings, settings | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}):
            for model, channels in (("lab/wsdino-dna", ()), ("lab/vit", ("--channels", "dna"))):
                output = tmp_path / f"{environment['HF_HUB_OFFLINE']}-{model[4:]}.parquet"
                done = command(*script, output, "--model", model, *channels, **environment)
                assert done.returncode == 0, done.stderr[-2000:]
                table = pd.read_parquet(output)
                if model == "lab/vit":
                    row = next(iter(screen_rows(tiny_screen)))
                    expected_row = vit_features(vit[1], row["dna"])
                    np.testing.assert_allclose(features_of(table).iloc[0], expected_row, atol=2e-3)
                else:
                    pd.testing.assert_frame_equal(table, expected)
        done = command(*script, tmp_path / "none.parquet", "--model", "lab/absent", **settings)
        assert done.returncode == 2 and "lab/absent" in done.stderr and "Traceback" not in done.stderr


def test_tiles_of_the_whole_field(run, tiny_screen):
    extract(run, "--sets", "trained", "--channels", "dna", "--tiles", "full")
    table = pd.read_parquet(run / "profiles" / "trained.parquet")
    model = WSDinoModel.from_pretrained(run / "dna" / "model").eval()
    corners = [(top, left) for top in (0, 32) for left in (0, 24, 48)]
    for number, row in enumerate(list(screen_rows(tiny_screen))[:6]):
        expected = plain_features(model, row["dna"], corners)
        np.testing.assert_allclose(features_of(table).iloc[number], expected, atol=2e-4)


def test_fields_smaller_than_the_grid_of_tiles(run, tmp_path, capsys):
    """All of such a field fits in tiles; statistics need none, and pictures show as much as there is."""
    rng = np.random.default_rng(0)
    planes = [rng.integers(0, 12_000, (44, 50)).astype(np.uint16) for _ in range(3)]
    words = (run, "--dataset", small_dataset(tmp_path / "small", planes), "--parts", "all", "--channels", "dna")
    assert "smaller than the 64x64" in refused(capsys, *words, "--sets", "trained")
    extract(*words, "--sets", "intensity", "count")
    extract(*words, "--sets", "trained", "--tiles", "full")
    profiles = {name: pd.read_parquet(run / "profiles" / f"{name}.parquet") for name in ("trained", "count")}
    model = WSDinoModel.from_pretrained(run / "dna" / "model").eval()
    for number, plane in enumerate(planes):
        expected = plain_features(model, plane, [(top, left) for top in (0, 12) for left in (0, 18)])
        np.testing.assert_allclose(features_of(profiles["trained"]).iloc[number], expected, atol=2e-4)
        np.testing.assert_array_equal(features_of(profiles["count"]).iloc[number], nuclear_features(plane, 10_000))
    assert {path.name for path in (run / "pictures").iterdir()} == {"fields_dna.png", "attention_dna.png"}


def test_a_place_that_takes_no_pictures_is_told_before_extracting(run, tmp_path, capsys, monkeypatch, tiny_screen):
    (tmp_path / "file").write_text("not a folder")
    output = tmp_path / "p.parquet"
    words = ("--model", run / "dna" / "model", "--dataset", tiny_screen, "--parts", "dmso", "--output", output)
    for place in (tmp_path / "file", tmp_path / "file" / "pictures"):
        said = refused(capsys, *words, "--pictures", place)
        assert f"no pictures can be written into {place}" in said and not output.exists()
    (run / "pictures").write_text("not a folder")
    assert "no pictures can be written into" in refused(capsys, run, "--sets", "intensity")
    assert not (run / "profiles").exists()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(extract_profiles, "save_sheet", full)
    said = refused(capsys, *words, "--pictures", tmp_path / "pictures")
    assert "(No space left on device)" in said and output.exists()


def test_a_network_runs_where_it_lies_unless_told(monkeypatch):
    """A training process's network is on its own GPU, which need not be the first."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, plane = make_model(["dna"]), np.full((64, 80), 3000, np.uint16)
    for options in (extract_profiles.Options(), extract_profiles.Options(device=torch.device("cpu"))):
        (features,) = extract_profiles.network_stream(model, WSDinoImageProcessor(tile_size=32), [plane], options)
        np.testing.assert_allclose(features, plain_features(model, plane, PAPER), atol=2e-4)


def test_half_precision_is_close_and_another_set(run):
    extract(run, "--sets", "trained", "--channels", "dna")
    path = run / "profiles" / "trained.parquet"
    exact = features_of(pd.read_parquet(path)).to_numpy()
    extract(run, "--sets", "trained", "--channels", "dna", "--precision", "bf16")
    half = features_of(pd.read_parquet(path)).to_numpy()
    assert half.dtype == np.float32
    assert 0 < np.abs(half - exact).max() < 0.1 * np.abs(exact).max()


# ------------------------------------------------------------------------------------------- kills and changes


KILLED = """
import os, signal, sys
import evaluation_wsdino.shards as shards

write, left = shards.pq.write_table, int(sys.argv.pop(1))

def write_and_die(table, path, **kwargs):
    global left
    write(table, path, **kwargs)
    left -= 1
    if left == 0:  # the shard is written beside, but not renamed yet
        os.kill(os.getpid(), signal.SIGKILL)

shards.pq.write_table = write_and_die
import extract_profiles
extract_profiles.main(sys.argv[1:])
"""


# Of several processes only the named ones die, and the script finds the project as a module does.
KILLED_RANKS = """import os, signal, sys
if os.environ["RANK"] not in os.environ["KILLED_RANKS"].split():
    sys.argv[1] = "0"
"""


def command(*words, **environment):
    """A real process; its output and status."""
    words = [str(word) for word in words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_killed_extraction_goes_on_where_it_stopped(run, tmp_path):
    """SIGKILL while the fifth shard is written: the end equals the uninterrupted file, whole shards are not redone."""
    flags = ("--sets", "trained", "--batch_size", 8, "--shard_fields", 24)
    killed = command("-c", KILLED, 7, run, *flags)
    assert killed.returncode == -signal.SIGKILL
    path, folder = run / "profiles" / "trained.parquet", run / "profiles" / "trained.parquet.shards"
    assert not path.exists()
    # of 108 fields in shards of 24: five of dna, one of tubulin, and the half-written second
    shards = {shard: shard.stat().st_ino for shard in folder.glob("*.parquet")}
    assert len(shards) == 6 and len(list(folder.glob("*.partial"))) == 1
    for shard in shards:
        assert len(pd.read_parquet(shard)) in (24, 12)
    redone = []
    write = ProfileFile.write_shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProfileFile, "write_shard", lambda self, *rest: (redone.append(rest[:2]), write(self, *rest))[1])
        extract(run, *flags)
    assert sorted(redone) == sorted(
        [("tubulin", first) for first in (24, 48, 72, 96)] + [("actin", first) for first in (0, 24, 48, 72, 96)]
    )
    assert not folder.exists()
    whole = Path(shutil.copytree(run, tmp_path / "whole", ignore=shutil.ignore_patterns("profiles")))
    extract(whole, *flags)
    pd.testing.assert_frame_equal(pd.read_parquet(path), pd.read_parquet(whole / "profiles" / "trained.parquet"))


def test_any_batch_and_shard_size_may_finish_what_another_began(run, tiny_screen):
    """Shards of odd sizes left behind by other settings: no row lost, none twice."""
    flags = ("--sets", "trained", "--channels", "dna")
    with pytest.MonkeyPatch.context() as patch:
        write, count = ProfileFile.write_shard, [0]

        def fail_after_three(self, *rest):
            count[0] += 1
            if count[0] > 3:
                raise KeyboardInterrupt
            write(self, *rest)

        patch.setattr(ProfileFile, "write_shard", fail_after_three)
        with pytest.raises(KeyboardInterrupt):
            extract(run, *flags, "--batch_size", 5, "--shard_fields", 11)
    (run / "profiles" / "trained.parquet.shards" / "dna-000000010-000000020.parquet").unlink()  # a hole
    extract(run, *flags, "--batch_size", 16, "--shard_fields", 40)
    table = pd.read_parquet(run / "profiles" / "trained.parquet")
    model = WSDinoModel.from_pretrained(run / "dna" / "model").eval()
    expected = np.stack([plain_features(model, row["dna"], PAPER) for row in screen_rows(tiny_screen)])
    np.testing.assert_allclose(features_of(table), expected, atol=2e-4)


def test_damaged_shards_are_done_again(run):
    flags = ("--sets", "trained", "--channels", "dna", "--batch_size", 8, "--shard_fields", 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProfileFile, "join", lambda self: None)
        extract(run, *flags)
    shards = sorted((run / "profiles" / "trained.parquet.shards").glob("*.parquet"))
    shards[1].write_bytes(shards[1].read_bytes()[:500])
    shards[2].write_bytes(b"")
    extract(run, *flags)
    table = pd.read_parquet(run / "profiles" / "trained.parquet")
    (run / "profiles" / "trained.parquet").unlink()
    extract(run, *flags)
    pd.testing.assert_frame_equal(table, pd.read_parquet(run / "profiles" / "trained.parquet"))


def test_only_what_changed_is_extracted_again(run, tiny_screen, tmp_path, capsys):
    path = run / "profiles" / "trained.parquet"
    flags = (run, "--sets", "trained", "--channels", "dna")

    def changed(*more):
        before = path.stat().st_ino, path.stat().st_mtime_ns
        extract(*flags, *more)
        return (path.stat().st_ino, path.stat().st_mtime_ns) != before

    extract(*flags)
    assert not changed() and "up to date" in capsys.readouterr().out
    assert not changed("--batch_size", 3, "--shard_fields", 7, "--num_workers", 1)
    assert changed("--tiles", "full") and changed()  # and back again
    copy = Path(shutil.copytree(tiny_screen, tmp_path / "copy"))
    shard = sorted((copy / "data" / "dmso").glob("*.parquet"))[-1]
    table = pq.read_table(shard)
    swapped = table.take([0, 0, *range(2, len(table))])
    place = table.column_names.index("dna")  # the second field's dna image alone is another now
    pq.write_table(table.set_column(place, table.schema.field("dna"), swapped.column("dna")), shard)
    card = (
        copy / "README.md"
    ).read_text()  # by its sizes `datasets` tells a rebuilt folder from the one it has cached
    (copy / "README.md").write_text(re.sub(r"(download_size|num_bytes): \d+", r"\1: 1", card))
    assert changed("--dataset", copy)
    build_repository(run / "dna" / "model", make_model(["dna"], seed=9), WSDinoImageProcessor(tile_size=32))
    assert changed("--parts", "dmso") and len(pd.read_parquet(path)) == 36
    model = WSDinoModel.from_pretrained(run / "dna" / "model").eval()
    (row, *_) = screen_rows(tiny_screen, ["dmso"])
    expected = plain_features(model, row["dna"], PAPER)
    np.testing.assert_allclose(features_of(pd.read_parquet(path)).iloc[0], expected, atol=2e-4)


def test_shards_of_another_model_are_not_joined(run):
    """Killed, the model trained on, started again: nothing of the old model may survive."""
    flags = ("--sets", "trained", "--channels", "dna", "--batch_size", 8, "--shard_fields", 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProfileFile, "join", lambda self: None)
        extract(run, *flags)
    build_repository(run / "dna" / "model", make_model(["dna"], seed=9), WSDinoImageProcessor(tile_size=32))
    extract(run, *flags)
    path = run / "profiles" / "trained.parquet"
    table = pd.read_parquet(path)
    path.unlink()
    extract(run, *flags)
    pd.testing.assert_frame_equal(table, pd.read_parquet(path))


def test_the_metadata_of_the_file_tells_how_it_was_made(run):
    extract(run, "--sets", "trained", "--channels", "dna")
    schema = pq.read_schema(run / "profiles" / "trained.parquet")
    told = json.loads(schema.metadata[b"wsdino_settings"])
    assert told["fields"] == 108 and told["precision"] == "no"
    assert told["channels"]["dna"]["tiles"] == "paper" and told["channels"]["dna"]["tile_size"] == 32


# ------------------------------------------------------------------------------------------- several processes


LAUNCH_TWO = (
    *("-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


def test_two_processes_write_what_one_writes(run, tmp_path):
    """`accelerate launch` on two processes (gloo): each extracts a share, together the same file to the bit."""
    flags = ("--sets", "trained", "intensity", "--batch_size", 8, "--shard_fields", 24)
    two = Path(shutil.copytree(run, tmp_path / "two"))
    extract(run, *flags)
    done = command(
        *(*LAUNCH_TWO, "extract_profiles.py", two, *flags),
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 2" in done.stderr
    for name in ("trained", "intensity"):
        ours, expected = (pd.read_parquet(folder / "profiles" / f"{name}.parquet") for folder in (two, run))
        pd.testing.assert_frame_equal(ours, expected)


@pytest.mark.slow
def test_one_of_two_processes_killed_then_both_then_resumed(run, tmp_path):
    """SIGKILL in the middle of a shard, of one process and of both: in the end no row is lost or doubled."""
    flags = ("--sets", "trained", "--batch_size", 4, "--shard_fields", 8)
    expected = Path(shutil.copytree(run, tmp_path / "expected"))
    extract(expected, *flags)
    script = tmp_path / "killed.py"
    script.write_text(KILLED.replace("import os, signal, sys", KILLED_RANKS))
    folder = run / "profiles" / "trained.parquet.shards"
    kept = {}
    for ranks in ("1", "0 1", "0"):
        done = command(*LAUNCH_TWO, script, 3, run, *flags, ACCELERATE_USE_CPU="true", KILLED_RANKS=ranks)
        assert done.returncode != 0
        now = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
        assert len(now) > len(kept) and kept.items() <= now.items(), "whole shards stay and are not done again"
        kept = now
    assert not (run / "profiles" / "trained.parquet").exists()
    done = command(*LAUNCH_TWO, "extract_profiles.py", run, *flags, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_parquet(run / "profiles" / "trained.parquet")
    pd.testing.assert_frame_equal(table, pd.read_parquet(expected / "profiles" / "trained.parquet"))
    assert not table.duplicated(["Metadata_Plate", "Metadata_Well", "Metadata_Site"]).any()
    assert not folder.exists()


def test_a_launch_of_fewer_processes_than_asked_is_refused(run, monkeypatch, capsys):
    for name, value in (("ACCELERATE_MIXED_PRECISION", "no"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as ended:
        extract(run)
    assert ended.value.code == 2 and "--multi_gpu" in capsys.readouterr().err


@given(
    held=st.lists(st.booleans(), min_size=1, max_size=200),
    batch_size=st.integers(1, 40),
    processes=st.integers(1, 7),
    shard_fields=st.integers(1, 90),
)
@settings(deadline=None, max_examples=200)
def test_shares_cover_every_missing_row_once(held, batch_size, processes, shard_fields):
    """Whatever is there already: each missing row in exactly one shard of one process, and shares of equal work."""
    missing, row = [], 0
    while row < len(held):
        first = row
        while row < len(held) and not held[row]:
            row += 1
        if row > first:
            missing.append((first, row))
        row += row < len(held)
    seen, counts = [], []
    for process in range(processes):
        batches = extract_profiles.my_batches(missing, batch_size, process, processes)
        assert all(
            last - first <= batch_size and first // batch_size == (last - 1) // batch_size for first, last in batches
        )
        shards = extract_profiles.shards_of(batches, shard_fields)
        assert all(last - first <= max(shard_fields, batch_size) for first, last in shards)
        rows = [row for first, last in shards for row in range(first, last)]
        assert rows == [row for first, last in batches for row in range(first, last)]
        seen += rows
        counts.append(len(batches))
    assert seen == [row for row, there in enumerate(held) if not there]
    assert max(counts) - min(counts) <= 1


@given(lengths=st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=8))
@settings(deadline=None, max_examples=25)
def test_missing_rows_by_brute_force_and_the_join(lengths, tmp_path_factory):
    """Shards of any lengths and holes: what is missing, and when nothing is, the joined file in order."""
    count = sum(length for length, _ in lengths)
    metadata = pd.DataFrame(
        {"Metadata_Site": np.arange(count), "Metadata_Plate": [f"p{i // 5}" for i in range(count)]}
    )
    values = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    file = ProfileFile(tmp_path_factory.mktemp("join") / "a.parquet", metadata, ["dna", "actin"], "digest", {"a": 1})
    file.start()
    file.write_shard("actin", 0, values[:, ::-1])
    first, held = 0, set()
    for length, there in lengths:
        if there:
            file.write_shard("dna", first, values[first : first + length])
            held |= set(range(first, first + length))
        first += length
    ranges = file.missing("dna")
    assert [row for start, stop in ranges for row in range(start, stop)] == [r for r in range(count) if r not in held]
    for start, stop in ranges:
        file.write_shard("dna", start, values[start:stop])
    assert file.missing("dna") == [] and not file.is_whole()
    file.join()
    assert file.is_whole() and not file.folder.exists()
    table = pd.read_parquet(file.path)
    assert table.columns.tolist() == [*metadata, *(f"{c}_{i:04d}" for c in ("dna", "actin") for i in range(3))]
    np.testing.assert_array_equal(table.iloc[:, 2:5], values)
    np.testing.assert_array_equal(table.iloc[:, 5:8], values[:, ::-1])
    assert table["Metadata_Site"].tolist() == list(range(count))


# ------------------------------------------------------------------------------------------- other tools


def test_pycytominer_and_copairs_read_the_file_as_it_is(run):
    pytest.importorskip("pycytominer", reason="the oldest supported packages are older than its own")
    from copairs.map import average_precision
    from pycytominer import aggregate, feature_select, normalize
    from pycytominer.cyto_utils import infer_cp_features

    extract(run, "--sets", "trained")
    path = str(run / "profiles" / "trained.parquet")
    table = pd.read_parquet(path)
    assert infer_cp_features(table, metadata=True) == [
        f"Metadata_{name}" for name in METADATA.values()
    ]
    names = features_of(table).columns.tolist()
    control = (table["Metadata_Compound"] == "DMSO").to_numpy()
    normalized = normalize(path, features=names, samples="Metadata_Compound == 'DMSO'", method="standardize")
    values = table[names].to_numpy(np.float64)
    expected = (values - values[control].mean(0)) / values[control].std(0)
    np.testing.assert_allclose(normalized[names], expected, rtol=1e-3, atol=1e-3)
    strata = ["Metadata_Plate", "Metadata_Well", "Metadata_Treatment", "Metadata_MOA"]
    wells = aggregate(normalized, strata=strata, features=names, operation="median")
    assert len(wells) == len(table[strata].drop_duplicates())
    one = wells.iloc[0]
    rows = (table[strata] == one[strata]).all(axis=1).to_numpy()
    np.testing.assert_allclose(one[names].astype(float), np.median(expected[rows], axis=0), rtol=1e-3, atol=1e-3)
    selected = feature_select(wells, features=names, operation=["variance_threshold", "correlation_threshold"])
    kept = [column for column in selected if column in names]
    assert 0 < len(kept) <= len(names) and len(selected) == len(wells)
    treated = wells[wells["Metadata_Treatment"] != "DMSO"].reset_index(drop=True)
    scores = average_precision(
        treated[strata],
        treated[names].to_numpy(),
        pos_sameby=["Metadata_MOA"],
        pos_diffby=["Metadata_Well"],
        neg_sameby=[],
        neg_diffby=["Metadata_MOA"],
        progress_bar=False,
    )
    assert scores["average_precision"].notna().any()


# ------------------------------------------------------------------------------------------- bad input


def small_dataset(folder, planes, plates=None):
    """A dataset folder with one part, `all`, of one channel."""
    columns = {"dna": ImageFeature(), "plate": Value("string"), "well": Value("string"), "site": Value("int64")}
    rows = {
        "dna": [Image.fromarray(plane) for plane in planes],
        "plate": plates or ["p"] * len(planes),
        "well": [f"w{number}" for number in range(len(planes))],
        "site": [1] * len(planes),
    }
    (folder / "data").mkdir(parents=True)
    Dataset.from_dict(rows, features=Features(columns)).to_parquet(folder / "data" / "train.parquet")
    card = "---\nconfigs:\n- config_name: all\n  data_files:\n  - split: train\n    path: data/train.parquet\n---\n"
    (folder / "README.md").write_text(card)
    return folder


def refused(capsys, *words):
    """The one sentence of a refusal."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        extract(*words)
    assert ended.value.code == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("wsdino-extract: error: ")
    return sentence


def test_original_code_tiles_take_the_lower_median(tmp_path, capsys):
    rng = np.random.default_rng(0)
    planes = [rng.integers(0, 12_000, (512, 640)).astype(np.uint16) for _ in range(2)]
    dataset = small_dataset(tmp_path / "large", planes)
    model = make_model(["dna"])
    build_repository(tmp_path / "model", model, WSDinoImageProcessor(tile_size=32))
    words = ("--model", tmp_path / "model", "--dataset", dataset, "--parts", "all", "--output", tmp_path / "p.parquet")
    extract(*words, "--tiles", "original_code")
    table = pd.read_parquet(tmp_path / "p.parquet")
    for number, plane in enumerate(planes):
        tokens = []
        for top, left, width in ((32, 64, 256), (32, 320, 224), (256, 64, 256), (256, 320, 224)):
            tile = np.minimum(plane[top : top + 224, left : left + width] / 10_000, 1)
            with torch.no_grad():
                tokens.append(model(torch.tensor(tile, dtype=torch.float32)[None, None]).pooler_output[0])
        expected = torch.stack(tokens).median(dim=0).values
        np.testing.assert_allclose(features_of(table).iloc[number], expected, atol=2e-4)
    sizes = [np.zeros((64, 80), np.uint16)]
    other = small_dataset(tmp_path / "small", sizes)
    said = refused(capsys, *words, "--tiles", "original_code", "--dataset", other)
    assert "512x640" in said


def test_bad_input_ends_in_one_sentence_and_writes_nothing(run, tiny_screen, tmp_path, capsys):
    output = tmp_path / "out" / "p.parquet"
    model = ("--model", run / "dna" / "model")
    common = ("--dataset", tiny_screen, "--output", output)
    small = small_dataset(tmp_path / "tiny", [np.zeros((40, 50), np.uint16)])
    eight = small_dataset(tmp_path / "eight", [np.zeros((64, 80), np.uint8)] * 2)
    empty = small_dataset(tmp_path / "empty", [])
    twice = small_dataset(tmp_path / "twice", [np.zeros((64, 80), np.uint16)] * 2)
    mixed = small_dataset(tmp_path / "mixed", [np.zeros((64, 80), np.uint16), np.zeros((64, 82), np.uint16)])
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "other.parquet").write_text("someone's notes")
    damaged = Path(shutil.copytree(run / "dna" / "model", tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:300])
    cases = {
        (): "--model",
        (tmp_path / "absent",): "settings.json",
        (run, "--model", "x"): "either",
        (run, "--output", output): "--model",
        (run, "--batch_size", 0): "--batch_size is 0",
        (run, "--channels", "lipids"): "--channels lipids",
        (run, "--device", "nonsense"): "--device nonsense",
        (*model,): "--dataset",
        ("--model", tmp_path / "absent", *common): "absent",
        ("--model", damaged, *common): "damaged",
        (*model, *common, "--channels", "actin"): "--channels actin",
        (*model, "--dataset", tmp_path / "absent", "--output", output): "no dataset folder",
        (*model, *common, "--parts", "weird"): "weird",
        (*model, *common, "--parts", "dmso", "all"): "twice",
        ("--model", run / "model", "--dataset", twice, "--parts", "all", "--output", output): "no column 'tubulin'",
        (*model, "--dataset", small, "--parts", "all", "--output", output): "40x50",
        (*model, "--dataset", eight, "--parts", "all", "--output", output): "8-bit",
        (*model, "--dataset", empty, "--parts", "all", "--output", output): "no fields",
        (*model, "--dataset", tiny_screen, "--output", tmp_path / "file" / "p.parquet"): "cannot be written",
        (*model, "--dataset", tiny_screen, "--output", tmp_path / "other.parquet"): "something else",
        (*model, "--dataset", tiny_screen, "--output", tmp_path): "something else",
        ("--model", "nobody/nothing", *common): "nobody/nothing",
    }
    for words, sentence in cases.items():
        assert sentence in refused(capsys, *words), words
        assert not output.exists() and not output.parent.exists(), words
    assert (tmp_path / "other.parquet").read_text() == "someone's notes"
    for workers in (0, 1):  # found while extracting: whole shards stay, no profile file comes to be
        flags = ("--dataset", mixed, "--parts", "all", "--output", output, "--num_workers", workers)
        said = refused(capsys, *model, *flags)
        assert said.startswith("wsdino-extract: error: row 1: dna is uint16 of shape (64, 82)")
        assert not output.exists()


def test_two_extractions_at_once_into_one_file_are_refused(run, capsys):
    from filelock import FileLock

    folder = run / "profiles" / "trained.parquet.shards"
    folder.mkdir(parents=True)
    theirs = folder / "dna-000000000-000000008.parquet"
    theirs.write_bytes(b"half of what the other is writing, with other settings")
    with FileLock(folder / "lock"):
        assert "Another extraction" in refused(capsys, run, "--sets", "trained")
        assert theirs.exists()
        done = command(*LAUNCH_TWO, "extract_profiles.py", run, "--sets", "trained", ACCELERATE_USE_CPU="true")
    assert "Another extraction" in done.stderr and "ProfileError" not in done.stderr and "gloo" not in done.stderr
    extract(run, "--sets", "trained")


def test_a_full_disk_ends_in_a_sentence_and_the_next_run_finishes(run, capsys, monkeypatch):
    import evaluation_wsdino.shards as shards

    write, count = shards.pq.write_table, [0]

    def full(table, path, **kwargs):
        count[0] += 1
        if count[0] == 3:
            raise OSError(28, "No space left on device")
        write(table, path, **kwargs)

    flags = (run, "--sets", "trained", "--channels", "dna", "--batch_size", 8, "--shard_fields", 24)
    monkeypatch.setattr(shards.pq, "write_table", full)
    assert "No space left on device" in refused(capsys, *flags)
    extract(*flags)
    assert len(pd.read_parquet(run / "profiles" / "trained.parquet")) == 108


# ------------------------------------------------------------------------------------------- memory


MEASURED = """
import sys
from pathlib import Path
import extract_profiles
from dataset_scripts.open_dataset import METADATA, Planes, open_fields
from evaluation_wsdino.shards import ProfileFile

write = ProfileFile.write_shard

def measured(self, channel, first, features):
    write(self, channel, first, features)
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    print(first + len(features), *(int(lines[kind].split()[0]) / 1024 for kind in ("RssAnon", "RssFile")))

ProfileFile.write_shard = measured
extract_profiles.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_screen(tmp_path):
    """10,000 fields: the process's own memory after the last is within 10 MiB of that after a fifth of them."""
    planes = np.random.default_rng(0).integers(0, 12_000, (10_000, 64, 64)).astype(np.uint16)
    dataset = small_dataset(tmp_path / "screen", planes)
    build_repository(tmp_path / "model", make_model(["dna"]), WSDinoImageProcessor(tile_size=32))
    words = ("--model", tmp_path / "model", "--dataset", dataset, "--parts", "all", "--output", tmp_path / "p.parquet")
    done = command("-c", MEASURED, *words, "--shard_fields", 500)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_parquet(tmp_path / "p.parquet")) == 10_000
    sizes = [[float(word) for word in line.split()] for line in done.stdout.splitlines() if line[0].isdigit()]
    (early, *_), late = [size for size in sizes if size[0] >= 2_000], sizes[-1]
    assert late[0] == 10_000
    print(f"own memory {early[1]:.1f} -> {late[1]:.1f} MiB, mapped files {early[2]:.1f} -> {late[2]:.1f} MiB")
    assert late[1] - early[1] < 10


def test_planes_are_read_without_a_copy_of_the_dataset(tiny_screen):
    """Decoding is by row: one plane in memory, whatever the number asked for."""
    planes = Planes(open_fields(tiny_screen, ["dmso"]), "actin", [3, 1, 3])
    rows = list(screen_rows(tiny_screen, ["dmso"]))
    assert len(planes) == 3
    for plane, row in zip(planes, (3, 1, 3), strict=True):
        np.testing.assert_array_equal(plane, rows[row]["actin"])


def test_big_endian_planes_are_read_as_any_other(tmp_path):
    """ImageJ writes TIFFs so; the header by hand, for Pillow writes the machine's order."""
    plane = np.arange(20 * 24, dtype=np.uint16).reshape(20, 24) * 100
    entries = [(256, 24), (257, 20), (258, 16), (259, 1), (262, 1), (273, 8), (278, 20), (279, plane.nbytes)]
    directory = b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    header = b"MM\0*" + struct.pack(">I", 8 + plane.nbytes)
    content = header + plane.astype(">u2").tobytes() + struct.pack(">H", len(entries)) + directory + bytes(4)
    dataset = Dataset.from_dict({"er": [{"bytes": content, "path": None}]}, features=Features({"er": ImageFeature()}))
    (tmp_path / "own").mkdir()
    dataset.to_parquet(tmp_path / "own" / "train.parquet")
    found = Planes(open_fields(tmp_path / "own", ["default"]), "er")[0]
    assert found.dtype == np.uint16 and (found == plane).all()


def test_a_dataset_that_says_nothing_of_its_fields(tmp_path, capsys):
    """It trains by any label; profiles without a column to know them by would be of no use."""
    planes = [Image.fromarray(np.full((32, 32), i, np.uint16)) for i in range(2)]
    dataset = Dataset.from_dict({"er": planes, "gene": ["a", "b"]}).cast_column("er", ImageFeature())
    (tmp_path / "own").mkdir()
    dataset.to_parquet(tmp_path / "own" / "train.parquet")
    words = ("--dataset", str(tmp_path / "own"), "--parts", "default", "--output", str(tmp_path / "p.parquet"))
    build_repository(tmp_path / "model", make_model(["er"]), WSDinoImageProcessor(tile_size=32))
    with pytest.raises(SystemExit) as ended:
        extract("--model", str(tmp_path / "model"), *words)
    assert ended.value.code == 2
    assert "has none of the columns batch, compound, " in capsys.readouterr().err
    assert not (tmp_path / "p.parquet").exists()
