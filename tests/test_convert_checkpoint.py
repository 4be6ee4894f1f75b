"""Weights in and out of every layout are the same network, checked by what it computes there and here."""

import json
import shutil

import numpy as np
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants, hf_api
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from modeling_wsdino import (
    WSDinoConfig,
    WSDinoImageProcessor,
    WSDinoModel,
    WSDinoMultiChannelModel,
    build_repository,
)
from modeling_wsdino.convert_checkpoint import convert, load_backbone, load_image_processor, main

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}


def make_model(cls=WSDinoModel, **values):
    torch.manual_seed(0)
    model = cls(WSDinoConfig(**(SIZE | values))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4).add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def vit():
    """Transformers' ViT in the shape of ours."""
    torch.manual_seed(1)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return ViTModel(ViTConfig(**size, image_size=32, patch_size=8)).eval()


def test_another_architecture_is_never_read_as_random_weights(vit, tmp_path):
    vit.save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="config of a 'vit' model"):
        WSDinoModel.from_pretrained(tmp_path / "vit")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="bert is a 'bert' model"):
        load_backbone(tmp_path / "bert")


def test_out_to_the_original_layout_and_back(tmp_path, capsys):
    model = make_model(channel_names=["actin"])
    folder = build_repository(tmp_path / "actin", model, WSDinoImageProcessor(tile_size=32))
    main([str(folder), str(tmp_path / "out" / "actin.pth")])
    assert "actin.pth" in capsys.readouterr().out
    state = torch.load(tmp_path / "out" / "actin.pth", weights_only=True)
    assert {"cls_token", "pos_embed", "blocks.1.attn.qkv.bias", "norm.weight"} <= state.keys()
    flags = ("--num_attention_heads", "2", "--channel", "actin")  # which no shape in the file tells
    main([str(tmp_path / "out" / "actin.pth"), str(tmp_path / "again"), *flags])
    again = load_backbone(tmp_path / "again")
    assert again.config.num_attention_heads == 2 and again.config.channel_names == ["actin"]
    assert WSDinoImageProcessor.from_pretrained(tmp_path / "again").tile_size == 32
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("channels", [["dna"], ["dna", "actin"]], ids=["one channel", "combined"])
def test_weights_kept_in_half_precision_are_read_as_float32(tmp_path, channels):
    """Training from them, or an ONNX file of them, would else go on in half precision."""
    model = make_model(WSDinoMultiChannelModel if len(channels) > 1 else WSDinoModel, channel_names=channels)
    for dtype in (torch.bfloat16, torch.float16):
        folder = build_repository(tmp_path / "half", model.to(dtype), WSDinoImageProcessor(tile_size=32))
        loaded = load_backbone(folder)
        assert loaded.dtype == torch.float32 == loaded.config.dtype
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[name].float()), name


def test_a_repository_keeps_its_tiles_when_converted(tmp_path):
    processor = WSDinoImageProcessor(tile_size=16, tile_grid=3, max_intensity=4095)
    folder = build_repository(tmp_path / "dna", make_model(channel_names=["dna"]), processor)
    convert(str(folder), tmp_path / "copy")
    copied = WSDinoImageProcessor.from_pretrained(tmp_path / "copy")
    assert (copied.tile_size, copied.tile_grid, copied.max_intensity) == (16, 3, 4095)
    convert(str(folder), tmp_path / "larger", tile_size=64)
    larger = WSDinoImageProcessor.from_pretrained(tmp_path / "larger")
    assert (larger.tile_size, larger.tile_grid, larger.max_intensity) == (64, 3, 4095)


def test_a_repository_of_the_hub_keeps_its_tiles_too(tmp_path, monkeypatch):
    """A Hub id is no folder here: its files lie in the cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--lab--cells" / "snapshots" / ("0" * 40)
    processor = WSDinoImageProcessor(tile_size=16, max_intensity=255)
    build_repository(snapshot, make_model(channel_names=["dna"]), processor)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    convert("lab/cells", tmp_path / "copy")
    copied = WSDinoImageProcessor.from_pretrained(tmp_path / "copy")
    assert (copied.tile_size, copied.max_intensity) == (16, 255)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub-like server that this process asks, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer("hf_token") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield hub


def put(hub, name, folder):
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    hub.put("model", name, files)


def test_a_hub_that_fails_or_a_damaged_file_gives_no_other_tiles(hub, tmp_path, monkeypatch):
    """Features of tiles that the network was not trained on would be others, and nobody would know."""
    model = make_model(channel_names=["dna"])
    put(hub, "lab/dna", build_repository(tmp_path / "dna", model, WSDinoImageProcessor(tile_size=16)))
    hub.fail = ("HEAD", "preprocessor_config.json", 501)  # which is not tried again, with pauses
    with pytest.raises(ValueError, match="no image processor can be read from lab/dna"):
        load_image_processor("lab/dna", model)
    hub.fail = None
    assert load_image_processor("lab/dna", model).tile_size == 16
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_image_processor("lab/dna", model).tile_size == 16
    (cached,) = (tmp_path / "hub").glob("*/snapshots/*/preprocessor_config.json")
    for damage in (b"{", b"[]", b'{"image_processor_type": "ViTImageProcessor"}', None):
        for path in (cached, tmp_path / "dna" / "preprocessor_config.json"):
            path.unlink(missing_ok=True)
            if damage is not None:
                path.write_bytes(damage)
        for source in ("lab/dna", tmp_path / "dna"):
            with pytest.raises(ValueError, match=f"no image processor can be read from {source}") as caught:
                load_image_processor(source, model)
            assert "\n" not in str(caught.value)


def test_a_vit_of_the_hub_gets_our_tiles_where_it_certainly_has_none(hub, vit, tmp_path, monkeypatch):
    vit.save_pretrained(tmp_path / "vit")
    put(hub, "lab/vit", tmp_path / "vit")
    model = load_backbone("lab/vit")
    hub.fail = ("HEAD", "preprocessor_config.json", 501)  # which is not tried again, with pauses
    with pytest.raises(ValueError, match="no image processor can be read from lab/vit"):
        load_image_processor("lab/vit", model)
    hub.fail = None
    assert load_image_processor("lab/vit", model).tile_size == 32
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the cache knows what the Hub said
    assert load_image_processor("lab/vit", model).tile_size == 32
    (said,) = (tmp_path / "hub").glob("*/.no_exist/*/preprocessor_config.json")
    said.unlink()
    with pytest.raises(ValueError, match="no image processor can be read from lab/vit"):
        load_image_processor("lab/vit", model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.repositories["model", "lab/vit"]["files"]["preprocessor_config.json"] = b'{"image_processor_type": "X"}'
    assert load_image_processor("lab/vit", model).tile_size == 32


def test_a_vits_own_image_processor_does_not_cut_our_tiles(vit, tmp_path):
    vit.save_pretrained(tmp_path / "vit")
    own = {"image_processor_type": "ViTImageProcessor", "do_normalize": True, "size": {"height": 32, "width": 32}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(own))
    convert(str(tmp_path / "vit"), tmp_path / "dna", channel="dna")
    processor = WSDinoImageProcessor.from_pretrained(tmp_path / "dna")
    assert processor.tile_size == 32 and processor.channel_names == ["dna"] and not hasattr(processor, "do_normalize")


@pytest.mark.parametrize("patch_embedding", ["linear", "convolutional"])
@pytest.mark.parametrize("channels", [["dna"], ["dna", "actin"]], ids=["one channel", "combined"])
@pytest.mark.filterwarnings("ignore")
def test_onnx_computes_the_same_for_any_batch(tmp_path, channels, patch_embedding):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    cls = WSDinoMultiChannelModel if len(channels) > 1 else WSDinoModel
    model = make_model(cls, channel_names=channels, patch_embedding=patch_embedding)
    folder = build_repository(tmp_path / "model", model, WSDinoImageProcessor(tile_size=32))
    main([str(folder), str(tmp_path / "model.onnx"), "--tile_size", "48"])
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        images = torch.rand(batch, len(channels), 48, 48)
        (features,) = session.run(["features"], {"pixel_values": images.numpy()})
        with torch.no_grad():
            assert np.abs(features - model(images).pooler_output.numpy()).max() < 1e-4
    assert [path.name for path in tmp_path.glob("model.onnx*")] == ["model.onnx"]


def test_mistakes_end_the_command_with_status_2_and_one_sentence(tmp_path, refused):
    combined = make_model(WSDinoMultiChannelModel, channel_names=["dna", "actin"])
    build_repository(tmp_path / "combined", combined, WSDinoImageProcessor(tile_size=32))
    one = build_repository(tmp_path / "one", make_model(), WSDinoImageProcessor(tile_size=32))
    lacking = shutil.copytree(one, tmp_path / "lacking")
    state = load_file(one / "model.safetensors")
    state.pop("norm.bias")
    save_file(state, lacking / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "there.pth").write_text("precious")
    stem = make_model(patch_embedding="convolutional")
    build_repository(tmp_path / "stem", stem, WSDinoImageProcessor(tile_size=32))
    for arguments, words in [
        ([tmp_path / "absent", tmp_path / "out"], "absent"),
        ([tmp_path / "there.pth", tmp_path / "out"], "there.pth"),
        ([one, tmp_path / "there.pth"], "there.pth"),
        ([one, tmp_path / "out.bin"], "out.bin"),
        ([tmp_path / "combined", tmp_path / "out.pth"], "combined"),
        ([tmp_path / "stem", tmp_path / "out.pth"], "stem"),
        ([one, tmp_path / "out", "--network", "teacher"], "teacher"),
        ([one, tmp_path / "out", "--channel", "d.na"], "d.na"),
        ([tmp_path / "combined", tmp_path / "out", "--channel", "dna"], "(dna, actin)"),
        ([lacking, tmp_path / "out"], "norm.bias"),
        ([one, tmp_path / "out.onnx", "--tile_size", "50"], "tile_size 50"),
        ([one, tmp_path / "out", "--tile_size", "-8"], "tile_size -8"),
    ]:
        refused(main, *arguments, named=words)
