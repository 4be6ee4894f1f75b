"""Any network's features: repositories, original checkpoints, transformers' ViT, from folders and from a Hub."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from extraction_run import (
    PAPER,
    command,
    enlarge,
    extract,
    features_of,
    make_model,
    plain_features,
    plain_tiles,
    screen_rows,
)
from hub_server import HubServer
from transformers import ViTConfig, ViTModel

from modeling_wsdino import WSDinoImageProcessor, build_repository


@pytest.fixture
def run(random_run, tmp_path):
    """A copy of the run to write into."""
    return Path(shutil.copytree(random_run, tmp_path / "run"))


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
    extract("--model", run / "tubulin" / "model", *common, "--subsets", "dmso", "--pictures", tmp_path / "pictures")
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
            expected = plain_features(model, row[channel])
            np.testing.assert_allclose(features_of(table, channel).iloc[number], expected, atol=2e-4)


def vit_features(vit, plane):
    """The four tiles of a field, gray as RGB, through transformers' own ViT."""
    with torch.no_grad():
        return np.median(vit(plain_tiles(plane, PAPER)).last_hidden_state[:, 0].double().numpy(), axis=0)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder as of facebook/dino-vits8, with the image processor's file of that kind, and its network."""
    torch.manual_seed(8)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, image_size=32, patch_size=8
    )
    model = enlarge(ViTModel(config, add_pooling_layer=False).eval())
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
    # DINO's heads are 64 wide.
    model, other = (make_model(seed=seed, hidden_size=64, num_attention_heads=1) for seed in (4, 5))
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
        np.testing.assert_allclose(table.iloc[number], plain_features(model, row["actin"]), atol=2e-4)


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
