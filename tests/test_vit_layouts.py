"""Other programs' vision transformers as ours: transformers' own networks are the oracle, and no weight is made up."""

import argparse
import json

import numpy as np
import pytest
import torch
from model_oracles import small_model
from safetensors.torch import save_file
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from modeling_wsdino import WSDinoImageProcessor, WSDinoModel, build_repository
from modeling_wsdino.convert_checkpoint import load_backbone, main

SIZE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
DINOV2 = {"layer_scale": True, "num_register_tokens": 4, "patch_size": 14, "image_size": 56}
THEIRS = {
    "vit": (ViTModel, ViTConfig, {"patch_size": 8, "image_size": 32, "intermediate_size": 192}),
    "vit_mae": (ViTMAEModel, ViTMAEConfig, {"patch_size": 16, "image_size": 64, "intermediate_size": 96}),
    "dinov2": (Dinov2Model, Dinov2Config, {"patch_size": 14, "image_size": 56}),
    "dinov2 giant": (Dinov2Model, Dinov2Config, {"patch_size": 14, "image_size": 56, "use_swiglu_ffn": True}),
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {"patch_size": 14, "image_size": 56}),
}


def shifted(model):
    """Weights large enough for attention to matter, and norms that are not the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1).add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("kind", THEIRS)
def test_pooled_tokens_are_transformers_own_at_two_sizes(kind, tmp_path):
    cls, config, values = THEIRS[kind]
    torch.manual_seed(0)
    theirs = shifted(cls(config(**SIZE, **values)))
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")  # several files
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = load_backbone(tmp_path, channel_names=["dna"])
    patch, size = values["patch_size"], values["image_size"]
    assert ours.config.channel_names == ["dna"] and ours.config.patch_size == patch
    for side in (size, size + 2 * patch) if kind != "vit" else (size,):  # elsewhere a ViT interpolates as DINO does
        images, options = torch.rand(2, 3, side, side), {}
        if kind == "vit_mae":  # no patch is masked, and their order is kept
            theirs.config.mask_ratio = theirs.embeddings.config.mask_ratio = 0.0
            options = {"noise": torch.arange((side // patch) ** 2.0).expand(2, -1), "interpolate_pos_encoding": True}
        with torch.no_grad():
            expected, found = theirs(images, **options).last_hidden_state, ours(images).last_hidden_state
        assert found.shape == (2, 1 + (side // patch) ** 2, 48)
        torch.testing.assert_close(found[:, 0], expected[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("values", [{}, DINOV2, DINOV2 | {"mlp_type": "swiglu", "num_register_tokens": 0}], ids=str)
def test_out_and_in_again_is_the_same_to_the_bit(values, tmp_path):
    model = small_model(hidden_size=64, num_attention_heads=1, **values)
    torch.save(model.to_dino_state_dict(), tmp_path / "out.pth")
    images = torch.rand(2, 1, 56, 112)
    loaded = WSDinoModel.from_dino_checkpoint(
        tmp_path / "out.pth", position_interpolation=model.config.position_interpolation
    )
    folder = build_repository(tmp_path / "a", loaded, WSDinoImageProcessor(tile_size=model.config.image_size))
    again = load_backbone(folder)
    build_repository(tmp_path / "b", again, WSDinoImageProcessor(tile_size=model.config.image_size))
    for one in (loaded, again):
        assert all(torch.equal(value, one.state_dict()[name]) for name, value in model.state_dict().items())
        assert torch.equal(one(images).pooler_output, model(images).pooler_output)
        torch.testing.assert_close(one(images, cls_only=True).pooler_output, model(images).pooler_output)
    assert all((tmp_path / "b" / path.name).read_bytes() == path.read_bytes() for path in folder.glob("*.safetensors"))
    maps = model.attention_maps(images)
    assert maps.shape == (2, 1, 56 // model.config.patch_size, 112 // model.config.patch_size)
    model.set_attn_implementation("eager")
    weights = model(images, output_attentions=True).attentions[-1][:, :, 0, 1 + model.config.num_register_tokens :]
    torch.testing.assert_close(maps.flatten(2), weights)


@pytest.fixture
def network():
    """A DINO network and a DINOv2 one whose heads are 64 wide, as no file tells."""
    plain = small_model(hidden_size=64, num_attention_heads=1, num_hidden_layers=2)
    return plain, small_model(hidden_size=64, num_attention_heads=1, num_hidden_layers=2, **DINOV2)


def prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


def chunked(state):
    return {key.replace("blocks.", "blocks.0."): value for key, value in state.items()}


LAYOUTS = {
    "bare": lambda dino, v2: dino,
    "with a head": lambda dino, v2: dino | {"head.weight": torch.zeros(2, 2), "mask_token": torch.zeros(1, 64)},
    "training": lambda dino, v2: {
        "student": prefixed({key: value * 0 for key, value in dino.items()}, "module.backbone."),
        "teacher": prefixed(dino, "backbone.") | {"head.mlp.0.weight": torch.zeros(4, 4)},
        **{"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}, "epoch": 7},
        **{"args": argparse.Namespace(arch="vit_small"), "best": np.float64(0.5), "step": np.int64(3)},
    },
    "student alone": lambda dino, v2: {"student": prefixed(dino, "module.backbone.")},
    "compiled": lambda dino, v2: {"teacher": prefixed(dino, "module._orig_mod.backbone.")},
    "state_dict": lambda dino, v2: {"state_dict": prefixed(dino, "module.")},
    "nested": lambda dino, v2: {"checkpoint": {"model": dino}, "epoch": 3},
    "lightning": lambda dino, v2: {
        "state_dict": prefixed(dino, "teacher_backbone.") | {"student_backbone.cls_token": torch.zeros(1, 1, 64)}
    },
    "dinov2": lambda dino, v2: v2 | {"mask_token": torch.zeros(1, 64)},
    "dinov2 training": lambda dino, v2: {"teacher": prefixed(chunked(v2), "backbone.")},
    "dinov2 shard": lambda dino, v2: {"model": prefixed(chunked(v2), "teacher.backbone.")},
    "timm": lambda dino, v2: {"reg_token" if key == "register_tokens" else key: value for key, value in v2.items()},
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_as_other_trainings_leave_them(network, layout, suffix, tmp_path):
    content = LAYOUTS[layout](*(one.to_dino_state_dict() for one in network))
    expected = network["dinov2" in layout or layout == "timm"]
    flat = all(isinstance(value, torch.Tensor) for value in content.values())
    if suffix == ".safetensors" and not flat:
        pytest.skip("holds tensors alone")
    (save_file if flat and suffix == ".safetensors" else torch.save)(content, tmp_path / f"file{suffix}")
    loaded = WSDinoModel.from_dino_checkpoint(tmp_path / f"file{suffix}", channel_names=["dna"])
    assert loaded.config.channel_names == ["dna"] and not loaded.training
    assert loaded.config.position_interpolation == ("antialias" if loaded.config.num_register_tokens else "dino")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in expected.state_dict().items())


def test_the_student_where_it_is_asked_for_and_what_shapes_do_not_tell(network, tmp_path):
    torch.save(LAYOUTS["training"](network[0].to_dino_state_dict(), None), tmp_path / "file.pth")
    config = network[0].config.__class__(num_attention_heads=2, drop_path_rate=0.1, patch_size=16)
    loaded = WSDinoModel.from_dino_checkpoint(tmp_path / "file.pth", config, network="student")
    assert not loaded.norm.weight.any()
    assert (loaded.config.num_attention_heads, loaded.config.drop_path_rate, loaded.config.patch_size) == (2, 0.1, 8)


def test_one_input_channel_is_spread_over_three(network, tmp_path):
    state = network[0].to_dino_state_dict()
    kernel = state["patch_embed.proj.weight"]
    torch.save(state | {"patch_embed.proj.weight": kernel.sum(1, keepdim=True)}, tmp_path / "gray.pth")
    loaded, images = WSDinoModel.from_dino_checkpoint(tmp_path / "gray.pth"), torch.rand(2, 1, 64, 64)
    assert loaded.embeddings.patch_embeddings.weight.shape == kernel.shape
    torch.testing.assert_close(loaded(images).pooler_output, network[0](images).pooler_output, atol=1e-5, rtol=1e-5)


def test_positions_without_one_for_the_cls_token(network, tmp_path):
    """As timm's `no_embed_class`, in a folder as of its Hub repositories."""
    state = network[1].to_dino_state_dict()
    state |= {"reg_token": state.pop("register_tokens"), "pos_embed": state["pos_embed"][:, 1:].contiguous()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_small_patch14_reg4_dinov2"}))
    loaded = load_backbone(tmp_path)
    expected = network[1].embeddings.position_embeddings.detach().clone()
    expected[:, 0] = 0
    assert torch.equal(loaded.embeddings.position_embeddings, expected)
    assert loaded.config.position_interpolation == "antialias"


def test_a_network_with_a_head_and_pickled_weights(tmp_path):
    torch.manual_seed(0)
    theirs = shifted(ViTModel(ViTConfig(**SIZE, **THEIRS["vit"][2], num_channels=1)))
    theirs.config.save_pretrained(tmp_path)
    names = [("layers.", "encoder.layer."), ("o_proj", "output.dense"), ("mlp.fc1", "intermediate.dense")]
    names += [("mlp.fc2", "output.dense"), ("q_proj", "attention.query"), ("k_proj", "attention.key")]
    older = {}  # the names that files of facebook/dino-vits8 keep
    for key, value in theirs.state_dict().items():
        for new, old in (*names, ("v_proj", "attention.value")):
            key = key.replace(new, old)
        older[f"vit.{key}"] = value
    torch.save(older | {"classifier.weight": torch.zeros(2, 48)}, tmp_path / "pytorch_model.bin")
    images = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        torch.testing.assert_close(load_backbone(tmp_path)(images).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


class Payload:
    """What a hostile checkpoint could hold."""

    def __reduce__(self):
        return (print, ("this must never run",))


def test_files_that_hold_no_network_are_refused_in_a_sentence(network, tmp_path, refused, capsys):
    dino, v2 = (one.to_dino_state_dict() for one in network)
    contents = {  # by what the sentence must name
        "it lacks": {"teacher": {"module.head.mlp.0.weight": torch.zeros(2, 2)}},
        "norm.bias": {key: value for key, value in dino.items() if key != "norm.bias"},
        "q_norm": dino | {"blocks.0.attn.q_norm.weight": torch.zeros(64)},
        "norm_pre": dino | {"norm_pre.weight": torch.zeros(64)},
        "torch.Size([3])": dino | {"norm.bias": torch.zeros(3)},
        "67 tokens": dino | {"pos_embed": torch.zeros(1, 67, 64)},
        "5 channels": dino | {"patch_embed.proj.weight": torch.zeros(64, 5, 8, 8)},
        "LoRA": dino | {"blocks.0.attn.qkv.lora_A.weight": torch.zeros(4, 64)},
        "several networks": prefixed(dino, "a.") | prefixed(dino, "b."),
        "Tensor": torch.zeros(3),
        "print": {"teacher": Payload()},
        "object": {"teacher": dino, "loss": np.array([{}], dtype=object)[0:1]},
    }
    for words, content in contents.items():
        torch.save(content, tmp_path / "file.pth")
        said = refused(main, tmp_path / "file.pth", tmp_path / "out", named="file.pth")
        assert words in said or words == "object", said
        assert "\x1b" not in said
    for network in ("teacher", "student"):
        torch.save(dino, tmp_path / "file.pth")
        refused(main, tmp_path / "file.pth", tmp_path / "out", "--network", network, named=network)
    (tmp_path / "file.pth").write_bytes(b"hello")
    refused(main, tmp_path / "file.pth", tmp_path / "out", named="file.pth")
    assert "this must never run" not in capsys.readouterr().out


def test_folders_that_hold_no_network_are_refused_in_a_sentence(tmp_path, refused):
    torch.manual_seed(0)
    theirs = ViTModel(ViTConfig(**SIZE, **THEIRS["vit"][2]))
    for name, change, words in (
        ("adapter", lambda folder: (folder / "adapter_config.json").write_text("{}"), "merge_and_unload"),
        ("shards", lambda folder: (folder / ".metadata").write_bytes(b""), "dcp_to_torch"),
        (
            "wide",
            lambda folder: edit(folder, intermediate_size=96),
            "layers.0.mlp.fc1.bias is (192,) in its weights and (96,) by its",
        ),
        ("deep", lambda folder: edit(folder, num_hidden_layers=3), "lack layers.2"),
        ("relu", lambda folder: edit(folder, hidden_act="relu"), "relu"),
        ("text", lambda folder: edit(folder, model_type="bert"), "bert"),
        ("rotary", lambda folder: edit(folder, model_type="dinov3_vit"), "dinov3_vit"),
    ):
        theirs.save_pretrained(tmp_path / name)
        change(tmp_path / name)
        assert words in refused(main, tmp_path / name, tmp_path / "out", named=name)


def edit(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
