"""Publishing a run: what becomes a repository, which repositories are refused, and loading from them as a stranger."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard, constants
from test_build_card import CHANNELS, make_results
from transformers import pipeline

import push_to_hub
from modeling_wsdino import (
    WSDinoConfig,
    WSDinoFeatureExtractionPipeline,
    WSDinoImageProcessor,
    WSDinoModel,
    WSDinoMultiChannelModel,
    build_combined_repository,
    build_repository,
)

ROOT = Path(__file__).parents[1]
TOKEN = "hf_aSecretThatMustNeverBeShown"
NAME = "wsdino-vit32x1p8-simulated"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_screen):
    """A run folder with three small towers, the combined model and results."""
    folder = tmp_path_factory.mktemp("push") / "run"
    processor = WSDinoImageProcessor(tile_size=32)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    for seed, channel in enumerate(CHANNELS):
        torch.manual_seed(seed)
        model = WSDinoModel(WSDinoConfig(**size, channel_names=[channel]))
        build_repository(folder / channel / "model", model, processor)
    build_combined_repository(folder / "model", {channel: folder / channel / "model" for channel in CHANNELS})
    results = make_results(tiny_screen)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "settings.json").write_text(json.dumps(results["settings"]))
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A server that the command in this process talks to."""
    with HubServer(TOKEN) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(push_to_hub, "HfApi", partial(HfApi, endpoint=hub.url))
        yield hub


@pytest.fixture
def push(hub, run, capsys):
    """The command: its output, or the one sentence that it ends with."""

    def push(*flags, fails=False):
        if not fails:
            push_to_hub.main([str(run), *map(str, flags)])
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as ended:
            push_to_hub.main([str(run), *map(str, flags)])
        said = capsys.readouterr().err
        message = said[said.index("wsdino-push: error: ") :]
        assert ended.value.code == 2 and message.count("\n") == 1 and TOKEN not in said
        return message

    return push


def test_a_second_push_changes_nothing_and_old_files_leave(hub, push):
    out = push("--parts", "models", "metric")
    names = ["lab/not_same_compound", *[f"lab/{NAME}-{one}" for one in CHANNELS], f"lab/{NAME}"]
    assert [line.split(":")[0] for line in out.splitlines()] == names and out.count(": updated") == 5
    assert {name for _, name in next(iter(hub.collections.values()))} == set(names)
    before = hub.commits()
    assert push("--parts", "models", "metric").count(": unchanged") == 5 and hub.commits() == before
    space = hub.repositories["space", "lab/not_same_compound"]
    right = dict(space["files"])
    assert right.keys() == {*push_to_hub.METRIC_FILES, "README.md", "index.html", ".gitattributes"}
    space["files"] |= {"stale.py": b"old", "README.md": b"old", ".github/kept.yml": b""}
    assert "not_same_compound: updated" in push("--parts", "metric")
    assert space["files"] == right | {".github/kept.yml": b""}


def test_only_what_the_build_wrote_is_published_of_a_dataset(hub, push, run, tiny_screen, tmp_path):
    """A run may lie inside the dataset's folder: its checkpoints and settings are no data."""
    screen = tmp_path / "screen"
    shutil.copytree(tiny_screen, screen)
    (screen / "data" / "annotated" / "notes.parquet").write_bytes(b"mine")
    shutil.copytree(run, screen / "runs" / "first")
    push("--parts", "dataset", "--dataset", screen)
    files = hub.repositories["dataset", f"lab/{NAME}-screen"]["files"]
    built = {path.relative_to(tiny_screen).as_posix(): path for path in tiny_screen.rglob("*") if path.is_file()}
    built = {name: path.read_bytes() for name, path in built.items() if not name.startswith(".")}
    assert files == built | {".gitattributes": files[".gitattributes"]}
    next(screen.glob("data/annotated/train-*.parquet")).unlink()
    assert "lacks data/annotated/" in push("--parts", "dataset", "--dataset", screen, fails=True)


def test_files_that_another_put_there_stay(hub, push):
    """A lab may have a repository of that very name, with files that the run did not write."""
    name, flags = ("space", "lab/not_same_compound"), ("--parts", "metric")
    hub.fail = ("POST", "not_same_compound/commit", 403)  # what a new Space shows is nobody's work
    push(*flags, fails=True)
    hub.fail = None
    push(*flags)
    right = hub.repositories[name]["files"]
    theirs = {"app.py": b"precious", "README.md": b"ours"}
    hub.repositories[name] |= {"files": theirs, "titles": ["Add app.py", "initial commit"]}
    message = push(*flags, fails=True)
    assert "space lab/not_same_compound" in message and "such as README.md" in message and "--replace" in message
    assert hub.repositories[name]["files"] == theirs and hub.commits()[name[1]] == 2
    push(*flags, "--replace")
    assert hub.repositories[name]["files"] == {path: right[path] for path in right if path != ".gitattributes"}


def test_nothing_private_is_pushed_into_a_public_repository(hub, push):
    """Creating a repository that exists leaves its visibility as it is."""
    push("--parts", "metric")
    before = hub.commits()
    message = push("--parts", "metric", "models", "--private", fails=True)
    assert "space lab/not_same_compound" in message and "--private" in message and hub.commits() == before


def test_a_push_that_fails_in_the_middle_says_where_and_continues_when_repeated(hub, push):
    flags = ("--parts", "models", "metric")
    hub.fail = ("POST", f"{NAME}-tubulin/commit", 403)
    message = push(*flags, fails=True)
    assert f"model lab/{NAME}-tubulin" in message and "HTTP 403" in message and "Bearer <token>" in message
    before = hub.commits()
    assert before[f"lab/{NAME}-dna"] == 2 and f"lab/{NAME}" not in before and not hub.collections
    uploaded = {path for method, path in hub.requests if method == "PUT"}
    hub.fail = None
    hub.requests.clear()
    out = push(*flags)
    assert "dna: unchanged" in out and "tubulin: updated" in out
    for name in (f"lab/{NAME}-dna", "lab/not_same_compound"):
        assert hub.commits()[name] == before[name]
    # The weights that had arrived before the failure are not sent again.
    assert uploaded and not uploaded & {path for method, path in hub.requests if method == "PUT"}
    assert len(next(iter(hub.collections.values()))) == 5


def test_without_a_token_or_with_a_wrong_one_nothing_is_created(hub, push, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = push(fails=True)
    assert "HTTP 401" in message and "hf_wrong" not in message
    monkeypatch.delenv("HF_TOKEN")
    assert "HF_TOKEN" in push(fails=True) and not hub.repositories


def test_a_dry_run_writes_folders_that_load_and_asks_nobody(run, tmp_path, capsys):
    push_to_hub.main([str(run), "--dry_run", str(tmp_path / "hub"), "--namespace", "org", "--name", "cells"])
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    assert names == {"cells", "cells-dna", "cells-tubulin", "cells-actin", "not_same_compound"}
    assert "org/cells-actin" in capsys.readouterr().out
    flags = ["--parts", "models", "--dataset_on_hub", "org/screen", "--dry_run", str(tmp_path / "linked")]
    push_to_hub.main([str(run), *flags])
    assert ModelCard.load(tmp_path / "linked" / NAME / "README.md").data.datasets == ["org/screen"]
    assert WSDinoModel.from_pretrained(tmp_path / "hub" / "cells-actin").config.channel_names == ["actin"]
    assert 'pipeline("feature-extraction", model="org/cells"' in (tmp_path / "hub" / "cells" / "README.md").read_text()


def test_mistakes_end_the_command_with_status_2_and_one_sentence(run, tmp_path, capsys):
    for name in ("empty", "untrained", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "untrained" / "results.json").write_text(json.dumps(make_results()))
    (tmp_path / "untrained" / "settings.json").write_text(json.dumps(make_results()["settings"]))
    (tmp_path / "broken" / "results.json").write_text("{")
    (tmp_path / "empty" / "README.md").write_text("any folder")
    for flags, words in [
        ([tmp_path / "absent"], "absent"),
        ([tmp_path / "empty"], "wsdino-evaluate"),
        ([tmp_path / "broken"], "results.json"),
        ([tmp_path / "untrained"], "no trained model"),
        ([run, "--dataset", tmp_path / "empty"], "build.json"),
        ([run, "--dataset", "data/elsewhere"], "data/elsewhere"),
    ]:
        with pytest.raises(SystemExit) as ended:
            push_to_hub.main([*map(str, flags), "--dry_run", str(tmp_path / "hub")])
        message = capsys.readouterr().err
        assert ended.value.code == 2 and words in message and message.count("\n") == 1, message
        assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_a_release_holds_half_the_bytes_and_the_same_features(run, tmp_path, dtype, bound):
    """Loaded by the literal call, in float32; written over an earlier one, but over nothing of another kind."""
    flags = ["--dry_run", tmp_path, "--parts", "models", "--name", "cells", "--license", "mit"]
    field = np.random.default_rng(0).integers(0, 16_000, (3, 80, 90)).astype(np.uint16)
    features = {}
    for kind in ("float32", dtype):
        push_to_hub.main([str(word) for word in [run, *flags, "--weights_dtype", kind]])
        assert {path.name for path in tmp_path.iterdir()} == {"cells", *(f"cells-{one}" for one in CHANNELS)}
        extract = pipeline("feature-extraction", model=str(tmp_path / "cells"), trust_remote_code=True)
        assert extract.model.dtype == torch.float32
        size = (tmp_path / "cells" / "model.safetensors").stat().st_size
        features[kind] = (np.array(extract(field)), size)
    (exact, whole), (close, half) = features.values()
    assert 0 < np.abs(exact - close).max() < bound * np.abs(exact).max() and half < 0.6 * whole
    card = ModelCard.load(tmp_path / "cells-dna" / "README.md")
    assert card.data.license == "mit" and dtype in card.text
    foreign = tmp_path / "theirs-dna"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(SystemExit) as ended:
        push_to_hub.main([str(word) for word in [run, *flags, "--name", "theirs"]])
    assert ended.value.code == 2 and [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def environment(hub, home, **more):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept | settings | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"} | more


STRANGER = """
import json, sys
import importlib.abc

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_wsdino", "evaluation_wsdino", "dataset_scripts"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import numpy as np
from transformers import AutoImageProcessor, AutoModel, pipeline

work, name = sys.argv[1:]
field = np.load(f"{work}/field.npy")
results = {
    channel: pipeline("feature-extraction", model=f"lab/{name}-{channel}", trust_remote_code=True)(field[index])
    for index, channel in enumerate(("dna", "tubulin", "actin"))
}
results["combined"] = pipeline("feature-extraction", model=f"lab/{name}", trust_remote_code=True)(field)
model = AutoModel.from_pretrained(f"lab/{name}-dna", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(f"lab/{name}-dna", trust_remote_code=True)
results["auto"] = list(model(**processor(field[0], return_tensors="pt")).pooler_output.shape)

from datasets import load_dataset

rows = load_dataset(f"lab/{name}-screen", "all", split="train")
results["rows"] = len(rows)
results["mean"] = float(np.asarray(rows[0]["dna"]).mean())

import os
if os.environ.get("HF_HUB_OFFLINE") != "1":  # the evaluate library asks the server even for what it has
    import evaluate

    metric = evaluate.load("lab/not_same_compound")
    results["nsc"] = metric.compute(
        predictions=[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]],
        references=["a", "a", "b", "b"],
        compounds=["1", "2", "3", "4"],
        batches=["x", "y", "x", "y"],
    )["nsc"]
json.dump(results, open(f"{work}/stranger.json", "w"))
"""


@pytest.mark.slow
def test_a_stranger_loads_what_was_pushed(hub, push, run, tiny_screen, tmp_path):
    from datasets import load_dataset

    field = np.random.default_rng(0).integers(0, 16_000, (3, 80, 90)).astype(np.uint16)
    np.save(tmp_path / "field.npy", field)
    (tmp_path / "stranger.py").write_text(STRANGER)
    push("--private")
    models = [f"{NAME}-{channel}" for channel in CHANNELS] + [NAME]
    expected = {("model", f"lab/{name}") for name in models}
    expected |= {("dataset", f"lab/{NAME}-screen"), ("space", "lab/not_same_compound")}
    assert hub.repositories.keys() == expected
    assert all(repository["private"] for repository in hub.repositories.values())
    for name in models:
        files = hub.repositories["model", f"lab/{name}"]["files"]
        folder = run / "model" if name == NAME else run / name.removeprefix(f"{NAME}-") / "model"
        assert files.keys() == {path.name for path in folder.iterdir()} | {"README.md", ".gitattributes"}
        assert all(files[path.name] == path.read_bytes() for path in folder.iterdir())
    (collection,) = hub.collections.values()
    assert set(collection) == expected

    for offline in ("0", "1"):  # the second time from the cache alone
        loaded = subprocess.run(
            [sys.executable, "-I", str(tmp_path / "stranger.py"), str(tmp_path), NAME],
            env=environment(hub, tmp_path / "stranger", HF_HUB_OFFLINE=offline, HF_TOKEN="hf_reader"),
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert loaded.returncode == 0, loaded.stderr[-3000:]
        results = json.loads((tmp_path / "stranger.json").read_text())
        check_features(run, field, results)
        rows = load_dataset(str(tiny_screen), "all", split="train")
        assert results["rows"] == len(rows) and results["mean"] == float(np.asarray(rows[0]["dna"]).mean())
        assert results["auto"] == [4, 32]
        assert results.get("nsc", 1.0) == 1.0 and ("nsc" in results) == (offline == "0")


def check_features(run, field, results):
    """What came from the server is what the folders compute here."""
    for index, channel in enumerate((*CHANNELS, "combined")):
        combined = channel == "combined"
        folder = run / "model" if combined else run / channel / "model"
        cls = WSDinoMultiChannelModel if combined else WSDinoModel
        pipe = WSDinoFeatureExtractionPipeline(
            model=cls.from_pretrained(folder),
            image_processor=WSDinoImageProcessor.from_pretrained(folder),
            device="cpu",
        )
        np.testing.assert_allclose(results[channel], pipe(field if combined else field[index]), atol=1e-5)
