"""Mutated tables and images, and random labels and vectors: a valid result or the room's own error, never another one.

The draws are the same in every run; more of them: `WSDINO_EXAMPLES=5000 pytest tests/test_fuzz.py`.
"""

import gzip
import io
import os
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset_scripts.images import read_plane
from dataset_scripts.screen import ScreenColumns, read_mechanisms, read_screen
from evaluation_wsdino.not_same_compound.not_same_compound import not_same_compound
from modeling_wsdino import WSDinoImageProcessor
from wsdino.errors import UserError


def drawn(examples):
    return settings(
        max_examples=int(os.environ.get("WSDINO_EXAMPLES", examples)),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@st.composite
def mutated(draw, whole, snippets=()):
    """`whole` with some of its bytes replaced, removed, repeated or put in."""
    content = whole
    for _ in range(draw(st.integers(1, 4))):
        # Half of the edits at the start, where headers are.
        reach = draw(st.sampled_from([min(300, len(content)), len(content)]))
        first = draw(st.integers(0, reach))
        last = draw(st.integers(first, min(first + 40, len(content))))
        kind = draw(st.sampled_from(["replace", "remove", "repeat", "cut", "snippet"]))
        if kind == "replace":
            content = content[:first] + draw(st.binary(min_size=1, max_size=8)) + content[last:]
        elif kind == "remove":
            content = content[:first] + content[last:]
        elif kind == "repeat":
            content = content[:last] + content[first:last] * draw(st.integers(1, 5)) + content[last:]
        elif kind == "cut":
            content = content[:first]
        elif snippets:
            content = content[:first] + draw(st.sampled_from(snippets)) + content[last:]
    return content


# ---------------------------------------------------------------------------------------------- tables

HEADER = (
    "TableNumber,ImageNumber,Image_FileName_DAPI,Image_PathName_DAPI,Image_FileName_Tubulin,Image_PathName_Tubulin,"
    "Image_FileName_Actin,Image_PathName_Actin,Image_Metadata_Plate_DAPI,Image_Metadata_Well_DAPI,Replicate,"
    "Image_Metadata_Compound,Image_Metadata_Concentration"
)
ROWS = [
    f"1,{site},a_{well}_s{site}_w1.tif,Week1/Week1_1,a_{well}_s{site}_w2.tif,Week1/Week1_1,a_{well}_s{site}_w4.tif,"
    f"Week1/Week1_1,Week1_1,{well},1,{compound},{dose}"
    for well, compound, dose in (("B02", "DMSO", "0"), ("B03", "taxol", "0.3"), ("B04", "AZ-J", "1e-2"))
    for site in (1, 2)
]
TABLE = "\r\n".join([HEADER, *ROWS, ""]).encode()
MOA = b"compound,concentration,moa\ntaxol,0.3,Microtubule stabilizers\nAZ-J,0.01,Epithelial\nDMSO,0,DMSO\n"
SNIPPETS = [
    *(b",", b'"', b"\n", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf", b"nan", b"-1", b"1e999", b"inf", b"../", b"/", b"\\"),
    *("ä".encode(), "\u202e".encode(), b" " * 50, b"x" * 300, b"=1+1", b"'", b"9" * 400, b"1.5", b"0x10", b"True"),
]


def test_the_tables_themselves_are_read(tmp_path):
    """Without this the fuzzing would prove nothing."""
    (tmp_path / "image.csv").write_bytes(TABLE)
    (tmp_path / "moa.csv").write_bytes(MOA)
    fields = read_screen(tmp_path / "image.csv", tmp_path / "moa.csv")
    assert len(fields) == 6 and sorted(set(fields["part"])) == ["annotated", "dmso"]


def check_fields(fields):
    assert len(fields) and np.isfinite(fields["concentration"]).all() and (fields["concentration"] >= 0).all()
    for channel in ScreenColumns().channels:
        for file in fields[f"{channel}_file"]:
            assert isinstance(file, str) and ".." not in file.split("/") and not file.startswith("/")
    for name in ("plate", "well", "compound", "treatment", "batch"):
        assert all(isinstance(value, str) and value for value in fields[name]), name
    assert not any("/" in value or value in (".", "..") for name in ("plate", "well") for value in fields[name])
    assert set(fields["part"]) <= {"dmso", "annotated", "unannotated"}


@drawn(150)
@given(content=mutated(TABLE, SNIPPETS))
def test_image_tables(tmp_path, content):
    path = tmp_path / "image.csv"
    path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fields = read_screen(path)
    except UserError as error:
        assert "image.csv" in str(error)
    else:
        check_fields(fields)


@drawn(100)
@given(content=mutated(MOA, SNIPPETS))
def test_moa_tables(tmp_path, content):
    path = tmp_path / "moa.csv"
    path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known = read_mechanisms(path)
    except UserError as error:
        assert "moa.csv" in str(error)
    else:
        assert all(isinstance(name, str) and name and isinstance(moa, str) and moa for name, moa in known.items())


@drawn(80)
@given(content=mutated(gzip.compress(TABLE, mtime=0)))
def test_compressed_tables(tmp_path, content):
    path = tmp_path / "image.csv.gz"
    path.write_bytes(content)
    try:
        fields = read_screen(path)
    except UserError as error:
        assert "image.csv.gz" in str(error)
    else:
        check_fields(fields)


@drawn(100)
@given(
    values=st.lists(
        st.one_of(st.text(max_size=20), st.floats().map(str), st.integers().map(str)), min_size=13, max_size=13
    )
)
def test_rows_of_anything(tmp_path, values):
    import csv

    path = tmp_path / "image.csv"
    with open(path, "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        csv.writer(file).writerows([HEADER.split(","), ROWS[2].split(","), values])
    try:
        fields = read_screen(path)
    except UserError as error:
        assert "image.csv" in str(error)
    else:
        check_fields(fields)


# ---------------------------------------------------------------------------------------------- images


def encoded(kind, **options):
    pixels = np.random.default_rng(0).integers(0, 4096, (64, 80)).astype(np.uint16) * 16
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


IMAGES = {
    "tiff": encoded("tiff"),
    "lzw": encoded("tiff", compression="tiff_lzw"),
    "png": encoded("png"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_the_images_themselves_are_read(tmp_path, kind):
    (tmp_path / "field.tif").write_bytes(IMAGES[kind])
    assert read_plane(tmp_path / "field.tif").shape == (64, 80)


@drawn(150)
@given(content=st.sampled_from(sorted(IMAGES)).flatmap(lambda kind: mutated(IMAGES[kind])))
def test_images(tmp_path, content):
    path = tmp_path / "field.tif"
    path.write_bytes(content)
    processor = WSDinoImageProcessor(tile_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plane = read_plane(path)
        except UserError as error:
            assert "field.tif" in str(error)
        else:
            assert plane.ndim == 2 and plane.dtype == np.uint16
        try:
            tiles = processor.field_tiles(path)
        except ValueError as error:
            assert type(error) is ValueError and "field.tif" in str(error)
        else:
            assert all(tile.dtype == np.float32 and 0 <= tile.min() <= tile.max() <= 1 for tile in tiles)


# ---------------------------------------------------------------------------------------------- the metric


@st.composite
def screens(draw):
    """Vectors of few distinct values, so that ties are frequent; few labels, so that every rule is at work."""
    count, width = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    vectors = draw(
        st.lists(st.lists(st.integers(-2, 2), min_size=width, max_size=width), min_size=count, max_size=count)
    )
    labels = [draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count)) for _ in range(3)]
    options = {
        "metric": draw(st.sampled_from(["cosine", "correlation", "euclidean"])),
        "k": draw(st.integers(1, 3)),
        "batch_rule": draw(st.sampled_from(["median", "joined", "disjoint"])),
        "invalid": draw(st.sampled_from(["error", "wrong"])),
    }
    return np.array(vectors, dtype=float), *labels, options


def scores(*arguments, **options):
    result = not_same_compound(*arguments, **options)
    return {name: value for name, value in result.items() if name.endswith(("_correct", "_total", "_excluded"))}


@drawn(200)
@given(screen=screens(), data=st.data())
def test_the_metric_does_not_depend_on_order_scale_or_names(screen, data):
    vectors, moas, compounds, batches, options = screen
    try:
        before = scores(vectors, moas, compounds, batches, **options)
    except ValueError as error:
        assert options["invalid"] == "error" and "has no direction" in str(error)
        return
    for prefix in ("nsc", "nscb"):
        assert 0 <= before[f"{prefix}_correct"] <= before[f"{prefix}_total"]
        assert before[f"{prefix}_total"] + before[f"{prefix}_excluded"] == len(moas)
    assert before["nscb_total"] <= before["nsc_total"]

    order = data.draw(st.permutations(range(len(moas))))
    shuffled = [[labels[row] for row in order] for labels in (moas, compounds, batches)]
    if options["k"] == 1:  # among several neighbours at one distance the last that votes is the order's
        assert scores(vectors[list(order)], *shuffled, **options) == before
    # A power of two is exact, so that no tie is made or broken.
    assert scores(vectors * 4.0, moas, compounds, batches, **options) == before
    renamed = [[f"{names}_{label}" for label in labels] for names, labels in zip("xyz", screen[1:4], strict=True)]
    assert scores(vectors, *renamed, **options) == before


@drawn(150)
@given(
    profiles=st.one_of(
        st.lists(st.lists(st.floats(), max_size=4), max_size=6),
        st.lists(st.one_of(st.none(), st.text(max_size=3), st.floats()), max_size=6),
        st.none(),
        st.floats(),
    ),
    labels=st.tuples(*[st.lists(st.one_of(st.text(max_size=2), st.none(), st.floats()), max_size=6)] * 3),
    k=st.one_of(st.integers(), st.floats(), st.text(max_size=2), st.none()),
)
def test_the_metric_of_anything(profiles, labels, k):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = not_same_compound(profiles, *labels, k=k, invalid="wrong")
        except ValueError as error:
            assert type(error) is ValueError and len(str(error)) > 15 and "\n" not in str(error)
        else:
            assert 0 <= result["nsc_correct"] <= result["nsc_total"] <= len(profiles)
