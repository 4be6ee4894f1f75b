"""Build complete Hub repository folders: weights, configs and the code that runs them, loadable without this package.

This file stays at home; the four others of this package travel with every model.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .configuration_wsdino import WSDinoConfig
from .image_processing_wsdino import WSDinoImageProcessor
from .modeling_wsdino import WSDinoModel, WSDinoMultiChannelModel

SHIPPED_FILES = (
    "configuration_wsdino.py",
    "modeling_wsdino.py",
    "image_processing_wsdino.py",
    "pipeline_wsdino.py",
)


def build_repository(
    folder: str | Path,
    model: torch.nn.Module,
    image_processor: WSDinoImageProcessor,
    *,
    card: str | None = None,
) -> Path:
    """Write a repository folder for one model.

    `save_pretrained` alone leaves the code files out; the folder written here is complete: uploaded as it is, it makes
    a working Hub repository. It is written beside (`<folder>.partial`) and renamed, so a folder of this name is whole.

    Parameters
    ----------
    folder : str or Path
        Where to. An older repository there is replaced; anything else there is refused.
    model : WSDinoModel or WSDinoMultiChannelModel
        The trained model, not wrapped for distributed training.
    image_processor : WSDinoImageProcessor
        How its fields become tiles; it is given the model's channel names.
    card : str, optional
        The text of `README.md`.

    Returns
    -------
    Path
        The folder, with `config.json`, `model.safetensors`, `preprocessor_config.json`, four `.py` files and the card.

    Raises
    ------
    ValueError
        If something else stands in the folder, or the tiles do not divide into the model's patches.
    """
    folder = Path(folder)
    if folder.exists() and not _is_repository(folder):
        raise ValueError(f"{folder} holds something other than a WS-DINO repository: name another folder or empty it.")
    if image_processor.tile_size % model.config.patch_size:
        raise ValueError(
            f"tile_size {image_processor.tile_size} is not a multiple of the model's patch_size "
            f"{model.config.patch_size}: "
            "choose a tile size that divides into patches."
        )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    # The classes' names are written out rather than taken from the objects, whose modules differ when a model itself
    # was loaded from a repository.
    code = {
        "AutoConfig": "configuration_wsdino.WSDinoConfig",
        "AutoModel": f"modeling_wsdino.{type(model).__name__}",
        "AutoImageProcessor": "image_processing_wsdino.WSDinoImageProcessor",
    }
    config = json.loads((partial / "config.json").read_text())
    config["auto_map"] = {key: code[key] for key in ("AutoConfig", "AutoModel")}
    # The Hub's page of a model shows its code with the card's task, image-feature-extraction, whose stock pipeline
    # would turn every image into 8-bit RGB.
    own = {"impl": "pipeline_wsdino.WSDinoFeatureExtractionPipeline", "pt": ["AutoModel"], "type": "image"}
    config["custom_pipelines"] = {task: own for task in ("feature-extraction", "image-feature-extraction")}
    processor = image_processor.to_dict() | {"channel_names": list(model.config.channel_names)}
    processor["auto_map"] = {"AutoImageProcessor": code["AutoImageProcessor"]}
    _write_json(partial / "config.json", config)
    _write_json(partial / "preprocessor_config.json", processor)
    for name in SHIPPED_FILES:
        shutil.copyfile(Path(__file__).with_name(name), partial / name)
    if card is not None:
        (partial / "README.md").write_text(card, encoding="utf-8")
    replaced = folder.with_name(folder.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def build_combined_repository(
    folder: str | Path,
    towers: Mapping[str, str | Path | WSDinoModel],
    image_processor: WSDinoImageProcessor | None = None,
    *,
    card: str | None = None,
) -> Path:
    """Write the repository of the combined model, one tower a channel.

    Parameters
    ----------
    folder : str or Path
        Where to, as for `build_repository`.
    towers : mapping of str to repository folder or WSDinoModel
        The channels in the order of the combined model's features, such as dna, tubulin, actin.
    image_processor : WSDinoImageProcessor, optional
        By default that of the channels' repositories, which must be one and the same.
    card : str, optional
        The text of `README.md`.

    Raises
    ------
    ValueError
        If the towers differ in shape or in how their fields become tiles, or none of them says how.
    """
    if not towers:
        raise ValueError("no towers were given: name at least one channel.")
    models = {
        channel: WSDinoModel.from_pretrained(tower) if isinstance(tower, str | Path) else tower
        for channel, tower in towers.items()
    }
    if image_processor is None:
        image_processor = _common_image_processor(towers)
    shape_names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "mlp_ratio",
        "patch_size",
        "image_size",
        "patch_embedding",
        "layer_norm_eps",
        "qkv_bias",
    )
    configs = {channel: model.config for channel, model in models.items()}
    shape = _common_values(configs, shape_names, "combine towers of one shape.")
    combined = WSDinoMultiChannelModel(WSDinoConfig(**shape, channel_names=list(models)))
    for channel, model in models.items():
        combined.towers[channel].load_state_dict(model.state_dict())
    return build_repository(folder, combined.eval(), image_processor, card=card)


def _common_image_processor(towers: Mapping[str, str | Path | WSDinoModel]) -> WSDinoImageProcessor:
    """The image processor of all towers' repositories; refuses towers that cut or scale fields in different ways."""
    processors = {
        channel: WSDinoImageProcessor.from_pretrained(tower)
        for channel, tower in towers.items()
        if isinstance(tower, str | Path)
    }
    if not processors:
        raise ValueError("models alone do not say how fields become tiles: give an image_processor.")
    names = ("tiles", "tile_size", "tile_grid", "max_intensity", "intensity_scale", "symmetries")
    _common_values(processors, names, "the combined model has one, so give an image_processor that suits them all.")
    return next(iter(processors.values()))


def _common_values(owners: Mapping[str, Any], names: Iterable[str], mend: str) -> dict[str, Any]:
    """The attributes `names` of all channels' `owners`; refuses owners that differ in one, with the mend."""
    (first_channel, first), *_ = owners.items()
    common = {name: getattr(first, name) for name in names}
    for channel, owner in owners.items():
        for name, there in common.items():
            if (here := getattr(owner, name)) != there:
                raise ValueError(
                    f"the towers differ: {name} is {here} for {channel} and {there} for {first_channel}; {mend}"
                )
    return common


def _is_repository(folder: Path) -> bool:
    """Whether a folder may be replaced: it is empty or was written by `build_repository`."""
    if not folder.is_dir():
        return False
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return not any(folder.iterdir())
    return isinstance(config, dict) and config.get("model_type") == WSDinoConfig.model_type


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
