"""Any network that takes images as an encoder of fields: transformers, timm, ONNX, TorchScript, a Python function.

A field is cut into tiles as for WS-DINO. `EncoderSettings` states how its 16 bits become the network's input; its
features are the median over its tiles. Not shipped with models.
"""

import hashlib
import importlib
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from wsdino.errors import UserError, first_line

from .convert_checkpoint import UNREADABLE, VITS, load_backbone, read_config
from .image_processing_wsdino import WSDinoImageProcessor

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
DEFAULT_SIZE = 224


@dataclass(frozen=True)
class EncoderSettings:
    """How a field of 16 bits becomes the input of a network.

    Parameters
    ----------
    scaling : {"clip", "percentile"}
        `clip`: at `max_intensity`, and divided by it. `percentile`: the field's 0.1st percentile becomes 0 and its
        99.9th becomes 1.
    normalization : {"own", "none"}
        `own`: the mean and standard deviation that the network's files state, or ImageNet's where they state none, are
        taken away and divided by. `none`: values stay between 0 and 1.
    tiles, tile_size, tile_grid
        As those of `WSDinoImageProcessor`; a tile is by default as large as the network's input. Tiles of another size
        are resized to that, bicubic with antialiasing.
    max_intensity : float, optional
        For `clip`; by default 10,000, or 255 of 8-bit images.
    """

    scaling: Literal["clip", "percentile"] = "clip"
    normalization: Literal["own", "none"] = "own"
    tiles: Literal["paper", "full"] = "paper"
    tile_size: int | None = None
    tile_grid: int = 2
    max_intensity: float | None = None


@dataclass
class Network:
    """A function of images, and what is known about it.

    Parameters
    ----------
    function : callable
        `(batch, channels, size, size)` float32 to `(batch, dims)`.
    about : dict
        What it is: kind, source, revision, pooling, digest of its weights.
    module : torch.nn.Module, optional
        Where its weights are, to move them between devices and precisions.
    """

    function: Callable[[torch.Tensor], torch.Tensor]
    about: dict[str, Any]
    module: torch.nn.Module | None = None
    channels: int = 3
    size: int = DEFAULT_SIZE
    mean: list[float] = field(default_factory=lambda: IMAGENET[0])
    std: list[float] = field(default_factory=lambda: IMAGENET[1])


class TileCutter:
    """Fields of raw intensities to a network's input, without the network: what a loader's worker needs."""

    def __init__(self, network: "Network", settings: EncoderSettings) -> None:
        self.settings, self.channels, self.size = settings, network.channels, network.size
        self.mean, self.std = network.mean, network.std
        side = settings.tile_size or network.size
        self.image_processor = WSDinoImageProcessor(
            tiles=settings.tiles, tile_size=side, tile_grid=settings.tile_grid, max_intensity=1
        )

    def __call__(self, planes: np.ndarray) -> torch.Tensor:
        """`(height, width)` or `(channels, height, width)` to `(tiles, channels, size, size)`.

        Raises
        ------
        ValueError
            The field is smaller than its tiles, or has not the network's channels.
        """
        planes = planes[None] if planes.ndim == 2 else planes
        limit = self.settings.max_intensity or (255 if planes.dtype == np.uint8 else 10_000)
        low, high = np.zeros(1, np.float32), np.full(1, limit, np.float32)
        if self.settings.scaling == "percentile":
            low, high = np.percentile(planes, (0.1, 99.9), axis=(1, 2), keepdims=True).astype(np.float32)
        scaled = np.clip((planes.astype(np.float32) - low) / np.maximum(high - low, np.float32(1e-6)), 0, 1)
        tiles = torch.from_numpy(np.stack(self.image_processor.field_tiles(scaled, max_intensity=1)))
        if tiles.shape[1] not in (1, self.channels):
            raise ValueError(f"it has {tiles.shape[1]} channels, and the network takes {self.channels}")
        if tiles.shape[-1] != self.size:
            tiles = torch.nn.functional.interpolate(tiles, (self.size, self.size), mode="bicubic", antialias=True)
        tiles = tiles.expand(-1, self.channels, -1, -1)
        if self.settings.normalization == "own":
            mean, std = (torch.tensor(value[: self.channels])[:, None, None] for value in (self.mean, self.std))
            tiles = (tiles - mean) / std
        return tiles


class Encoder:
    """Features of fields by any network: the median over a field's tiles.

    Parameters
    ----------
    network : Network
    settings : EncoderSettings
    """

    def __init__(self, network: Network, settings: EncoderSettings) -> None:
        self.network, self.settings, self.cut = network, settings, TileCutter(network, settings)

    def describe(self) -> dict[str, Any]:
        """All that the features depend on, beside the planes: the row's card."""
        one, own = self.network, self.settings.normalization == "own"
        sizes = {"tile_size": self.cut.image_processor.tile_size, "input_size": one.size, "channels": one.channels}
        return one.about | asdict(self.settings) | sizes | ({"mean": one.mean, "std": one.std} if own else {})

    def stream(
        self, planes: Sequence[np.ndarray], device: str, batch_size: int = 1, num_workers: int = 0
    ) -> Iterator[np.ndarray]:
        """One float32 vector per field, in order.

        Raises
        ------
        ValueError
            A field has not the network's channels, is smaller than its tiles, or the network fails on them.
        """
        module, dtype = self.network.module, torch.float32
        if module is not None:
            dtype = next((one.dtype for one in module.to(device).parameters()), dtype)
        loader = DataLoader(Mapped(planes, self.cut), batch_size=batch_size, num_workers=num_workers, collate_fn=list)
        for fields in loader:
            try:
                with torch.inference_mode():
                    features = self.network.function(torch.cat(fields).to(device, dtype))
            except (RuntimeError, TypeError, IndexError) as error:
                raise ValueError(
                    f"the network fails on {tuple(fields[0].shape)} tiles: {first_line(error)}"
                ) from error
            if not isinstance(features, torch.Tensor) or features.shape[:-1] != (sum(map(len, fields)),):
                shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
                raise ValueError(f"the network gives {shape} where (tiles, dims) is needed")
            for rows in features.float().cpu().split([len(tiles) for tiles in fields]):
                yield np.median(rows.numpy(), axis=0)


class Mapped(Dataset):
    """A function of every plane, as torch's loaders take it."""

    def __init__(self, planes: Sequence[np.ndarray], function: Callable) -> None:
        self.planes, self.function = planes, function

    def __len__(self) -> int:
        return len(self.planes)

    def __getitem__(self, index: int) -> Any:
        return self.function(self.planes[index])


class StackedPlanes(Sequence):
    """Planes of several channels as `(channels, height, width)`; `like` is such a field of the same size and type."""

    def __init__(self, channels: Sequence[Any]) -> None:
        self.channels, self.like = channels, np.stack([planes.like for planes in channels])

    def __len__(self) -> int:
        return len(self.channels[0])

    def __getitem__(self, index: int) -> np.ndarray:
        return np.stack([planes[index] for planes in self.channels])


def is_ours(source: str) -> bool:
    """Whether `load_backbone` reads this network: a WS-DINO repository, a DINO checkpoint, a ViT that it knows."""
    if Path(source).is_file():
        return not (source.endswith(".onnx") or _is_torchscript(source))
    if source.startswith("timm/") or (":" in source and not Path(source).exists()):
        return False
    return read_config(source).get("model_type") in (None, "wsdino", *VITS)


def load_network(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Network:
    """Any network that takes images.

    Parameters
    ----------
    source : str
        A folder or Hub id of a vision model of transformers; `timm/<name>`, where timm is installed; an `.onnx` file,
        where onnxruntime is installed; a TorchScript file; or `module:function`, a Python function of
        `(batch, 3, 224, 224)` images.
    revision : str, optional
        Of a Hub repository.
    trust_remote_code : bool
        Whether code of the Hub repository may run here.

    Raises
    ------
    UserError
        There is no such network, it takes no images, or a package that it needs is absent.
    """
    try:
        if Path(source).is_file():
            return _onnx(source) if source.endswith(".onnx") else _torchscript(source)
        if source.startswith("timm/"):
            return _timm(source)
        if ":" in source and not Path(source).exists():
            return _function(source)
        return _transformers(source, revision, trust_remote_code)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"The model {source} needs a package that is absent: {first_line(error)}.") from error
    except UNREADABLE as error:
        raise UserError(f"The model {source} cannot be loaded: {' '.join(str(error).split())[:400]}") from error


def _transformers(source: str, revision: str | None, trust_remote_code: bool) -> Network:
    """A vision model of transformers, pooled by `pooled`; ViTs that WS-DINO knows are run as its own network."""
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(source, **where)
    config = getattr(config, "vision_config", None) or config
    about = {"kind": f"transformers {config.model_type}", "source": source, "revision": revision}
    if config.model_type in VITS:
        model = load_backbone(source)
        function, about["pooling"] = lambda images: model(images, cls_only=True).pooler_output, "CLS token"
    else:
        model, found = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **where)
        model = getattr(model, "vision_model", model).eval()
        lacking = [key for key in found["missing_keys"] if "pooler" not in key]
        if model.main_input_name != "pixel_values":
            raise UserError(
                f"{source} is a {config.model_type!r} model, which takes {model.main_input_name}, not images."
            )
        if lacking:
            raise UserError(f"{source} is damaged: its weights lack {min(lacking)}. Copy it again.")
        has_cls = any(name.endswith(("cls_token", "class_embedding")) for name, _ in model.named_parameters())
        random_pooler = any("pooler" in key for key in found["missing_keys"])
        function = lambda images: pooled(model(pixel_values=images), has_cls, not random_pooler)  # noqa: E731
        about["pooling"] = "CLS token" if has_cls else "pooler, or mean over places"
    size = getattr(config, "image_size", DEFAULT_SIZE)
    network = Network(
        function,
        about | {"weights": digest_of(model)},
        model,
        channels=getattr(config, "num_channels", 3),
        size=size if isinstance(size, int) else DEFAULT_SIZE,
    )
    try:
        own = AutoImageProcessor.from_pretrained(source, **where)
    except (OSError, ValueError, ImportError):
        return network
    crop = getattr(own, "crop_size", None) or getattr(own, "size", None) or {}
    network.size = int(getattr(crop, "height", None) or getattr(crop, "shortest_edge", None) or network.size)
    network.mean = list(getattr(own, "image_mean", None) or network.mean)
    network.std = list(getattr(own, "image_std", None) or network.std)
    return network


def pooled(output: Any, has_cls: bool, pooler: bool = True) -> torch.Tensor:
    """One vector per image: the CLS token where there is one, else the pooler's output, else the mean over places.

    Parameters
    ----------
    output : ModelOutput
        With `last_hidden_state` `(batch, tokens, dims)` or `(batch, dims, height, width)`, or `pooler_output`.
    has_cls : bool
        Whether the first token is the CLS token.
    pooler : bool
        Whether the pooler was trained.
    """
    last, pool = getattr(output, "last_hidden_state", None), getattr(output, "pooler_output", None)
    if has_cls and last is not None and last.ndim == 3:
        return last[:, 0]
    if pooler and pool is not None:
        return pool.flatten(1)
    return last.flatten(2).mean(2) if last.ndim == 4 else last.mean(1)


def _timm(source: str) -> Network:
    """A network of timm, as it pools without its classifier."""
    import timm

    model = timm.create_model(f"hf-hub:{source}", pretrained=True, num_classes=0).eval()
    own = timm.data.resolve_model_data_config(model)
    about = {"kind": f"timm {timm.__version__}", "source": source, "pooling": "timm's", "weights": digest_of(model)}
    channels, size, _ = own["input_size"]
    return Network(model, about, model, channels, size, list(own["mean"]), list(own["std"]))


def _onnx(source: str) -> Network:
    """An ONNX file: its only input takes images, and its first output of two dimensions gives the features."""
    import onnxruntime

    session = onnxruntime.InferenceSession(source, providers=onnxruntime.get_available_providers())
    (taken, *more), outputs = session.get_inputs(), session.get_outputs()
    shapes = {one.name: one.shape for one in outputs}
    flat = [name for name, shape in shapes.items() if len(shape) == 2]
    if more or len(taken.shape) != 4 or not flat:
        raise UserError(
            f"{source} takes {taken.shape} and gives {shapes}: images in and (batch, dims) out are needed."
        )
    channels, size = (  # a dimension that any number fits has a name
        value if isinstance(value, int) else usual
        for value, usual in zip(taken.shape[1:3], (3, DEFAULT_SIZE), strict=True)
    )

    def function(images: torch.Tensor) -> torch.Tensor:
        fixed = taken.shape[0] if isinstance(taken.shape[0], int) else len(images)
        parts = [session.run(flat[:1], {taken.name: part.cpu().numpy()})[0] for part in images.split(fixed)]
        return torch.from_numpy(np.concatenate(parts))

    weights = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    about = {"kind": "ONNX", "source": Path(source).name, "pooling": flat[0], "weights": weights}
    return Network(function, about, None, channels, size)


def _torchscript(source: str) -> Network:
    """A TorchScript file whose function takes images and gives features."""
    model = torch.jit.load(source, map_location="cpu").eval()
    about = {"kind": "TorchScript", "source": Path(source).name, "pooling": "its own", "weights": digest_of(model)}
    return Network(model, about, model)


def _is_torchscript(source: str) -> bool:
    """Whether a file holds a compiled program beside its weights."""
    return zipfile.is_zipfile(source) and any("/code/" in name for name in zipfile.ZipFile(source).namelist())


def _function(source: str) -> Network:
    """`module:function`, found as Python finds modules, also in the working folder."""
    module, _, name = source.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name, None)
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise UserError(f"{source}: the module {module} has no function {name}.")
    model = function if isinstance(function, torch.nn.Module) else None
    return Network(function, {"kind": "function", "source": source, "pooling": "its own"}, model)


def digest_of(model: torch.nn.Module) -> str:
    """SHA-256 over a network's names and weights, in hexadecimal."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode() + tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return weights.hexdigest()
