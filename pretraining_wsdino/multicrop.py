"""Multi-crop views: draw boxes, cut their windows out of uint16 planes, resize and flip them in batches on the device.

The released recipe crops with area 0.1-0.2 (global, 224 pixels) and 0.04-0.08 (local, 96 pixels), ratio 1, OpenCV's
bicubic kernel (a = -0.75, no antialias, border replicated inside the crop), and both flips with probability 0.5. Here
a crop is cut before anything is computed, so that the cost is that of the crop's pixels and never of the whole field,
and all crops of a batch are resized together, as two weighted sums of four pixels: along the rows, then the columns.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class CropSpec:
    """What to draw from one field.

    Args:
        count: crops a field.
        size: side of the resized crop, in pixels; a multiple of the model's patch size.
        area: smallest and largest share of the field's area, drawn uniformly.
        flip: probability of each of the horizontal and the vertical flip.
    """

    count: int
    size: int
    area: tuple[float, float]
    flip: float = 0.5


def draw_boxes(random: np.random.Generator, spec: CropSpec, shape: tuple[int, int]) -> np.ndarray:
    """Square boxes inside a field of `shape (height, width)`.

    The side is the rounded root of the drawn area, never longer than the field's shorter side; the place is uniform
    over the positions that fit.

    Returns:
        `(count, 6)` int64: top, left, height, width, flipped left-right, flipped up-down.
    """
    height, width = shape
    u = random.random((spec.count, 5))
    area = (spec.area[0] + (spec.area[1] - spec.area[0]) * u[:, 0]) * (height * width)
    side = np.clip(np.rint(np.sqrt(area)), 1, min(height, width)).astype(np.int64)
    top = (u[:, 1] * (height - side + 1)).astype(np.int64)
    left = (u[:, 2] * (width - side + 1)).astype(np.int64)
    flips = (u[:, 3:5] < spec.flip).astype(np.int64)
    return np.column_stack([top, left, side, side, flips])


def cut_window(plane: np.ndarray, box: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Copy of the box's pixels from `plane (height, width)`, into the upper left of `out` where given."""
    top, left, height, width = box[:4].tolist()
    window = np.asarray(plane)[top : top + height, left : left + width]  # a memory map's own slicing is slow
    if out is None:
        return window.copy()
    out[:height, :width] = window
    return out


def bicubic_taps(
    length: torch.Tensor, size: int, flip: torch.Tensor, a: float = -0.75
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which four pixels of a line, and how much of each, make each pixel of that line resized to `size`.

    Keys' cubic convolution kernel with `a = -0.75` at half-pixel centres, as in OpenCV's INTER_CUBIC and torch's
    bicubic without antialias; taps outside the crop take its border pixel.

    Args:
        length: `(...)` source lengths.
        flip: `(...)` bool, reverses the output.

    Returns:
        `(..., size, 4)` int32 in [0, length), and `(..., size, 4)` float32 that sum to 1.
    """
    device, length, flip = length.device, length.contiguous(), flip.contiguous()
    pixel = torch.arange(size, device=device)
    pixel = torch.where(flip[..., None], size - 1 - pixel, pixel)
    place = (pixel + 0.5) * (length[..., None] / size) - 0.5
    first = torch.floor(place)
    # A line a tap: the coefficients of 1, t, t^2 and t^3.
    kernel = [[0, a, -2 * a, a], [1, 0, -(a + 3), a + 2], [0, -a, 2 * a + 3, -(a + 2)], [0, 0, a, -a]]
    c = torch.tensor(kernel, dtype=torch.float32, device=device).t()[..., None]
    t = (place - first).view(1, -1)
    weights = ((c[3] * t + c[2]) * t + c[1]) * t + c[0]
    taps = torch.arange(-1, 3, dtype=torch.int32, device=device)[:, None] + first.int().view(1, -1)
    taps = torch.minimum(taps.clamp_(min=0), (length - 1).int().view(-1).repeat_interleave(size))
    return tuple(transposed(each.view(1, 4, -1)).view(*place.shape, 4) for each in (taps, weights))


def transposed(images: torch.Tensor) -> torch.Tensor:
    """`(n, rows, columns)`, contiguous, to contiguous `(n, columns, rows)`.

    Shuffling channels is a transposition of (groups, channels of a group), and of all transpositions the one that
    torch does with vector instructions on a processor: measured four times as fast as a strided copy. Other devices
    lack it, and need it not.
    """
    if images.device.type != "cpu":
        return images.transpose(1, 2).contiguous()
    n, rows, columns = images.shape
    pixels = rows * columns
    channels_last = images.as_strided((n, pixels, 1, 1), (pixels, 1, pixels, pixels))
    return torch.channel_shuffle(channels_last, rows).reshape(n, columns, rows)


def weighted_rows(images: torch.Tensor, taps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each row of the result is the sum of four weighted rows, in float32 whatever the settings for products.

    Args:
        images: `(n, rows, columns)` float32.
        taps: `(n, size, 4)`, counted through the rows of all images.
        weights: `(n, size, 4)` float32.

    Returns:
        `(n, size, columns)` float32.
    """
    n, size, _ = taps.shape
    table = images.view(-1, images.shape[2])
    # What torch calls an embedding bag: a weighted sum of rows of a table.
    bags = F.embedding_bag(taps.view(-1, 4), table, per_sample_weights=weights.view(-1, 4), mode="sum")
    return bags.view(n, size, -1)


def resize_windows(
    windows: torch.Tensor, sizes: torch.Tensor, flips: torch.Tensor, size: int, max_intensity: float
) -> torch.Tensor:
    """Network input from raw windows: clip, scale to [0, 1], bicubic to `size`, flip; all windows at once.

    Args:
        windows: `(n, tallest, widest)` uint16 or uint8, on any device.
        sizes: `(n, 2)` height and width of each window inside the padding.
        flips: `(n, 2)` bool, left-right and up-down.
        size: side of the crop.
        max_intensity: counts that become 1.0; brighter pixels are clipped first (10,000 in the paper's recipe).

    Returns:
        `(n, 1, size, size)` float32; the cubic kernel may overshoot [0, 1] a little, as the original's does.
    """
    n, tallest, widest = windows.shape
    # A processor takes as many windows at a time as its cache holds: measured twice as fast as 160 at once.
    part = max(1, 2**19 // (tallest * widest) if windows.device.type == "cpu" else n)
    (rows, columns), (row_weights, column_weights) = bicubic_taps(sizes.t(), size, flips.t().flip(0))
    place = (torch.arange(n, dtype=torch.int32, device=windows.device) % part)[:, None, None]
    rows += place * tallest
    columns += place * widest
    row_weights /= max_intensity
    crops = torch.empty(n, 1, size, size, device=windows.device)
    for start in range(0, n, part):
        some = slice(start, start + part)
        images = windows[some].float().clamp_(max=max_intensity)
        images = transposed(weighted_rows(images, rows[some], row_weights[some]))
        crops[some, 0] = transposed(weighted_rows(images, columns[some], column_weights[some]))
    return crops
