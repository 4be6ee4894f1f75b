"""The convolutional stem against loops over pixels, and the transformer behind it against that of linear patches."""

import math

import numpy as np
import pytest
import torch
from model_oracles import SMALL, plain_stem, small_model

from modeling_wsdino import WSDinoConfig, WSDinoModel


def stem_model(seed=0, **values):
    """A small model with a convolutional stem whose running statistics are those of some images."""
    model = small_model(seed, patch_embedding="convolutional", **values).train()
    for _ in range(3):
        model(torch.rand(4, 1, 64, 64) * 3)
    return model.eval()


@pytest.mark.parametrize(("patch", "widths"), [(2, [32]), (4, [16, 32]), (8, [8, 16, 32]), (16, [4, 8, 16, 32])])
def test_the_stem_is_stride_2_convolutions_with_batch_norm_and_relu_between(patch, widths):
    model = stem_model(patch_size=patch)
    stem = model.embeddings.patch_embeddings
    assert [tuple(each.weight.shape) for each in stem.convolutions] == [
        (wide, narrow, 3, 3) for narrow, wide in zip([1, *widths[:-1]], widths, strict=True)
    ]
    image = torch.rand(1, 64, 48)
    with torch.no_grad():
        tokens = stem(image[None])
        maps = image[None]  # and as the trial wrote it
        for convolution, norm in zip(stem.convolutions, stem.norms, strict=False):
            maps = torch.relu(norm(convolution(maps)))
    assert tokens.shape == (1, 64 * 48 // patch**2, 32)
    plain = plain_stem(stem.state_dict(), image, len(widths))
    assert np.abs(tokens[0].numpy() - plain).max() < 1e-3 * max(1, np.abs(plain).max())
    torch.testing.assert_close(tokens, stem.convolutions[-1](maps).flatten(2).transpose(1, 2))


def test_three_replicas_of_gray_are_one_channel_to_the_stem():
    model = stem_model()
    gray = torch.rand(2, 1, 64, 40)
    torch.testing.assert_close(model(gray.expand(-1, 3, -1, -1)).pooler_output, model(gray).pooler_output)


def test_the_stem_feeds_the_same_transformer():
    """Position embeddings, CLS token, blocks, `cls_only` and attention maps are those of the linear model."""
    model, images = stem_model(), torch.rand(2, 1, 64, 40)
    linear = WSDinoModel(WSDinoConfig(**SMALL)).eval()
    state = {name: value for name, value in model.state_dict().items() if "patch_embeddings" not in name}
    assert not linear.load_state_dict(state, strict=False).unexpected_keys
    patches = model.embeddings.patch_embeddings(images)
    linear.embeddings.patch_embeddings.forward = lambda pixel_values: patches
    with torch.no_grad():
        output = model(images)
        torch.testing.assert_close(output.last_hidden_state, linear(images).last_hidden_state)
        torch.testing.assert_close(model(images, cls_only=True).pooler_output, output.pooler_output)
        torch.testing.assert_close(model.attention_maps(images), linear.attention_maps(images))
        model.set_attn_implementation("eager")
        weights = model(images, output_attentions=True).attentions[-1]
    torch.testing.assert_close(model.attention_maps(images).flatten(2), weights[:, :, 0, 1:])


def test_features_of_the_stem_depend_on_the_batch_in_training_only():
    model, images = stem_model(), torch.rand(4, 1, 64, 64)
    torch.testing.assert_close(model(images).pooler_output[:1], model(images[:1]).pooler_output)
    model.train()
    assert not torch.allclose(model(images).pooler_output[:1], model(images[:1]).pooler_output, atol=1e-3)


def test_training_reaches_every_parameter_of_the_stem():
    model = stem_model().train()
    model(torch.rand(2, 1, 64, 40)).pooler_output.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stem_is_saved_with_its_running_statistics(tmp_path, dtype):
    model, images = stem_model(channel_names=["dna"]).to(dtype), torch.rand(2, 1, 64, 64)
    model.save_pretrained(tmp_path)
    loaded = WSDinoModel.from_pretrained(tmp_path)
    assert loaded.config.patch_embedding == "convolutional" and loaded.dtype == dtype
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded(images).pooler_output, model(images).pooler_output)


def test_the_stem_starts_as_pytorchs_convolutions_and_follows_the_seed():
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(WSDinoModel(WSDinoConfig(patch_embedding="convolutional", num_hidden_layers=1)).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    stem = {key.rpartition("patch_embeddings.")[2]: value for key, value in states[0].items() if "patch_em" in key}
    for step, fan_in in enumerate((9, 9 * 96, 9 * 192)):
        kernel, bound = stem[f"convolutions.{step}.weight"], 1 / math.sqrt(fan_in)
        assert kernel.abs().max() <= bound and abs(kernel.std().item() / bound * math.sqrt(3) - 1) < 0.05
    assert "convolutions.0.bias" not in stem and "convolutions.2.bias" in stem
    assert (stem["norms.0.running_var"] == 1).all() and (stem["norms.1.running_mean"] == 0).all()
