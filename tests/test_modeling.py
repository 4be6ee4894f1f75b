"""The network against oracles: transformers' Dinov2 where both agree, a ViT in plain NumPy elsewhere."""

import math
import shutil
from fractions import Fraction

import accelerate
import numpy as np
import pytest
import torch
from model_oracles import SMALL, dinov2_twin, plain_interpolation, plain_vit, small_model

from modeling_wsdino import WSDinoConfig, WSDinoModel, WSDinoMultiChannelModel, attention_mass_mask
from modeling_wsdino.layers_wsdino import WSDinoDropPath

# --- the network


def test_equals_dinov2_at_the_trained_size():
    model = small_model()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = model(images), dinov2_twin(model)(images)
    assert ours.last_hidden_state.shape == (2, 65, 32)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_equals_dinov2_as_vit_s8_at_224():
    torch.manual_seed(0)
    model = WSDinoModel(WSDinoConfig()).eval()
    images = torch.rand(1, 1, 224, 224)
    with torch.no_grad():
        ours, theirs = model(images), dinov2_twin(model)(images.expand(-1, 3, -1, -1))
    assert ours.last_hidden_state.shape == (1, 785, 384) and ours.pooler_output.shape == (1, 384)
    assert (ours.last_hidden_state - theirs.last_hidden_state).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (64, 40), (112, 128), (128, 32), (24, 24)])
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_a_plain_vit_at_any_size(size, channels):
    model = small_model(num_attention_heads=4)
    images = torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = model(images).last_hidden_state
    for image, ours in zip(images, tokens, strict=True):
        plain, _ = plain_vit(model.to_dino_state_dict(), image.expand(3, -1, -1), heads=4, patch=8)
        assert np.abs(ours.numpy() - plain).max() < 1e-4


@pytest.mark.parametrize(("table", "size"), [(28, (96, 96)), (28, (224, 256)), (28, (448, 448)), (8, (64, 40))])
def test_position_embeddings_are_sampled_as_the_original_does(table, size):
    model = small_model(num_hidden_layers=1, image_size=8 * table)
    model.embeddings.position_embeddings.data = torch.randn(1, 1 + table**2, 32)
    ours = model.embeddings.interpolate_position_embeddings(*size)[0].detach().numpy()
    plain = plain_interpolation(model.embeddings.position_embeddings.detach(), *size, 8)
    # float32 against float64: PyTorch computes the sampled places in float32
    assert np.abs(ours - plain).max() < 2e-4


def test_as_many_patches_in_another_shape_are_interpolated_too():
    model = small_model(image_size=32)
    assert model.embeddings.interpolate_position_embeddings(32, 32) is model.embeddings.position_embeddings
    assert not torch.equal(
        model.embeddings.interpolate_position_embeddings(16, 64), model.embeddings.position_embeddings
    )


def test_one_channel_equals_gray_replicated_in_output_and_gradients():
    model = small_model()
    gray = torch.rand(2, 1, 64, 64)
    gradients = []
    for images in (gray, gray.expand(-1, 3, -1, -1)):
        model.zero_grad()
        model(images).pooler_output.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, three in zip(*gradients, strict=True):
        torch.testing.assert_close(one, three, atol=1e-3, rtol=1e-3)
    assert model.embeddings.patch_embeddings.weight.shape == (32, 3, 8, 8)


def test_cls_only_is_exact_and_smaller():
    model = small_model()
    images = torch.rand(2, 1, 64, 48)
    whole, alone = model(images), model(images, cls_only=True)
    assert alone.last_hidden_state.shape == (2, 1, 32)
    torch.testing.assert_close(alone.pooler_output, whole.pooler_output, atol=1e-5, rtol=1e-5)
    gradients = []
    for output in (whole, alone):
        model.zero_grad()
        output.pooler_output.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


class LowRank(torch.nn.Linear):
    """A linear layer with an adapter beside it, as LoRA puts in its place."""

    def forward(self, tokens):
        return super().forward(tokens) + 0.1 * tokens.roll(1, dims=-1).repeat(1, 1, 3)


@pytest.mark.parametrize("way", ["adapter", "hook", "hook before", "offloaded"])
def test_cls_only_sees_what_stands_in_for_the_projection(way):
    model = small_model()
    images = torch.rand(2, 1, 64, 48)
    for layer in model.layers:
        if way == "adapter":
            layer.attention.qkv.__class__ = LowRank
        elif way == "hook":
            layer.attention.qkv.register_forward_hook(lambda _, given, projected: projected * 1.5)
        elif way == "hook before":
            layer.attention.qkv.register_forward_pre_hook(lambda _, given: given[0] * 1.5)
    if way == "offloaded":  # each layer's weights are on the meta device until the layer itself is called
        accelerate.cpu_offload(model, execution_device="cpu")
        assert model.layers[-1].attention.qkv.weight.is_meta
    with torch.no_grad():
        whole, alone = model(images), model(images, cls_only=True)
        torch.testing.assert_close(alone.pooler_output, whole.pooler_output, atol=1e-5, rtol=1e-5)
        maps = model.attention_maps(images)
        model.set_attn_implementation("eager")
        attentions = model(images, output_attentions=True).attentions
    torch.testing.assert_close(maps.flatten(2), attentions[-1][:, :, 0, 1:])


def test_sdpa_is_the_default_and_equals_eager_which_returns_attentions():
    model = small_model()
    assert model.config._attn_implementation == "sdpa"
    images = torch.rand(2, 1, 64, 40)
    with torch.no_grad():
        fast = model(images)
        model.set_attn_implementation("eager")
        slow = model(images, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(fast.last_hidden_state, slow.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert len(slow.attentions) == 3 and len(slow.hidden_states) == 4
    assert all(weights.shape == (2, 2, 41, 41) for weights in slow.attentions)
    torch.testing.assert_close(model.norm(slow.hidden_states[-1]), slow.last_hidden_state)
    _, plain = plain_vit(model.to_dino_state_dict(), images[0].expand(3, -1, -1), heads=2, patch=8)
    assert np.abs(slow.attentions[-1][0].numpy() - plain).max() < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore")
def test_flex_attention_equals_sdpa():
    model = small_model()
    images = torch.rand(2, 1, 64, 40)
    with torch.no_grad():
        expected = model(images)
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(images).last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
        pooled = model(images, cls_only=True).pooler_output
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [[], ["dna", "actin"]], ids=["one tower", "combined"])
def test_return_dict_false_gives_a_tuple(channels):
    model = small_model(cls=WSDinoMultiChannelModel if channels else WSDinoModel, channel_names=channels)
    count = max(len(channels), 1)
    images = torch.rand(1, count, 64, 64)
    last, pooled = model(images, return_dict=False)
    assert last.shape == (1, 65, 32 * count) and pooled.shape == (1, 32 * count)
    model.config.return_dict = False
    assert isinstance(model(images), tuple) and model(images, return_dict=True).pooler_output.shape == pooled.shape


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_maps_are_the_last_blocks_cls_row(implementation):
    model = small_model()
    model.set_attn_implementation(implementation)
    images = torch.rand(2, 1, 64, 40)
    maps = model.attention_maps(images).detach()
    assert maps.shape == (2, 2, 8, 5)
    for image, ours in zip(images, maps, strict=True):
        _, plain = plain_vit(model.to_dino_state_dict(), image.expand(3, -1, -1), heads=2, patch=8)
        assert np.abs(ours.numpy() - plain[:, 0, 1:].reshape(2, 8, 5)).max() < 1e-5


@pytest.mark.parametrize("mass", [0.05, 0.6, 0.95, 1.0])
def test_the_mass_mask_keeps_the_fewest_patches_that_hold_the_mass(mass):
    maps = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(0)) ** 4
    mask = attention_mass_mask(maps, mass)
    assert mask.shape == maps.shape and mask.dtype == torch.bool
    for weights, kept in zip(maps.reshape(6, -1).double(), mask.reshape(6, -1), strict=True):
        exact = sorted(map(Fraction, weights.tolist()), reverse=True)
        held, count = Fraction(0), 0
        while held < Fraction(mass) * sum(exact):
            held, count = held + exact[count], count + 1
        assert kept.sum() == count
        assert weights[kept].min() >= weights[~kept].max() if 0 < count < len(weights) else True
        assert weights[kept].sum() >= mass * weights.sum() * (1 - 1e-9)


def test_the_mass_mask_refuses_a_share_that_is_none():
    for mass in (0.0, 1.5):
        with pytest.raises(ValueError, match="mass must be above 0 and at most 1"):
            attention_mass_mask(torch.ones(2, 2), mass)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 1, 64, 60), "64x60 pixels does not divide into patches of 8x8: crop it"),
        ((1, 2, 64, 64), r"1 channel .* or 3 .* is \(1, 2, 64, 64\)"),
        ((1, 64, 64), r"must be .batch, channels, height, width. .* is \(1, 64, 64\)"),
        ((1, 1, 0, 64), "0x64 pixels"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_a_sentence(shape, words):
    with pytest.raises(ValueError, match=words):
        small_model()(torch.rand(*shape))


def test_half_precision_runs_and_stays_near():
    model = small_model(scale=1.0)
    images = torch.rand(2, 1, 96, 96)
    with torch.no_grad():
        exact = model(images).pooler_output
        half = model.to(torch.bfloat16)(images).pooler_output
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact, half.float()).min() > 0.99


# --- training


def test_initialisation_is_dinos_and_follows_the_seed():
    torch.manual_seed(0)
    model = WSDinoModel(WSDinoConfig(num_hidden_layers=2))
    state = model.to_dino_state_dict()
    for key in ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "pos_embed"):
        assert abs(state[key].std().item() - 0.02) < 1e-3 and abs(state[key].mean().item()) < 1e-3
    assert abs(state["cls_token"].std().item() - 0.02) < 3e-3
    # PyTorch's default for a convolution: uniform within 1 / sqrt(fan in)
    bound = 1 / math.sqrt(3 * 8 * 8)
    patch = state["patch_embed.proj.weight"]
    assert patch.abs().max() <= bound and abs(patch.std().item() - bound / math.sqrt(3)) < 1e-3
    for key, value in state.items():
        if "norm" in key:
            assert (value == (1 if key.endswith("weight") else 0)).all()
        elif key.endswith("bias") and "patch" not in key:
            assert (value == 0).all()
    torch.manual_seed(0)
    again = WSDinoModel(WSDinoConfig(num_hidden_layers=2)).to_dino_state_dict()
    assert all(torch.equal(state[key], again[key]) for key in state)


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    drop = WSDinoDropPath(0.3).train()
    branch = torch.randn(20_000, 2, 3)
    dropped = drop(branch)
    rows = (dropped == 0).flatten(1).all(1)
    assert abs(rows.double().mean().item() - 0.3) < 0.02
    torch.testing.assert_close(dropped[~rows], branch[~rows] / 0.7)
    assert torch.equal(drop.eval()(branch), branch)


def test_drop_path_rises_linearly_over_depth_and_works_in_training_only():
    model = small_model(drop_path_rate=0.2, num_hidden_layers=5)
    assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    images = torch.rand(1, 1, 64, 64).expand(16, -1, -1, -1)
    still = model(images).pooler_output
    torch.testing.assert_close(still, still[:1].expand(16, -1))
    model.train()
    torch.manual_seed(0)
    first = model(images).pooler_output
    assert not torch.allclose(first, first[:1].expand(16, -1), atol=1e-3)
    torch.manual_seed(0)
    torch.testing.assert_close(model(images).pooler_output, first)


def test_gradient_checkpointing_changes_no_gradient():
    model = small_model(drop_path_rate=0.3).train()
    images = torch.rand(4, 1, 64, 40)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.layers)
        model.zero_grad()
        torch.manual_seed(3)
        model(images, cls_only=True).pooler_output.square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.isfinite(gradient).all(), name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_training_reaches_every_parameter():
    model = small_model().train()
    model(torch.rand(2, 1, 64, 40)).pooler_output.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


# --- files and names


def test_save_and_load_round_trip(tmp_path):
    model = small_model(channel_names=["actin"])
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = WSDinoModel.from_pretrained(tmp_path)
    images = torch.rand(1, 1, 64, 64)
    assert loaded.config.channel_names == ["actin"]
    assert torch.equal(loaded(images).pooler_output, model(images).pooler_output)


# --- the combined model


def test_the_combined_model_is_its_towers_side_by_side():
    model = small_model(cls=WSDinoMultiChannelModel, channel_names=["dna", "tubulin", "actin"])
    images = torch.rand(2, 3, 64, 40)
    output = model(images)
    assert output.pooler_output.shape == (2, 96) and output.last_hidden_state.shape == (2, 41, 96)
    for index, channel in enumerate(("dna", "tubulin", "actin")):
        alone = model.towers[channel](images[:, index : index + 1])
        part = slice(32 * index, 32 * (index + 1))
        torch.testing.assert_close(output.pooler_output[:, part], alone.pooler_output)
        torch.testing.assert_close(output.last_hidden_state[..., part], alone.last_hidden_state)
    assert model(images, cls_only=True).last_hidden_state.shape == (2, 1, 96)


def test_the_combined_model_changes_attention_in_every_tower():
    model = small_model(cls=WSDinoMultiChannelModel, channel_names=["dna", "actin"])
    images = torch.rand(1, 2, 64, 64)
    maps = model.attention_maps(images)
    model.set_attn_implementation("eager")
    output = model(images, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 3 and output.attentions[0].shape == (1, 4, 65, 65)
    assert len(output.hidden_states) == 4 and output.hidden_states[0].shape == (1, 65, 64)
    torch.testing.assert_close(maps.flatten(2), output.attentions[-1][:, :, 0, 1:])
    chosen = model(images, output_hidden_states=[-1]).hidden_states  # newer transformers leave the others out
    torch.testing.assert_close(chosen[-1], output.hidden_states[-1])


def test_towers_on_several_devices_meet_on_the_firsts():
    """As `device_map="auto"` spreads them over GPUs; the meta device stands in for another one."""
    model = small_model(cls=WSDinoMultiChannelModel, channel_names=["dna", "actin"])
    model.set_attn_implementation("eager")
    accelerate.hooks.attach_execution_device_hook(model.towers["dna"].to("meta"), "meta")
    images = torch.rand(1, 2, 64, 64)
    output = model(images, output_attentions=True, output_hidden_states=True)
    shapes = {output.pooler_output: (1, 64), output.last_hidden_state: (1, 65, 64)}
    shapes |= dict.fromkeys(output.hidden_states, (1, 65, 64)) | dict.fromkeys(output.attentions, (1, 4, 65, 65))
    shapes[model.attention_maps(images)] = (1, 4, 8, 8)
    assert len(shapes) == 10 and all(part.is_meta and part.shape == shape for part, shape in shapes.items())


def test_the_combined_model_names_its_channels():
    with pytest.raises(ValueError, match="needs channel_names"):
        WSDinoMultiChannelModel(WSDinoConfig(**SMALL))
    model = small_model(cls=WSDinoMultiChannelModel, channel_names=["dna", "actin"])
    with pytest.raises(ValueError, match="the channels dna, actin in this order"):
        model(torch.rand(1, 3, 64, 64))
