"""Publishing a run with the real command to a small Hub-like server, and loading from it as a stranger."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard

import push_to_hub
from model_cards import metric_card, model_card
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
CHANNELS = ("dna", "tubulin", "actin")
NAME = "wsdino-vit32x1p8-simulated"


def make_results(dataset="nowhere", simulated=True):
    """A results.json whose every number is recognisable."""

    def scores(seed, interval=(0.31, 0.53)):
        right = 41 + seed
        found = {"nsc": right / 97, "nsc_correct": right, "nsc_total": 97}
        found |= {"nscb": (right - 7) / 89, "nscb_correct": right - 7, "nscb_total": 89}
        return found | {"nsc_bootstrap": list(interval), "nscb_bootstrap": [0.29, 0.57]}

    source = "simulated, seed 7" if simulated else "BBBC021v1"
    sets = {
        name: scores(seed)
        | {"channels": {channel: scores(seed + 1 + i, (0.2 + i / 50, 0.6)) for i, channel in enumerate(CHANNELS)}}
        for seed, name in ((11, "untrained"), (17, "intensity"), (23, "trained"))
    }
    pair = {"compared": 97, "gained": ["a"] * 13, "lost": ["b"], "p_compound": 0.0173}
    return {
        "simulated": simulated,
        "sources": [source],
        "headline": {"set": "trained", "nsc": sets["trained"]["nsc"], "nscb": sets["trained"]["nscb"]},
        "comparisons": [{"first": "untrained", "second": "trained", "nsc": pair, "nscb": pair}],
        "counts": {
            **{"fields": 2311, "dmso_fields": 619, "scored_treatments": 97, "compounds": 38},
            **{"moas": 12, "plates": 53, "batches": 9},
        },
        "protocol": {"normalization": "TVN", "metric": "cosine", "k": 1, "batch_rule": "median"},
        "sets": sets,
        "training": {
            "dna": {"collapse": {"verdict": "suspect", "reasons": ["the targets hardly differ"], "last": {}}}
        },
        "settings": {
            "arguments": {"weak_label": "compound", "epochs": 43, "stop_after_epoch": 37, "init": "random", "seed": 5},
            "dataset": {"path": str(dataset), "part": "annotated", "fields": 1693, "source": [source]},
        },
    }


def make_run(folder, dataset="nowhere", **kwargs):
    """A run folder with three small towers, the combined model and results."""
    processor = WSDinoImageProcessor(tile_size=32)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    for seed, channel in enumerate(CHANNELS):
        torch.manual_seed(seed)
        build_repository(
            folder / channel / "model", WSDinoModel(WSDinoConfig(**size, channel_names=[channel])), processor
        )
    build_combined_repository(folder / "model", {channel: folder / channel / "model" for channel in CHANNELS})
    (folder / "results.json").write_text(json.dumps(make_results(dataset, **kwargs)))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_screen):
    return make_run(tmp_path_factory.mktemp("push") / "run", tiny_screen)


def environment(hub, home, **more):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept | settings | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"} | more


def push(hub, run, home, *flags, token=TOKEN):
    """The command in a process of its own, as HF_ENDPOINT is read when the Hub's library is imported."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "push_to_hub.py"), str(run), *flags],
        env=environment(hub, home, **({"HF_TOKEN": token} if token else {})),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert TOKEN not in done.stdout + done.stderr
    return done


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
def test_push_then_load_as_a_stranger_then_push_again(run, tiny_screen, tmp_path):
    from datasets import load_dataset

    field = np.random.default_rng(0).integers(0, 16_000, (3, 80, 90)).astype(np.uint16)
    np.save(tmp_path / "field.npy", field)
    (tmp_path / "stranger.py").write_text(STRANGER)
    with HubServer(TOKEN) as hub:
        done = push(hub, run, tmp_path / "author", "--private")
        assert done.returncode == 0, done.stderr[-2000:]
        models = [f"{NAME}-{channel}" for channel in CHANNELS] + [NAME]
        expected = {("model", f"lab/{name}") for name in models}
        expected |= {("dataset", f"lab/{NAME}-screen"), ("space", "lab/not_same_compound")}
        assert hub.repositories.keys() == expected
        assert all(repository["private"] for repository in hub.repositories.values())
        assert hub.repositories["space", "lab/not_same_compound"]["sdk"] == "static"
        for name in models:
            files = hub.repositories["model", f"lab/{name}"]["files"]
            folder = run / "model" if name == NAME else run / name.removeprefix(f"{NAME}-") / "model"
            assert files.keys() == {path.name for path in folder.iterdir()} | {"README.md", ".gitattributes"}
            assert all(files[path.name] == path.read_bytes() for path in folder.iterdir())
        (collection,) = hub.collections.values()
        assert set(collection["items"]) == expected and collection["title"] == NAME

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

        before = hub.commits()
        again = push(hub, run, tmp_path / "author", "--private")
        assert again.returncode == 0 and again.stdout.count("unchanged") == 6
        assert hub.commits() == before and len(hub.collections) == 1


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


def test_a_push_that_fails_in_the_middle_says_where_and_goes_on_when_repeated(run, tmp_path):
    with HubServer(TOKEN) as hub:
        flags = ("--parts", "models", "metric")
        hub.fail = ("POST", f"{NAME}-tubulin/commit", 0, 403)
        done = push(hub, run, tmp_path, *flags)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        message = done.stderr[done.stderr.index("wsdino-push: error") :]
        assert re.search(
            rf"model lab/{NAME}-tubulin could not be pushed \(HTTP 403, .*the disk is full, Bearer <token>", message
        )
        assert message.count("\n") == 1 and not hub.collections
        done_before = hub.commits()
        assert done_before[f"lab/{NAME}-dna"] == 2 and f"lab/{NAME}" not in done_before
        uploaded = [path for method, path in hub.requests if method == "PUT"]

        hub.fail = None
        hub.requests.clear()
        done = push(hub, run, tmp_path, *flags)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "dna: unchanged" in done.stdout and "tubulin: 8 files changed" in done.stdout
        after = hub.commits()
        assert {name: after[name] for name in (f"lab/{NAME}-dna", "lab/not_same_compound")} == {
            name: done_before[name] for name in (f"lab/{NAME}-dna", "lab/not_same_compound")
        }
        # the weights that had arrived before the failure are not sent again
        assert not set(uploaded) & {path for method, path in hub.requests if method == "PUT"}
        assert len(next(iter(hub.collections.values()))["items"]) == 5


def test_old_files_leave_and_changed_ones_are_replaced(run, tmp_path):
    with HubServer(TOKEN) as hub:
        assert push(hub, run, tmp_path, "--parts", "metric").returncode == 0
        files = hub.repositories["space", "lab/not_same_compound"]["files"]
        right = dict(files)
        files["stale.py"], files["README.md"] = b"old", b"old"
        done = push(hub, run, tmp_path, "--parts", "metric")
        assert done.returncode == 0 and "not_same_compound: 2 files changed" in done.stdout
        assert hub.repositories["space", "lab/not_same_compound"]["files"] == right


def test_files_that_another_put_there_stay(run, tmp_path):
    """A lab may have a repository of that very name, whose files are none of the run's."""
    name, flags = ("space", "lab/not_same_compound"), ("--parts", "metric")
    with HubServer(TOKEN) as hub:
        hub.fail = ("POST", "not_same_compound/commit", 0, 403)  # what a new Space shows is nobody's work
        assert push(hub, run, tmp_path, *flags).returncode == 2
        hub.fail = None
        assert push(hub, run, tmp_path, *flags).returncode == 0
        right = hub.repositories[name]["files"]
        assert right.keys() == {*push_to_hub.METRIC_FILES, "README.md", "index.html", ".gitattributes"}
        theirs = {"files": {"app.py": b"precious", "README.md": b"ours"}, "titles": ["Add app.py", "initial commit"]}
        hub.repositories[name] |= theirs
        before = hub.commits()
        done = push(hub, run, tmp_path, *flags)
        assert done.returncode == 2 and hub.commits() == before and hub.repositories[name]["files"] == theirs["files"]
        message = done.stderr[done.stderr.index("wsdino-push: error") :]
        assert (
            "space lab/not_same_compound could not be pushed (it holds files of others, such as README.md" in message
        )
        assert "--replace" in message and message.count("\n") == 1
        assert push(hub, run, tmp_path, *flags, "--replace").returncode == 0
        assert hub.repositories[name]["files"] == {path: right[path] for path in right if path != ".gitattributes"}


def test_nothing_private_is_pushed_into_a_public_repository(run, tmp_path):
    """Creating a repository that exists leaves its visibility as it is."""
    with HubServer(TOKEN) as hub:
        assert push(hub, run, tmp_path, "--parts", "metric").returncode == 0
        before = hub.commits()
        done = push(hub, run, tmp_path, "--parts", "metric", "models", "--private")
        assert done.returncode == 2 and hub.commits() == before
        assert "space lab/not_same_compound could not be pushed (it is public: make it private" in done.stderr


def test_without_a_token_or_with_a_wrong_one_nothing_is_created(run, tmp_path):
    with HubServer(TOKEN) as hub:
        for token, words in ((None, "there is no Hub token: log in with 'hf auth login'"), ("hf_wrong", "HTTP 401")):
            done = push(hub, run, tmp_path, token=token)
            assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
            assert "hf_wrong" not in done.stderr
        assert not hub.repositories


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
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "results.json").write_text(json.dumps(make_results()))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    for flags, words in [
        ([tmp_path / "absent"], "absent is not a folder: name a run folder"),
        ([empty], "results.json is missing: run wsdino-evaluate"),
        ([tmp_path / "broken"], "results.json is not JSON"),
        ([tmp_path / "untrained"], "holds no trained model"),
        ([run, "--dataset", empty], "is not a built dataset"),
        ([run, "--dataset", "data/elsewhere"], "data/elsewhere is not a folder here: name it with --dataset"),
    ]:
        with pytest.raises(SystemExit) as ended:
            push_to_hub.main([*map(str, flags), "--dry_run", str(tmp_path / "hub")])
        message = capsys.readouterr().err
        assert ended.value.code == 2 and words in message and message.count("\n") == 1, message
    with pytest.raises(SystemExit):
        push_to_hub.main([str(run), "--dry_run", str(run)])
    assert "is not empty: name a new folder" in capsys.readouterr().err


def card_of(results, channels, **more):
    config = {"channel_names": channels, "hidden_size": 384, "num_hidden_layers": 12, "patch_size": 8}
    processor = {"tile_size": 224, "tile_grid": 2, "tiles": "paper", "max_intensity": more.pop("limit", 10_000)}
    return model_card(results, config, processor, **({"repo_id": "lab/name", "dataset_name": "BBBC021v1"} | more))


@pytest.mark.parametrize("channels", [["tubulin"], list(CHANNELS)], ids=["one channel", "combined"])
def test_a_card_shows_the_measured_numbers_and_no_others(channels):
    results = make_results(simulated=False)
    card = ModelCard(card_of(results, channels, dataset_id="lab/bbbc021"))
    scores = results["sets"]["trained"]
    scores = scores if len(channels) > 1 else scores["channels"]["tubulin"]
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {"NSC": scores["nsc"], "NSCB": scores["nscb"]}
    assert (
        card.data.model_name == "name" and card.data.datasets == ["lab/bbbc021"] and "simulated" not in card.data.tags
    )
    text = card.text
    for number in ("2,311", "619", "1,693", "38", "53", "epoch 37", f"({scores['nsc_correct']}/97)"):
        assert number in text, number
    assert ("0.31-0.53" in text) == (len(channels) > 1) == ("gains 13 and loses 1 of 97" in text)
    assert ("0.22-0.60" in text) == (channels == ["tubulin"])
    # every number of the table and of the data is in results.json (shares rounded)
    known = set(re.findall(r"\d+", json.dumps(results)))
    exact = [found for found in re.findall(r"\d+(?:\.\d+)?", json.dumps(results))]
    rounded = {f"{float(value):.{digits}f}" for value in exact for digits in (2, 3)}
    results_part = text[text.index("## Results") : text.index("## Limits")]
    data_part = text[text.index("## Data") : text.index("## Results")].replace(",", "")
    for number in re.findall(
        r"\d+\.\d+|\d+", results_part + data_part.replace("BBBC021v1", "").replace("bbbc021", "")
    ):
        assert number in known | rounded | {"95", "13"}, number  # 95 % intervals, 13 gained treatments


def test_a_card_says_what_the_pipeline_leaves_to_the_user():
    """The training data were corrected and resized; fields straight from a microscope are not."""
    text = " ".join(card_of(make_results(simulated=False), ["dna"]).split())
    assert "neither corrected for illumination nor resized: prepare yours as the training data were" in text
    assert "raw" not in text and "the median over its tiles of the CLS token" in text


def test_a_card_of_simulated_data_says_so_first():
    card = ModelCard(card_of(make_results(), ["dna"], dataset_name="simulated screen"))
    assert card.text.strip().startswith("# Simulated demonstration: ")
    assert "simulated" in card.data.tags and "Simulated data." in card.text
    assert {result.metric_name for result in card.data.eval_results} == {
        "NSC (simulated data)",
        "NSCB (simulated data)",
    }
    assert "- dna: suspect: the targets hardly differ." in card.text
    assert ModelCard(metric_card("lab/not_same_compound")).data.to_dict()["sdk"] == "static"


def test_a_card_tells_the_recipe_that_ran_and_no_setting_that_had_no_effect():
    results = make_results()
    arguments = results["settings"]["arguments"]
    arguments |= {"centering": "sinkhorn", "center_momentum": 0.8, "koleo_weight": 0.02, "whiten_patches": True}
    arguments |= {"exclude_compounds": ["taxol", "AZ-C"], "local_crop_area": [0.04, 0.08], "anchor_group": "plate"}
    results["protocol"]["aligned_by"] = None
    text = card_of(results, ["dna"])
    for row in (
        "| targets kept apart by | sinkhorn |",
        "| weight of KoLeo | 0.02 |",
        "| whitened patch embedding | yes |",
        "| compounds kept out | taxol, AZ-C |",
        "| their share of the field | 0.04, 0.08 |",
        "| anchors of a step share | plate |",
    ):
        assert row in text, row
    assert "centre momentum" not in text and "aligned by" not in text and "None" not in text
    assert "Trained on cells drawn by a program" in text
    arguments |= {"init": "facebook/dino-vits8", "centering": "mean", "exclude_compounds": []}
    results["simulated"] = False
    text = card_of(results, ["dna"])
    assert "| centre momentum | 0.8 |" in text and "whitened" not in text and "kept out" not in text
    assert "Trained on one screen" in text and "16-bit intensities of the dna channel" in text
    assert "8-bit intensities of" in card_of(results, ["dna"], limit=255)


def test_nothing_scored_is_a_dash_and_no_metadata():
    results = make_results()
    for part in results["sets"].values():
        part |= {"nscb": None, "nscb_correct": 0, "nscb_total": 0}
    card = ModelCard(card_of(results, list(CHANNELS)))
    assert [result.metric_name for result in card.data.eval_results] == ["NSC (simulated data)"]
    assert "| - |" in card.text


def test_names_of_architectures_and_data():
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    names = {(384, 12, 6, 8): "vits8", (768, 12, 12, 16): "vitb16", (96, 4, 3, 8): "vit96x4p8"}
    for shape, name in names.items():
        assert push_to_hub.architecture_name(dict(zip(sizes, shape, strict=True))) == name
    assert push_to_hub.dataset_names(make_results(simulated=False)) == ("bbbc021", "BBBC021v1")
    assert push_to_hub.dataset_names(make_results()) == ("simulated", "simulated screen")
