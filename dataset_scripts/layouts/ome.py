"""OME-TIFF and OME-Zarr plates, by their own metadata alone: no file name is interpreted.

A plane of a file with several is named `<path>#<number>`, counted from 0: the page of a TIFF, or the plane of a Zarr
array when its leading axes are run through in order.
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pandas as pd
from PIL import Image

from wsdino.errors import UserError, first_line

from ..tables import row_letters
from . import Screen, Source
from .file_names import one_row_per_field


def ome(source: Source) -> Screen:
    """Plates that an OME-XML (in a TIFF or a companion file) or an OME-Zarr describes."""
    rows, sizes = [], set()
    for file in source.matching(r".*\.zarr"):
        rows += _zarr_plate(source.raw, file, sizes)
    described: set[str] = set()
    for file in source.matching(r".*\.(ome|ome\.tiff?)"):
        if file not in described:  # every file of a set repeats the description of all
            found = _tiff_plate(source, file, sizes)
            described |= {row["file"].partition("#")[0] for row in found}
            rows += found
    if not rows:
        raise UserError(
            f"no OME file of {source.raw} describes a plate: use --layout folder --pattern, which goes by names"
        )
    pixel = sizes - {None}
    return one_row_per_field(pd.DataFrame(rows), source, pixel_size=pixel.pop() if len(pixel) == 1 else None)


def _zarr_plate(raw: Path, file: str, sizes: set) -> list[dict]:
    def attributes(folder: Path) -> dict:
        try:
            if (folder / "zarr.json").is_file():  # Zarr 3, OME-Zarr 0.5
                return json.loads((folder / "zarr.json").read_text())["attributes"]["ome"]
            return json.loads((folder / ".zattrs").read_text())
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder} is not a whole OME-Zarr ({first_line(error)}): copy it again") from error

    rows = []
    plate = attributes(raw / file).get("plate")
    if plate is None:
        return rows
    name = plate.get("name") or Path(file).stem
    for well in plate["wells"]:
        images = attributes(raw / file / well["path"])["well"]["images"]
        for number, image in enumerate(images, start=1):
            inside = f"{file}/{well['path']}/{image['path']}"
            about = attributes(raw / inside)
            scales = about["multiscales"][0]
            axes = [axis["name"] if isinstance(axis, dict) else axis for axis in scales.get("axes", "tczyx")]
            array = f"{inside}/{scales['datasets'][0]['path']}"
            meta = raw / array / "zarr.json"
            shape = json.loads((meta if meta.is_file() else raw / array / ".zarray").read_text())["shape"]
            scale = [t["scale"] for t in scales["datasets"][0].get("coordinateTransformations", ()) if "scale" in t]
            sizes.add(round(scale[0][-1], 6) if scale else None)
            labels = [c.get("label") or str(i) for i, c in enumerate(about.get("omero", {}).get("channels", ()))]
            length = dict(zip(axes, shape, strict=True))
            for plane in range(math.prod(shape[:-2])):
                left, where = plane, {}
                for axis in reversed(axes[:-2]):
                    left, where[axis] = divmod(left, length[axis])
                channel = where.get("c", 0)
                rows.append({
                    "plate": name, "well": well["path"].replace("/", ""), "site": str(number),
                    "channel": labels[channel] if channel < len(labels) else f"ch{channel}",
                    "z": str(where.get("z", 0) + 1), "time": str(where.get("t", 0) + 1),
                    "file": f"{array}#{plane}",
                })  # fmt: skip
    return rows


def _tiff_plate(source: Source, file: str, sizes: set) -> list[dict]:
    path = source.raw / file
    try:
        if file.lower().endswith(".ome"):
            text = path.read_text(encoding="utf-8")
        else:
            with Image.open(path) as image:
                text = str(getattr(image, "tag_v2", {}).get(270, ""))
        root = ET.fromstring(re.sub(r'\sxmlns="[^"]*"', "", text).encode())
    except (OSError, ValueError, ET.ParseError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} holds no OME-XML ({first_line(error)}): use --layout folder --pattern") from error
    folder = file.rpartition("/")[0]
    images = {image.get("ID"): image for image in root.iter("Image")}
    rows = []
    for plate in root.iter("Plate"):
        name = plate.get("Name") or plate.get("ID") or Path(file).stem.removesuffix(".ome")
        for well in plate.iter("Well"):
            label = f"{row_letters(int(well.get('Row')) + 1)}{int(well.get('Column')) + 1:02d}"
            for number, sample in enumerate(well.iter("WellSample"), start=1):
                reference = sample.find("ImageRef")
                image = images.get(reference.get("ID")) if reference is not None else None
                if image is None:
                    continue
                pixels = image.find("Pixels")
                sizes.add(round(float(pixels.get("PhysicalSizeX")), 6) if pixels.get("PhysicalSizeX") else None)
                rows += [
                    {
                        "plate": name,
                        "well": label,
                        "site": str(number),
                        **plane,
                        "file": f"{folder}/{plane['file']}".lstrip("/"),
                    }
                    for plane in _planes(pixels, Path(file).name)
                ]
    return rows


def _planes(pixels: ET.Element, own: str) -> list[dict]:
    """Channel, z, time and `file#page` of every plane of an OME image, from its TiffData elements."""
    channels = [c.get("Name") or f"ch{i}" for i, c in enumerate(pixels.findall("Channel"))]
    order = pixels.get("DimensionOrder", "XYCZT")[2:]
    length = {axis: int(pixels.get(f"Size{axis}", 1)) for axis in "CZT"}
    rows = []
    for block in pixels.findall("TiffData") or [ET.Element("TiffData")]:
        uuid = block.find("UUID")
        file = uuid.get("FileName", own) if uuid is not None else own
        first = {axis: int(block.get(f"First{axis}", 0)) for axis in "CZT"}
        page = int(block.get("IFD", 0))
        # Without a count the element stands for one plane if it names its page, and for the rest of the file if not.
        count = int(block.get("PlaneCount", 1 if block.get("IFD") or uuid is not None else math.prod(length.values())))
        start = first[order[0]] + length[order[0]] * (first[order[1]] + length[order[1]] * first[order[2]])
        for step in range(count):
            left, at = start + step, {}
            for axis in order:
                left, at[axis] = divmod(left, length[axis])
            channel = channels[at["C"]] if at["C"] < len(channels) else f"ch{at['C']}"
            rows.append(
                {"channel": channel, "z": str(at["Z"] + 1), "time": str(at["T"] + 1), "file": f"{file}#{page + step}"}
            )
    return rows
