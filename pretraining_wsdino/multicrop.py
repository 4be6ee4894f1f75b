"""Multi-crop views: draw boxes, cut their windows out of uint16 planes, resize and flip them in batches on the device.

The released recipe crops with area 0.1-0.2 (global, 224 pixels) and 0.04-0.08 (local, 96 pixels), ratio 1, OpenCV's
bicubic kernel (a = -0.75, no antialias, border replicated inside the crop), and both flips with probability 0.5. Here
a crop is cut before anything is computed, so that the cost is that of the crop's pixels and never of the whole field,
and all crops of a batch are resized together as two batched matrix products.
"""

from dataclasses import dataclass

import numpy as np
import torch


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
    top, left, height, width = (int(value) for value in box[:4])
    window = plane[top : top + height, left : left + width]
    if out is None:
        return window.copy()
    out[:height, :width] = window
    return out


def bicubic_weights(
    length: torch.Tensor, size: int, extent: int, flip: torch.Tensor, a: float = -0.75
) -> torch.Tensor:
    """Interpolation matrices that map `length` pixels to `size` pixels, padded to `extent` columns.

    Keys' cubic convolution kernel with `a = -0.75` at half-pixel centres, as in OpenCV's INTER_CUBIC and torch's
    bicubic without antialias; taps outside the crop take its border pixel.

    Args:
        length: `(n,)` source lengths, each at most `extent`.
        flip: `(n,)` bool, reverses the output.

    Returns:
        `(n, size, extent)` float32, rows summing to 1.
    """
    place = (torch.arange(size, device=length.device) + 0.5)[None, :] * (length[:, None] / size) - 0.5
    first = torch.floor(place)
    t = place - first
    weights = torch.stack(
        [
            ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a,
            ((a + 2) * t - (a + 3)) * t * t + 1,
            ((a + 2) * (1 - t) - (a + 3)) * (1 - t) * (1 - t) + 1,
            ((a * (2 - t) - 5 * a) * (2 - t) + 8 * a) * (2 - t) - 4 * a,
        ],
        dim=-1,
    )
    taps = first[..., None].long() + torch.arange(-1, 3, device=length.device)
    taps = torch.minimum(taps.clamp(min=0), (length - 1)[:, None, None])
    matrix = torch.zeros(len(length), size, extent, device=length.device)
    matrix.scatter_add_(2, taps, weights.float())
    return torch.where(flip[:, None, None], matrix.flip(1), matrix)


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
    scaled = windows.float().clamp_(max=max_intensity).div_(max_intensity)
    rows = bicubic_weights(sizes[:, 0], size, windows.shape[1], flips[:, 1])
    columns = bicubic_weights(sizes[:, 1], size, windows.shape[2], flips[:, 0])
    return torch.bmm(torch.bmm(rows, scaled), columns.transpose(1, 2))[:, None]
