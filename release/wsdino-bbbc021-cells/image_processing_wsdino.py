"""The WS-DINO image processor: 16-bit fields to clipped, scaled, square tiles.

A field is one site of a well, `(height, width)` or `(channels, height, width)` of raw intensities. As in the paper
(arXiv 2209.07819, section 3) intensities are clipped at 10,000 and divided by it, with no mean and no standard
deviation, and the centre of the field is cut into a square grid of tiles. Other scales of intensity, sizes and grids
are settings; a single cell is a small field that is cut into one tile.
"""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

# Modes of Pillow images with a single intensity per pixel. A colour image is a rendering, not a measurement.
GRAY_MODES = ("L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
CHOICES = {
    "tiles": ("paper", "full", "original_code"),
    "intensity_scale": ("linear", "log"),
    "symmetries": (1, 4, 8),
}
# Of all pages of a file together: a header that claims more is refused before anything of its size is allocated.
MAX_PIXELS = 100_000_000
# The crops of the authors' released evaluation script, (top, left, height, width) of a 512x640 field: two of them are
# wider than the square the paper describes.
ORIGINAL_CODE_CROPS = ((32, 64, 224, 256), (32, 320, 224, 224), (256, 64, 224, 256), (256, 320, 224, 224))


class WSDinoImageProcessorKwargs(TypedDict, total=False):
    """What may be set when the processor is loaded; for one call `tiles`, `max_intensity` and `channel_names`."""

    tiles: str
    tile_size: int
    tile_grid: int
    max_intensity: int | float
    intensity_scale: str
    symmetries: int
    channel_names: list[str]


class WSDinoImageProcessor(BaseImageProcessor):
    r"""
    Cut 16-bit fluorescence fields, or crops of single cells, into tiles of floats.

    Parameters
    ----------
    tiles : {"paper", "full", "original_code"}
        Which tiles: `paper` is a centred grid of `tile_grid` by `tile_grid`; `full` covers the whole field with the
        fewest tiles, evenly spaced and so overlapping where the sides are no multiples of a tile; `original_code` are
        the crops of the authors' released script, for comparing numbers: of 512x640 fields alone, two of them 224x256.
    tile_size : int
        Side of a tile in pixels (224 in the paper).
    tile_grid : int
        Tiles along a side of the centred grid (2 in the paper: 448x448 of a 640x512 field; 1 for single cells).
    max_intensity : int or float
        Intensities are clipped here and divided by it (10,000 in the paper).
    intensity_scale : {"linear", "log"}
        Which function of the raw intensities the network sees, see `scale_intensities`.
    symmetries : {1, 4, 8}
        The pipeline averages a tile's features over so many symmetries of the square: 1 is the tile as it is; 4 are
        the tile, its left-right mirror image, its quarter turn and its half turn; 8 are all turns of the tile and of
        its mirror image. The image processor itself cuts each tile once.
    channel_names : list of str
        The channels of a field in the order of the model's towers; needed for fields given as a dict of channels.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = WSDinoImageProcessorKwargs

    def __init__(
        self,
        tiles: str = "paper",
        tile_size: int = 224,
        tile_grid: int = 2,
        max_intensity: int | float = 10_000,
        intensity_scale: str = "linear",
        symmetries: int = 1,
        channel_names: Iterable[str] = (),
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        check_settings(tiles=tiles, intensity_scale=intensity_scale, symmetries=symmetries)
        check_settings(tile_size=tile_size, tile_grid=tile_grid, max_intensity=max_intensity)
        self.tiles = tiles
        self.tile_size = tile_size
        self.tile_grid = tile_grid
        self.max_intensity = max_intensity
        self.intensity_scale = intensity_scale
        self.symmetries = symmetries
        self.channel_names = list(channel_names)

    def preprocess(self, images: Any, *, return_tensors: str | None = "pt", **kwargs) -> BatchFeature:
        """Tiles of one field or several, ready for the model.

        Parameters
        ----------
        images : field or list of fields or array `(fields, channels, height, width)`
            See `field_tiles` for what a field may be.
        return_tensors : str, optional
            `"pt"` (default) or `"np"`.
        **kwargs
            `tiles` and `max_intensity`, for this call alone.

        Returns
        -------
        BatchFeature
            `pixel_values` `(fields * tiles, channels, tile_size, tile_size)`, float32 as `scale_intensities` makes
            them: the tiles of a field stand together, row by row, so that `features.unflatten(0, (fields, -1))`
            separates them again.
        """
        if not isinstance(images, list | tuple) and getattr(images, "ndim", 0) != 4:
            images = [images]
        tiles = [tile for image in images for tile in self.field_tiles(image, **kwargs)]
        if len({tile.shape for tile in tiles}) != 1:
            shapes = " and ".join(sorted({str(tile.shape) for tile in tiles})) or "no field"
            raise ValueError(f"tiles of {shapes} make no batch: process them apart, or use the pipeline.")
        return BatchFeature({"pixel_values": np.stack(tiles)}, tensor_type=return_tensors)

    def field_tiles(
        self,
        image: Any,
        *,
        tiles: str | None = None,
        max_intensity: int | float | None = None,
        channel_names: Iterable[str] | None = None,
    ) -> list[np.ndarray]:
        """The tiles of one field.

        Parameters
        ----------
        image : array, tensor, PIL.Image, path, or dict of these by channel
            `(height, width)` or `(channels, height, width)` raw intensities; Pillow images of mode `I;16` (or
            `I`, `F`, `L`); paths of PNG or TIFF files.
        tiles, max_intensity, channel_names : optional
            Instead of the processor's own.

        Returns
        -------
        list of numpy.ndarray
            Float32 `(channels, tile_size, tile_size)`, scaled by `scale_intensities`, row by row (`original_code`:
            224 by 224 or 256).

        Raises
        ------
        ValueError
            The image is not such a field, is smaller than its tiles, or has more than 8 bits where the model was
            trained on 8. An 8-bit field for a model of 16-bit ones gives a warning.
        """
        tiles = self.tiles if tiles is None else tiles
        check_settings(tiles=tiles)
        field, name = _read_field(image, list(self.channel_names if channel_names is None else channel_names))
        limit = self._intensity_limit(field, name, max_intensity)
        return [
            scale_intensities(field[:, top : top + height, left : left + width], limit, self.intensity_scale)
            for top, left, height, width in self._tile_boxes(*field.shape[-2:], name, tiles)
        ]

    def _tile_boxes(self, height: int, width: int, name: str, tiles: str) -> Iterable[tuple[int, int, int, int]]:
        """Top, left, height and width of the tiles of a `height` by `width` field."""
        size = self.tile_size
        region = size if tiles == "full" else size * self.tile_grid
        fits = (height, width) == (512, 640) if tiles == "original_code" else min(height, width) >= region
        if not fits:
            needed = "of 512x640" if tiles == "original_code" else f"of at least {region}x{region}"
            raise ValueError(
                f"{name} is {height}x{width} pixels (height x width), but {tiles} tiles of {size}x{size} need a field "
                f"{needed}: give such a field, or other tiles, a smaller tile_size or tile_grid."
            )
        if tiles == "original_code":
            return ORIGINAL_CODE_CROPS
        if tiles == "full":
            tops, lefts = (
                np.linspace(0, side - size, -(-side // size)).round().astype(int).tolist() for side in (height, width)
            )
        else:
            tops, lefts = (
                [(side - region) // 2 + size * step for step in range(self.tile_grid)] for side in (height, width)
            )
        return [(top, left, size, size) for top in tops for left in lefts]

    def _intensity_limit(self, field: np.ndarray, name: str, max_intensity: int | float | None) -> int | float:
        """The intensity that becomes 1; an 8-bit field scaled as a 16-bit one would be black, the reverse white."""
        if field.dtype.kind == "f" and not np.isfinite(field).all():
            raise ValueError(f"{name} holds values that are not finite: replace them first.")
        if max_intensity is not None:
            check_settings(max_intensity=max_intensity)
            return max_intensity
        if field.dtype == np.uint8 and self.max_intensity > 255:
            warnings.warn(
                f"{name} is 8-bit, but this model was trained on intensities up to {self.max_intensity:g}: 255 takes "
                "the place of that number, and the features do not compare with those of the 16-bit original.",
                stacklevel=4,
            )
            return 255
        highest = field.max(initial=0)
        scaled = field.dtype.kind == "f" and 0 < highest <= 1 < self.max_intensity
        if scaled or highest > 255 >= self.max_intensity:
            raise ValueError(
                f"{name} holds intensities up to {highest:g}, but this model was trained on intensities up to "
                f"{self.max_intensity:g}: give raw intensities of its depth, or name max_intensity."
            )
        return self.max_intensity


def scale_intensities(values: np.ndarray, max_intensity: int | float, intensity_scale: str = "linear") -> np.ndarray:
    """Raw intensities as the network sees them, float32 of the same shape.

    Parameters
    ----------
    values : numpy.ndarray
        Raw intensities of any type.
    max_intensity : int or float
        The intensity that `linear` makes 1.
    intensity_scale : {"linear", "log"}
        `linear`: clipped to 0 and `max_intensity`, then divided by it, as in the paper. `log`: the natural logarithm
        of the intensity, at least 2 % of `max_intensity`, over 10 % of it, divided by 0.8. With 10,000 that is
        `log(max(v, 200) / 1000) / 0.8`, whose mean is about 0 and whose standard deviation is about 1 on fluorescence
        images; bright pixels are not clipped.
    """
    if intensity_scale == "log":
        raised = np.maximum(values.astype(np.float32), np.float32(0.02 * max_intensity))
        return np.log(raised / np.float32(0.1 * max_intensity)) / np.float32(0.8)
    return np.clip(values, 0, max_intensity).astype(np.float32) / np.float32(max_intensity)


def check_settings(**settings: Any) -> None:
    """Refuse settings that are not among their `CHOICES`, or not positive, finite and, for sides, whole numbers."""
    for name, value in settings.items():
        whole = name in ("tile_size", "tile_grid")
        number = isinstance(value, (int, np.integer) if whole else (int, float, np.number))
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(str, CHOICES[name]))}, but is {value!r}.")
        if name not in CHOICES and not (number and 0 < value < float("inf")):
            raise ValueError(f"{name} must be a positive {'whole ' * whole}number, but is {value!r}.")


def _read_field(image: Any, channel_names: list[str]) -> tuple[np.ndarray, str]:
    """A field as `(channels, height, width)` raw intensities, and a name for messages."""
    if isinstance(image, Mapping):
        return _stack_channels(image, channel_names)
    name = str(image) if isinstance(image, str | Path) else "the image"
    if isinstance(image, str | Path | Image.Image):
        image = _read_pillow(image, name)
    elif isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()  # NumPy has no bfloat16
    if not isinstance(image, np.ndarray) or image.dtype.kind not in "uif":
        kind = f"array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"{name} is a {kind}: give an array of numbers, a Pillow image, a path, or a dict of these.")
    field = image[None] if image.ndim == 2 else image
    if field.ndim != 3 or field.shape[2] <= 4 < field.shape[0]:  # no field is four pixels wide
        raise ValueError(f"{name} has the shape {image.shape}: give (height, width) or (channels, height, width).")
    return field, name


def _read_pillow(source: str | Path | Image.Image, name: str) -> np.ndarray:
    """Pixels of a Pillow image or an image file; the pages of a multi-page TIFF become channels."""
    pages, pixels = [], 0
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
            mode, count, here = image.mode, getattr(image, "n_frames", 1), image.tell()
            for page in range(count if mode in GRAY_MODES else 0):
                if count > 1:  # also for the first: an image that was read before stands at another
                    image.seek(page)
                pixels += image.width * image.height
                if pixels > MAX_PIXELS:
                    raise Image.DecompressionBombError
                pages.append(np.asarray(image))
            if count > 1:
                image.seek(here)
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has more than {MAX_PIXELS:,} pixels: cut it into fields.") from error
    except Exception as error:  # Pillow's readers let errors of their own parsing through
        raise ValueError(f"{name} cannot be read as an image ({error}): copy the file again.") from error
    if mode not in GRAY_MODES or len({page.shape for page in pages}) > 1:
        kind = f"a {mode} picture" if mode not in GRAY_MODES else "a file with pages of different sizes"
        raise ValueError(f"{name} is {kind}, not measured intensities: give one 16-bit gray image per channel.")
    return np.stack(pages) if len(pages) > 1 else pages[0]


def _stack_channels(images: Mapping, channel_names: list[str]) -> tuple[np.ndarray, str]:
    """The planes of a dict of channels, in the order of the model's towers; further entries are left alone."""
    if not channel_names or not set(channel_names) <= images.keys():
        raise ValueError(
            f"a dict of the channels {', '.join(map(str, images))} was given, but this model was trained on "
            f"{', '.join(channel_names) or 'a channel without a name'}: give that, or use another repository."
        )
    planes = [_read_field(images[channel], [channel])[0] for channel in channel_names]
    for channel, plane in zip(channel_names, planes, strict=True):
        if (plane.shape, plane.dtype) != ((1, *planes[0].shape[1:]), planes[0].dtype):
            raise ValueError(
                f"the channel {channel} is {plane.dtype} of shape {plane.shape}, and {channel_names[0]} "
                f"{planes[0].dtype} of shape {planes[0].shape}: give one plane per channel, of one field."
            )
    return np.concatenate(planes), f"the field ({', '.join(channel_names)})"


__all__ = ["WSDinoImageProcessor"]
