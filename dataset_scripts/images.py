"""Reads one grey image from a file or from bytes: a limit of its size, and one sentence for whatever is wrong."""

from __future__ import annotations

import re
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image

from .screen import ScreenError

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
    ScreenError
        It is missing, not an image, truncated, larger than :data:`MAX_PIXELS`, a stack, or not of one grey channel.
    """
    too_large = f"{name} has more than {MAX_PIXELS:,} pixels, the most that are read: cut it into fields"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is the limit
            opened = Image.open(source)
        with opened as image:
            if image.width * image.height > MAX_PIXELS:  # known from the header: nothing is decoded yet
                raise ScreenError(too_large)
            # Of a stack the first plane alone would be read. ImageJ describes large ones in one directory.
            description = str(getattr(image, "tag_v2", {}).get(270, ""))
            told = description.startswith("ImageJ=") and re.search(r"^images=(\d{1,9})", description, re.MULTILINE)
            if (count := max(getattr(image, "n_frames", 1), int(told[1]) if told else 1)) > 1:
                raise ScreenError(f"{name} holds {count} images: give one file a channel and field")
            mode = image.mode
            plane = np.asarray(image)
    except ScreenError:
        raise
    except FileNotFoundError as error:
        raise ScreenError(f"{name} is missing: fetch it again") from error
    except Image.DecompressionBombError as error:
        raise ScreenError(too_large) from error
    except Exception as error:  # Pillow's readers let errors of their own parsing through
        raise ScreenError(f"{name} is truncated or not an image ({error}): fetch it again") from error
    if plane.ndim != 2 or mode == "P":
        raise ScreenError(f"{name} is not one grey channel (mode {mode}): give one file a channel")
    return plane.astype(plane.dtype.newbyteorder("="), copy=False), mode
