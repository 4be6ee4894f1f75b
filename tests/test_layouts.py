"""Layouts: each system's own files give the same table, and every path of it leads to the pixels of its row."""

import layout_files
import numpy as np
import pytest
import tifffile
from layout_files import CHANNELS, FIELDS, value

from dataset_scripts.layouts.plan import LayoutSettings, understand
from wsdino.errors import UserError

NAMED = r"(?P<plate>P\d)-(?P<channel>\w+)/(?P<well>[A-Z]\d+)_(?P<site>\d+)"


def pixels(path):
    """The value of an image that a path of the table names, read by tifffile or zarr."""
    path, _, number = str(path).partition("#")
    if ".zarr" in path:
        import zarr

        array = np.asarray(zarr.open_array(path, mode="r"))
        return array.reshape(-1, *array.shape[-2:])[int(number)].max()
    return tifffile.imread(path, key=int(number or 0)).max()


@pytest.mark.parametrize(
    ("write", "layout", "settings", "pixel_size"),
    [
        (layout_files.gallery, "gallery", {}, None),
        (layout_files.phenix, "phenix", {}, 0.597),
        (lambda raw: layout_files.phenix(raw, names_in_images=False), "phenix", {}, 0.597),
        (lambda raw: layout_files.phenix(raw, planes=3), "phenix", {"z": "2"}, 0.597),
        (layout_files.imagexpress, "imagexpress", {}, None),
        (lambda raw: layout_files.imagexpress(raw, prefix=lambda p: "IXMtest"), "imagexpress", {}, None),
        (layout_files.incell, "incell", {}, 0.65),
        (layout_files.ome_tiff, "ome", {}, 0.5),
        (layout_files.ome_zarr, "ome", {}, 0.5),
        (lambda raw: layout_files.ome_zarr(raw, version=3), "ome", {}, 0.5),
        (layout_files.named, "folder", {"pattern": NAMED}, None),
    ],
)
def test_every_layout_is_found_and_leads_to_its_own_pixels(write, layout, settings, pixel_size, tmp_path):
    raw = tmp_path / "raw"
    write(raw)
    screen = understand(LayoutSettings(str(raw), **settings))
    assert (screen.layout, screen.pixel_size) == (layout, pixel_size)
    columns, table = screen.columns, screen.table
    assert set(columns.channels) == set(CHANNELS)
    rows = table[[columns.plate, columns.well, columns.site]].itertuples(index=False)
    assert sorted((plate, well, int(site)) for plate, well, site in rows) == FIELDS
    for _, row in table.iterrows():
        for channel, (file, folder) in columns.channels.items():
            assert folder is None
            path = row[file].replace("s3://cellpainting-gallery/", "")
            wanted = value(row[columns.plate], row[columns.well], int(row[columns.site]), channel)
            assert pixels(raw / path) == wanted


def test_load_data_tells_images_from_illumination_functions(tmp_path):
    layout_files.load_data(tmp_path)
    screen = understand(LayoutSettings(str(tmp_path)))
    assert screen.layout == "load_data"
    assert screen.columns.channels == {c: (f"FileName_Orig{c.upper()}", f"PathName_Orig{c.upper()}") for c in CHANNELS}
    assert any("FileName_IllumDAPI" in note for note in screen.notes)
    chosen = understand(LayoutSettings(str(tmp_path), channels=["dna=dapi"])).columns.channels
    assert list(chosen) == ["dna"]


def test_the_gallery_joins_its_own_plate_maps(tmp_path):
    layout_files.gallery(tmp_path)
    screen = understand(LayoutSettings(str(tmp_path)))
    assert screen.columns.batch == "Metadata_Batch" and set(screen.table["Metadata_Batch"]) == {"2024_Batch1"}
    assert screen.columns.control == "" and screen.columns.compound == "broad_sample"
    found = screen.table.groupby("Metadata_Well")["broad_sample"].first().to_dict()
    assert found == {"A01": "", "A02": "BRD-taxol", "B01": "BRD-nocodazole"}


@pytest.mark.parametrize(
    ("write", "settings", "named"),
    [
        (lambda raw: layout_files.phenix(raw, planes=2), {}, "--z"),
        (lambda raw: layout_files.phenix(raw, planes=2), {"z": "5"}, "--z"),
        (layout_files.named, {}, "--pattern"),
        (layout_files.named, {"layout": "folder"}, "--pattern"),
        (layout_files.named, {"pattern": "("}, "--pattern"),
        (layout_files.named, {"pattern": "(?P<wel>.)"}, "wel"),
        (layout_files.named, {"pattern": "(?P<well>Q9)"}, "none of the 24 images"),
        (layout_files.named, {"pattern": r"(?P<well>[A-Z]\d+)_(?P<site>\d+)"}, "one channel of one field"),
        (layout_files.incell, {"channels": ["gfp"]}, "'gfp'"),
        (layout_files.incell, {"compound_column": "Drug"}, "--compound_column"),
        (lambda raw: None, {}, "does not exist"),
        (lambda raw: raw.mkdir(), {"layout": "phenix"}, "images of"),
        (lambda raw: raw.mkdir(), {"layout": "ome"}, "no OME file"),
    ],
)
def test_what_is_not_understood_is_refused(write, settings, named, tmp_path):
    write(tmp_path / "raw")
    with pytest.raises(UserError) as error:
        understand(LayoutSettings(str(tmp_path / "raw"), **settings))
    assert named in str(error.value)


@pytest.mark.parametrize("damage", ["<a>", "", "<a><Image><URL>x</URL><Row>one</Row><Col>1</Col></Image></a>"])
def test_a_damaged_index_is_named(damage, tmp_path):
    (tmp_path / "Index.idx.xml").write_text(damage)
    with pytest.raises(UserError, match="Index.idx.xml is not a whole index"):
        understand(LayoutSettings(str(tmp_path)))


def test_plates_of_one_prefix_and_one_folder_name_stay_apart(tmp_path):
    """Two plates whose files have the same names, in folders that end alike: the whole folder is the plate."""
    layout_files.imagexpress(tmp_path, htd=False, prefix=lambda p: "scan")
    screen = understand(LayoutSettings(str(tmp_path)))
    assert set(screen.table["plate"]) == {"P1_2024-01-01_123", "P2_2024-01-01_123"}
    assert set(screen.columns.channels) == {"w1", "w2"}


def test_files_that_do_not_fit_are_counted(tmp_path):
    layout_files.named(tmp_path)
    layout_files.write_image(tmp_path / "overview.tif", "P1", "A01", 1, "dapi")
    notes = understand(LayoutSettings(str(tmp_path), pattern=NAMED)).notes
    assert any("1 of 25" in note and "overview.tif" in note for note in notes)
