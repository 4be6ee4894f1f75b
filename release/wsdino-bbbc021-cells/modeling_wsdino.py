"""The WS-DINO vision transformer: one tower per fluorescence channel, and the model that holds several towers.

The network is the DINO ViT (arXiv 2104.14294) as WS-DINO trains it (arXiv 2209.07819): pre-norm blocks, learned
position embeddings, a CLS token whose final LayerNorm output is the feature. It differs from the ViTs in transformers
by its position-embedding interpolation and by taking one-channel images (see `layers_wsdino.py`).
"""

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_wsdino import WSDinoConfig
from .layers_wsdino import WSDinoAttention, WSDinoEmbeddings, WSDinoLayer, WSDinoLayerScale


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
        """The model of a folder or Hub id, of the class that its config names: one tower or combined.

        Both models share one config class, so `AutoModel` may choose the wrong one for a second repository whose
        folder has the same name, and its weights would then stay random.
        """
        known = config
        if known is None and pretrained_model_name_or_path is not None:
            names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            where = {name: kwargs[name] for name in names if name in kwargs}
            known = cls.config_class.from_pretrained(pretrained_model_name_or_path, **where)
        named = getattr(known, "architectures", None) or [cls.__name__]
        classes = {tower.__name__: tower for tower in (WSDinoModel, WSDinoMultiChannelModel)}
        right = cls if cls.__name__ in named else classes.get(named[0], cls)
        right._auto_class = cls._auto_class  # without this mark of remote code, saving would leave out the code
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
        elif isinstance(module, WSDinoLayerScale):
            init.ones_(module.gamma)
        elif isinstance(module, WSDinoEmbeddings):
            for parameter in module.parameters(recurse=False):  # the CLS token, positions and registers
                init.trunc_normal_(parameter, std=self.config.initializer_range)


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
            `last_hidden_state` `(batch, 1 + patches, hidden)` after the final LayerNorm, without registers, and
            `pooler_output` `(batch, hidden)`, its CLS token.

        Raises
        ------
        ValueError
            For another number of dimensions or channels, or sizes that do not divide into patches.
        """
        tokens = self.embeddings(pixel_values)
        for layer in self.layers[:-1]:
            tokens = layer(tokens, False, **kwargs)
        tokens = self.norm(self.layers[-1](tokens, cls_only, **kwargs))
        if self.config.num_register_tokens and not cls_only:
            tokens = torch.cat((tokens[:, :1], tokens[:, 1 + self.config.num_register_tokens :]), dim=1)
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
            to itself and to the registers.
        """
        tokens = self.embeddings(pixel_values)
        for layer in self.layers[:-1]:
            tokens = layer(tokens)
        last = self.layers[-1]
        query, key, _ = last.attention.project(last.norm1(tokens), cls_only=True)
        weights = nn.functional.softmax(query @ key.transpose(2, 3) * last.attention.scaling, dim=-1)
        weights = weights[:, :, 0, 1 + self.config.num_register_tokens :]
        return weights.unflatten(-1, (pixel_values.shape[-2] // self.config.patch_size, -1))

    @classmethod
    def from_dino_checkpoint(cls, path: str | Path, *args: Any, **kwargs: Any) -> "WSDinoModel":
        """The network of a checkpoint file of DINO, DINOv2, WS-DINO, MAE or timm.

        See `modeling_wsdino.checkpoint_layouts.read_dino_checkpoint`, whose parameters these are: the package wsdino
        must be installed.
        """
        return import_module("modeling_wsdino.checkpoint_layouts").read_dino_checkpoint(path, *args, **kwargs)

    def to_dino_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights under the original DINO's names; the package wsdino must be installed."""
        return import_module("modeling_wsdino.checkpoint_layouts").to_dino_state_dict(self)


class WSDinoMultiChannelModel(WSDinoPreTrainedModel):
    """The combined model: one tower per channel, side by side, in the order of `config.channel_names`."""

    def __init__(self, config: WSDinoConfig) -> None:
        super().__init__(config)
        if not config.channel_names:
            raise ValueError("a combined model needs channel_names in its config: such as ['dna', 'actin'].")
        # The towers share one config object, so that a change of attention implementation reaches all of them.
        self.towers = nn.ModuleDict({name: WSDinoModel(config) for name in config.channel_names})
        self.post_init()

    def _split(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One `(batch, 1, height, width)` per tower."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != len(self.towers):
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)}, but this model takes (batch, {len(self.towers)}, "
                f"height, width) with the channels {', '.join(self.towers)} in this order."
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


__all__ = ["WSDinoModel", "WSDinoMultiChannelModel", "WSDinoPreTrainedModel"]
