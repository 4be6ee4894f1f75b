"""Encodes planes for the dataset: lossless grey PNGs, and a small preview in colour."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

PREVIEW_SIDE = 160


def encode_png(plane: np.ndarray) -> bytes:
    """A lossless grey PNG.

    Parameters
    ----------
    plane : numpy.ndarray
        `(rows, columns)` uint8 or uint16.

    Returns
    -------
    bytes

    Notes
    -----
    Camera noise gives deflate nothing to match, so "sub" filtering and run-length + Huffman coding alone make files
    3 to 5 % smaller than Pillow's fastest level at a quarter of its time (measured 6-8 against 19-29 ms for
    640 x 512 planes), which also decode faster.
    """
    depth = plane.dtype.itemsize
    rows, columns = plane.shape
    big = np.ascontiguousarray(plane.astype(">u2" if depth == 2 else np.uint8, copy=False)).view(np.uint8)
    big = big.reshape(rows, columns * depth)
    filtered = np.empty((rows, columns * depth + 1), np.uint8)
    filtered[:, 0] = 1
    filtered[:, 1 : depth + 1] = big[:, :depth]
    np.subtract(big[:, depth:], big[:, :-depth], out=filtered[:, depth + 1 :])
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    data = packer.compress(filtered) + packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", columns, rows, 8 * depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def make_preview(planes: Sequence[np.ndarray | None]) -> bytes:
    """A small 8-bit RGB JPEG to look at: first channel blue, second green, third red (DNA, tubulin, actin).

    Each channel is stretched to its own 99.7th percentile, so brightness must not be compared between previews.

    Parameters
    ----------
    planes : sequence of numpy.ndarray or None
        `(rows, columns)` of one size, one per channel; None where the field lacks it. Not all may be None.

    Returns
    -------
    bytes
        A JPEG whose longer side is about 160 pixels.
    """
    size = next(plane.shape for plane in planes if plane is not None)
    step = max(1, round(max(size) / PREVIEW_SIDE))
    small = (size[0] // step, size[1] // step)
    picture = np.zeros((*small, 3), np.uint8)
    for colour, plane in zip((2, 1, 0), planes, strict=False):
        if plane is None:
            continue
        cut = plane[: small[0] * step, : small[1] * step]
        mean = cut.reshape(small[0], step, small[1], step).mean(axis=(1, 3), dtype=np.float32)
        low, high = np.percentile(mean, (1, 99.7))
        picture[..., colour] = np.clip((mean - low) * (255 / max(high - low, 1e-6)), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
