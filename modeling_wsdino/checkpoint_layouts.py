"""Vision transformers under other programs' names: their weights are read safely, renamed, and made a network of ours.

All layouts are first brought to the names of the original DINO, which timm, MAE and DINOv2 extend. Not shipped with
models.
"""

import argparse
import codecs
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from wsdino.errors import UserError, first_line

from .configuration_wsdino import WSDinoConfig
from .modeling_wsdino import WSDinoModel

# Parts of our parameter names and of DINO's or DINOv2's; replaced in this order they map either way.
DINO_KEYS = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.register_tokens", "register_tokens"),
    ("embeddings.patch_embeddings.", "patch_embed.proj."),
    ("layers.", "blocks."),
    (".attention.", ".attn."),
    (".scale1.", ".ls1."),
    (".scale2.", ".ls2."),
)
# Other spellings of DINO's names: DINOv2's chunks of blocks and gated MLP, timm's registers.
DINO_SPELLINGS = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"^reg_token$", "register_tokens"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
# Modules of transformers' ViT, ViT-MAE and DINOv2 in DINO's words.
TRANSFORMERS_KEYS = (
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(?:encoder\.layer|layers)\.", "blocks."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.(gate|up)_proj\.", r".mlp.\1."),
    (r"\.mlp\.down_proj\.", ".mlp.w3."),
)
MERGED = ((".attn.qkv.", (".attn.q.", ".attn.k.", ".attn.v.")), (".mlp.w12.", (".mlp.gate.", ".mlp.up.")))
# What a network's features do not depend on: heads, decoders, the token of masked patches, ViT's unused pooler.
UNUSED = ("head", "fc.", "mask_token", "decoder", "dino_head", "ibot_head", "pooler.")


def read_dino_checkpoint(
    path: str | Path, config: WSDinoConfig | None = None, *, network: str | None = None, **config_kwargs: Any
) -> WSDinoModel:
    """The network of a checkpoint file in the layout of DINO, WS-DINO, DINOv2, MAE or timm.

    Parameters
    ----------
    path : str or Path
        A `.pth` (read safely, `weights_only`) or `.safetensors` file: the bare backbone (`cls_token`, `pos_embed`,
        `blocks.0.attn.qkv.weight`, ...), or a training checkpoint that holds it at any depth, such as under `teacher`
        and `module.backbone.`. Projection heads and optimiser states are left out. A patch embedding of one input
        channel is spread over three.
    config : WSDinoConfig, optional
        Source of the values that shapes do not tell.
    network : {"teacher", "student"}, optional
        Which network of a full checkpoint; by default the teacher where there is one, as DINO evaluates it.
    **config_kwargs
        Further config values, such as `channel_names`. Without `num_attention_heads` a head is 64 wide, as in DINO.
        Without `position_interpolation` it is DINO's, or with registers DINOv2's for them.

    Returns
    -------
    WSDinoModel
        In evaluation mode and float32.

    Raises
    ------
    UserError
        The file is not such a checkpoint, or holds several other networks.
    """
    tensors = dict(_tensors(read_checkpoint(path)))
    prefixes = [key.removesuffix("cls_token") for key in tensors if re.search(r"(^|\.)cls_token$", key)]
    named = {name: one for name in ("student", "teacher") for one in prefixes if name in re.split(r"[._]", one)}
    if network not in (None, *named):
        raise UserError(f"{path} holds no {network} network; it holds {' and '.join(named) or 'bare weights'}.")
    if not named and len(prefixes) > 1:
        raise UserError(f"{path} holds several networks ({', '.join(prefixes)}): save the weights of one.")
    if any(prefix.endswith("embeddings.") for prefix in prefixes):
        raise UserError(f"{path} holds weights under transformers' names: give its folder, with the config.json.")
    prefix = named.get(network or "teacher") or named.get("student") or (prefixes or [""])[0]
    state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return model_from_dino_names(state, config, name=str(path), **config_kwargs)


def model_from_dino_names(
    state: dict[str, torch.Tensor], config: WSDinoConfig | None = None, *, name: str, **config_kwargs: Any
) -> WSDinoModel:
    """As `read_dino_checkpoint`, from one network's weights under DINO's, DINOv2's, MAE's or timm's names.

    Depth, width, patch and image size, MLP and biases follow the weights; `name` stands in messages.
    """
    values = ({} if config is None else config.to_diff_dict()) | config_kwargs
    if values.get("patch_embedding", "linear") != "linear":
        raise UserError(f"{name} holds a linear patch embedding: leave out patch_embedding.")
    if any("lora_" in key for key in state):
        raise UserError(f"{name} holds LoRA adapters: merge them first, with peft's merge_and_unload().")
    gated = "blocks.0.mlp.w12.weight" in state or "blocks.0.0.mlp.w12.weight" in state
    state = {_renamed(key, DINO_SPELLINGS): one for key, one in state.items() if not key.startswith(UNUSED)}
    try:
        kernel, positions, registers = (
            state["patch_embed.proj.weight"],
            state["pos_embed"],
            state.get("register_tokens"),
        )
        width, places = state["cls_token"].shape[-1], positions.shape[1]
        if kernel.shape[1] == 1:
            state["patch_embed.proj.weight"] = kernel.expand(-1, 3, -1, -1) / 3  # whose sum a gray image meets
        elif kernel.shape[1] != 3:
            raise UserError(f"{name} takes images of {kernel.shape[1]} channels: give a network of one or three.")
        if math.isqrt(places) ** 2 == places:  # no position of the CLS token, as in some of timm's
            positions = state["pos_embed"] = torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)
        elif math.isqrt(places - 1) ** 2 != places - 1:
            raise UserError(
                f"{name} has positions for {places} tokens, which are no square of patches and a CLS token."
            )
        ratio = state["blocks.0.mlp.fc2.weight"].shape[1] / width
        values |= {
            "hidden_size": width,
            "num_hidden_layers": sum(key.endswith(".mlp.fc2.weight") for key in state),
            "mlp_ratio": int(ratio) if ratio.is_integer() else ratio,
            "mlp_type": "swiglu" if gated else "gelu",
            "layer_scale": "blocks.0.ls1.gamma" in state,
            "patch_size": kernel.shape[-1],
            "image_size": math.isqrt(positions.shape[1] - 1) * kernel.shape[-1],
            "num_register_tokens": 0 if registers is None else registers.shape[1],
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        }
        values.setdefault("position_interpolation", "dino" if registers is None else "antialias")
        if config is None:
            values.setdefault("num_attention_heads", width / 64 if width % 64 else width // 64)
        model = WSDinoModel(WSDinoConfig(**values))
        model.load_state_dict({from_dino_key(key): tensor for key, tensor in state.items()})
    except (KeyError, IndexError, ZeroDivisionError, RuntimeError) as error:
        lack = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{name} holds no whole DINO vision transformer ({lack[:300]}).") from error
    return model.eval()


def dino_names_of_transformers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of transformers' ViT, ViT-MAE or DINOv2 (with registers or without) under DINO's names."""
    state = {_renamed(key, TRANSFORMERS_KEYS): tensor for key, tensor in model.state_dict().items()}
    for whole, parts in MERGED:
        for key in [key for key in state if parts[0] in key]:
            state[key.replace(parts[0], whole)] = torch.cat([state.pop(key.replace(parts[0], part)) for part in parts])
    return state


def to_dino_state_dict(model: WSDinoModel) -> dict[str, torch.Tensor]:
    """A tower's weights under the names of the original DINO or, for what that lacks, of DINOv2.

    Raises
    ------
    UserError
        The patch embedding is convolutional, for which those layouts have no place.
    """
    if model.config.patch_embedding != "linear":
        raise UserError(
            "DINO's layout has no place for a convolutional patch embedding: keep this network as a repository folder "
            "or export it to ONNX."
        )
    state = {to_dino_key(key): tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    if model.config.mlp_type == "swiglu":
        state = {key.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): state[key] for key in state}
    return state


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


def _renamed(key: str, names: tuple[tuple[str, str], ...]) -> str:
    """A key after all replacements of a table of regular expressions."""
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


def _tensors(content: dict, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested dictionaries under their keys, joined by dots."""
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict) and depth < 8:
            yield from _tensors(value, f"{prefix}{key}.", depth + 1)


def read_checkpoint(path: str | Path) -> dict:
    """The content of a `.pth`, `.bin` or `.safetensors` file, read without executing any of it.

    Raises
    ------
    UserError
        It cannot be read, or holds objects that reading would have to execute.
    """
    numbers = [(_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = [np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        # Training checkpoints keep their arguments as a Namespace and losses as NumPy numbers, which are harmless.
        with torch.serialization.safe_globals([argparse.Namespace, codecs.encode, *kinds, *numbers]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise whatever their parsing meets
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a {culprit[1]}, which could run code" if culprit else first_line(error)
        reason = re.sub(r"\x1b\[[0-9;]*m", "", reason)  # torch prints in bold
        raise UserError(f"{path} cannot be read safely as a checkpoint ({reason}): save its state dict.") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a state dict: save model.state_dict().")
    return checkpoint


def _number(kind: np.dtype, data: bytes) -> np.generic:
    """What NumPy itself makes of a pickled number, but of plain numbers alone."""
    if kind.hasobject:
        raise ValueError(f"{kind} is not a number")
    return np.frombuffer(data, kind)[0]
