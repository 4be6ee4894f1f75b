"""Small models, fields of noise, and the features of a field in a plain loop."""

import numpy as np
import torch

from modeling_wsdino import WSDinoConfig, WSDinoModel, WSDinoMultiChannelModel

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
