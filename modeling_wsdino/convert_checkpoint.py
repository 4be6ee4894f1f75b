"""Bring weights in from other layouts and take them out: the command `wsdino-convert SOURCE OUTPUT`.

    wsdino-convert dino_deitsmall8_pretrain.pth init/imagenet     # original DINO or DINOv2 -> repository folder
    wsdino-convert checkpoint.pth init/dna --channel dna          # full checkpoint of DINO or WS-DINO, its teacher
    wsdino-convert facebook/dinov2-small init/dinov2              # transformers' layout, folder or Hub id
    wsdino-convert runs/demo/dna/model dna.pth                    # -> original DINO's layout
    wsdino-convert runs/demo/dna/model dna.onnx                   # -> ONNX with a dynamic batch

Not shipped with models.
"""

import argparse
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModel
from transformers.utils import cached_file, logging

from wsdino.errors import UserError, command, first_line
from wsdino.files import read_json, written_whole

from .build_repository import build_repository, check_tile_size
from .checkpoint_layouts import dino_names_of_transformers, model_from_dino_names, read_checkpoint
from .configuration_wsdino import WSDinoConfig
from .image_processing_wsdino import WSDinoImageProcessor
from .modeling_wsdino import WSDinoModel, WSDinoMultiChannelModel, WSDinoPreTrainedModel

# Which of transformers' vision transformers are ours under other names, and how they interpolate positions. A ViT is
# taken for one of DINO's, whose repositories say an epsilon of 1e-12 where they were trained with 1e-6.
VITS = {
    "vit": {"position_interpolation": "dino", "layer_norm_eps": 1e-6},
    "vit_mae": {"position_interpolation": "resize"},
    "dinov2": {"position_interpolation": "resize"},
    "dinov2_with_registers": {"position_interpolation": "antialias"},
}
# Raised by transformers while it loads a repository whose files are cut or do not belong together.
UNREADABLE = (
    *(OSError, RuntimeError, TypeError, ValueError, KeyError),
    *(SafetensorError, StrictDataclassError, UnpicklingError),
)


def load_backbone(source: str | Path, *, network: str | None = None, **config_kwargs: Any) -> WSDinoPreTrainedModel:
    """Read a network, whatever its layout.

    Parameters
    ----------
    source : str or Path
        A checkpoint file (see `read_dino_checkpoint`), or a folder or Hub id of a WS-DINO repository, of transformers'
        ViT, ViT-MAE or DINOv2 (with registers or without), or of timm's ViT.
    network : {"teacher", "student"}, optional
        Which network of a full checkpoint.
    **config_kwargs
        Config values to set, such as `channel_names` and `drop_path_rate`.

    Returns
    -------
    WSDinoModel or WSDinoMultiChannelModel
        In evaluation mode and float32.

    Raises
    ------
    UserError
        The source is none of these, or is damaged.
    """
    try:
        if Path(source).is_file():
            return WSDinoModel.from_dino_checkpoint(source, network=network, **config_kwargs)
        if (Path(source) / ".metadata").is_file():
            merge = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {source} merged.pth"
            raise UserError(f"{source} holds the shards of a distributed checkpoint: merge them with '{merge}'.")
        if _repository_file(source, "adapter_config.json") is not None:
            raise UserError(f"{source} is a PEFT adapter: save the network with peft's merge_and_unload() instead.")
        config = read_config(source)
        kind, architecture = config.get("model_type"), str(config.get("architecture"))
        if network is not None:
            raise UserError(f"{source} holds one network, not a teacher and a student: leave out {network}.")
        if kind == "wsdino":
            return _load_repository(source, config, config_kwargs)
        if kind in VITS:
            return _load_transformers(source, config, config_kwargs)
        weights = _repository_file(source, "model.safetensors")
        if kind is None and architecture.startswith("vit_") and weights:
            config_kwargs = {"position_interpolation": "antialias"} | config_kwargs
            return model_from_dino_names(read_checkpoint(weights), name=str(source), **config_kwargs)
        raise UserError(
            f"{source} is a {kind or architecture!r} model: give a WS-DINO repository, a DINO checkpoint, a ViT of "
            f"timm, or one of transformers' {', '.join(VITS)}."
        )
    except UserError:
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"The model {source} cannot be loaded: {reason[:500]}") from error


def _load_repository(source: str | Path, config: dict, config_kwargs: dict) -> WSDinoPreTrainedModel:
    """The network of a WS-DINO repository, in full precision."""
    combined = "WSDinoMultiChannelModel" in (config.get("architectures") or [])
    if combined and "channel_names" in config_kwargs:
        names = ", ".join(map(str, config.get("channel_names") or []))
        raise UserError(f"{source} holds several towers ({names}): name the folder of one channel.")
    # Overriding through `from_pretrained` would set the values without checking them.
    checked = WSDinoConfig.from_dict(config | config_kwargs)
    return _loaded_whole(WSDinoMultiChannelModel if combined else WSDinoModel, source, config=checked).eval()


def _load_transformers(source: str | Path, config: dict, config_kwargs: dict) -> WSDinoModel:
    """A vision transformer of transformers as one of ours."""
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{source} has the activation {config['hidden_act']!r}: only gelu is supported.")
    model = _loaded_whole(AutoModel, source)
    values = {name: getattr(model.config, name) for name in ("num_attention_heads", "layer_norm_eps")}
    values |= VITS[config["model_type"]] | config_kwargs
    return model_from_dino_names(dino_names_of_transformers(model), name=str(source), **values)


def _loaded_whole(cls: Any, source: str | Path, **kwargs: Any) -> Any:
    """`cls.from_pretrained` in float32, where the files hold every weight: what they lack would be random."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # of transformers' own table of such weights
    try:
        model, found = cls.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    finally:
        logging.set_verbosity(level)
    lacking = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))
    if lacking:
        raise UserError(f"{source} is damaged: its weights lack {lacking[0]}. Copy it again.")
    for key, stored, expected in sorted(found["mismatched_keys"]):
        raise UserError(
            f"{source} is damaged: {key} is {tuple(stored)} in its weights and {tuple(expected)} by its config.json."
        )
    return model


def load_image_processor(source: str | Path, model: WSDinoPreTrainedModel | None = None) -> WSDinoImageProcessor:
    """The image processor of a WS-DINO repository; for networks of other layouts, four tiles of the size they know.

    The model itself is needed for these alone.

    Raises
    ------
    UserError
        A WS-DINO repository's cannot be read, or it is not certain that another has none: other tiles would give
        other features.
    """
    default = WSDinoImageProcessor(**({"tile_size": model.config.image_size} if model is not None else {}))
    if Path(source).is_file():
        return default
    own_layout = read_config(source).get("model_type") == "wsdino"
    file = "preprocessor_config.json"
    try:
        own = WSDinoImageProcessor.get_image_processor_dict(source)[0]
        if own.get("image_processor_type") == "WSDinoImageProcessor":
            return WSDinoImageProcessor.from_dict(own)
        reason, absent = "it is of another kind", True
    except (ValueError, OSError, TypeError, AttributeError) as error:
        reason = first_line(error).partition(". ")[0].rstrip(".")
        if Path(source).is_dir():
            absent = not (Path(source) / file).is_file()
        else:  # by the Hub's own answer, which the cache keeps: a Hub that is out of reach may have it
            absent = try_to_load_from_cache(str(source), file) is _CACHED_NO_EXIST
    if own_layout or not absent:
        raise UserError(
            f"no image processor can be read from {source} ({reason}): copy its {file} again, or check the connection."
        )
    return default


def read_config(source: str | Path) -> dict:
    """The config.json of a folder or Hub repository."""
    path = _repository_file(source, "config.json")
    if path is None:
        raise UserError(
            f"{source} is neither a checkpoint file nor a folder or Hub id with a config.json: check the name."
        )
    return read_json(path, fix="copy it again")


def _repository_file(source: str | Path, name: str) -> str | None:
    """Where a file of a folder or Hub repository lies on this machine, or None where the repository lacks it."""
    if Path(source).is_dir():
        return str(Path(source) / name) if (Path(source) / name).is_file() else None
    try:
        return cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source} is neither a checkpoint file nor a folder or Hub id that can be read ({first_line(error)}): "
            "check the name, the connection and your access."
        ) from error


def export_onnx(model: WSDinoPreTrainedModel, path: str | Path, *, image_size: int | None = None) -> Path:
    """Write `pixel_values (batch, channels, size, size)` -> `features (batch, hidden)` as ONNX, for any batch.

    Needs the packages onnx and onnxscript. The channels are 1 for a tower and the model's own number for a combined
    model, whose features are side by side and not normalised; the image size is fixed, by default the trained one.
    """
    size = image_size or model.config.image_size
    channels = len(model.config.channel_names) if isinstance(model, WSDinoMultiChannelModel) else 1
    with torch.no_grad():
        program = torch.onnx.export(
            _Features(model).eval(),
            (torch.zeros(2, channels, size, size),),
            input_names=["pixel_values"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=2**16)},),
            dynamo=True,
            verbose=False,
        )
    with written_whole(path) as partial:
        program.save(partial, external_data=False)
    return Path(path)


class _Features(torch.nn.Module):
    """The CLS features alone, which is what an ONNX file gives."""

    def __init__(self, model: WSDinoPreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values, cls_only=True).pooler_output


def convert(
    source: str,
    output: str | Path,
    *,
    network: str | None = None,
    channel: str | None = None,
    num_attention_heads: int | None = None,
    tile_size: int | None = None,
) -> Path:
    """Read `source` and write the kind of file that the name `output` says: `.pth`, `.onnx`, else a repository folder.

    Raises
    ------
    UserError
        The source cannot be read, the output exists, or the layout of the output has no place for the network.
    """
    output = Path(output)
    if output.suffix in (".pth", ".onnx") and output.exists():
        raise UserError(f"{output} exists already: name another output or remove it.")
    if output.suffix in (".pt", ".bin", ".safetensors", ".ckpt"):
        raise UserError(f"{output}: write .pth (original DINO), .onnx, or a folder without a suffix (repository).")
    config_kwargs = {} if channel is None else {"channel_names": [channel]}
    if num_attention_heads is not None:
        config_kwargs["num_attention_heads"] = num_attention_heads
    model = load_backbone(source, network=network, **config_kwargs)
    if tile_size is not None:
        check_tile_size(tile_size, model.config)
    if output.suffix == ".onnx":
        try:
            return export_onnx(model, output, image_size=tile_size)
        except ModuleNotFoundError as error:
            raise UserError(f"ONNX needs the package {error.name}: pip install 'wsdino[onnx]'.") from error
    if output.suffix == ".pth":
        if isinstance(model, WSDinoMultiChannelModel):
            raise UserError(f"{source} holds several towers, and a DINO checkpoint one: convert each channel's own.")
        if model.config.patch_embedding != "linear":
            raise UserError(f"{source} has a convolutional patch embedding, for which a DINO checkpoint has no place.")
        with written_whole(output) as partial:
            torch.save(model.to_dino_state_dict(), partial)
        return output
    processor = load_image_processor(source, model)
    processor.tile_size = tile_size or processor.tile_size
    return build_repository(output, model, processor)


@command("wsdino-convert")
def main(argv: list[str] | None = None) -> None:
    """The command `wsdino-convert`."""
    parser = argparse.ArgumentParser(
        prog="wsdino-convert",
        description="Convert weights between DINO, DINOv2, ViTs of transformers and timm, WS-DINO and ONNX.",
    )
    parser.add_argument(
        "source",
        help="a .pth or .safetensors file, or a folder or Hub id of WS-DINO, transformers or timm",
    )
    parser.add_argument("output", help="a .pth file (original DINO), a .onnx file, or a folder (repository)")
    parser.add_argument("--network", choices=("teacher", "student"), help="of a full checkpoint; default: the teacher")
    parser.add_argument("--channel", help="the fluorescence channel that the weights are for, such as dna")
    parser.add_argument("--num_attention_heads", type=int, help="of a checkpoint file; default: heads 64 wide")
    parser.add_argument(
        "--tile_size", type=int, help="side of a tile, or of the ONNX input; default: the trained size"
    )
    print(f"wrote {convert(**vars(parser.parse_args(argv)))}")


if __name__ == "__main__":
    main()
