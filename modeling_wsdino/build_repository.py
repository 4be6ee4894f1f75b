"""Build complete Hub repository folders: weights, configs and the code that runs them, loadable without this package.

Not shipped with models; the `*_wsdino.py` files of this package are.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from wsdino.errors import UserError
from wsdino.files import claim_folder, write_json, write_text, written_whole

from .configuration_wsdino import WSDinoConfig
from .image_processing_wsdino import WSDinoImageProcessor
from .modeling_wsdino import WSDinoModel, WSDinoMultiChannelModel

SHIPPED_FILES = (
    "configuration_wsdino.py",
    "layers_wsdino.py",
    "modeling_wsdino.py",
    "image_processing_wsdino.py",
    "pipeline_wsdino.py",
)
# What towers must share to become one model, and what their image processors must.
SHAPE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "patch_size", "image_size"),
    *("patch_embedding", "layer_norm_eps", "qkv_bias"),
)
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TILES = ("tiles", "tile_size", "tile_grid", "max_intensity", "intensity_scale", "symmetries")


def build_repository(
    folder: str | Path,
    model: torch.nn.Module,
    image_processor: WSDinoImageProcessor,
    *,
    card: str | None = None,
    dtype: str = "float32",
) -> Path:
    """Write a repository folder for one model, whole or not at all.

    `save_pretrained` alone leaves the code files out; the folder written here is complete: uploaded as it is, it makes
    a working Hub repository.

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
    dtype : {"float32", "float16", "bfloat16"}
        How the weights are stored, see `store_weights`.

    Returns
    -------
    Path
        The folder, with `config.json`, `model.safetensors`, `preprocessor_config.json`, the code and the card.

    Raises
    ------
    UserError
        The folder holds something else, or the tiles do not divide into the model's patches.
    """
    folder = Path(folder)
    claim_folder(folder, "configuration_wsdino.py", "WS-DINO repository")
    check_tile_size(image_processor.tile_size, model.config)
    # The classes are named here: a model that was itself loaded from a repository has a class of another module.
    code = {
        "AutoConfig": "configuration_wsdino.WSDinoConfig",
        "AutoModel": f"modeling_wsdino.{type(model).__name__}",
        "AutoImageProcessor": "image_processing_wsdino.WSDinoImageProcessor",
    }
    # The Hub's page of a model shows its code with the card's task, image-feature-extraction, whose stock pipeline
    # would turn every image into 8-bit RGB.
    own = {"impl": "pipeline_wsdino.WSDinoFeatureExtractionPipeline", "pt": ["AutoModel"], "type": "image"}
    with written_whole(folder) as partial:
        model.save_pretrained(partial)
        store_weights(partial, dtype)
        config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        config["auto_map"] = {key: code[key] for key in ("AutoConfig", "AutoModel")}
        config["custom_pipelines"] = {task: own for task in ("feature-extraction", "image-feature-extraction")}
        write_json(partial / "config.json", config)
        processor = image_processor.to_dict() | {"channel_names": list(model.config.channel_names)}
        processor["auto_map"] = {"AutoImageProcessor": code["AutoImageProcessor"]}
        write_json(partial / "preprocessor_config.json", processor)
        for name in SHIPPED_FILES:
            shutil.copyfile(Path(__file__).with_name(name), partial / name)
        if card is not None:
            write_text(partial / "README.md", card)
    return folder


def build_combined_repository(
    folder: str | Path,
    towers: Mapping[str, str | Path | WSDinoModel],
    image_processor: WSDinoImageProcessor | None = None,
    *,
    card: str | None = None,
) -> Path:
    """Write the repository of the combined model, one tower per channel.

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
    UserError
        The towers differ in shape or in how their fields become tiles, or none of them says how.
    """
    folders = {channel: tower for channel, tower in towers.items() if isinstance(tower, str | Path)}
    if not folders and image_processor is None:
        raise UserError("No folder of a tower says how fields become tiles: give an image_processor.")
    models = dict(towers) | {channel: WSDinoModel.from_pretrained(tower) for channel, tower in folders.items()}
    if image_processor is None:
        processors = {channel: WSDinoImageProcessor.from_pretrained(tower) for channel, tower in folders.items()}
        common = _common_values(processors, TILES, "give an image_processor that suits them all")
        image_processor = WSDinoImageProcessor(**common)
    configs = {channel: model.config for channel, model in models.items()}
    shape = _common_values(configs, SHAPE, "combine towers of one shape")
    combined = WSDinoMultiChannelModel(WSDinoConfig(**shape, channel_names=list(models)))
    for channel, model in models.items():
        combined.towers[channel].load_state_dict(model.state_dict())
    return build_repository(folder, combined.eval(), image_processor, card=card)


def store_weights(folder: str | Path, dtype: str) -> None:
    """Store the weights of a repository in half the bytes; models are loaded as float32, as its config.json says.

    Vectors (biases, norms, running statistics) stay as they are: they are few, and rounding them costs most.

    Parameters
    ----------
    folder : str or Path
        A repository folder with one `model.safetensors`.
    dtype : {"float32", "float16", "bfloat16"}
        `float32` changes nothing.
    """
    if dtype == "float32":
        return
    path = Path(folder) / "model.safetensors"
    state = load_file(path)
    state = {name: tensor.to(HALF[dtype]) if tensor.ndim > 1 else tensor for name, tensor in state.items()}
    save_file(state, path, metadata={"format": "pt"})


def check_tile_size(tile_size: int, config: WSDinoConfig) -> None:
    """Refuse tiles that do not divide into the model's patches."""
    if tile_size < 1 or tile_size % config.patch_size:
        raise UserError(
            f"tile_size {tile_size} is not a multiple of the model's patch_size {config.patch_size}: choose a tile "
            "size that divides into patches."
        )


def _common_values(owners: Mapping[str, Any], names: tuple[str, ...], fix: str) -> dict[str, Any]:
    """The attributes `names` of all channels' `owners`; refuses owners that differ in one."""
    (first_channel, first), *_ = owners.items()
    common = {name: getattr(first, name) for name in names}
    for channel, owner in owners.items():
        for name, there in common.items():
            if (here := getattr(owner, name)) != there:
                raise UserError(
                    f"The towers differ: {name} is {here} for {channel} and {there} for {first_channel}; {fix}."
                )
    return common
