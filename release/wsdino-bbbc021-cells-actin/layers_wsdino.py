"""Layers of the WS-DINO vision transformer: patch embeddings, positions, attention, blocks."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_wsdino import WSDinoConfig


class WSDinoPatchEmbeddings(nn.Conv2d):
    """Square patches to tokens: `(batch, 1 or 3, height, width)` to `(batch, patches, hidden)`, patches row by row.

    The weight keeps the three input channels of ImageNet DINO. A one-channel image meets the kernel summed over its
    input channels, which equals replicating gray to RGB at a third of the work.
    """

    def __init__(self, config: WSDinoConfig) -> None:
        super().__init__(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = pixel_values.shape
        patch = self.kernel_size[0]
        kernel = self.weight if channels == 3 else self.weight.sum(dim=1, keepdim=True)
        # The convolution is written as a product of patches with the flattened kernel: twice as fast on a CPU.
        patches = pixel_values.to(kernel.dtype).reshape(batch, channels, height // patch, patch, width // patch, patch)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)
        return nn.functional.linear(patches, kernel.reshape(kernel.shape[0], -1), self.bias)


class WSDinoConvolutionalStem(nn.Module):
    """Images to tokens, `(batch, patches, hidden)`, by log2(patch size) 3x3 convolutions of stride 2.

    The width doubles at each convolution, up to `hidden_size` (a quarter, a half and the whole for patches of 8). Each
    but the last is followed by batch normalisation and ReLU ("Early Convolutions Help Transformers See Better", arXiv
    2106.14881). The stem takes one channel: of three, which are replicas of gray, it takes the mean.

    Batch normalisation keeps running means and variances in buffers, which no optimiser or moving average of
    parameters touches: copy them from the student to its EMA teacher after each step. In training mode, which a
    teacher may be in too, a batch is normalised by its own statistics, and the features of an image depend on its
    batch; in evaluation mode they do not.
    """

    def __init__(self, config: WSDinoConfig) -> None:
        super().__init__()
        steps = config.patch_size.bit_length() - 1
        widths = [config.hidden_size >> (steps - 1 - step) for step in range(steps)]
        self.convolutions = nn.ModuleList(
            # A bias before a batch normalisation would be subtracted again.
            nn.Conv2d(narrow, wide, kernel_size=3, stride=2, padding=1, bias=wide == config.hidden_size)
            for narrow, wide in zip([1, *widths[:-1]], widths, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[:-1])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        maps = pixel_values.to(self.convolutions[0].weight.dtype).mean(dim=1, keepdim=True)
        for convolution, norm in zip(self.convolutions, self.norms, strict=False):
            maps = nn.functional.relu(norm(convolution(maps)))
        return self.convolutions[-1](maps).flatten(2).transpose(1, 2)


class WSDinoEmbeddings(nn.Module):
    """Images `(batch, channels, height, width)` to tokens that know their positions: CLS, registers, patches."""

    def __init__(self, config: WSDinoConfig) -> None:
        super().__init__()
        self.patch_size, self.interpolation = config.patch_size, config.position_interpolation
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        num_patches = (config.image_size // config.patch_size) ** 2
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + num_patches, config.hidden_size))
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        stem = config.patch_embedding == "convolutional"
        self.patch_embeddings = WSDinoConvolutionalStem(config) if stem else WSDinoPatchEmbeddings(config)

    def interpolate_position_embeddings(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings `(1, 1 + patches, hidden)` for an image of `height` by `width` pixels.

        Bicubic, in one of three ways that sample slightly different places: with scale factors `(n + 0.1) / sqrt(N)`
        as in the original DINO, resized to the output size, or that with antialiasing.
        """
        table = self.position_embeddings
        rows, columns = height // self.patch_size, width // self.patch_size
        if rows * columns == table.shape[1] - 1 and height == width:
            return table
        side = math.isqrt(table.shape[1] - 1)
        grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if self.interpolation == "dino":
            size = {"scale_factor": ((rows + 0.1) / side, (columns + 0.1) / side)}
        else:
            size = {"size": (rows, columns), "antialias": self.interpolation == "antialias"}
        # Bicubic weights in half precision would shift the embeddings.
        grid = nn.functional.interpolate(grid.float(), mode="bicubic", **size).to(table.dtype)
        return torch.cat((table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)), dim=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        shape, patch = tuple(pixel_values.shape), self.patch_size
        if len(shape) != 4 or shape[1] not in (1, 3):
            raise ValueError(
                "pixel_values must be (batch, channels, height, width) with 1 channel (gray) or 3 (its replicas), but "
                f"is {shape}."
            )
        if 0 in shape[2:] or shape[2] % patch or shape[3] % patch:
            raise ValueError(
                f"an image of {shape[2]}x{shape[3]} pixels does not divide into patches of {patch}x{patch}: "
                f"crop it to multiples of {patch}."
            )
        patches = self.patch_embeddings(pixel_values)
        tokens = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        tokens = tokens + self.interpolate_position_embeddings(*shape[2:])
        if not hasattr(self, "register_tokens"):
            return tokens
        registers = self.register_tokens.expand(patches.shape[0], -1, -1)
        return torch.cat((tokens[:, :1], registers, tokens[:, 1:]), dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, which also returns its weights `(batch, heads, queries, keys)`."""
    weights = nn.functional.softmax(query @ key.transpose(2, 3) * scaling, dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class WSDinoAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values, as in DINO."""

    def __init__(self, config: WSDinoConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, hidden)` to `(batch, heads, tokens, head width)`."""
        return tokens.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project(self, tokens: torch.Tensor, cls_only: bool) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, each `(batch, heads, tokens, head width)`; with `cls_only` the CLS query alone."""
        qkv, width = self.qkv, tokens.shape[-1]
        # LoRA adapters, quantised layers, offloading and hooks change what a call does: bare weights miss it.
        called = type(qkv) is not nn.Linear or qkv._forward_pre_hooks or qkv._forward_hooks or hasattr(qkv, "_hf_hook")
        if called or not cls_only:
            query, key, value = qkv(tokens).chunk(3, dim=-1)
            query = query[:, :1] if cls_only else query
        else:
            bias = (None, None) if qkv.bias is None else qkv.bias.tensor_split((width,))
            query = nn.functional.linear(tokens[:, :1], qkv.weight[:width], bias[0])
            key, value = nn.functional.linear(tokens, qkv.weight[width:], bias[1]).chunk(2, dim=-1)
        return tuple(self.split_heads(part) for part in (query, key, value))

    def forward(
        self, tokens: torch.Tensor, cls_only: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        implementation = self.config._attn_implementation
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        query_key_value = self.project(tokens, cls_only)
        output, weights = attention(self, *query_key_value, None, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.proj(output.flatten(-2)), weights


class WSDinoMLP(nn.Module):
    """Two linear layers with an exact GELU between, or a SiLU gate, which is the first half of the first layer."""

    def __init__(self, config: WSDinoConfig) -> None:
        super().__init__()
        units = int(config.hidden_size * config.mlp_ratio + 1e-6)  # a ratio read from a file is a rounded quotient
        self.gated = config.mlp_type == "swiglu"
        self.fc1 = nn.Linear(config.hidden_size, units * (1 + self.gated))
        self.fc2 = nn.Linear(units, config.hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(tokens)
        if not self.gated:
            return self.fc2(nn.functional.gelu(hidden))
        gate, value = hidden.chunk(2, dim=-1)
        return self.fc2(nn.functional.silu(gate) * value)


class WSDinoLayerScale(nn.Module):
    """A learned factor for each feature of a residual branch ("Going deeper with Image Transformers", 2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        return branch * self.gamma


class WSDinoDropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): while training, drops a residual branch for whole samples at random."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return branch
        keep = 1.0 - self.rate
        kept = torch.rand(branch.shape[0], 1, 1, dtype=torch.float32, device=branch.device) < keep
        return branch * (kept / keep).to(branch.dtype)


class WSDinoLayer(GradientCheckpointingLayer):
    """One pre-norm transformer block. With `cls_only` it returns the CLS token alone, at the cost of one query."""

    def __init__(self, config: WSDinoConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = WSDinoAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = WSDinoMLP(config)
        self.scale1, self.scale2 = (
            WSDinoLayerScale(config.hidden_size) if config.layer_scale else nn.Identity() for _ in range(2)
        )
        self.drop_path = WSDinoDropPath(drop_path_rate)

    def forward(
        self, tokens: torch.Tensor, cls_only: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        attended, _ = self.attention(self.norm1(tokens), cls_only, **kwargs)
        tokens = (tokens[:, :1] if cls_only else tokens) + self.drop_path(self.scale1(attended))
        return tokens + self.drop_path(self.scale2(self.mlp(self.norm2(tokens))))
