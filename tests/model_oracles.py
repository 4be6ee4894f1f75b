"""Small networks and what they must compute: DINO and the stem in plain NumPy, and transformers' Dinov2."""

import math

import numpy as np
import torch
from transformers import Dinov2Config, Dinov2Model

from modeling_wsdino import WSDinoConfig, WSDinoModel

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}
NORM = ("weight", "bias", "running_mean", "running_var")


def small_model(seed=0, scale=5.0, cls=WSDinoModel, **values):
    """A small model whose weights are large enough for attention to be far from uniform."""
    torch.manual_seed(seed)
    model = cls(WSDinoConfig(**(SMALL | values))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim > 1:
                parameter.mul_(scale)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def plain_cubic(distance, a=-0.75):
    """Keys' cubic kernel with PyTorch's a."""
    distance = abs(distance)
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    if distance < 2:
        return a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
    return 0.0


def plain_interpolation(table, height, width, patch):
    """The original DINO's position embeddings, sampled point by point: (1 + patches, hidden) in float64."""
    table = table.double().numpy()[0]
    side = round(math.sqrt(len(table) - 1))
    rows, columns = height // patch, width // patch
    if (rows * columns == side * side) and height == width:
        return table
    grid = table[1:].reshape(side, side, -1)
    sampled = [table[0]]
    for row in range(rows):
        y = (row + 0.5) / ((rows + 0.1) / side) - 0.5
        for column in range(columns):
            x = (column + 0.5) / ((columns + 0.1) / side) - 0.5
            value = np.zeros(grid.shape[-1])
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    weight = plain_cubic(y - i) * plain_cubic(x - j)
                    value += weight * grid[min(max(i, 0), side - 1), min(max(j, 0), side - 1)]
            sampled.append(value)
    return np.stack(sampled)


def plain_vit(state, image, heads, patch, eps=1e-6):
    """The original DINO's forward of one RGB image with its own parameter names, head by head, in float64.

    Returns the tokens after the final LayerNorm and the last block's attention (heads, tokens, tokens).
    """
    state = {key: value.double().numpy() for key, value in state.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)

    image = image.double().numpy()
    kernel = state["patch_embed.proj.weight"].reshape(len(state["patch_embed.proj.weight"]), -1)
    tokens = [state["cls_token"][0, 0]]
    for top in range(0, image.shape[1], patch):
        for left in range(0, image.shape[2], patch):
            tokens.append(
                kernel @ image[:, top : top + patch, left : left + patch].ravel() + state["patch_embed.proj.bias"]
            )
    x = np.stack(tokens) + plain_interpolation(torch.from_numpy(state["pos_embed"]), *image.shape[1:], patch)
    width, depth = x.shape[1] // heads, 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    for block in range(depth):
        qkv = linear(norm(x, f"blocks.{block}.norm1"), f"blocks.{block}.attn.qkv")
        attended, attention = [], []
        for head in range(heads):
            q, k, v = (qkv[:, i * x.shape[1] + head * width : i * x.shape[1] + (head + 1) * width] for i in range(3))
            scores = q @ k.T / math.sqrt(width)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            attention.append(weights / weights.sum(-1, keepdims=True))
            attended.append(attention[-1] @ v)
        x = x + linear(np.concatenate(attended, 1), f"blocks.{block}.attn.proj")
        hidden = linear(norm(x, f"blocks.{block}.norm2"), f"blocks.{block}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"blocks.{block}.mlp.fc2")
    return norm(x, "norm"), np.stack(attention)


def dinov2_twin(model):
    """A Dinov2Model with the weights of ours: the same network at the trained image size."""
    config = model.config
    twin = Dinov2Model(
        Dinov2Config(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            patch_size=config.patch_size,
            image_size=config.image_size,
            layerscale_value=1.0,
            use_mask_token=False,
        )
    ).eval()
    dino = model.to_dino_state_dict()
    state = {
        "embeddings.cls_token": dino["cls_token"],
        "embeddings.position_embeddings": dino["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": dino["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": dino["patch_embed.proj.bias"],
        "layernorm.weight": dino["norm.weight"],
        "layernorm.bias": dino["norm.bias"],
    }
    for block in range(config.num_hidden_layers):
        there, here = f"encoder.layer.{block}.", f"blocks.{block}."
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", dino[here + f"attn.qkv.{kind}"].chunk(3), strict=True):
                state[there + f"attention.{name}_proj.{kind}"] = part
            state[there + f"attention.o_proj.{kind}"] = dino[here + f"attn.proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[there + f"{name}.{kind}"] = dino[here + f"{name}.{kind}"]
        for scale in ("layer_scale1", "layer_scale2"):
            state[there + f"{scale}.lambda1"] = torch.ones(config.hidden_size)
    twin.load_state_dict(state)
    return twin


def plain_stem(state, image, steps, eps=1e-5):
    """The stem of one gray image, pixel by pixel in float64, with the running statistics: (patches, hidden)."""
    state = {key: value.double().numpy() for key, value in state.items()}
    maps = image.double().numpy()
    for step in range(steps):
        kernel = state[f"convolutions.{step}.weight"]
        bordered = np.pad(maps, ((0, 0), (1, 1), (1, 1)))
        rows, columns = maps.shape[1] // 2, maps.shape[2] // 2
        maps = np.zeros((len(kernel), rows, columns))
        for row in range(rows):
            for column in range(columns):
                seen = bordered[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                maps[:, row, column] = (kernel * seen).sum((1, 2, 3))
        if step == steps - 1:
            return (maps + state[f"convolutions.{step}.bias"][:, None, None]).reshape(len(kernel), -1).T
        norm = {name: state[f"norms.{step}.{name}"][:, None, None] for name in NORM}
        maps = (maps - norm["running_mean"]) / np.sqrt(norm["running_var"] + eps) * norm["weight"] + norm["bias"]
        maps = np.maximum(maps, 0)
