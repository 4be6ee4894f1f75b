"""The WS-DINO image processor: 16-bit fields to clipped, scaled, square tiles.

A field is one site of a well, `(height, width)` or `(channels, height, width)` of raw intensities. As in the paper
(arXiv 2209.07819, section 3) intensities are clipped at 10,000 and divided by it, with no mean and no standard
deviation, and the centre of the field is cut into a square grid of tiles. Other scales of intensity, sizes and grids
are settings; a single cell is a small field that is cut into one tile.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

# Modes of Pillow images with a single intensity a pixel. A colour image is a rendering, not a measurement.
GRAY_MODES = ("L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
TILE_LAYOUTS = ("paper", "full", "original_code")
INTENSITY_SCALES = ("linear", "log")
SYMMETRIES = (1, 4, 8)
# Of all pages of a file together; three channels of a field of 1280x1024 are four million. A header that claims more
# is refused before anything of its size is allocated.
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
        if tiles not in TILE_LAYOUTS:
            raise ValueError(f"tiles must be one of {', '.join(TILE_LAYOUTS)}, but is {tiles!r}.")
        if intensity_scale not in INTENSITY_SCALES:
            raise ValueError(
                f"intensity_scale must be one of {', '.join(INTENSITY_SCALES)}, but is {intensity_scale!r}."
            )
        if symmetries not in SYMMETRIES:
            raise ValueError(f"symmetries must be 1, 4 or 8, but is {symmetries!r}.")
        for name, value in (("tile_size", tile_size), ("tile_grid", tile_grid)):
            if isinstance(value, float):
                raise ValueError(f"{name} must be a whole number, but is {value}.")
            _check_positive(name, value)
        _check_positive("max_intensity", max_intensity)
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
        if not tiles:
            raise ValueError("no images were given: pass at least one field.")
        if len({tile.shape[1:] for tile in tiles}) > 1:
            raise ValueError("tiles of different sizes cannot share a batch: use the pipeline instead.")
        if len({tile.shape for tile in tiles}) > 1:
            counts = " and ".join(sorted({str(tile.shape[0]) for tile in tiles}))
            raise ValueError(f"fields with {counts} channels cannot share a batch: process them apart.")
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
            For what is no such field, a field smaller than its tiles, or one of more than 8 bits for a model of 8-bit
            fields. An 8-bit field for a model of 16-bit ones is warned about.
        """
        field, name = _read_field(image, list(self.channel_names if channel_names is None else channel_names))
        limit = self._intensity_limit(field, name, max_intensity)
        boxes = self._tile_boxes(*field.shape[-2:], name, self.tiles if tiles is None else tiles)
        return [
            scale_intensities(field[:, top : top + height, left : left + width], limit, self.intensity_scale)
            for top, left, height, width in boxes
        ]

    def _tile_boxes(self, height: int, width: int, name: str, tiles: str) -> Iterable[tuple[int, int, int, int]]:
        """Top, left, height and width of the tiles of a `height` by `width` field."""
        size = self.tile_size
        if tiles == "original_code":
            if (height, width) != (512, 640):
                raise ValueError(
                    f"{name} is {height}x{width} pixels (height x width), but the released code crops 512x640: "
                    "resize it, or choose tiles='paper'."
                )
            return ORIGINAL_CODE_CROPS
        if tiles == "paper":
            region = self.tile_grid * size
            fix = "give a larger field, or a smaller tile_size or tile_grid"
            tops, lefts = (
                [(side - region) // 2 + size * step for step in range(self.tile_grid)] for side in (height, width)
            )
        elif tiles == "full":
            region = size
            fix = "give a larger field or a smaller tile_size"
            counts = (-(-height // size), -(-width // size))
            tops, lefts = (
                np.linspace(0, side - size, count).round().astype(int).tolist()
                for side, count in zip((height, width), counts, strict=True)
            )
        else:
            raise ValueError(f"tiles must be one of {', '.join(TILE_LAYOUTS)}, but is {tiles!r}.")
        if min(height, width) < region:
            raise ValueError(
                f"{name} is {height}x{width} pixels (height x width), smaller than the {region}x{region} of "
                f"{f'its {size}x{size} tiles' if region > size else 'one tile'}: {fix}."
            )
        return [(top, left, size, size) for top in tops for left in lefts]

    def _intensity_limit(self, field: np.ndarray, name: str, max_intensity: int | float | None) -> int | float:
        """The intensity that becomes 1. An 8-bit field scaled as a 16-bit one would be nearly black, and the reverse
        white."""
        if field.dtype.kind == "f" and not np.isfinite(field).all():
            raise ValueError(f"{name} holds values that are not finite: replace them before.")
        if max_intensity is not None:
            _check_positive("max_intensity", max_intensity)
            return max_intensity
        if field.dtype == np.uint8 and self.max_intensity > 255:
            warnings.warn(
                f"{name} is 8-bit, but this model was trained on 16-bit intensities clipped at "
                f"{self.max_intensity:g}: it is "
                "divided by 255, and its features do not compare with those of 16-bit fields; give the 16-bit "
                "original.",
                stacklevel=4,
            )
            return 255
        highest = field.max(initial=0)
        if highest > 255 >= self.max_intensity:
            raise ValueError(
                f"{name} holds intensities up to {highest:g}, but this model was trained on 8-bit ones clipped at "
                f"{self.max_intensity:g}: give the 8-bit image, or say max_intensity=<the intensity that is to be 1>."
            )
        if field.dtype.kind == "f" and self.max_intensity > 1 and 0 < highest <= 1:
            raise ValueError(
                f"{name} holds floats no larger than 1, as if scaled already: give raw intensities, or say "
                "max_intensity=1."
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


def _check_positive(name: str, value: Any) -> None:
    """Refuse what is no positive, finite number; a single one of NumPy's is one."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ValueError(f"{name} must be a number, but is {value!r}.")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, but is {value}.")


def _read_field(image: Any, channel_names: list[str]) -> tuple[np.ndarray, str]:
    """A field as `(channels, height, width)` raw intensities, and a name for messages."""
    if isinstance(image, Mapping):
        return _stack_channels(image, channel_names)
    name = "the image"
    if isinstance(image, str | Path):
        name = str(image)
        if not Path(image).is_file():
            raise FileNotFoundError(f"{name} is not a file: give the path of a PNG or TIFF image.")
        try:
            opened = Image.open(image)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{name} has more than {MAX_PIXELS:,} pixels: cut it into fields.") from error
        except Exception as error:  # Pillow's readers let errors of their own parsing through
            raise ValueError(f"{name} cannot be read as an image ({error}): copy the file again.") from error
        with opened:
            image = _read_pillow(opened, name)
    elif isinstance(image, Image.Image):
        image = _read_pillow(image, name)
    elif isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()  # NumPy has no bfloat16
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"a {type(image).__name__} is not an image: give an array, a Pillow image, a path, or a dict of these "
            f"by channel."
        )
    if image.dtype.kind not in "uif":
        raise ValueError(f"{name} holds {image.dtype} values: give intensities.")
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[2] <= 4 < image.shape[0]:  # no field is four pixels wide
        raise ValueError(
            f"{name} has the shape {image.shape}: give (height, width), or (channels, height, width), channels first."
        )
    return image, name


def _read_pillow(image: Image.Image, name: str) -> np.ndarray:
    """Pixels of a Pillow image; the pages of a multi-page TIFF become channels."""
    if image.mode not in GRAY_MODES:
        raise ValueError(
            f"{name} is a {image.mode} picture, not measured intensities: give one 16-bit gray image a channel."
        )
    pages, pixels = [], 0
    try:
        count, here = getattr(image, "n_frames", 1), image.tell()
        for page in range(count):
            if count > 1:  # also the first: an image that was read before stands at another
                image.seek(page)
            pixels += image.width * image.height
            if pixels > MAX_PIXELS:
                break
            pages.append(np.asarray(image))
        if count > 1:
            image.seek(here)
    except Exception as error:  # as above
        raise ValueError(f"{name} cannot be read as an image ({error}): copy the file again.") from error
    if pixels > MAX_PIXELS:
        raise ValueError(f"{name} has more than {MAX_PIXELS:,} pixels: cut it into fields.")
    if len({page.shape for page in pages}) > 1:
        raise ValueError(f"{name} has pages of different sizes: give channels of one field.")
    return np.stack(pages) if len(pages) > 1 else pages[0]


def _stack_channels(images: Mapping, channel_names: list[str]) -> tuple[np.ndarray, str]:
    """The planes of a dict of channels, in the order of the model's towers; further entries are left alone."""
    if not channel_names:
        raise ValueError(
            "this model does not know its channels' names, so a dict of channels has no order: give the plane or an "
            "array."
        )
    absent = [name for name in channel_names if name not in images]
    if absent:
        raise ValueError(
            f"the channel {', '.join(absent)} is not among those given ({', '.join(map(str, images))}): this model "
            f"was trained "
            f"on {', '.join(channel_names)}; give it, or use the repository of another channel."
        )
    planes = []
    for channel in channel_names:
        plane, _ = _read_field(images[channel], [channel])
        if plane.shape[0] != 1:
            raise ValueError(f"the channel {channel} has {plane.shape[0]} planes: give one (height, width) plane.")
        if planes and (plane.shape, plane.dtype) != (planes[0].shape, planes[0].dtype):
            raise ValueError(
                f"the channel {channel} is {plane.shape[1]}x{plane.shape[2]} {plane.dtype}, but {channel_names[0]} is "
                f"{planes[0].shape[1]}x{planes[0].shape[2]} {planes[0].dtype}: give channels of one field."
            )
        planes.append(plane)
    return np.concatenate(planes), f"the field ({', '.join(channel_names)})"


__all__ = ["WSDinoImageProcessor"]
