"""Weights in and out of every layout are the same network, checked by what it computes there and here."""

import argparse
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
from modeling_wsdino.convert_checkpoint import convert, load_backbone, load_image_processor, main, vit_to_dino

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
    """Transformers' ViT in the shape of ours, with DINO's epsilon so that its output can be compared."""
    torch.manual_seed(1)
    return ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            image_size=32,
            patch_size=8,
            layer_norm_eps=1e-6,
        )
    ).eval()


def check_equal_to_vit(model, vit):
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images).last_hidden_state, vit(images).last_hidden_state, atol=1e-5, rtol=1e-4
        )


def test_a_vit_folder_is_read_as_it_is_stored(vit, tmp_path):
    vit.save_pretrained(tmp_path)
    model = load_backbone(tmp_path, channel_names=["dna"], drop_path_rate=0.1)
    assert model.config.channel_names == ["dna"] and model.config.drop_path_rate == 0.1
    assert model.config.num_attention_heads == 2 and model.config.layer_norm_eps == 1e-6
    check_equal_to_vit(model, vit)


def test_a_vit_with_pickled_weights_is_read_too(vit, tmp_path):
    vit.config.save_pretrained(tmp_path)
    torch.save({f"vit.{key}": value for key, value in vit.state_dict().items()}, tmp_path / "pytorch_model.bin")
    check_equal_to_vit(load_backbone(tmp_path), vit)


def test_both_namings_of_a_vit_are_known(vit):
    """Transformers renamed the modules in version 5, while files keep the older names."""
    older = {}
    for key, value in vit.state_dict().items():
        for new, old in (
            ("layers.", "encoder.layer."),
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ):
            if old not in key:
                key = key.replace(new, old)
        older[key] = value
    first, second = vit_to_dino(vit.state_dict()), vit_to_dino(older)
    assert first.keys() == second.keys() == make_model().to_dino_state_dict().keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_another_architecture_is_never_read_as_random_weights(vit, tmp_path):
    vit.save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="config of a 'vit' model, not of WS-DINO: bring its weights"):
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
    main([str(tmp_path / "out" / "actin.pth"), str(tmp_path / "again"), "--num_attention_heads", "2"])
    again = load_backbone(tmp_path / "again")
    assert again.config.num_attention_heads == 2  # which no shape in the file tells
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


def test_a_full_checkpoint_becomes_a_repository(tmp_path):
    model = make_model(hidden_size=64, num_attention_heads=1)
    networks = {
        name: {f"module.backbone.{key}": value * factor for key, value in model.to_dino_state_dict().items()}
        for name, factor in (("student", 0.5), ("teacher", 1.0))
    }
    torch.save(networks | {"epoch": 3, "args": argparse.Namespace(lr=1)}, tmp_path / "checkpoint.pth")
    main([str(tmp_path / "checkpoint.pth"), str(tmp_path / "dna"), "--channel", "dna"])
    loaded = load_backbone(tmp_path / "dna")
    assert loaded.config.channel_names == ["dna"]
    assert WSDinoImageProcessor.from_pretrained(tmp_path / "dna").tile_size == 32
    images = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images).pooler_output, model(images).pooler_output)
    main([str(tmp_path / "checkpoint.pth"), str(tmp_path / "student"), "--network", "student"])
    assert torch.equal(load_backbone(tmp_path / "student").norm.bias, model.norm.bias * 0.5)


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


def test_mistakes_end_the_command_with_status_2_and_one_sentence(tmp_path, capsys):
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
    capsys.readouterr()
    for arguments, words in [
        ([tmp_path / "absent", tmp_path / "out"], "absent is neither a checkpoint file nor a folder or Hub id"),
        ([tmp_path / "there.pth", tmp_path / "out"], "there.pth cannot be read safely"),
        ([one, tmp_path / "there.pth"], "there.pth exists already"),
        ([one, tmp_path / "out.bin"], "write .pth (original DINO), .onnx, or a folder"),
        ([tmp_path / "combined", tmp_path / "out.pth"], "holds several towers"),
        ([tmp_path / "stem", tmp_path / "out.pth"], "convolutional patch embedding"),
        ([one, tmp_path / "out", "--network", "teacher"], "holds one network, not a teacher and a student"),
        ([one, tmp_path / "out", "--channel", "d.na"], "channel name 'd.na'"),
        ([tmp_path / "combined", tmp_path / "out", "--channel", "dna"], "holds several towers (dna, actin)"),
        ([tmp_path / "combined", tmp_path / "out", "--channel", "er"], "holds several towers (dna, actin)"),
        ([lacking, tmp_path / "out"], "lacking is damaged: its weights lack norm.bias"),
        ([one, tmp_path / "out.onnx", "--tile_size", "50"], "tile_size 50 is not a multiple of the model's"),
        ([one, tmp_path / "out", "--tile_size", "-8"], "tile_size -8 is not a multiple"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        message = capsys.readouterr().err  # without what transformers' progress bars say while loading
        message = message[message.rindex("wsdino-convert") :]
        assert ended.value.code == 2 and words in message and message.count("\n") == 1, message
    assert (tmp_path / "there.pth").read_text() == "precious" and not (tmp_path / "out").exists()
