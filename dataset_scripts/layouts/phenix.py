"""Opera Phenix and Operetta: the index that Harmony writes beside the images of a measurement."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pandas as pd

from wsdino.errors import UserError

from ..tables import row_letters
from . import Screen, Source
from .file_names import by_pattern, one_row_per_field

INDEX = r"(.*/)?Index(\.\w+)?\.xml|(.*/)?r\d+c\d+f\d+p\d+-ch\d+sk\d+[^/]*\.tiff?"
NAMES = (
    r"(?:^|/)r(?P<row>\d+)c(?P<column>\d+)f(?P<site>\d+)p(?P<z>\d+)-ch(?P<channel>\d+)"
    r"sk(?P<time>\d+)[^/]*$"
)


def phenix(source: Source) -> Screen:
    """Well, field, plane, channel names and resolution from every `Index.idx.xml` or `Index.xml` below the folder.

    Without an index the files' names are read, which tell all but the channels' names and the resolution.
    """
    rows, names, sizes, seen = [], {}, set(), set()
    for file in source.matching(r"(.*/)?Index(\.\w+)?\.xml"):
        folder = file.rpartition("/")[0]
        if folder in seen:  # an export may hold both names of the index
            continue
        seen.add(folder)
        plate, images, channels = read_index(source.raw / file)
        plate = plate or _measurement(folder) or source.raw.resolve().name
        for image in images:
            sizes.add(image.pop("size"))
            name = image.pop("name") or channels.get(image["channel"]) or f"ch{image['channel']}"
            if names.setdefault(image["channel"], name) != name:
                raise UserError(
                    f"{source.raw / file}: channel {image['channel']} is {name!r} here and "
                    f"{names[image['channel']]!r} on another plate: build these plates apart"
                )
            rows.append(image | {"plate": plate, "file": f"{folder}/{image['file']}".lstrip("/")})
    if not seen:
        files = by_pattern(source, NAMES)
        source.notes.append("no Index.idx.xml is there: channels are named by their numbers")
        wells = files.pop("row").map(lambda row: row_letters(int(row))) + files.pop("column")
        plates = files["file"].map(lambda file: _measurement(file.rpartition("/")[0]) or source.raw.resolve().name)
        names = {channel: f"ch{channel}" for channel in files["channel"].unique()}
        return one_row_per_field(files.assign(well=wells, plate=plates), source, names)
    if not rows:
        raise UserError(f"{source.raw}: {', '.join(sorted(seen))} holds an index that names no image")
    pixel = sizes - {None}
    size = pixel.pop() if len(pixel) == 1 else None
    return one_row_per_field(pd.DataFrame(rows), source, names, pixel_size=size)


def _measurement(folder: str) -> str:
    """The plate in the name of a measurement's folder, `<plate>__<time>-Measurement 1/Images`."""
    return folder.removesuffix("Images").rstrip("/").rpartition("/")[2].partition("__")[0]


def read_index(path: Path) -> tuple[str, list[dict], dict[str, str]]:
    """The plate's name, its images (well, site, z, time, channel, name, file, size in µm) and the channels' names.

    Raises
    ------
    UserError
        The file is not whole, or an image of it lacks an entry.
    """
    plate, images, channels = "", [], {}
    try:
        for _, node in ET.iterparse(path):
            tag = node.tag.rpartition("}")[2]
            if tag not in ("Plate", "Entry", "Image"):
                continue
            said = {child.tag.rpartition("}")[2]: (child.text or "").strip() for child in node}
            if tag == "Plate":
                plate = plate or said.get("Name") or said.get("PlateID", "")
            elif tag == "Entry" and "ChannelName" in said:
                channels[node.get("ChannelID", "")] = said["ChannelName"]
            elif tag == "Image" and "URL" in said:
                size = said.get("ImageResolutionX")
                images.append({
                    "well": f"{row_letters(int(said['Row']))}{int(said['Col']):02d}", "site": said["FieldID"],
                    "z": said.get("PlaneID", "1"), "time": said.get("TimepointID", "0"), "channel": said["ChannelID"],
                    "name": said.get("ChannelName", ""), "file": said["URL"].replace("\\", "/"),
                    "size": round(float(size) * 1e6, 6) if size else None,  # the index has metres
                })  # fmt: skip
                node.clear()
    except (ET.ParseError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a whole index of Harmony ({error}): copy the measurement again") from error
    return plate, images, channels
