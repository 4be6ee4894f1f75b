"""The WS-DINO vision transformer: one tower a fluorescence channel, and the model that holds several towers.

The network is the DINO ViT (arXiv 2104.14294) as WS-DINO trains it (arXiv 2209.07819): pre-norm blocks, learned
position embeddings, a CLS token whose final LayerNorm output is the feature. It differs from the ViTs in transformers
by its position-embedding interpolation and by taking one-channel images.

Parameter names and those of the original DINO (`blocks.0.attn.qkv.weight`) map one to one, see `DINO_KEYS`.
"""

import argparse
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_wsdino import WSDinoConfig

# Fragments of our parameter names and of the original DINO's; replaced in this order they map either way.
DINO_KEYS = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.", "patch_embed.proj."),
    ("layers.", "blocks."),
    (".attention.", ".attn."),
)


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
        # A convolution whose stride is its kernel is a product of cut-out patches with the flattened kernel;
        # written so it is about twice as fast on a CPU.
        patches = pixel_values.to(kernel.dtype).reshape(batch, channels, height // patch, patch, width // patch, patch)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)
        return nn.functional.linear(patches, kernel.reshape(kernel.shape[0], -1), self.bias)


class WSDinoConvolutionalStem(nn.Module):
    """Images to tokens by log2(patch size) 3x3 convolutions of stride 2: `(batch, 1 or 3, height, width)` to `(batch,
    patches, hidden)`.

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
    """Images `(batch, channels, height, width)` to tokens `(batch, 1 + patches, hidden)` that know their positions."""

    def __init__(self, config: WSDinoConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        num_patches = (config.image_size // config.patch_size) ** 2
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + num_patches, config.hidden_size))
        stem = config.patch_embedding == "convolutional"
        self.patch_embeddings = WSDinoConvolutionalStem(config) if stem else WSDinoPatchEmbeddings(config)

    def interpolate_position_embeddings(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings `(1, 1 + patches, hidden)` for an image of `height` by `width` pixels.

        As in the original DINO: bicubic, with scale factors `(n + 0.1) / sqrt(N)`. Transformers' `ViTModel` and
        `Dinov2Model` resize to the output size instead, which samples slightly different places.
        """
        table = self.position_embeddings
        num_patches = (height // self.patch_size) * (width // self.patch_size)
        if num_patches == table.shape[1] - 1 and height == width:
            return table
        side = math.isqrt(table.shape[1] - 1)
        grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale_factor = ((height // self.patch_size + 0.1) / side, (width // self.patch_size + 0.1) / side)
        # in float32: bicubic weights in half precision would shift the embeddings
        grid = nn.functional.interpolate(grid.float(), scale_factor=scale_factor, mode="bicubic").to(table.dtype)
        return torch.cat((table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, num_patches, -1)), dim=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values must be (batch, channels, height, width), but is {tuple(pixel_values.shape)}: "
                "add the missing dimensions or flatten tiles into the batch."
            )
        _, channels, height, width = pixel_values.shape
        if channels not in (1, 3):
            raise ValueError(f"pixel_values has {channels} channels, but a tower takes 1 (gray) or 3 (its replicas).")
        patch = self.patch_size
        if height % patch or width % patch or height == 0 or width == 0:
            raise ValueError(
                f"an image of {height}x{width} pixels does not divide into patches of {patch}x{patch}: "
                f"crop it to multiples of {patch}."
            )
        patches = self.patch_embeddings(pixel_values)
        tokens = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        return tokens + self.interpolate_position_embeddings(height, width)


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
        # Adapters, quantised layers, offloading and hooks change what a call does, which bare weights would pass by.
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
        query, key, value = self.project(tokens, cls_only)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.proj(output.flatten(-2)), weights


class WSDinoMLP(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, config: WSDinoConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, int(config.hidden_size * config.mlp_ratio))
        self.fc2 = nn.Linear(int(config.hidden_size * config.mlp_ratio), config.hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(tokens)))


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

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class WSDinoLayer(GradientCheckpointingLayer):
    """One pre-norm transformer block. With `cls_only` it returns the CLS token alone, at the cost of one query."""

    def __init__(self, config: WSDinoConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = WSDinoAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = WSDinoMLP(config)
        self.drop_path = WSDinoDropPath(drop_path_rate)

    def forward(
        self, tokens: torch.Tensor, cls_only: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        attended, _ = self.attention(self.norm1(tokens), cls_only, **kwargs)
        tokens = (tokens[:, :1] if cls_only else tokens) + self.drop_path(attended)
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class WSDinoPreTrainedModel(PreTrainedModel):
    """What the tower and the combined model share: loading, saving, attention implementations, initialisation."""

    config: WSDinoConfig
    config_class = WSDinoConfig
    base_model_prefix = "wsdino"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["WSDinoEmbeddings", "WSDinoLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": WSDinoLayer, "attentions": WSDinoAttention}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """The model of a folder or Hub id, of the class that its config names, one tower or combined.

        `AutoModel` chooses by the config's class, which both share, and so takes for the second model of a process the
        class of the first where their folders are called alike; its weights would stay random then.
        """
        known = config
        if known is None and pretrained_model_name_or_path is not None:
            names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            where = {name: kwargs[name] for name in names if name in kwargs}
            known = cls.config_class.from_pretrained(pretrained_model_name_or_path, **where)
        named = getattr(known, "architectures", None) or [cls.__name__]
        classes = {tower.__name__: tower for tower in (WSDinoModel, WSDinoMultiChannelModel)}
        right = cls if cls.__name__ in named else classes.get(named[0], cls)
        if right is not cls:  # without the mark of a class that came with a repository, saving leaves out its code
            right._auto_class = cls._auto_class
        load = super(WSDinoPreTrainedModel, right).from_pretrained
        return load(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """DINO's initialisation: truncated normals and zero biases; convolutions start as PyTorch's."""
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, WSDinoEmbeddings):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)


class WSDinoModel(WSDinoPreTrainedModel):
    """One tower: the DINO vision transformer for one fluorescence channel (or ImageNet's RGB)."""

    def __init__(self, config: WSDinoConfig) -> None:
        super().__init__(config)
        self.embeddings = WSDinoEmbeddings(config)
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            WSDinoLayer(config, config.drop_path_rate * depth / last) for depth in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, cls_only: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Features of a batch of images.

        Parameters
        ----------
        pixel_values : torch.Tensor
            `(batch, 1 or 3, height, width)` floats in [0, 1]; height and width multiples of the patch size.
        cls_only : bool
            Compute the last block for the CLS token alone: the same `pooler_output` for about 7 % less work, and a
            `last_hidden_state` of `(batch, 1, hidden)`.
        output_hidden_states, output_attentions, return_dict : bool, optional
            As everywhere in transformers. Attentions need `attn_implementation="eager"`; see also `attention_maps`.

        Returns
        -------
        BaseModelOutputWithPooling
            `last_hidden_state` `(batch, 1 + patches, hidden)` after the final LayerNorm and `pooler_output`
            `(batch, hidden)`, its CLS token.

        Raises
        ------
        ValueError
            For another number of dimensions or channels, or sizes that do not divide into patches.
        """
        tokens = self.embeddings(pixel_values)
        for layer in self.layers[:-1]:
            tokens = layer(tokens, False, **kwargs)
        tokens = self.norm(self.layers[-1](tokens, cls_only, **kwargs))
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens[:, 0])

    def attention_maps(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """How much the CLS token of the last block attends to each patch (figure 1 of the paper).

        Works with any attention implementation and never holds a tokens-by-tokens matrix.

        Parameters
        ----------
        pixel_values : torch.Tensor
            As for `forward`.

        Returns
        -------
        torch.Tensor
            `(batch, heads, height / patch, width / patch)`; a map sums to one minus the CLS token's attention
            to itself.
        """
        tokens = self.embeddings(pixel_values)
        for layer in self.layers[:-1]:
            tokens = layer(tokens)
        last = self.layers[-1]
        query, key, _ = last.attention.project(last.norm1(tokens), cls_only=True)
        weights = nn.functional.softmax(query @ key.transpose(2, 3) * last.attention.scaling, dim=-1)
        return weights[:, :, 0, 1:].unflatten(-1, (pixel_values.shape[-2] // self.config.patch_size, -1))

    @classmethod
    def from_dino_checkpoint(
        cls, path: str | Path, config: WSDinoConfig | None = None, *, network: str | None = None, **config_kwargs
    ) -> "WSDinoModel":
        """Read weights in the layout of the original DINO or WS-DINO code.

        Parameters
        ----------
        path : str or Path
            A `.pth` (read safely, `weights_only`) or `.safetensors` file: the bare backbone (`cls_token`, `pos_embed`,
            `blocks.0.attn.qkv.weight`, ...), or a full training checkpoint with `teacher` and `student`, whose
            keys may carry `module.` and `backbone.`. Projection heads and optimiser states are left out.
        config : WSDinoConfig, optional
            Where the values that shapes do not tell come from; depth, width, patch and image size, MLP ratio
            and biases always follow the file.
        network : {"teacher", "student"}, optional
            Which network of a full checkpoint; by default the teacher where there is one, as DINO evaluates it.
        **config_kwargs
            Further config values, such as `channel_names`. Without `num_attention_heads` a head is 64 wide, as
            in DINO.

        Raises
        ------
        ValueError
            For a file that is not such a checkpoint, in one sentence.
        """
        return cls.from_dino_state_dict(read_dino_backbone(path, network), config, name=str(path), **config_kwargs)

    @classmethod
    def from_dino_state_dict(
        cls,
        state: dict[str, torch.Tensor],
        config: WSDinoConfig | None = None,
        *,
        name: str = "the state dict",
        **config_kwargs,
    ) -> "WSDinoModel":
        """As `from_dino_checkpoint`, of weights under the original DINO's bare names; `name` stands in messages."""
        values = {} if config is None else config.to_diff_dict()
        values.update(config_kwargs)
        values.update(_config_values_of_dino_backbone(name, state))
        if values.get("patch_embedding", "linear") != "linear":
            raise ValueError(f"{name} holds a linear patch embedding, as all of DINO's: leave out patch_embedding.")
        if "num_attention_heads" not in config_kwargs and config is None:
            if values["hidden_size"] % 64:
                raise ValueError(
                    f"{name}: a width of {values['hidden_size']} is not a multiple of DINO's 64 a head: "
                    "name num_attention_heads."
                )
            values["num_attention_heads"] = values["hidden_size"] // 64
        model = cls(WSDinoConfig(**values))
        expected = {to_dino_key(key): parameter.shape for key, parameter in model.state_dict().items()}
        missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
        for problem, keys in (("lacks", missing), ("has unknown", unknown)):
            if keys:
                raise ValueError(
                    f"{name} {problem} {_some(sorted(keys))}: it is not a DINO vision transformer of "
                    f"{values['num_hidden_layers']} blocks; give the whole backbone of a ViT."
                )
        for key, shape in expected.items():
            if state[key].shape != shape:
                raise ValueError(f"{name}: {key} is {tuple(state[key].shape)}, where {tuple(shape)} is needed.")
        model.load_state_dict({from_dino_key(key): tensor for key, tensor in state.items()})
        return model.eval()

    def to_dino_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights under the original DINO's names, as `from_dino_checkpoint` and the original code read them.

        Raises
        ------
        ValueError
            The patch embedding is convolutional, for which that layout has no place.
        """
        if self.config.patch_embedding != "linear":
            raise ValueError(
                "the original DINO's layout has no place for a convolutional patch embedding: keep this network as a "
                "repository folder or export it to ONNX."
            )
        return {to_dino_key(key): tensor.detach().cpu() for key, tensor in self.state_dict().items()}


class WSDinoMultiChannelModel(WSDinoPreTrainedModel):
    """The combined model: one tower a channel, side by side, in the order of `config.channel_names`."""

    def __init__(self, config: WSDinoConfig) -> None:
        super().__init__(config)
        if not config.channel_names:
            raise ValueError("a combined model needs channel_names in its config: such as ['dna', 'actin'].")
        # The towers share one config object, so that a change of attention implementation reaches all of them.
        self.towers = nn.ModuleDict({name: WSDinoModel(config) for name in config.channel_names})
        self.post_init()

    def _split(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One `(batch, 1, height, width)` a tower."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != len(self.towers):
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)}, but this model takes (batch, {len(self.towers)}, "
                f"height, "
                f"width) with the channels {', '.join(self.towers)} in this order."
            )
        return pixel_values.split(1, dim=1)

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, cls_only: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """Features of a batch of multi-channel images.

        Parameters
        ----------
        pixel_values : torch.Tensor
            `(batch, channels, height, width)` floats in [0, 1], channels in the order of `config.channel_names`.
        cls_only, output_hidden_states, output_attentions, return_dict
            As for `WSDinoModel`.

        Returns
        -------
        BaseModelOutputWithPooling
            As `WSDinoModel`'s, with the towers' widths side by side: `pooler_output` `(batch, channels * hidden)`, not
            normalised; attentions `(batch, channels * heads, tokens, tokens)`.
        """
        outputs = [
            tower(image, cls_only, return_dict=True, **kwargs)
            for tower, image in zip(self.towers.values(), self._split(pixel_values), strict=True)
        ]
        recorded = {
            key: tuple(
                None if towers[0] is None else _side_by_side(towers, dim)  # None: a layer that was not asked for
                for towers in zip(*(output[key] for output in outputs), strict=True)
            )
            for key, dim in (("hidden_states", -1), ("attentions", 1))  # where the towers stand side by side
            if getattr(outputs[0], key) is not None
        }
        return BaseModelOutputWithPooling(
            last_hidden_state=_side_by_side([output.last_hidden_state for output in outputs], -1),
            pooler_output=_side_by_side([output.pooler_output for output in outputs], -1),
            **recorded,
        )

    def attention_maps(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As `WSDinoModel.attention_maps`, with the towers' heads side by side: `(batch, channels * heads, h, w)`."""
        images = self._split(pixel_values)
        maps = [tower.attention_maps(image) for tower, image in zip(self.towers.values(), images, strict=True)]
        return _side_by_side(maps, 1)


def _side_by_side(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Towers' tensors as one, on the first tower's device: `device_map="auto"` may spread towers over several GPUs."""
    return torch.cat([part.to(parts[0].device) for part in parts], dim=dim)


def attention_mass_mask(attention_maps: torch.Tensor, mass: float = 0.6) -> torch.Tensor:
    """Keep the fewest patches that together hold a share of a map's attention.

    The original code's threshold kept every patch; this one keeps what it names.

    Parameters
    ----------
    attention_maps : torch.Tensor
        `(..., height, width)`, not negative.
    mass : float
        The share to keep, above 0 and at most 1.

    Returns
    -------
    torch.Tensor
        Booleans of the same shape: the largest patches, the last of which reaches the share.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be above 0 and at most 1, but is {mass}.")
    flat = attention_maps.flatten(-2).double()
    values, order = flat.sort(dim=-1, descending=True, stable=True)
    # a patch is kept while the larger ones before it do not yet hold the share
    before = values.cumsum(dim=-1) - values
    kept = before < mass * values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept).reshape(attention_maps.shape)


def to_dino_key(key: str) -> str:
    """Our parameter name in the original DINO's words."""
    for ours, theirs in DINO_KEYS:
        key = key.replace(ours, theirs)
    return key


def from_dino_key(key: str) -> str:
    """The original DINO's parameter name in our words."""
    for ours, theirs in DINO_KEYS:
        key = key.replace(theirs, ours)
    return key


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_checkpoint(path: str | Path) -> dict:
    """What a `.pth`, `.bin` or `.safetensors` file holds, read without executing anything of it.

    Raises
    ------
    ValueError
        For a file that is none, in one sentence.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file: name a .pth or .safetensors checkpoint.")
    try:
        if path.suffix == ".safetensors":
            checkpoint = load_file(path)
        else:
            # full DINO checkpoints keep their arguments as a Namespace, a harmless class
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read safely as a PyTorch checkpoint ({[*str(error).splitlines(), 'it is empty'][0]}): "
            "save it again as a plain state dict."
        ) from error
    except Exception as error:  # safetensors raises its own error class, which derives from Exception alone
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}.") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a state dict: save model.state_dict().")
    return checkpoint


def read_dino_backbone(path: str | Path, network: str | None = None) -> dict[str, torch.Tensor]:
    """The backbone of a DINO checkpoint file under bare names, its heads left out (see `from_dino_checkpoint`)."""
    checkpoint = read_checkpoint(path)
    if network not in (None, "teacher", "student"):
        raise ValueError(f"network must be 'teacher' or 'student', but is {network!r}.")
    choices = [name for name in ("teacher", "student") if isinstance(checkpoint.get(name), dict)]
    if network is not None and network not in choices:
        raise ValueError(f"{path} holds no {network} network: choose {choices[0] if choices else 'none'}.")
    state = checkpoint[network or choices[0]] if choices else checkpoint
    backbone = {}
    for key, tensor in state.items():
        for prefix in ("module.", "_orig_mod.", "backbone."):
            key = str(key).removeprefix(prefix)
        if isinstance(tensor, torch.Tensor) and not key.startswith(("head.", "fc.")):
            backbone[key] = tensor
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= backbone.keys():
        raise ValueError(
            f"{path} holds no DINO backbone (its keys are {_some([str(key) for key in state]) or 'none'}): "
            "give the file with the vision transformer, not the head alone."
        )
    return backbone


def _config_values_of_dino_backbone(name: str, state: dict[str, torch.Tensor]) -> dict:
    """The config values which the shapes of a DINO backbone tell."""
    blocks = [int(key.split(".")[1]) for key in state if key.startswith("blocks.") and key.split(".")[1].isdigit()]
    fc1 = state.get("blocks.0.mlp.fc1.weight")
    if fc1 is None:
        raise ValueError(f"{name} lacks blocks.0.mlp.fc1.weight: give the whole backbone of a ViT.")
    for key, dimensions in (("cls_token", 3), ("pos_embed", 3), ("patch_embed.proj.weight", 4)):
        if key not in state or state[key].ndim != dimensions or not state[key].numel():
            raise ValueError(f"{name} has no {key} of {dimensions} dimensions: give the whole backbone of a ViT.")
    hidden_size = state["cls_token"].shape[-1]
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    ratio = fc1.shape[0] / hidden_size
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(blocks),
        "mlp_ratio": int(ratio) if ratio.is_integer() else ratio,
        "patch_size": patch_size,
        "image_size": side * patch_size,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }


__all__ = ["WSDinoModel", "WSDinoMultiChannelModel", "WSDinoPreTrainedModel", "attention_mass_mask"]
