"""What the tests of extraction share: a run folder with random networks, and a plain way to its features."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

import extract_profiles
from modeling_wsdino import (
    WSDinoConfig,
    WSDinoImageProcessor,
    WSDinoModel,
    build_combined_repository,
    build_repository,
)

ROOT = Path(__file__).parents[1]
CHANNELS = ["dna", "tubulin", "actin"]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
PAPER = ((0, 8), (0, 40), (32, 8), (32, 40))  # the four 32-pixel tiles in the middle of 64 x 80
LAUNCH_TWO = (
    *("-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


def make_model(channels=(), seed=0, **size):
    torch.manual_seed(seed)
    return enlarge(WSDinoModel(WSDinoConfig(**(SIZE | size), channel_names=list(channels))).eval())


def enlarge(model):
    """Make weights large enough for fields to differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5).add_(0.05 * torch.randn_like(parameter))
    return model


def make_run(folder, screen):
    """A run folder as training leaves it, with random networks."""
    for seed, channel in enumerate(CHANNELS):
        build_repository(folder / channel / "model", make_model([channel], seed), WSDinoImageProcessor(tile_size=32))
    build_combined_repository(folder / "model", {channel: folder / channel / "model" for channel in CHANNELS})
    arguments = {"channels": CHANNELS, "init": "random", "whiten_patches": False, "seed": 5}
    content = {"arguments": arguments, "dataset": {"path": str(screen)}}
    (folder / "settings.json").write_text(json.dumps(content))
    return folder


def extract(*words):
    extract_profiles.main([str(word) for word in words])


def refused(capsys, *words):
    """The one sentence of a refusal."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        extract(*words)
    assert ended.value.code == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("wsdino-extract: error: ")
    return sentence


def command(*words, **environment):
    """A real process; its output and status."""
    words = [str(word) for word in words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def features_of(table, channel=None):
    return table[[name for name in table if not name.startswith("Metadata_") and name.startswith(channel or "")]]


def screen_rows(screen, subsets=("annotated", "dmso")):
    """Rows of the built dataset's own Parquet files with images as arrays, read without the project."""
    for subset in subsets:
        for path in sorted((screen / "data" / subset).glob("*.parquet")):
            for row in pq.read_table(path).to_pylist():
                for channel in CHANNELS:
                    with Image.open(io.BytesIO(row[channel]["bytes"])) as image:
                        row[channel] = np.array(image)
                yield row


def plain_tiles(plane, corners, size=32):
    tiles = [plane[top : top + size, left : left + size].astype(np.float64) for top, left in corners]
    return torch.tensor(np.minimum(tiles, 10_000) / 10_000, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)


def plain_features(model, plane, corners=PAPER, size=32):
    """One tile after the other through the whole network, gray as RGB, and NumPy's median."""
    with torch.no_grad():
        tokens = [model(tile[None]).last_hidden_state[0, 0].double() for tile in plain_tiles(plane, corners, size)]
    return np.median(np.stack(tokens), axis=0)


def small_dataset(folder, planes):
    """A dataset folder with one subset, `all`, of one channel."""
    columns = {"dna": ImageFeature(), "plate": Value("string"), "well": Value("string"), "site": Value("int64")}
    rows = {
        "dna": [Image.fromarray(plane) for plane in planes],
        "plate": ["p"] * len(planes),
        "well": [f"w{number}" for number in range(len(planes))],
        "site": [1] * len(planes),
    }
    (folder / "data").mkdir(parents=True)
    Dataset.from_dict(rows, features=Features(columns)).to_parquet(folder / "data" / "train.parquet")
    card = "---\nconfigs:\n- config_name: all\n  data_files:\n  - split: train\n    path: data/train.parquet\n---\n"
    (folder / "README.md").write_text(card)
    return folder
