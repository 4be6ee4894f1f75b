"""Reading one image: whatever is wrong with a file ends as one sentence, and a bomb is never decoded."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from dataset_scripts.images import MAX_PIXELS, read_image
from wsdino.errors import UserError

PLANE = np.random.default_rng(0).integers(0, 65535, (20, 24)).astype(np.uint16)


def encoded(kind, plane=PLANE, **options):
    buffer = io.BytesIO()
    Image.fromarray(plane).save(buffer, kind, **options)
    return buffer.getvalue()


def png_that_says(width, height, content=b""):
    """A 16-bit PNG whose header claims a size."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(content, 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pixels_and_depth_are_kept(tmp_path, kind, dtype):
    plane = PLANE.astype(dtype)
    (tmp_path / "a").write_bytes(encoded(kind, plane))
    for source in (tmp_path / "a", io.BytesIO(encoded(kind, plane))):
        found, _ = read_image(source, "a")
        assert found.dtype == dtype and (found == plane).all()


def tiff(plane, pages=1):
    """An uncompressed TIFF in big-endian order, as ImageJ writes it: each page's directory, then its pixels."""
    rows, columns = plane.shape
    data, content = plane.astype(">u2").tobytes(), b"MM\0*" + struct.pack(">I", 8)
    for page in range(pages):
        start = len(content) + 2 + 8 * 12 + 4
        entries = [(256, 4, columns), (257, 4, rows), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, start)]
        entries += [(278, 4, rows), (279, 4, len(data))]
        content += struct.pack(">H", len(entries))
        for tag, kind, value in entries:
            content += struct.pack(">HHII", tag, kind, 1, value << 16 if kind == 3 else value)
        content += struct.pack(">I", start + len(data) if page + 1 < pages else 0) + data
    return content


def test_big_endian_tiffs_are_read_in_the_machine_s_order():
    plane, mode = read_image(io.BytesIO(tiff(PLANE)), "a")
    assert plane.dtype == np.uint16 and plane.dtype.isnative and (plane == PLANE).all()
    assert mode == "I;16B"


def test_a_stack_is_refused():
    """Its first page alone would be read, silently."""
    with pytest.raises(UserError, match="field 7 holds 3 planes"):
        read_image(io.BytesIO(tiff(PLANE, pages=3)), "field 7")


@pytest.mark.parametrize("description", ["images=3\nslices=3", "slices=3\nimages=12\n"])
def test_a_stack_of_one_directory_that_lacks_its_planes_is_refused(description):
    """As ImageJ writes large ones: one directory, whose description tells of the planes that follow."""
    stack = encoded("TIFF", description=f"ImageJ=1.54f\n{description}\n")
    with pytest.raises(UserError, match="field 7 "):
        read_image(io.BytesIO(stack), "field 7")


@pytest.mark.parametrize("description", ["ImageJ=1.54f\nunit=micron\n", "ImageJ=1.54f\nimages=1\n", "images=3"])
def test_other_descriptions_are_read_over(description):
    plane, _ = read_image(io.BytesIO(encoded("TIFF", description=description)), "field 7")
    assert (plane == PLANE).all()


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (1, 100_000_001), (12_000, 12_000), (2**31 - 1,) * 2])
def test_bombs_are_refused_by_their_header(monkeypatch, width, height):
    """Pillow warns from 89 and refuses from 179 million pixels; here all above 100 million are refused, silently."""
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    bomb = png_that_says(width, height)
    assert width * height > MAX_PIXELS == 100_000_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="row 3 has more than 100,000,000 pixels, the most that are read: cut"):
            read_image(io.BytesIO(bomb), "row 3")


def test_a_large_image_below_the_limit_is_read_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plane, _ = read_image(
            io.BytesIO(encoded("PNG", np.zeros((9_200, 9_800), np.uint8), compress_level=1)), "large"
        )
    assert plane.shape == (9_200, 9_800)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about the tags
@pytest.mark.parametrize(
    ("kind", "options"), [("TIFF", {}), ("TIFF", {"compression": "tiff_deflate"}), ("PNG", {})], ids=str
)
def test_any_damage_is_one_sentence_or_an_image(kind, options, capfd):
    """Bytes changed and cut at random: nothing but a UserError comes out."""
    random, whole, refused = np.random.default_rng(1), encoded(kind, **options), 0
    for trial in range(600):
        content = bytearray(whole)
        for place in random.integers(0, len(content), 3) if trial % 2 else random.integers(-250, 60, 3):
            content[place] = random.integers(256)
        if trial % 3 == 0:
            content = content[: random.integers(0, len(content))]
        try:
            plane, _ = read_image(io.BytesIO(bytes(content)), "field 7")
            assert plane.ndim == 2
        except UserError as error:
            refused += 1
            assert str(error).startswith("field 7 ") and ": " in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated or not an image"),
        (b"P5 1", "is truncated or not an image"),
        (encoded("PNG")[:-100], "is truncated or not an image"),
        (encoded("TIFF")[:-500], "is truncated or not an image"),
        (encoded("PNG", np.zeros((4, 4, 3), np.uint8)), "is not one grey channel .mode RGB."),
    ],
)
def test_faults_are_named(content, message):
    with pytest.raises(UserError, match=f"well B02 {message}"):
        read_image(io.BytesIO(content), "well B02")


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="b.tif is missing: fetch it again"):
        read_image(tmp_path / "b.tif", f"{tmp_path / 'b.tif'}")
