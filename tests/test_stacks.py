"""Files as microscopes write them: exact pixels, a chosen plane of a stack, or one sentence that says why not."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from dataset_scripts.images import read_plane
from wsdino.errors import UserError

PLANE = np.random.default_rng(0).integers(300, 4000, (40, 48)).astype(np.uint16)
STACK = np.stack([PLANE + k for k in range(3)])


def write(path, pixels, **options):
    tifffile.imwrite(path, pixels, **options)
    return path


SINGLE = {
    "plain": (PLANE, {}),
    "big-endian": (PLANE, {"byteorder": ">"}),
    "BigTIFF": (PLANE, {"bigtiff": True}),
    "tiled": (PLANE, {"tile": (16, 16)}),
    "deflate": (PLANE, {"compression": "zlib", "predictor": True}),
    "int16": (PLANE.astype(np.int16), {}),
    "int32": (PLANE.astype(np.int32), {}),
    "uint32": (PLANE.astype(np.uint32), {}),
    "float32": (PLANE.astype(np.float32), {}),
    "float64": (PLANE.astype(np.float64), {}),
    "white is zero": (PLANE, {"photometric": "miniswhite"}),
    "OME": (PLANE[None, None, None], {"ome": True, "metadata": {"axes": "TZCYX"}}),
    "ImageJ": (PLANE, {"imagej": True}),
    "alpha": (
        np.dstack([PLANE, np.full_like(PLANE, 65535)]),
        {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]},
    ),
}


@pytest.mark.parametrize("kind", SINGLE)
def test_one_plane_is_read_exactly(tmp_path, kind):
    pixels, options = SINGLE[kind]
    found = read_plane(write(tmp_path / "a.tif", pixels, **options))
    assert found.dtype == np.uint16 and found.dtype.isnative and (found == PLANE).all()


@pytest.mark.parametrize("pyramid", ["thumbnail page", "levels below"])
def test_reduced_copies_are_passed_over(tmp_path, pyramid):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(PLANE, metadata=None, subifds=1 if pyramid == "levels below" else 0)
        file.write(PLANE[::2, ::2].copy(), subfiletype=1, metadata=None)
    assert (read_plane(tmp_path / "a.tif") == PLANE).all()


def test_floats_are_scaled_only_as_asked(tmp_path):
    path = write(tmp_path / "a.tif", (PLANE / 65535).astype(np.float32))
    assert (read_plane(path, scale=65535) == PLANE).all()
    with pytest.raises(UserError, match="a.tif .*--scale"):
        read_plane(path)


@pytest.mark.parametrize("value", [-1, 65536, 0.5, np.nan, np.inf])
def test_values_that_do_not_fit_are_refused(tmp_path, value):
    pixels = PLANE.astype(np.float32)
    pixels[3, 4] = value
    with pytest.raises(UserError, match="a.tif .*--scale"):
        read_plane(write(tmp_path / "a.tif", pixels))


CHANNELS = {
    "OME": (STACK, {"ome": True, "metadata": {"axes": "CYX"}}),
    "ImageJ": (STACK, {"imagej": True, "metadata": {"axes": "CYX"}}),
    "ImageJ in one directory": (STACK, {"imagej": True, "metadata": {"axes": "CYX"}, "truncate": True}),
    "pages": (STACK, {"photometric": "minisblack"}),
    "planar samples": (STACK, {"photometric": "rgb", "planarconfig": "separate"}),
    "interleaved samples": (np.moveaxis(STACK, 0, -1), {"photometric": "rgb"}),
    "samples without a meaning": (np.moveaxis(STACK, 0, -1), {"photometric": "minisblack", "planarconfig": "contig"}),
}


@pytest.mark.parametrize("kind", CHANNELS)
def test_a_file_of_all_channels(tmp_path, kind):
    pixels, options = CHANNELS[kind]
    path = write(tmp_path / "a.tif", np.ascontiguousarray(pixels), **options)
    for page in range(3):
        assert (read_plane(path, page=page, pages=3) == STACK[page]).all()
    for wrong in ({}, {"page": 3}, {"page": 0, "pages": 2}):
        with pytest.raises(UserError, match="a.tif holds 3 planes"):
            read_plane(path, **wrong)


@pytest.mark.parametrize(
    "options", [{"ome": True, "metadata": {"axes": "CZYX"}}, {"imagej": True, "metadata": {"axes": "ZCYX"}}], ids=str
)
def test_planes_of_different_focus(tmp_path, options):
    volume = np.random.default_rng(1).integers(0, 9000, (2, 5, 40, 48)).astype(np.uint16)  # channels, focus
    pixels = volume if "ome" in options else volume.transpose(1, 0, 2, 3)
    path = write(tmp_path / "a.tif", np.ascontiguousarray(pixels), **options)
    assert (read_plane(path, page=1, z="max") == volume[1].max(axis=0)).all()
    assert (read_plane(path, page=1, z="3") == volume[1, 3]).all()
    assert (read_plane(path, page=0, z="mean") == np.rint(volume[0].mean(axis=0))).all()
    for z in (None, "5"):
        with pytest.raises(UserError, match="a.tif holds 5 planes of different focus"):
            read_plane(path, page=0, z=z)


def test_pages_without_a_meaning_are_focus_where_the_user_says_so(tmp_path):
    path = write(tmp_path / "a.tif", STACK, photometric="minisblack")
    assert (read_plane(path, z="max") == STACK.max(axis=0)).all()


def test_a_compression_that_cannot_be_read_is_named(tmp_path):
    path = write(tmp_path / "a.tif", PLANE, compression="zlib")
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        tag = file.pages[0].tags["Compression"]
        content[tag.valueoffset : tag.valueoffset + 2] = (34887).to_bytes(2, "little")  # LERC
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.tif .*LERC|a.tif is truncated"):
        read_plane(path)


@pytest.mark.parametrize("page", [1, 2])
def test_a_plane_that_a_file_lacks(tmp_path, page):
    Image.fromarray(PLANE).save(tmp_path / "a.png")
    for path in (write(tmp_path / "a.tif", PLANE), tmp_path / "a.png"):
        with pytest.raises(UserError, match=f"{path.name} holds one plane, and page {page}"):
            read_plane(path, page=page)


def test_missing_pixels_are_not_taken_for_zeros(tmp_path):
    """tifffile alone would."""
    path = write(tmp_path / "a.tif", STACK, photometric="minisblack", compression="zlib")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="a.tif is truncated"):
        read_plane(path, page=2)
