"""One small screen, written as each system lays it out: two plates, three wells, two sites, two channels.

Every image is of one value, `value(plate, well, site, channel)`, so that a test sees whose pixels it got.
"""

import csv
import gzip
import json
from itertools import product

import numpy as np
import pytest
import tifffile

PLATES, WELLS, SITES, CHANNELS = ("P1", "P2"), ("A01", "A02", "B01"), (1, 2), ("dapi", "actin")
COMPOUNDS = {
    "A01": ("DMSO", "", ""),
    "A02": ("taxol", "0.3", "stabilizer"),
    "B01": ("nocodazole", "1", "destabilizer"),
}
FIELDS = list(product(PLATES, WELLS, SITES))


def value(plate, well, site, channel):
    return 1000 * PLATES.index(plate) + 100 * WELLS.index(well) + 10 * site + CHANNELS.index(channel) + 1


def plane(plate, well, site, channel, size=(16, 20)):
    return np.full(size, value(plate, well, site, channel), np.uint16)


def write_image(path, *where):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, plane(*where))


def write_rows(path, rows, separator=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def plate_map(path, plates=PLATES, well=str):
    """A plate map by plate and well; with one plate of None, by well alone."""
    rows = [
        {**({"Plate": p} if p else {}), "Well": well(w), "Compound": c, "Dose (µM)": d, "MOA": m}
        for p in plates
        for w, (c, d, m) in COMPOUNDS.items()
    ]
    write_rows(path, rows)


def load_data(
    raw, table="load_data.csv", folder=lambda p: f"/home/ubuntu/bucket/{p}", fields=FIELDS, extra=lambda w: {}
):
    """CellProfiler's table, which names illumination functions, too."""
    rows = []
    for p, w, s in fields:
        row = {"Metadata_Plate": p, "Metadata_Well": w, "Metadata_Site": s, **extra(w)}
        for c in CHANNELS:
            name = f"{w}_s{s}_{c}.tif"
            write_image(raw / p / name, p, w, s, c)
            row |= {f"FileName_Orig{c.upper()}": name, f"PathName_Orig{c.upper()}": folder(p)}
            row |= {f"FileName_Illum{c.upper()}": f"{p}_{c}.npy", f"PathName_Illum{c.upper()}": "/illum"}
        rows.append(row)
    write_rows(raw / table, rows)


def gallery(root):
    """`<project>/<source>/images` and `workspace` of the Cell Painting Gallery, one batch of two plates."""
    source = root / "cpg9999" / "source_1"
    for p in PLATES:
        rows = []
        for w, s in product(WELLS, SITES):
            row = {"Metadata_Plate": p, "Metadata_Well": w, "Metadata_Site": s}
            for number, c in enumerate(CHANNELS, start=1):
                name = f"r{'AB'.index(w[0]) + 1:02d}c{w[1:]}f{s:02d}p01-ch{number}sk1fk1fl1.tiff"
                inside = f"images/2024_Batch1/images/{p}__2024-01-01/Images/{name}"
                write_image(source / inside, p, w, s, c)
                row[f"URL_Orig{c.upper()}"] = f"s3://cellpainting-gallery/cpg9999/source_1/{inside}"
            rows.append(row)
        tables = source / "workspace/load_data_csv/2024_Batch1" / p
        write_rows(tables / "load_data.csv.gz", rows)
        write_rows(tables / "load_data_with_illum.csv", [row | {"URL_IllumDAPI": "s3://x/illum.npy"} for row in rows])
    maps = source / "workspace/metadata/platemaps/2024_Batch1"
    pairs = [{"Assay_Plate_Barcode": p, "Plate_Map_Name": "map_a"} for p in PLATES]
    write_rows(maps / "barcode_platemap.csv", pairs)
    rows = [
        {
            "well_position": w,
            "broad_sample": "" if c == "DMSO" else f"BRD-{c}",
            "mmoles_per_liter": d,
            "solvent": "DMSO",
        }
        for w, (c, d, _) in COMPOUNDS.items()
    ]
    write_rows(maps / "platemap" / "map_a.txt", rows, "\t")


def phenix(root, names_in_images=True, planes=1):
    """A measurement folder per plate, with the index of Harmony (version 5, or 6 with names in the channel map)."""
    for p in PLATES:
        folder = root / f"{p}__2024-01-01T10_00_00-Measurement 1" / "Images"
        entries, images = [], []
        for number, c in enumerate(CHANNELS, start=1):
            name = f"<ChannelName>{c.upper()}</ChannelName>"
            entries.append(f'<Entry ChannelID="{number}">{name if not names_in_images else ""}</Entry>')
            for w, s, z in product(WELLS, SITES, range(1, planes + 1)):
                row, column = "AB".index(w[0]) + 1, int(w[1:])
                file = f"r{row:02d}c{column:02d}f{s:02d}p{z:02d}-ch{number}sk1fk1fl1.tiff"
                write_image(folder / file, p, w, s, c)
                images.append(
                    f"<Image><id>x</id><State>Ok</State><URL>{file}</URL><Row>{row}</Row><Col>{column}</Col>"
                    f"<FieldID>{s}</FieldID><PlaneID>{z}</PlaneID><TimepointID>0</TimepointID><ChannelID>{number}"
                    f"</ChannelID>{name if names_in_images else ''}"
                    '<ImageResolutionX Unit="m">5.97e-07</ImageResolutionX></Image>'
                )
        (folder / "Index.idx.xml").write_text(
            '<?xml version="1.0" encoding="utf-8"?>\n<EvaluationInputData '
            'xmlns="http://www.perkinelmer.com/PEHH/HarmonyV5" Version="1"><InstrumentType>Phenix</InstrumentType>'
            f"<Plates><Plate><PlateID>{p}</PlateID><Name>{p}</Name></Plate></Plates>"
            f"<Maps><Map>{''.join(entries)}</Map></Maps><Images>{''.join(images)}</Images></EvaluationInputData>"
        )


def imagexpress(root, htd=True, prefix=lambda p: p):
    """`<plate>/2024-01-01/123/TimePoint_1/<plate>_A01_s1_w1<GUID>.tif`, thumbnails, and the .HTD file."""
    for p in PLATES:
        folder = root / p / "2024-01-01" / "123"
        for w, s, (number, c) in product(WELLS, SITES, enumerate(CHANNELS, start=1)):
            stem = folder / "TimePoint_1" / f"{prefix(p)}_{w}_s{s}_w{number}"
            write_image(stem.with_name(stem.name + "8F2A11C0-1234.tif"), p, w, s, c)
            write_image(stem.with_name(stem.name + "_thumb00FF.tif"), p, w, s, c)
        if htd:
            waves = "".join(f'"WaveName{i}", "{c.upper()}"\r\n' for i, c in enumerate(CHANNELS, start=1))
            start = '"HTSInfoFile", Version 1.0\r\n"TimePoints", 1\r\n"Sites", TRUE\r\n"NWavelengths", 2\r\n'
            (folder / f"{p}.HTD").write_text(f'{start}{waves}"EndFile"\r\n')


def incell(root):
    for p, w, s in FIELDS:
        for c, wave in zip(CHANNELS, ("UV - DAPI", "Red - Actin"), strict=True):
            write_image(root / p / f"{w[0]} - {w[1:]}(fld {s} wv {wave}).tif", p, w, s, c)
        (root / p / "run.xdce").write_text(
            '<Plate><ObjectiveCalibration pixel_width="0.65" pixel_height="0.65"/></Plate>'
        )


def named(root):
    """A naming of a lab's own."""
    for (p, w, s), c in product(FIELDS, CHANNELS):
        write_image(root / "day 1" / f"{p}-{c}" / f"{w[0]}{int(w[1:])}_{s:03d}.png.tif", p, w, s, c)


def ome_tiff(root):
    """A file per plate and well that holds two sites of two channels as pages; each describes its whole plate."""
    root.mkdir(parents=True, exist_ok=True)
    for p in PLATES:
        wells, images = "", ""
        for number, w in enumerate(WELLS):
            samples = ""
            for s in SITES:
                name = f"Image:{number}{s}"
                samples += f'<WellSample ID="S:{number}{s}" Index="{s}"><ImageRef ID="{name}"/></WellSample>'
                data = "".join(
                    f'<TiffData FirstC="{c}" FirstZ="0" FirstT="0" IFD="{2 * (s - 1) + c}" PlaneCount="1">'
                    f'<UUID FileName="{p}_{number}.ome.tif">urn:uuid:1</UUID></TiffData>'
                    for c in range(2)
                )
                channels = "".join(f'<Channel ID="Channel:{i}" Name="{c}"/>' for i, c in enumerate(CHANNELS))
                images += (
                    f'<Image ID="{name}"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="20" '
                    f'SizeY="16" SizeC="2" SizeZ="1" SizeT="1" PhysicalSizeX="0.5">{channels}{data}</Pixels></Image>'
                )
            wells += f'<Well ID="W:{number}" Row="{"AB".index(w[0])}" Column="{int(w[1:]) - 1}">{samples}</Well>'
        xml = (
            '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
            f'<Plate ID="Plate:0" Name="{p}">{wells}</Plate>{images}</OME>'
        )
        for number, w in enumerate(WELLS):
            pages = np.stack([plane(p, w, s, c) for s, c in product(SITES, CHANNELS)])
            tifffile.imwrite(
                root / f"{p}_{number}.ome.tif", pages, photometric="minisblack", metadata=None, description=xml
            )


def ome_zarr(root, version=2):
    """An OME-Zarr plate per plate: 0.4 on Zarr 2, or 0.5 on Zarr 3."""
    zarr = pytest.importorskip("zarr")

    def attributes(folder, content):
        folder.mkdir(parents=True, exist_ok=True)
        if version == 2:
            (folder / ".zgroup").write_text('{"zarr_format": 2}')
            (folder / ".zattrs").write_text(json.dumps(content))
        else:
            about = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"version": "0.5", **content}}}
            (folder / "zarr.json").write_text(json.dumps(about))

    for p in PLATES:
        plate = root / f"{p}.zarr"
        wells = [{"path": f"{w[0]}/{int(w[1:])}", "rowIndex": 0, "columnIndex": 0} for w in WELLS]
        attributes(plate, {"plate": {"name": p, "rows": [], "columns": [], "wells": wells}})
        for w, well in zip(WELLS, wells, strict=True):
            images = [{"path": str(s - 1), "acquisition": 0} for s in SITES]
            attributes(plate / well["path"], {"well": {"images": images}})
            for s in SITES:
                image = plate / well["path"] / str(s - 1)
                axes = [{"name": name} for name in "tczyx"]
                level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 1, 0.5, 0.5]}]}
                scales = [{"axes": axes, "datasets": [level]}]
                labels = [{"label": c} for c in CHANNELS]
                attributes(image, {"multiscales": scales, "omero": {"channels": labels}})
                data = np.stack([plane(p, w, s, c) for c in CHANNELS])[None, :, None]
                zarr.create_array(str(image / "0"), data=data, zarr_format=version)
