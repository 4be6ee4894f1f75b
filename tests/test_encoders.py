"""Any encoder's profiles against a plain loop: tiles cut by hand, the network's own call, NumPy's median."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from extraction_run import extract, features_of, screen_rows
from transformers import (
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
)

import extract_profiles

SIZE = 32
MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.25, 0.3]
BLOCK = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}


def resnet():
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1], "layer_type": "basic"}
    return ResNetModel(ResNetConfig(**sizes)), lambda model, x: model(x).pooler_output.flatten(1)


def convnext():
    model = ConvNextModel(ConvNextConfig(hidden_sizes=[16, 24], depths=[1, 1], num_stages=2, image_size=SIZE))
    return model, lambda model, x: model(x).pooler_output


def siglip():
    text = BLOCK | {"vocab_size": 50, "max_position_embeddings": 8}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=BLOCK | {"image_size": SIZE, "patch_size": 8}))
    return model, lambda model, x: model.vision_model(pixel_values=x).pooler_output


def dinov2():
    config = Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=SIZE, patch_size=8)
    return Dinov2Model(config), lambda model, x: model(x).last_hidden_state[:, 0]


def small_network():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def planes(tiny_screen):
    """The first fields of the screen, as `(channels, height, width)`."""
    rows = [row for row, _ in zip(screen_rows(tiny_screen), range(3), strict=False)]
    return [np.stack([row["dna"], row["actin"], row["tubulin"]]) for row in rows]


def plain_input(plane, limits=(0, 10_000), mean=MEAN, std=STD):
    """Four tiles in the middle of 64 x 80 as the network sees them."""
    low, high = limits
    scaled = np.clip((plane.astype(np.float64) - low) / (high - low), 0, 1)
    tiles = [scaled[..., top : top + SIZE, left : left + SIZE] for top in (0, 32) for left in (8, 40)]
    tiles = np.stack(tiles) if plane.ndim == 3 else np.stack([np.stack([tile] * 3) for tile in tiles])
    normalized = (tiles - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]
    return torch.tensor(normalized, dtype=torch.float32)


def check(output, planes, channels, expected, **inputs):
    """The first rows of a profile file are what `expected` makes of the plain input; a median over tiles."""
    table = pd.read_parquet(output)
    for number, field in enumerate(planes):
        for channel, plane in (("stacked", field),) if channels == "stacked" else zip(channels, field, strict=False):
            with torch.no_grad():
                row = np.median(expected(plain_input(plane, **inputs)).numpy(), axis=0)
            found = features_of(table, channel).iloc[number]
            np.testing.assert_allclose(found, row, atol=2e-5 * max(1, np.abs(row).max()))


@pytest.mark.parametrize("make", [resnet, convnext, siglip, dinov2])
def test_vision_models_of_transformers(make, planes, tiny_screen, tmp_path):
    torch.manual_seed(0)
    model, call = make()
    model.eval().save_pretrained(tmp_path / "model")
    own = {"image_processor_type": "ViTImageProcessor", "image_mean": MEAN, "image_std": STD}
    own |= {"size": {"height": SIZE, "width": SIZE}}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(own))
    words = ["--model", tmp_path / "model", "--dataset", tiny_screen, "--output", tmp_path / "p.parquet"]
    extract(*words, "--channels", "dna", "actin", "--scaling", "clip", "--batch_size", "3")
    check(tmp_path / "p.parquet", planes, ["dna", "actin"], lambda x: call(model, x))


@pytest.fixture
def compiled(tmp_path):
    """A TorchScript and an ONNX file, and a module of Python functions."""
    model = small_network()
    torch.jit.trace(model, torch.zeros(1, 3, SIZE, SIZE)).save(str(tmp_path / "net.pt"))
    pytest.importorskip("onnxscript")
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, SIZE, SIZE),),
        tmp_path / "net.onnx",
        dynamo=True,
        verbose=False,
        dynamic_shapes=(batch,),
    )
    code = (
        "import torch\ndef spread(images):\n    return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1)"
    )
    (tmp_path / "own_encoder.py").write_text(code + "\n\n\ndef flat(images):\n    return images.mean()\n")
    return model


@pytest.mark.parametrize("source", ["net.pt", "net.onnx", "own_encoder:spread"])
@pytest.mark.filterwarnings("ignore")
def test_files_and_functions(source, compiled, planes, tiny_screen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--model", source, "--dataset", tiny_screen, "--output", tmp_path / "p.parquet", "--tile_size", SIZE]
    if source == "net.onnx":
        pytest.importorskip("onnxruntime")
        expected = compiled
    else:  # no file tells their input size, which is 224: tiles are resized to it

        def expected(x):
            x = torch.nn.functional.interpolate(x, (224, 224), mode="bicubic", antialias=True)
            return compiled(x) if source == "net.pt" else torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)

    extract(*words, "--channels", "dna", "--normalization", "none")
    check(tmp_path / "p.parquet", planes, ["dna"], expected, mean=[0, 0, 0], std=[1, 1, 1])


@pytest.mark.filterwarnings("ignore")
def test_channels_as_those_of_one_image_and_percentiles(compiled, planes, tiny_screen, tmp_path):
    words = ["--model", tmp_path / "net.onnx", "--dataset", tiny_screen, "--output", tmp_path / "p.parquet"]
    extract(*words, "--channels", "dna", "actin", "tubulin", "--stack_channels", "True", "--scaling", "percentile")
    for field in planes[:1]:
        limits = np.percentile(field, (0.1, 99.9), axis=(1, 2), keepdims=True)
        imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        check(tmp_path / "p.parquet", [field], "stacked", compiled, limits=limits, **imagenet)


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_encoder_is_refused(compiled, tiny_screen, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    BertModel(BertConfig(**BLOCK, vocab_size=50)).save_pretrained(tmp_path / "text")
    damaged = ResNetModel(ResNetConfig(embedding_size=16, hidden_sizes=[16, 24], depths=[1, 1], layer_type="basic"))
    damaged.save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"hidden_sizes": [16, 32]}))
    (tmp_path / "remote").mkdir()
    code = {"model_type": "new", "auto_map": {"AutoConfig": "configuration.New", "AutoModel": "modeling.New"}}
    (tmp_path / "remote" / "config.json").write_text(json.dumps(code))
    (tmp_path / "remote" / "configuration.py").write_text("open('ran', 'w')")
    (tmp_path / "own_encoder.pyc").unlink(missing_ok=True)
    words = ["--dataset", tiny_screen, "--output", tmp_path / "p.parquet", "--channels", "dna"]
    for source in ("text", "other", "remote", "absent", "own_encoder:absent", "no_module:x", "timm/absent"):
        refused(extract_profiles.main, "--model", source, *words, named=source)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    sized = [*words, "--tile_size", SIZE]
    refused(extract_profiles.main, "--model", "own_encoder:flat", *sized, named="(tiles, dims)")
    refused(
        extract_profiles.main, "--model", "net.onnx", *words, "actin", "--stack_channels", "True", named="2 channels"
    )
    refused(extract_profiles.main, "--model", "net.onnx", *words[:4], named="--channels")
    refused(extract_profiles.main, "--model", "net.onnx", *words, "--pictures", tmp_path / "x", named="--pictures")
