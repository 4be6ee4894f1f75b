"""Reads one grey plane from a file or from bytes, of limited size, with one sentence for whatever is wrong.

Pillow reads what most microscopes write: one 8- or 16-bit plane per file. Every other TIFF is read by tifffile: stacks
of channels (pages, samples, OME and ImageJ axes) and of focus (z), signed, 32-bit and floating-point pixels, and
compressions that Pillow does not know. Reduced copies of a plane, such as thumbnails and pyramids, are passed over.
"""

import logging
import re
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from wsdino.errors import UserError, first_line

MAX_PIXELS = 100_000_000  # 76 times a BBBC021 field: 200 MB of 16 bits, decoded; a larger one may be a small file
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
Z_RULES = {"max": np.max, "mean": np.mean}


def read_image(
    source: str | Path | BinaryIO, name: str, *, page: int | None = None, pages: int = 0, z: str | None = None
) -> tuple[np.ndarray, str]:
    """The pixels of one plane, and what they are called.

    Parameters
    ----------
    source : path or binary file
    name : str
        Names the image, and its row, in an error message.
    page : int, optional
        Which plane of a file that holds several channels, counted from 0: a page, a sample or a place on its channel
        axis.
    pages : int
        How many planes the file must hold; 0 for any number.
    z : str, optional
        What becomes of planes of different focus: "max", "mean", or the number of the plane to take, from 0.

    Returns
    -------
    plane : numpy.ndarray
        `(rows, columns)`, of the type that the file has (float64 for the mean of a focus stack), in the machine's byte
        order.
    kind : str
        Pillow's mode, or numpy's name of the type.

    Raises
    ------
    UserError
        It is missing, not an image, truncated, compressed in a way that cannot be read, larger than `MAX_PIXELS`, or
        holds several planes of which none is chosen.
    """
    try:
        plane, mode = _read_zarr(source, page or 0) if ".zarr/" in str(source) else _read_pillow(source)
        if plane is None and _is_tiff(source):
            stack = _read_tiff(source)
            plane, mode = _choose(stack, name, page, pages, z), str(stack.dtype)
        elif plane is None:
            raise UserError(f"{name} is not one grey channel (mode {mode}): give one file per channel")
        elif mode != "zarr" and (page or pages > 1):
            raise UserError(f"{name} holds one plane, and page {page} is asked for (from 0)")
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{name} is missing: fetch it again") from error
    except (Image.DecompressionBombError, OverflowError) as error:
        raise UserError(
            f"{name} has more than {MAX_PIXELS:,} pixels, the most that are read: cut it into fields"
        ) from error
    except Exception as error:  # Pillow's and tifffile's readers let errors of their own parsing through
        compression = re.search(r"<COMPRESSION\.(\w+)", str(error))
        if compression and "imagecodecs" in str(error):
            raise UserError(
                f"{name} is compressed by {compression[1]}, which cannot be read here: install imagecodecs, or save "
                "the images uncompressed"
            ) from error
        raise UserError(f"{name} is truncated or not an image ({first_line(error)}): fetch it again") from error
    return plane.astype(plane.dtype.newbyteorder("="), copy=False), mode


def _read_zarr(source: str | Path, page: int) -> tuple[np.ndarray, str]:
    """A plane of a Zarr array, whose axes before the last two are run through in order."""
    try:
        import zarr
    except ImportError as error:
        raise UserError(f"{source} needs the package zarr: pip install wsdino[ome]") from error
    array = zarr.open_array(str(source), mode="r")
    if array.shape[-1] * array.shape[-2] > MAX_PIXELS:
        raise OverflowError
    return np.asarray(array[np.unravel_index(page, array.shape[:-2])]), "zarr"


def _read_pillow(source: str | Path | BinaryIO) -> tuple[np.ndarray | None, str]:
    """The plane of a file that holds one grey plane alone; None, and what is known of the mode, for other files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is the limit
            opened = Image.open(source)
    except (UnidentifiedImageError, KeyError, SyntaxError) as error:
        if not _is_tiff(source):
            raise ValueError(first_line(error)) from error
        return None, ""
    with opened as image:
        if image.width * image.height > MAX_PIXELS:  # known from the header: nothing is decoded yet
            raise OverflowError
        # ImageJ describes large stacks in the directory of their first plane.
        description = str(getattr(image, "tag_v2", {}).get(270, ""))
        told = description.startswith("ImageJ=") and re.search(r"^images=(\d{1,9})", description, re.MULTILINE)
        single = max(getattr(image, "n_frames", 1), int(told[1]) if told else 1) == 1
        if not single or image.mode == "P" or len(image.getbands()) > 1:
            return None, image.mode
        try:
            return np.asarray(image), image.mode
        except OSError as error:
            if "not available" not in str(error):  # Pillow was built without this decoder
                raise
            return None, image.mode


def _is_tiff(source: str | Path | BinaryIO) -> bool:
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            return file.read(4) in TIFF_STARTS
    source.seek(0)
    start = source.read(4)
    source.seek(0)
    return start in TIFF_STARTS


def _read_tiff(source: str | Path | BinaryIO) -> np.ndarray:
    """The planes of a TIFF as `(channels, focus planes, rows, columns)`."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it would warn about is refused here
    with tifffile.TiffFile(source) as file:
        levels = [series for series in file.series if not series.keyframe.is_reduced]
        page = levels[0].keyframe
        full = [series for series in levels if series.keyframe.shape == page.shape]
        if sum(series.size for series in full) > MAX_PIXELS:
            raise OverflowError
        for each in (each for series in full for each in series.pages if each is not None):
            # tifffile takes what is missing for zeros.
            ends = zip(each.dataoffsets, each.databytecounts, strict=True)
            if any(count == 0 or offset + count > file.filehandle.size for offset, count in ends):
                raise ValueError("its pixels end early")
        axes = full[0].axes if len(full) == 1 else "I" + full[0].axes
        stack = full[0].asarray() if len(full) == 1 else np.stack([series.asarray() for series in full])
        told = int((file.imagej_metadata or {}).get("images", 1))  # of which large stacks have one directory
        if told > stack.size // (page.imagelength * page.imagewidth):
            raise ValueError(f"it tells of {told} planes and lacks some")
        # Alpha is no channel; samples that a file does not explain are.
        alpha = sum(kind in (1, 2) for kind in page.extrasamples)
    if stack.size == 0 or not {"Y", "X"} <= set(axes):
        raise ValueError("it holds no plane of pixels")
    if "S" in axes and alpha:
        stack = stack.take(range(stack.shape[axes.index("S")] - alpha), axis=axes.index("S"))
    focus = [number for number, axis in enumerate(axes) if axis == "Z"]
    plane = [axes.index("Y"), axes.index("X")]
    others = [number for number in range(len(axes)) if number not in (*focus, *plane)]
    stack = stack.transpose(*others, *focus, *plane)
    return stack.reshape(-1, stack.shape[len(others)] if focus else 1, *stack.shape[-2:])


def _choose(stack: np.ndarray, name: str, page: int | None, pages: int, z: str | None) -> np.ndarray:
    channels, focus = stack.shape[:2]
    if z is not None and focus == 1 and page is None:  # pages that the file does not explain
        stack, channels, focus = stack.transpose(1, 0, 2, 3), 1, channels
    if channels > 1 and page is None:
        raise UserError(
            f"{name} holds {channels} planes: name the one of this channel in the column mapping (page), or say what "
            "becomes of planes of different focus (--z)"
        )
    if pages and channels != pages:
        raise UserError(
            f"{name} holds {channels} planes for {pages} channels: name the plane of each in the column mapping (page)"
        )
    if (page or 0) >= channels:
        raise UserError(f"{name} holds {channels} plane{'s' * (channels > 1)}, and page {page} is asked for (from 0)")
    planes = stack[page or 0]
    if focus == 1:
        return planes[0]
    if z in Z_RULES:
        return Z_RULES[z](planes, axis=0)
    if z is None or int(z) >= focus:
        raise UserError(
            f"{name} holds {focus} planes of different focus: choose with --z max, mean or a number from 0"
        )
    return planes[int(z)]


def read_plane(
    path: Path,
    bits: int = 16,
    size: tuple[int, int] | None = None,
    where: str = "",
    *,
    page: int | None = None,
    pages: int = 0,
    z: str | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """Read one plane of the depth and size that a screen has.

    Parameters
    ----------
    path : path
    bits : int
        16 or 8: the depth it must have. Signed, 32-bit and floating-point pixels count as 16-bit ones if every value
        is a whole number of 0 to 65535, after multiplication by `scale`.
    size : (rows, columns), optional
        The size it must have.
    where : str
        Names the row of the table in an error message.
    page, pages, z
        See `read_image`.
    scale : float, optional
        Multiplies every value, which is then rounded: 65535 for floats of 0 to 1.

    Returns
    -------
    numpy.ndarray
        `(rows, columns)` uint16 or uint8.

    Raises
    ------
    UserError
        It cannot be read (see `read_image`), or has another depth or size.
    """
    name = f"{path}{where}"
    plane, kind = read_image(path, name, page=page, pages=pages, z=z)
    if scale is not None or plane.dtype not in (np.uint8, np.uint16):
        plane = _fit(plane, name, kind, bits, scale, rounded=scale is not None or z == "mean")
    if plane.dtype.itemsize * 8 != bits:
        fix = "build an 8-bit screen with --bits 8" if bits == 16 else "leave --bits 8 out"
        raise UserError(f"{name} is {plane.dtype.itemsize * 8}-bit, not {bits}-bit: give the original files, or {fix}")
    if size is not None and plane.shape != tuple(size):
        raise UserError(
            f"{name} is {plane.shape[1]} x {plane.shape[0]} pixels where the screen's first image is "
            f"{size[1]} x {size[0]}: all images of a screen must have one size"
        )
    return plane


def _fit(plane: np.ndarray, name: str, kind: str, bits: int, scale: float | None, rounded: bool) -> np.ndarray:
    """The same whole numbers in `bits` bits."""
    if plane.dtype.kind not in "iuf":
        raise UserError(f"{name} is of type {kind}, not {bits}-bit: give grey images")
    values, most = plane.astype(np.float64) * (scale or 1), 2**bits - 1
    whole = np.rint(values) if rounded else values
    low, high = float(whole.min()), float(whole.max())
    if not (low >= 0 and high <= most and (rounded or (whole == np.rint(whole)).all())):  # False for NaN, too
        raise UserError(
            f"{name} is of type {kind}, with values from {plane.min():g} to {plane.max():g}, which are not whole "
            f"numbers of 0 to {most}: give the original files, or a factor (--scale, {most} for 0 to 1)"
        )
    return whole.astype(np.uint16 if bits == 16 else np.uint8)
