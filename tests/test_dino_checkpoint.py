"""Weights in the original DINO's layout are the same network, and files that hold none are refused."""

import argparse
import pickle

import pytest
import torch
from model_oracles import SMALL, small_model

from modeling_wsdino import WSDinoConfig, WSDinoModel


def test_every_parameter_has_a_name_in_the_original(tmp_path):
    model = small_model(num_hidden_layers=2)
    expected = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    expected |= {"norm.weight", "norm.bias"}
    for block in range(2):
        for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            expected |= {f"blocks.{block}.{name}.weight", f"blocks.{block}.{name}.bias"}
    assert model.to_dino_state_dict().keys() == expected


@pytest.fixture
def dino_files(tmp_path):
    """A model, and a function that writes its weights in an original layout."""
    model = small_model(hidden_size=64, num_attention_heads=1, num_hidden_layers=2)

    def write(kind):
        bare = model.to_dino_state_dict()
        wrapped = {f"module.backbone.{key}": value for key, value in bare.items()}
        wrapped["module.head.mlp.0.weight"] = torch.zeros(4, 4)
        other = {key: torch.zeros_like(value) for key, value in wrapped.items()}
        checkpoint = {
            "bare": bare,
            "bare with head": bare | {"head.weight": torch.zeros(2, 2)},
            "full": {
                "student": other,
                "teacher": wrapped,
                "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
                "epoch": 7,
                "args": argparse.Namespace(arch="vit_small", patch_size=8),
                "dino_loss": {"center": torch.zeros(1, 8)},
            },
            "student": {"student": wrapped, "teacher": other, "epoch": 1},
            "student alone": {"student": wrapped},
        }[kind]
        path = tmp_path / f"{kind}.pth"
        torch.save(checkpoint, path)
        return path

    return model, write


@pytest.mark.parametrize("kind", ["bare", "bare with head", "full", "student", "student alone"])
def test_original_checkpoints_are_read(dino_files, kind):
    model, write = dino_files
    network = "student" if kind == "student" else None
    loaded = WSDinoModel.from_dino_checkpoint(write(kind), network=network, channel_names=["dna"])
    assert loaded.config.channel_names == ["dna"] and not loaded.training
    for name in SMALL.keys() - {"hidden_size", "num_hidden_layers", "num_attention_heads"}:
        assert getattr(loaded.config, name) == SMALL[name]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    assert [getattr(loaded.config, name) for name in names] == [64, 2, 1]
    images = torch.rand(1, 1, 64, 40)
    assert torch.equal(loaded(images).pooler_output, model(images).pooler_output)


def test_a_given_config_keeps_what_shapes_do_not_tell(dino_files):
    model, write = dino_files
    config = WSDinoConfig(num_attention_heads=2, drop_path_rate=0.1, patch_size=16)
    loaded = WSDinoModel.from_dino_checkpoint(write("bare"), config)
    assert (loaded.config.num_attention_heads, loaded.config.drop_path_rate) == (2, 0.1)
    assert (loaded.config.patch_size, loaded.config.hidden_size) == (8, 64)


class Payload:
    """What a hostile checkpoint could hold."""

    def __reduce__(self):
        return (print, ("this must never run",))


def test_files_that_hold_no_checkpoint_are_refused_in_a_sentence(dino_files, tmp_path, capsys):
    model, write = dino_files
    bare = torch.load(write("bare"), weights_only=True)
    contents = {
        "head": {"teacher": {"module.head.mlp.0.weight": torch.zeros(2, 2)}},
        "norm.bias": {key: value for key, value in bare.items() if key != "norm.bias"},
        "blocks.0.ls1.gamma": bare | {"blocks.0.ls1.gamma": torch.zeros(64)},
        "a norm.bias of another shape": bare | {"norm.bias": torch.zeros(3)},
        "flat positions": bare | {"pos_embed": torch.zeros(3)},
        "empty": {},
        "tensor": torch.zeros(3),
        "payload": {"teacher": Payload()},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
    for name, content in {"text.pth": b"hello", "text.safetensors": b"hello", "pickle.pth": pickle.dumps(3)}.items():
        (tmp_path / name).write_bytes(content)
    for name in [f"{name}.pth" for name in contents] + ["text.pth", "text.safetensors", "pickle.pth", "absent.pth"]:
        with pytest.raises(ValueError) as caught:
            WSDinoModel.from_dino_checkpoint(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert "this must never run" not in capsys.readouterr().out
    for kind, network in (("student alone", "teacher"), ("full", "tutor"), ("bare", "teacher")):
        with pytest.raises(ValueError, match=f"no {network} network"):
            WSDinoModel.from_dino_checkpoint(write(kind), network=network)


def test_the_stem_has_no_place_in_the_original_layout(dino_files):
    with pytest.raises(ValueError, match="no place for a convolutional patch embedding"):
        small_model(patch_embedding="convolutional").to_dino_state_dict()
    _, write = dino_files
    config = WSDinoConfig(patch_embedding="convolutional")
    for given in ({"patch_embedding": "convolutional"}, {"config": config}):
        with pytest.raises(ValueError, match="linear patch embedding"):
            WSDinoModel.from_dino_checkpoint(write("bare"), **given)
