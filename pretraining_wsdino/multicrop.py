"""Multi-crop views: draw boxes, cut their windows out of uint16 planes, resize and flip them in batches on the device.

The released recipe crops with area 0.1-0.2 (global, 224 pixels) and 0.04-0.08 (local, 96 pixels), ratio 1, OpenCV's
bicubic kernel (a = -0.75, no antialias, border replicated inside the crop), and both flips with probability 0.5. Here
a crop is cut before anything is computed, so that the cost is that of the crop's pixels and never of the whole field,
and all crops of a batch are resized together, as two weighted sums of four pixels: along the rows, then the columns.

Networks that start without ImageNet weights take brightness and orientation for shortcuts. For them a crop may also be
transposed, which with both flips gives all eight symmetries of the square, and its brightness may be varied.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

LOG_SPREAD = 0.8  # natural logarithms of fluorescence counts per unit of logarithmic input


@dataclass(frozen=True)
class CropSpec:
    """What to draw from one field.

    Parameters
    ----------
    count : int
        Crops per field.
    size : int
        Side of the resized crop in pixels; a multiple of the model's patch size.
    area : (float, float)
        Smallest and largest share of the field's area, drawn uniformly.
    flip : float
        Probability of each of the horizontal and the vertical flip.
    transpose : float
        Probability of exchanging rows and columns after the flips; 0.5 makes all eight symmetries of the square
        equally likely.
    brightness_sd : float
        Standard deviation of the natural logarithm of the factor by which a crop's intensities are multiplied.
    """

    count: int
    size: int
    area: tuple[float, ...]
    flip: float = 0.5
    transpose: float = 0.0
    brightness_sd: float = 0.0


def draw_boxes(random: np.random.Generator, spec: CropSpec, shape: tuple[int, int]) -> np.ndarray:
    """Square boxes inside a field of `shape (height, width)`.

    The side is the rounded root of the drawn area, never longer than the field's shorter side; the place is uniform
    over the positions that fit.

    Returns
    -------
    numpy.ndarray
        `(count, 7)` int64: top, left, height, width, flipped left-right, flipped up-down, transposed.
    """
    height, width = shape
    u = random.random((spec.count, 5))
    area = (spec.area[0] + (spec.area[1] - spec.area[0]) * u[:, 0]) * (height * width)
    side = np.clip(np.rint(np.sqrt(area)), 1, min(height, width)).astype(np.int64)
    top = (u[:, 1] * (height - side + 1)).astype(np.int64)
    left = (u[:, 2] * (width - side + 1)).astype(np.int64)
    flips = (u[:, 3:5] < spec.flip).astype(np.int64)
    # Drawn only when asked for: the paper's recipe keeps its random numbers.
    transposed = random.random(spec.count) < spec.transpose if spec.transpose else np.zeros(spec.count)
    return np.column_stack([top, left, side, side, flips, transposed]).astype(np.int64)


def draw_log_gains(random: np.random.Generator, spec: CropSpec) -> np.ndarray:
    """Natural logarithms of the brightness factors of one field's crops: `(count,)` float32, normal with mean 0."""
    if not spec.brightness_sd:
        return np.zeros(spec.count, np.float32)
    return random.normal(0.0, spec.brightness_sd, spec.count).astype(np.float32)


def cut_window(plane: np.ndarray, box: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Copy of the box's pixels from `plane (height, width)`, into the upper left of `out` where given."""
    top, left, height, width = box[:4].tolist()
    window = np.asarray(plane)[top : top + height, left : left + width]  # a memory map's own slicing is slow
    if out is None:
        return window.copy()
    out[:height, :width] = window
    return out


@functools.lru_cache
def cubic_coefficients(a: float, device: torch.device) -> torch.Tensor:
    """`(4, 4, 1)`: power of t, tap. Cached, since each copy to a GPU makes the host wait for the device."""
    kernel = [[0, a, -2 * a, a], [1, 0, -(a + 3), a + 2], [0, -a, 2 * a + 3, -(a + 2)], [0, 0, a, -a]]
    return torch.tensor(kernel, dtype=torch.float32, device=device).t()[..., None]


def bicubic_taps(
    length: torch.Tensor, size: int, flip: torch.Tensor, a: float = -0.75
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which four pixels of a line, and how much of each, make each pixel of that line resized to `size`.

    Keys' cubic convolution kernel with `a = -0.75` at half-pixel centres, as in OpenCV's INTER_CUBIC and torch's
    bicubic without antialias; taps outside the crop take its border pixel.

    Parameters
    ----------
    length : torch.Tensor
        `(...)` source lengths.
    size : int
        Pixels of the resized line.
    flip : torch.Tensor
        `(...)` bool, reverses the output.
    a : float
        Of the kernel.

    Returns
    -------
    torch.Tensor, torch.Tensor
        `(..., size, 4)` int32 in [0, length), and `(..., size, 4)` float32 that sum to 1.
    """
    device, length, flip = length.device, length.contiguous(), flip.contiguous()
    pixel = torch.arange(size, device=device)
    pixel = torch.where(flip[..., None], size - 1 - pixel, pixel)
    place = (pixel + 0.5) * (length[..., None] / size) - 0.5
    first = torch.floor(place)
    c = cubic_coefficients(a, device)
    t = (place - first).view(1, -1)
    weights = ((c[3] * t + c[2]) * t + c[1]) * t + c[0]
    taps = torch.arange(-1, 3, dtype=torch.int32, device=device)[:, None] + first.int().view(1, -1)
    taps = torch.minimum(taps.clamp_(min=0), (length - 1).int().view(-1).repeat_interleave(size))
    taps, weights = (transposed(each.view(1, 4, -1)).view(*place.shape, 4) for each in (taps, weights))
    return taps, weights


def transposed(images: torch.Tensor) -> torch.Tensor:
    """`(n, rows, columns)`, contiguous, to contiguous `(n, columns, rows)`.

    Shuffling channels is a transposition of (groups, channels of a group), and of all transpositions the one that
    torch does with vector instructions on a processor: measured four times as fast as a strided copy. Other devices
    lack it, and do not need it.
    """
    if images.device.type != "cpu":
        return images.transpose(1, 2).contiguous()
    n, rows, columns = images.shape
    pixels = rows * columns
    channels_last = images.as_strided((n, pixels, 1, 1), (pixels, 1, pixels, pixels))
    return torch.channel_shuffle(channels_last, rows).reshape(n, columns, rows)


def weighted_rows(images: torch.Tensor, taps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each row of the result is the sum of four weighted rows, in float32 whatever the settings for products.

    Parameters
    ----------
    images : torch.Tensor
        `(n, rows, columns)` float32.
    taps : torch.Tensor
        `(n, size, 4)`, counted through the rows of all images.
    weights : torch.Tensor
        `(n, size, 4)` float32.

    Returns
    -------
    torch.Tensor
        `(n, size, columns)` float32.
    """
    n, size, _ = taps.shape
    table = images.view(-1, images.shape[2])
    # What torch calls an embedding bag: a weighted sum of rows of a table.
    bags = F.embedding_bag(taps.view(-1, 4), table, per_sample_weights=weights.view(-1, 4), mode="sum")
    return bags.view(n, size, -1)


def log_scaled(counts: torch.Tensor, max_intensity: float) -> torch.Tensor:
    """Logarithmic input: `log(max(v, 0.02 m) / (0.1 m)) / 0.8` for counts `v` and `max_intensity` m.

    Fluorescence images have about mean 0 and standard deviation 1 so, and a change of gain is a shift. The image
    processor's `intensity_scale="log"` states the same formula for pipelines.
    """
    return torch.log(counts.clamp(min=0.02 * max_intensity) / (0.1 * max_intensity)) / LOG_SPREAD


def resize_windows(
    windows: torch.Tensor,
    sizes: torch.Tensor,
    flips: torch.Tensor,
    size: int,
    max_intensity: float,
    *,
    intensity_scale: str = "linear",
    log_gains: torch.Tensor | None = None,
) -> torch.Tensor:
    """Network input from raw windows: scale, bicubic to `size`, flip, transpose; all windows at once.

    Parameters
    ----------
    windows : torch.Tensor
        `(n, tallest, widest)` uint16 or uint8, on any device.
    sizes : torch.Tensor
        `(n, 2)` height and width of each window inside the padding.
    flips : torch.Tensor
        `(n, 2)` or `(n, 3)` bool: left-right, up-down and, after both, rows and columns exchanged.
    size : int
        Side of the crop in pixels.
    max_intensity : float
        Counts that become 1.0; brighter pixels are clipped first (10,000 in the paper's recipe).
    intensity_scale : {"linear", "log"}
        "linear" as in the paper, or `log_scaled`, which clips nothing at the top.
    log_gains : torch.Tensor, optional
        `(n,)` natural logarithms of brightness factors. They multiply linear input after it is clipped.

    Returns
    -------
    torch.Tensor
        `(n, 1, size, size)` float32; the cubic kernel may overshoot a little, as the original's does.
    """
    n, tallest, widest = windows.shape
    # A processor takes as many windows at a time as its cache holds: measured twice as fast as 160 at once.
    part = max(1, 2**19 // (tallest * widest) if windows.device.type == "cpu" else n)
    (rows, columns), (row_weights, column_weights) = bicubic_taps(sizes.t(), size, flips[:, :2].t().flip(0))
    place = (torch.arange(n, dtype=torch.int32, device=windows.device) % part)[:, None, None]
    rows += place * tallest
    columns += place * widest
    logarithmic = intensity_scale == "log"
    if not logarithmic:
        row_weights /= max_intensity
    crops = torch.empty(n, 1, size, size, device=windows.device)
    for start in range(0, n, part):
        some = slice(start, start + part)
        images = windows[some].float()
        images = log_scaled(images, max_intensity) if logarithmic else images.clamp_(max=max_intensity)
        images = transposed(weighted_rows(images, rows[some], row_weights[some]))
        crops[some, 0] = transposed(weighted_rows(images, columns[some], column_weights[some]))
    if flips.shape[1] == 3:
        crops = torch.where(flips[:, 2].view(-1, 1, 1, 1), crops.transpose(2, 3), crops)
    if log_gains is not None:
        gains = log_gains.view(-1, 1, 1, 1)
        crops = crops + gains / LOG_SPREAD if logarithmic else crops * gains.exp()
    return crops
