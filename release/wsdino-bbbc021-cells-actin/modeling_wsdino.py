"""The WS-DINO vision transformer: one tower per fluorescence channel, and the model that holds several towers.

The network is the DINO ViT (arXiv 2104.14294) as WS-DINO trains it (arXiv 2209.07819): pre-norm blocks, learned
position embeddings, a CLS token whose final LayerNorm output is the feature. It differs from the ViTs in transformers
by its position-embedding interpolation and by taking one-channel images (see `layers_wsdino.py`).
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_wsdino import WSDinoConfig
from .layers_wsdino import WSDinoAttention, WSDinoEmbeddings, WSDinoLayer

# Parts of our parameter names and of the original DINO's; replaced in this order they map either way.
DINO_KEYS = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.", "patch_embed.proj."),
    ("layers.", "blocks."),
    (".attention.", ".attn."),
)


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
            Source of the values that shapes do not tell; depth, width, patch and image size, MLP ratio and biases
            always follow the file.
        network : {"teacher", "student"}, optional
            Which network of a full checkpoint; by default the teacher where there is one, as DINO evaluates it.
        **config_kwargs
            Further config values, such as `channel_names`. Without `num_attention_heads` a head is 64 wide, as
            in DINO.

        Raises
        ------
        ValueError
            The file is not such a checkpoint; the message is one sentence.
        """
        state = read_checkpoint(path)
        networks = [name for name in ("teacher", "student") if isinstance(state.get(name), dict)]
        if network not in (None, *networks):
            raise ValueError(
                f"{path} holds no {network} network; it holds {' and '.join(networks) or 'bare weights'}."
            )
        state = state[network or networks[0]] if networks else state
        return cls.from_dino_state_dict(state, config, name=str(path), **config_kwargs)

    @classmethod
    def from_dino_state_dict(
        cls, state: dict, config: WSDinoConfig | None = None, *, name: str = "the state dict", **config_kwargs
    ) -> "WSDinoModel":
        """As `from_dino_checkpoint`, from weights under the original DINO's names; `name` stands in messages."""
        keys = {key: re.sub(r"^((module|_orig_mod|backbone)\.)+", "", str(key)) for key in state}
        state = {keys[key]: tensor for key, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        values = ({} if config is None else config.to_diff_dict()) | config_kwargs
        if values.get("patch_embedding", "linear") != "linear":
            raise ValueError(f"{name} holds a linear patch embedding, as all of DINO's: leave out patch_embedding.")
        try:
            width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
            ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / width
            values |= {
                "hidden_size": width,
                "num_hidden_layers": sum(key.endswith(".mlp.fc1.weight") for key in state),
                "mlp_ratio": int(ratio) if ratio.is_integer() else ratio,
                "patch_size": patch,
                "image_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch,
                "qkv_bias": "blocks.0.attn.qkv.bias" in state,
            }
            if config is None:
                values.setdefault("num_attention_heads", width / 64 if width % 64 else width // 64)
            model = cls(WSDinoConfig(**values))
            heads = ("head.", "fc.")
            model.load_state_dict({from_dino_key(key): state[key] for key in state if not key.startswith(heads)})
        except (KeyError, IndexError, ZeroDivisionError, RuntimeError) as error:
            lack = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise ValueError(f"{name} holds no whole DINO vision transformer ({lack[:300]}).") from error
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


def read_checkpoint(path: str | Path) -> dict:
    """The content of a `.pth`, `.bin` or `.safetensors` file, read without executing any of it."""
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        # Full DINO checkpoints keep their arguments as a Namespace, a harmless class.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise whatever their parsing meets
        reason = (str(error).strip().splitlines() or ["it is empty"])[0]
        raise ValueError(f"{path} cannot be read safely as a checkpoint ({reason}).") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a state dict: save model.state_dict().")
    return checkpoint


__all__ = ["WSDinoModel", "WSDinoMultiChannelModel", "WSDinoPreTrainedModel"]
