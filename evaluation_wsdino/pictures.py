"""Pictures a biologist would rather look at than numbers: example fields, and where a network's attention goes."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TEXT_HEIGHT = 18
GAP = 6
BACKGROUND = (255, 255, 255)


def draw_fields(fields: list[np.ndarray], titles: list[str], columns: int = 4, width: int = 320) -> Image.Image:
    """Fields in a grid, each under its title.

    Args:
        fields: `(height, width)` arrays in [0, 1], all of one shape; shown with the square root of intensity, so that
            dim structures are seen beside bright ones.
        titles: one a field.
        columns: fields a row.
        width: of one field in pixels of the picture.
    """
    return _grid([_gray(field, width) for field in fields], titles, columns)


def draw_attention(
    tiles: np.ndarray, maps: np.ndarray, masks: np.ndarray, titles: list[str], width: int = 200
) -> Image.Image:
    """One row a tile: the tile, its thresholded attention mass, the heads' mean, and every head.

    Args:
        tiles: `(n, height, width)` in [0, 1].
        maps: `(n, heads, h, w)` attention of the CLS token to each patch.
        masks: `(n, h, w)` bool, the patches that hold most of the mean attention.
        titles: one a tile.
    """
    cells, names = [], []
    for tile, heads, mask, title in zip(tiles, maps, masks, titles, strict=True):
        gray = _gray(tile, width)
        cells.append(gray)
        names.append(title)
        dimmed = np.asarray(gray, dtype=np.float32)
        keep = _enlarge(mask.astype(np.float32), gray.size)[..., None] > 0.5
        cells.append(Image.fromarray(np.where(keep, dimmed, dimmed * 0.25).astype(np.uint8)))
        names.append(f"{mask.mean():.0%} of patches hold the mass")
        for number, head in enumerate([heads.mean(0), *heads]):
            cells.append(_heat(head, gray.size))
            names.append("mean of heads" if number == 0 else f"head {number}")
    return _grid(cells, names, columns=len(cells) // len(tiles))


def _gray(field: np.ndarray, width: int) -> Image.Image:
    values = (np.sqrt(np.clip(field, 0, 1)) * 255).astype(np.uint8)
    height = round(width * field.shape[0] / field.shape[1])
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC).convert("RGB")


def _heat(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Black over red and yellow to white, from the map's smallest to its largest value."""
    low, high = float(values.min()), float(values.max())
    unit = (_enlarge(values, size) - low) / max(high - low, 1e-12)
    channels = [np.clip(unit * 3 - shift, 0, 1) for shift in range(3)]
    return Image.fromarray((np.stack(channels, axis=-1) * 255).astype(np.uint8))


def _enlarge(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Patches as squares: no smoothing that would suggest a finer map than there is."""
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.NEAREST))


def _grid(cells: list[Image.Image], titles: list[str], columns: int) -> Image.Image:
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    width, height = cells[0].width + GAP, cells[0].height + TEXT_HEIGHT + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, (cell, title) in enumerate(zip(cells, titles, strict=True)):
        row, column = divmod(number, columns)
        left, top = GAP + column * width, GAP + row * height
        while len(title) > 4 and draw.textlength(title, font=font) > cell.width:
            title = title[:-2].rstrip("…") + "…"
        draw.text((left, top), title, fill=(20, 20, 20), font=font)
        sheet.paste(cell, (left, top + TEXT_HEIGHT))
    return sheet
