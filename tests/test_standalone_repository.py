"""The literal pipeline call on a saved repository, where this package cannot be imported, against a plain loop."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small_fields import CHANNELS, make_fields, make_model, plain_features
from transformers import AutoModel, pipeline

from modeling_wsdino import WSDinoImageProcessor, build_repository

STRANGER = """
import json, sys
import importlib.abc

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_wsdino":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import modeling_wsdino
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("this package can be imported")

import numpy as np
import torch
from datasets import Dataset, Features, Image as ImageFeature
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline
from transformers.pipelines.pt_utils import KeyDataset

folder, work = sys.argv[1:]
fields = list(np.load(f"{work}/fields.npy"))
channels = fields[0].shape[0]
pipe = pipeline("feature-extraction", model=folder, trust_remote_code=True)
assert type(pipe.model).__module__.startswith("transformers_modules."), type(pipe.model).__module__
first = pipe(fields[0])
assert isinstance(first, list) and isinstance(first[0], float), type(first)
results = {
    "arrays": [pipe(field) for field in fields],
    "list": pipe(fields),
    "batches": pipe(fields, batch_size=3),
    "generator": list(pipe((field for field in fields), batch_size=2)),
    "tensors": torch.stack(pipe(fields, return_tensors=True)).tolist(),
    "workers": pipe(fields, batch_size=2, num_workers=2),
}
if channels == 1:
    planes = [field[0] for field in fields]
    pictures = [Image.fromarray(plane) for plane in planes]
    assert pictures[0].mode == "I;16"
    columns = Features({"dna": ImageFeature(), "well": __import__("datasets").Value("string")})
    dataset = Dataset.from_dict({"dna": pictures, "well": ["B02"] * len(planes)}, features=columns)
    results |= {
        "planes": pipe(planes),
        "pictures": pipe(pictures, batch_size=2),
        "png": pipe([f"{work}/{index}.png" for index in range(len(planes))], batch_size=2),
        "tiff": [pipe(f"{work}/{index}.tif") for index in range(len(planes))],
        "KeyDataset": list(pipe(KeyDataset(dataset, "dna"), batch_size=2)),
        "named": pipe([{"dna": plane, "actin": None} for plane in planes]),
    }
else:
    names = pipe.model.config.channel_names
    results["named"] = pipe([dict(zip(names, field)) for field in fields], batch_size=2)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    by_hand = [model(**processor(field, return_tensors="pt")).pooler_output for field in fields]
results["auto classes"] = torch.stack(by_hand).mean(1).tolist()
json.dump(results, open(f"{work}/results.json", "w"))
"""


def run_as_stranger(tmp_path, folder, fields):
    """What the stranger's script computes from a repository and fields, by kind of input."""
    np.save(tmp_path / "fields.npy", np.stack(fields))
    for index, field in enumerate(fields):
        for suffix in ("png", "tif"):
            Image.fromarray(field[0]).save(tmp_path / f"{index}.{suffix}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "stranger.py").write_text(STRANGER)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "stranger.py"), str(folder), str(tmp_path)],
        cwd=tmp_path / "elsewhere",
        env=environment,
        stdin=subprocess.DEVNULL,  # a question about trust would end here
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    by_hand = results.pop("auto classes")
    assert np.shape(by_hand) == np.shape(results["arrays"])
    return results


@pytest.mark.parametrize("channels", [["dna"], CHANNELS], ids=["one channel", "combined"])
def test_a_stranger_gets_the_plain_loops_features(tmp_path, channels):
    model = make_model(channels)
    folder = build_repository(tmp_path / "a-repository", model, WSDinoImageProcessor(tile_size=32))
    fields = make_fields(5, len(channels))
    results = run_as_stranger(tmp_path, folder, fields)
    expected = np.stack([plain_features(model, field) for field in fields])
    assert expected.shape == (5, 32 * len(channels)) and np.ptp(expected, axis=0).mean() > 1e-3
    for name, features in results.items():
        np.testing.assert_allclose(features, expected, atol=1e-4, err_msg=name)
    assert len(results) == (12 if len(channels) == 1 else 7)


@pytest.mark.parametrize("channels", [["dna"], CHANNELS], ids=["one channel", "combined"])
def test_a_stranger_gets_the_features_of_single_cells_too(tmp_path, channels):
    """A convolutional stem, a logarithmic scale, one tile per cell and symmetries all stand in the repository."""
    model = make_model(channels, patch_embedding="convolutional")
    processor = WSDinoImageProcessor(tile_size=32, tile_grid=1, intensity_scale="log", symmetries=4)
    folder = build_repository(tmp_path / "cells", model, processor)
    cells = make_fields(3, len(channels), shape=(36, 36))
    expected = []
    for cell in cells:
        scaled = torch.from_numpy(np.log(np.maximum(cell[:, 2:34, 2:34].astype(np.float64), 200) / 1000) / 0.8).float()
        views = [scaled, scaled.flip(2), torch.rot90(scaled, 1, (1, 2)), torch.rot90(scaled, 2, (1, 2))]
        with torch.no_grad():
            mean = sum(model(view[None]).pooler_output[0] for view in views) / 4
        expected.append((mean / mean.norm() if len(channels) > 1 else mean).numpy())
    for name, results in run_as_stranger(tmp_path, folder, cells).items():
        np.testing.assert_allclose(results, expected, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("order", [("one", "three"), ("three", "one")])
def test_a_channel_and_the_combined_model_load_in_one_process(order, tmp_path):
    """Of a run, both lie in folders called `model`: their code is one module then, and transformers, which goes by the
    config's class, would give the second the class of the first, and so random weights."""
    models = {"one": make_model(["dna"], seed=1), "three": make_model(CHANNELS, seed=2)}
    (field,) = make_fields(1, 3)
    for name in order:
        folder = build_repository(tmp_path / name / "model", models[name], WSDinoImageProcessor(tile_size=32))
        own = field[:1] if name == "one" else field
        loaded = pipeline("feature-extraction", model=str(folder), trust_remote_code=True, device="cpu")
        np.testing.assert_allclose(loaded(own), plain_features(models[name], own), atol=2e-5)
        auto = AutoModel.from_pretrained(folder, trust_remote_code=True)
        assert type(auto).__name__ == type(models[name]).__name__


def test_a_saved_pipeline_loads_again(tmp_path):
    """What a user saves after loading a repository is a whole repository too, with the code of the pipeline."""
    build_repository(tmp_path / "model", make_model(["dna"]), WSDinoImageProcessor(tile_size=32))
    loaded = pipeline("feature-extraction", model=str(tmp_path / "model"), trust_remote_code=True, device="cpu")
    loaded.save_pretrained(tmp_path / "saved")
    (field,) = make_fields(1, 1)
    for task in ("feature-extraction", "image-feature-extraction"):  # the second stands on the Hub's page of a model
        again = pipeline(task, model=str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
        assert again(field) == loaded(field)
    for name in ("pipeline_wsdino.py", "modeling_wsdino.py"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_one_tower_is_saved_whole_after_the_combined_model_of_the_same_name(tmp_path):
    """As of `run/model` and `run/dna/model`: AutoModel takes the class of the first for the second, too."""
    one, both = tmp_path / "one" / "alike", tmp_path / "both" / "alike"
    build_repository(one, make_model(["dna"]), WSDinoImageProcessor(tile_size=32))
    build_repository(both, make_model(["dna", "actin"]), WSDinoImageProcessor(tile_size=32))
    pipeline("feature-extraction", model=str(both), trust_remote_code=True, device="cpu")
    loaded = pipeline("feature-extraction", model=str(one), trust_remote_code=True, device="cpu")
    loaded.save_pretrained(tmp_path / "saved")
    again = pipeline("feature-extraction", model=str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    (field,) = make_fields(1, 1)
    assert again(field) == loaded(field)
