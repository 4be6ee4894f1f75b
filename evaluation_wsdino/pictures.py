"""Pictures for readers who would rather look than compare numbers: example fields, and what a network attends to.

A sheet carries its titles twice: drawn above its pictures, for the file itself, and with the place of each picture as
JSON in the PNG's own text (`save_sheet`, `read_sheet`), for a page that sets them as text of its own.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from wsdino.files import written_whole

TEXT_HEIGHT = 18
GAP = 6
BACKGROUND = (255, 255, 255)
SHEET_KEY = "wsdino_sheet"


def choose_examples(metadata: pd.DataFrame, count: int = 8) -> dict[int, str]:
    """Row numbers of up to `count` fields that show a screen, with their titles.

    Parameters
    ----------
    metadata : pandas.DataFrame
        `Metadata_*` columns, one row per field. Where they name mechanisms, treatments and concentrations, the first
        DMSO field and the highest concentration of each mechanism are chosen; otherwise fields at equal distances.
    """
    needed = ["Metadata_MOA", "Metadata_Treatment", "Metadata_Concentration"]
    if not set(needed) <= set(metadata):
        rows = np.linspace(0, len(metadata) - 1, count).round().astype(int).tolist()
        return {row: f"field {row}" for row in rows}
    moa, treatment = metadata["Metadata_MOA"], metadata["Metadata_Treatment"]
    controls = metadata.index[moa == "DMSO"][:1].tolist()
    treated = metadata[(moa != "DMSO") & (moa != "")].sort_values("Metadata_Concentration", kind="stable")
    strongest = treated.groupby("Metadata_MOA").tail(1).sort_values("Metadata_MOA")
    rows = controls + strongest.index[: count - len(controls)].tolist()
    return {row: f"{moa[row]}: {treatment[row]}" for row in rows}


def draw_fields(fields: list[np.ndarray], titles: list[str], columns: int = 4, width: int = 320) -> Image.Image:
    """Fields in a grid, each under its title.

    Parameters
    ----------
    fields : list of (height, width) arrays
        Intensities in [0, 1], all of one shape; shown with their square root, so that dim structures are seen beside
        bright ones.
    titles : list of str
        One per field.
    columns : int
        Fields per row.
    width : int
        Of one field in pixels of the picture.
    """
    sheet, boxes = _grid([_gray(field, width) for field in fields], titles, columns)
    cells = [{"title": title, "box": box} for title, box in zip(titles, boxes, strict=True)]
    sheet.info["groups"] = [{"title": "", "cells": cells}]
    return sheet


def draw_attention(
    tiles: np.ndarray, maps: np.ndarray, masks: np.ndarray, titles: list[str], width: int = 200
) -> Image.Image:
    """One row per tile: the tile, the patches that hold most of the attention, the heads' mean, and every head.

    Parameters
    ----------
    tiles : (n, height, width) array
        Intensities in [0, 1].
    maps : (n, heads, h, w) array
        Attention of the CLS token to each patch.
    masks : (n, h, w) bool array
        The patches that hold most of the mean attention.
    titles : list of str
        One per tile.
    width : int
        Of one tile in pixels of the picture.
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
    columns = len(cells) // len(tiles)
    sheet, boxes = _grid(cells, names, columns)
    sheet.info["groups"] = []
    for row, title in enumerate(titles):
        own = range(row * columns, (row + 1) * columns)
        group = [{"title": names[number] if number > own[0] else "field", "box": boxes[number]} for number in own]
        sheet.info["groups"].append({"title": title, "cells": group})
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG, with the titles and places of its pictures."""
    text = PngInfo()
    text.add_itxt(SHEET_KEY, json.dumps(sheet.info["groups"]))
    with written_whole(path) as partial:
        sheet.save(partial, format="PNG", pnginfo=text)


def read_sheet(path: Path) -> list[tuple[str, list[tuple[str, Image.Image]]]]:
    """The pictures of a sheet.

    Returns
    -------
    list of (title, list of (title, picture))
        Groups of pictures; a PNG without such places, of any origin, is one group of one picture without titles.

    Raises
    ------
    OSError
        The file cannot be read as a picture.
    """
    with Image.open(path) as image:
        image.load()
        whole = image.convert("RGB")
        text = getattr(image, "text", {}).get(SHEET_KEY)
    try:
        groups = [
            (str(group["title"]), [(str(cell["title"]), _cut(whole, cell["box"])) for cell in group["cells"]])
            for group in json.loads(text)
        ]
    except (TypeError, KeyError, ValueError):
        groups = []
    return groups if any(cells for _, cells in groups) else [("", [("", whole)])]


def _cut(sheet: Image.Image, box: list[int]) -> Image.Image:
    left, top, right, bottom = (int(edge) for edge in box)
    if not (0 <= left < right <= sheet.width and 0 <= top < bottom <= sheet.height):
        raise ValueError(f"the box {box} lies outside the sheet")
    return sheet.crop((left, top, right, bottom))


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


def _grid(
    cells: list[Image.Image], titles: list[str], columns: int
) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """The sheet, and where each cell lies in it: left, top, right, bottom."""
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    width, height = cells[0].width + GAP, cells[0].height + TEXT_HEIGHT + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), BACKGROUND)
    draw, font, boxes = ImageDraw.Draw(sheet), ImageFont.load_default(size=12), []
    for number, (cell, title) in enumerate(zip(cells, titles, strict=True)):
        row, column = divmod(number, columns)
        left, top = GAP + column * width, GAP + row * height
        while len(title) > 4 and draw.textlength(title, font=font) > cell.width:
            title = title[:-2].rstrip("…") + "…"
        draw.text((left, top), title, fill=(20, 20, 20), font=font)
        sheet.paste(cell, (left, top + TEXT_HEIGHT))
        boxes.append((left, top + TEXT_HEIGHT, left + cell.width, top + TEXT_HEIGHT + cell.height))
    return sheet, boxes
