"""The literal pipeline call on a saved repository, where this package cannot be imported, against a plain loop."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoModel, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from modeling_wsdino import (
    WSDinoConfig,
    WSDinoFeatureExtractionPipeline,
    WSDinoImageProcessor,
    WSDinoModel,
    WSDinoMultiChannelModel,
    attention_mass_mask,
    build_repository,
)

CHANNELS = ["dna", "tubulin", "actin"]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}


def make_model(channels, seed=0, **values):
    torch.manual_seed(seed)
    cls = WSDinoMultiChannelModel if len(channels) > 1 else WSDinoModel
    model = cls(WSDinoConfig(**SIZE, **values, channel_names=channels)).eval()
    with torch.no_grad():  # weights large enough for tiles to differ
        for parameter in model.parameters():
            parameter.mul_(5).add_(0.05 * torch.randn_like(parameter))
    return model


def make_fields(count, channels, seed=0, shape=(70, 90)):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 16_000, (channels, *shape)).astype(np.uint16) for _ in range(count)]


def plain_features(model, field, corners=((3, 13), (3, 45), (35, 13), (35, 45)), size=32):
    """One field, one tile and one channel at a time; the median of NumPy."""
    towers = model.towers.values() if isinstance(model, WSDinoMultiChannelModel) else [model]
    parts = []
    for tower, plane in zip(towers, field, strict=True):
        tiles = []
        for top, left in corners:
            tile = np.minimum(plane[top : top + size, left : left + size].astype(np.float64), 10_000) / 10_000
            with torch.no_grad():
                tokens = tower(torch.tensor(tile, dtype=torch.float32)[None, None]).last_hidden_state
            tiles.append(tokens[0, 0].numpy())
        parts.append(np.median(np.stack(tiles).astype(np.float64), axis=0))
    vector = np.concatenate(parts)
    return vector / np.sqrt((vector**2).sum()) if len(parts) > 1 else vector


def make_pipeline(channels=("dna",), **kwargs):
    model = make_model(list(channels))
    processor = WSDinoImageProcessor(tile_size=32)
    return WSDinoFeatureExtractionPipeline(model=model, image_processor=processor, device="cpu", **kwargs)


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


def plain_symmetries(tile, count):
    """The tile under symmetries of the square, pixel by pixel."""
    n = len(tile)
    places = {
        "as it is": lambda i, j: (i, j),
        "mirrored": lambda i, j: (i, n - 1 - j),
        "quarter turn": lambda i, j: (j, n - 1 - i),
        "half turn": lambda i, j: (n - 1 - i, n - 1 - j),
        "three quarters": lambda i, j: (n - 1 - j, i),
        "upside down": lambda i, j: (n - 1 - i, j),
        "transposed": lambda i, j: (j, i),
        "other diagonal": lambda i, j: (n - 1 - j, n - 1 - i),
    }
    return [
        np.array([[tile[place(i, j)] for j in range(n)] for i in range(n)]) for place in list(places.values())[:count]
    ]


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("channels", [["dna"], CHANNELS], ids=["one channel", "combined"])
def test_features_are_averaged_over_symmetries_before_the_median(channels, count):
    pipe = make_pipeline(channels)
    (field,) = make_fields(1, len(channels))
    towers = pipe.model.towers.values() if len(channels) > 1 else [pipe.model]
    tiles = []
    for tile in pipe.image_processor.field_tiles(field):
        parts = []
        for tower, plane in zip(towers, tile, strict=True):
            views = [torch.tensor(view)[None, None] for view in plain_symmetries(plane, count)]
            with torch.no_grad():
                parts.append(np.mean([tower(view).pooler_output[0].numpy() for view in views], axis=0))
        tiles.append(np.concatenate(parts))
    expected = np.median(tiles, axis=0)
    expected = expected / np.linalg.norm(expected) if len(channels) > 1 else expected
    np.testing.assert_allclose(pipe(field, outputs="tiles", symmetries=count), tiles, atol=1e-5)
    np.testing.assert_allclose(pipe([field, field], symmetries=count, batch_size=2), [expected] * 2, atol=1e-5)
    pipe.image_processor.symmetries = count
    np.testing.assert_allclose(pipe(field), expected, atol=1e-5)
    pipe.image_processor.symmetries = 8
    np.testing.assert_allclose(pipe(field, symmetries=count), expected, atol=1e-5)
    if count == 8:  # a cell is the same cell however it lies under the microscope
        square = field[..., :70, :70]
        for turned in (np.rot90(square, 1, (-2, -1)), square[..., ::-1]):
            np.testing.assert_allclose(pipe(turned.copy()), pipe(square), atol=1e-5)


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


def test_the_combined_vector_has_unit_length_and_one_channel_has_not():
    (field,) = make_fields(1, 3)
    assert np.linalg.norm(make_pipeline(CHANNELS)(field)) == pytest.approx(1, abs=1e-6)
    assert abs(np.linalg.norm(make_pipeline()(field[0])) - 1) > 0.1


@pytest.mark.parametrize(("count", "grid"), [(4, 2), (9, 3), (1, 1)])
def test_the_median_is_numpys_for_even_and_odd_numbers_of_tiles(count, grid):
    pipe = make_pipeline()
    pipe.image_processor.tile_grid = grid
    field = make_fields(1, 1, shape=(100, 100))[0]
    tiles = np.array(pipe(field, outputs="tiles"))
    assert tiles.shape == (count, 32)
    np.testing.assert_allclose(pipe(field), np.median(tiles, axis=0), atol=1e-6)


def test_every_output_is_the_models_own():
    pipe = make_pipeline()
    model, field = pipe.model, make_fields(1, 1)[0]
    pixel_values = pipe.image_processor(field)["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values)
        maps = model.attention_maps(pixel_values)
    tiles = pipe(field, outputs="tiles", return_tensors=True)
    patches = pipe(field, outputs="patches", return_tensors=True)
    attention = pipe([field, field], outputs="attention", return_tensors=True, batch_size=2)[1]
    torch.testing.assert_close(tiles, expected.pooler_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches, expected.last_hidden_state[:, 1:].reshape(4, 4, 4, 32), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention, maps, atol=1e-5, rtol=1e-5)
    assert np.shape(pipe(field, outputs="attention")) == (4, 2, 4, 4)
    assert attention_mass_mask(attention).float().mean() < 0.9


def test_fields_of_different_sizes_share_a_batch_when_all_of_each_is_tiled():
    pipe = make_pipeline()
    fields = [make_fields(1, 1, shape=shape)[0] for shape in ((32, 32), (70, 90), (33, 64))]
    together = pipe(fields, tiles="full", batch_size=3)
    np.testing.assert_allclose(together, [pipe(field, tiles="full") for field in fields], atol=1e-5)
    assert [len(pipe(field, tiles="full", outputs="tiles")) for field in fields] == [1, 9, 4]


def test_the_original_codes_way_takes_the_lower_median_of_its_crops():
    pipe = make_pipeline()
    fields = make_fields(2, 1, shape=(512, 640))
    lefts = {64: 256, 320: 224}  # and the widths of the crops there
    expected = []
    for field in fields:
        scaled = torch.from_numpy(np.minimum(field, 10_000).astype(np.float32) / 10_000)
        with torch.no_grad():
            crops = [
                pipe.model(scaled[None, :, top : top + 224, left : left + width]).pooler_output
                for top in (32, 256)
                for left, width in lefts.items()
            ]
        expected.append(torch.median(torch.cat(crops), dim=0).values.numpy())
    np.testing.assert_allclose(pipe(fields, tiles="original_code", batch_size=2), expected, atol=1e-5)
    patches = pipe(fields[0], tiles="original_code", outputs="patches", return_tensors=True)
    assert [tuple(tile.shape) for tile in patches] == [(28, 32, 32), (28, 28, 32)] * 2
    assert np.shape(pipe(fields[0], tiles="original_code", outputs="patches")[0]) == (28, 32, 32)


def test_streams_are_read_as_they_are_asked_for():
    pipe, taken = make_pipeline(), []

    def stream():
        for index, field in enumerate(make_fields(20, 1)):
            taken.append(index)
            yield field

    results = iter(pipe(stream(), batch_size=4))
    next(results)
    assert len(taken) <= 5  # the stock pipelines look one ahead
    assert len(list(results)) == 19


def test_a_last_short_batch_and_no_fields_at_all():
    pipe = make_pipeline()
    fields = make_fields(5, 1)
    np.testing.assert_allclose(pipe(fields, batch_size=4), [pipe(field) for field in fields], atol=1e-5)
    assert pipe([]) == [] and list(pipe(field for field in [])) == []
    np.testing.assert_allclose(pipe(tuple(fields[:2])), pipe(fields[:2]), atol=1e-6)


def test_half_precision_gives_float32_near_the_exact():
    field = make_fields(1, 3)[0]
    pipe = make_pipeline(CHANNELS)
    exact = pipe(field, return_tensors=True)
    pipe.model.to(torch.bfloat16)
    half = pipe(field, return_tensors=True)
    assert half.dtype == torch.float32 and torch.dot(exact, half) > 0.98


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
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


def test_half_precision_on_a_cpu_is_warned_about():
    model, processor = make_model(["dna"]).to(torch.bfloat16), WSDinoImageProcessor(tile_size=32)
    with pytest.warns(UserWarning, match="bfloat16 on a CPU"):
        WSDinoFeatureExtractionPipeline(model=model, image_processor=processor, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_pipeline()


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


def test_a_compiled_model_gives_the_same_features():
    fields = make_fields(3, 1)
    pipe = make_pipeline()
    expected = pipe(fields, batch_size=3)
    pipe.model.compile(fullgraph=True)
    np.testing.assert_allclose(pipe(fields, batch_size=3), expected, atol=1e-5)


def test_three_channels_for_one():
    """Gray replicated to RGB, as the paper feeds it, is fine; three different channels are a mistake."""
    pipe = make_pipeline()
    (field,) = make_fields(1, 3)
    replicated = np.repeat(field[:1], 3, axis=0)
    np.testing.assert_allclose(pipe(replicated), pipe(field[0]), atol=1e-4)
    with pytest.warns(UserWarning, match="three different channels, but this model knows dna alone"):
        pipe(field)


def test_mistakes_are_refused_in_a_sentence():
    pipe, combined = make_pipeline(), make_pipeline(CHANNELS)
    (field,) = make_fields(1, 3)
    for call, words in [
        (lambda: pipe(field[:2]), "has 2 channels, but this model takes 1 .dna."),
        (lambda: combined(field[0]), "has 1 channels, but this model takes 3 .dna, tubulin, actin."),
        (lambda: pipe({"actin": field[0]}), "channel dna is not among those given .actin."),
        (lambda: pipe(field[:1, :50]), "50x90 pixels .* smaller than the 64x64"),
        (lambda: pipe(field[0], outputs="tokens"), "outputs must be one of features, tiles, patches, attention"),
        (lambda: pipe(field[0], tiles="none"), "tiles must be one of"),
        (lambda: pipe(field[0], symmetries=3), "symmetries must be 1, 4 or 8"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="poool"):
        pipe(field[0], poool=True)


class Screen(torch.utils.data.Dataset):
    """A dataset with two channels, as `datasets` gives them."""

    column_names = ["dna", "actin", "well"]

    def __init__(self):
        self.fields = make_fields(3, 2)

    def __len__(self):
        return len(self.fields)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return {"dna": self.fields[index][0], "actin": self.fields[index][1], "well": "B02"}


def test_another_channels_column_is_refused():
    pipe = make_pipeline()
    assert np.shape(list(pipe(KeyDataset(Screen(), "dna"), batch_size=2))) == (3, 32)
    with pytest.raises(ValueError, match=r"column actin .* trained on dna: give KeyDataset\(dataset, 'dna'\)"):
        pipe(KeyDataset(Screen(), "actin"))


def test_a_dataset_of_several_channels_needs_no_key():
    screen = Screen()
    combined = make_pipeline(["dna", "actin"])
    expected = [combined(field) for field in screen.fields]
    np.testing.assert_allclose(list(combined(screen, batch_size=2)), expected, atol=1e-5)
    pictures = {name: [Image.fromarray(row[name]) for row in screen] for name in ("actin", "dna")}
    features = Features({"actin": ImageFeature(), "dna": ImageFeature(), "well": Value("string")})
    table = Dataset.from_dict(pictures | {"well": ["B02"] * 3}, features=features)
    np.testing.assert_allclose(list(combined(table, batch_size=2)), expected, atol=1e-5)
    np.testing.assert_allclose(list(combined(table.to_iterable_dataset(), batch_size=2)), expected, atol=1e-5)
    with pytest.raises(ValueError, match="columns actin, well, but this model needs dna"):
        combined(table.remove_columns("dna"))
    with pytest.raises(ValueError, match="the dataset has the splits train, test: give one of them"):
        combined(DatasetDict(train=table, test=table))


def test_a_column_of_a_dataset_is_streamed():
    pipe, screen = make_pipeline(), Screen()
    pictures = {name: [Image.fromarray(row[name]) for row in screen] for name in ("actin", "dna")}
    table = Dataset.from_dict(pictures, features=Features({"actin": ImageFeature(), "dna": ImageFeature()}))
    expected = [pipe(row["dna"]) for row in screen]
    for source in (table, table.to_iterable_dataset()):
        np.testing.assert_allclose(list(pipe(source["dna"], batch_size=2)), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"column actin .* trained on dna: give KeyDataset\(dataset, 'dna'\)"):
        pipe(table["actin"])
