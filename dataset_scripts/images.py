"""Reads one grey image from a file or from bytes, of limited size, with one sentence for whatever is wrong."""

import re
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from wsdino.errors import UserError

MAX_PIXELS = 100_000_000  # 76 times a BBBC021 field: 200 MB of 16 bits, decoded; a larger one may be a small file


def read_image(source: str | BinaryIO, name: str) -> tuple[np.ndarray, str]:
    """The pixels of an image and its Pillow mode.

    Parameters
    ----------
    source : path or binary file
    name : str
        Names the image, and its row, in an error message.

    Returns
    -------
    plane : numpy.ndarray
        `(rows, columns)`, of whatever depth the file has, in the machine's byte order.
    mode : str

    Raises
    ------
    UserError
        It is missing, not an image, truncated, larger than `MAX_PIXELS`, a stack, or not of one grey channel.
    """
    too_large = f"{name} has more than {MAX_PIXELS:,} pixels, the most that are read: cut it into fields"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is the limit
            opened = Image.open(source)
        with opened as image:
            if image.width * image.height > MAX_PIXELS:  # known from the header: nothing is decoded yet
                raise UserError(too_large)
            # Of a stack the first plane alone would be read. ImageJ describes large ones in one directory.
            description = str(getattr(image, "tag_v2", {}).get(270, ""))
            told = description.startswith("ImageJ=") and re.search(r"^images=(\d{1,9})", description, re.MULTILINE)
            if (count := max(getattr(image, "n_frames", 1), int(told[1]) if told else 1)) > 1:
                raise UserError(f"{name} holds {count} images: give one file per channel and field")
            mode = image.mode
            plane = np.asarray(image)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{name} is missing: fetch it again") from error
    except Image.DecompressionBombError as error:
        raise UserError(too_large) from error
    except Exception as error:  # Pillow's readers let errors of their own parsing through
        raise UserError(f"{name} is truncated or not an image ({error}): fetch it again") from error
    if plane.ndim != 2 or mode == "P":
        raise UserError(f"{name} is not one grey channel (mode {mode}): give one file per channel")
    return plane.astype(plane.dtype.newbyteorder("="), copy=False), mode


def read_plane(path: Path, bits: int = 16, size: tuple[int, int] | None = None, where: str = "") -> np.ndarray:
    """Read one grey image.

    Parameters
    ----------
    path : path
    bits : int
        16 or 8: the depth it must have.
    size : (rows, columns), optional
        The size it must have.
    where : str
        Names the row of the table in an error message.

    Returns
    -------
    numpy.ndarray
        `(rows, columns)` uint16 or uint8.

    Raises
    ------
    UserError
        It cannot be read (see `read_image`), or has another depth or size.
    """
    wanted = f"{path}{where}"
    plane, mode = read_image(path, wanted)
    depth = 8 if plane.dtype == np.uint8 else 16 if plane.dtype == np.uint16 else 0
    if depth != bits:
        found, fix = {
            0: (f"of mode {mode}", ", as whole numbers without a sign"),
            8: ("8-bit", ", or build an 8-bit screen with --bits 8"),
            16: ("16-bit", ", or leave --bits 8 out"),
        }[depth]
        raise UserError(f"{wanted} is {found}, not {bits}-bit: give the original files{fix}")
    if size is not None and plane.shape != tuple(size):
        raise UserError(
            f"{wanted} is {plane.shape[1]} x {plane.shape[0]} pixels where the screen's first image is "
            f"{size[1]} x {size[0]}: all images of a screen must have one size"
        )
    return plane
