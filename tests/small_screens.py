"""Small screens on disk for tests of the builder, and what their tables and datasets say."""

import csv

from datasets import load_dataset
from PIL import Image

from dataset_scripts import ScreenColumns

# Of small tables of other screens.
PLAIN = {"plate": "P", "well": "W", "site": "S", "compound": "D", "concentration": "C", "replicate": None}


def load(folder, part, tmp_path):
    return load_dataset(str(folder), part, split="train", cache_dir=str(tmp_path / "cache"))


def table_of(raw):
    with open(raw / "BBBC021_v1_image.csv", newline="") as file:
        return list(csv.DictReader(file))


def copy_of(raw, folder, rows=24):
    """A small copy of a screen: its first rows only."""
    folder.mkdir()
    kept = table_of(raw)[:rows]
    for row in kept:
        for channel in ("DAPI", "Tubulin", "Actin"):
            place = folder / row[f"Image_PathName_{channel}"]
            place.mkdir(parents=True, exist_ok=True)
            name = row[f"Image_FileName_{channel}"]
            (place / name).write_bytes((raw / row[f"Image_PathName_{channel}"] / name).read_bytes())
    with open(folder / "BBBC021_v1_image.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, kept[0])
        writer.writeheader()
        writer.writerows(kept)
    seen = {(row["Image_Metadata_Compound"], float(row["Image_Metadata_Concentration"])) for row in kept}
    lines = (raw / "BBBC021_v1_moa.csv").read_text().splitlines()
    parsed = [(line, line.replace('"', "").split(",")) for line in lines[1:]]
    lines = lines[:1] + [line for line, cells in parsed if (cells[0], float(cells[1])) in seen]
    (folder / "BBBC021_v1_moa.csv").write_text("\n".join(lines) + "\n")
    return folder, folder / kept[3]["Image_PathName_Tubulin"] / kept[3]["Image_FileName_Tubulin"]


def plain_screen(folder, planes, text="p1,A{i:02d},1,{drug},1", drugs=("x",), **columns):
    """A table with one field per plane, of one channel, and the arguments that build it."""
    rows = ["P,W,S,D,C,F"]
    for i, plane in enumerate(planes):
        Image.fromarray(plane).save(folder / f"{i}.tif")
        rows.append(text.format(i=i, drug=drugs[i % len(drugs)]) + f",{i}.tif")
    (folder / "t.csv").write_text("\n".join(rows) + "\n")
    columns = ScreenColumns(channels={"er": ("F", None)}, **PLAIN, **columns)
    return {"image_csv": folder / "t.csv", "columns": columns, "progress": False}
