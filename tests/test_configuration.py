"""The configuration refuses what cannot make a network, and survives a round trip through its file."""

import pytest
from huggingface_hub.errors import StrictDataclassError

from modeling_wsdino import WSDinoConfig


def test_the_defaults_are_vit_s8():
    config = WSDinoConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (384, 12, 6)
    assert (config.patch_size, config.image_size, config.mlp_ratio, config.layer_norm_eps) == (8, 224, 4, 1e-6)
    assert config.qkv_bias and config.drop_path_rate == 0 and config.channel_names == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"patch_size": 7, "image_size": 224 + 1}, "image_size 225 is not a multiple of patch_size 7"),
        ({"hidden_size": 384, "num_attention_heads": 5}, "384 is not a multiple of num_attention_heads 5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be positive, but is 0"),
        ({"patch_size": -8}, "patch_size must be positive, but is -8"),
        ({"mlp_ratio": 0}, "mlp_ratio must be positive"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be positive"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and below 1"),
        ({"drop_path_rate": -0.1}, "drop_path_rate must be at least 0 and below 1"),
        ({"patch_embedding": "fourier"}, "patch_embedding"),
        ({"patch_embedding": "convolutional", "patch_size": 14}, "power of two .* 14 and 384"),
        ({"patch_embedding": "convolutional", "patch_size": 1}, "power of two .* 1 and 384"),
        (
            {"patch_embedding": "convolutional", "hidden_size": 30, "num_attention_heads": 2},
            "8 and 30",
        ),
        ({"channel_names": ["dna", "dna"]}, "name a channel twice"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"channel_names": ["d.na"]}, "d.na"),
    ],
)
def test_absurd_values_are_refused_in_a_sentence(values, words):
    with pytest.raises((ValueError, StrictDataclassError), match=words):
        WSDinoConfig(**values)


def test_round_trip_through_the_file(tmp_path):
    config = WSDinoConfig(hidden_size=48, num_attention_heads=3, mlp_ratio=2.5, channel_names=("dna", "actin"))
    config.save_pretrained(tmp_path)
    loaded = WSDinoConfig.from_pretrained(tmp_path)
    assert loaded.channel_names == ["dna", "actin"]
    for name in ("hidden_size", "num_attention_heads", "mlp_ratio", "patch_size", "image_size", "qkv_bias"):
        assert getattr(loaded, name) == getattr(config, name)


def test_two_configurations_do_not_share_their_list_of_channels():
    first, second = WSDinoConfig(), WSDinoConfig()
    first.channel_names.append("dna")
    assert second.channel_names == []
