"""Flaws of images: found on drawn fields with faults, and never on the same fields without."""

import json

import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy import ndimage
from small_screens import load, plain_screen

from dataset_scripts.prepare import build_dataset
from dataset_scripts.quality import flaws, measure_plane
from dataset_scripts.simulator import Optics, Phenotype, draw_field, mechanism_phenotypes

PHENOTYPES = [Phenotype(), *mechanism_phenotypes().values()]


@pytest.fixture(scope="module")
def fields():
    """Drawn fields of every phenotype, three planes each."""
    return [draw_field(np.random.default_rng(i), (256, 320), one, Optics()) for i, one in enumerate(PHENOTYPES)]


def judged(planes):
    named = dict(zip("abc", planes, strict=False))
    return flaws({name: measure_plane(plane) for name, plane in named.items()}, named)


def test_good_fields_have_no_flaws(fields):
    for planes in fields:
        assert judged(planes)[0] == ""
        assert judged([(plane >> 8).astype(np.uint8) for plane in planes])[0] == ""


def noise(plane, rng):
    return rng.integers(0, 4096, plane.shape).astype(np.uint16) << 4


def striped_noise(plane, rng):
    """Alike along rows alone, as files of a shifted width are."""
    return (noise(plane, rng) // 8 + rng.integers(0, 30_000, (len(plane), 1))).astype(np.uint16)


def stripe(level):
    def saturate(plane, rng):
        plane = plane.copy()
        plane[40 : 40 + len(plane) // 10] = level
        return plane

    return saturate


FAULTS = {
    "noise": (noise, "noise"),
    "striped noise": (striped_noise, "noise"),
    "black": (lambda plane, rng: np.zeros_like(plane), "one value"),
    "white": (lambda plane, rng: np.full_like(plane, 65535), "one value"),
    "a fibre at full scale": (stripe(65535), "saturated"),
    "a fibre at the full scale of 12 bits, shifted": (stripe(65520), "saturated"),
    "a fibre at the full scale of 14 bits": (lambda plane, rng: stripe(16383)(plane // 16, rng), "saturated"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fields, fault):
    spoil, name = FAULTS[fault]
    for number, planes in enumerate(fields):
        spoilt = [planes[0], spoil(planes[1], np.random.default_rng(number)), planes[2]]
        assert judged(spoilt)[0] == f"b: {name}"


def test_a_channel_that_is_there_twice(fields):
    assert judged([fields[0][0], fields[0][1], fields[0][0]]) == ("a and c: alike", pytest.approx(1))
    assert np.isnan(judged(fields[0][:1])[1])


def test_focus_falls_with_every_blur(fields):
    for plane in fields[0]:
        blurred = [ndimage.gaussian_filter(plane.astype(float), sigma).astype(np.uint16) for sigma in (0, 1, 2)]
        slopes = [measure_plane(each)["focus"] for each in blurred]
        assert slopes[0] > slopes[1] > slopes[2]


def test_measures_against_plain_loops():
    plane = np.random.default_rng(3).integers(0, 50, (32, 40)).astype(np.uint16)
    plane[:, 1:] += plane[:, :-1] // 2
    found = measure_plane(plane)

    def neighbours(lines):
        pairs = [(line[1:] - line.mean(), line[:-1] - line.mean()) for line in lines.astype(float)]
        one, two = (np.concatenate(side) for side in zip(*pairs, strict=True))
        return (one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum())

    assert found["correlation"] == pytest.approx(min(neighbours(plane[::4]), neighbours(plane[:, ::4].T)), rel=1e-4)
    assert found["one_value"] == max(np.unique(plane[::4], return_counts=True)[1]) / plane[::4].size
    assert found["saturated"] == 0


@pytest.mark.parametrize("drop_bad", [False, True])
def test_flaws_are_in_the_dataset_and_bad_fields_may_be_dropped(fields, tmp_path, drop_bad, capsys):
    planes = [planes[0] for planes in fields[:4]]
    planes[2] = noise(planes[2], np.random.default_rng(0))
    screen = plain_screen(tmp_path, planes) | {"progress": True}
    build_dataset(tmp_path, tmp_path / "out", drop_bad=drop_bad, **screen)
    said, data = capsys.readouterr().out, load(tmp_path / "out", "all", tmp_path)
    expected = ["", "", "er: noise", ""]
    wells = ["A00", "A01", "A02", "A03"]
    if drop_bad:
        del expected[2], wells[2]
    assert data["quality"] == expected and data["well"] == wells
    focus = measure_plane(planes[3])["focus"]
    assert data["quality_er_focus"][-1] == pytest.approx(focus, rel=1e-6)
    assert "er: noise (1)" in said and ("1 were dropped" in said) == drop_bad
    build = json.loads((tmp_path / "out" / "build.json").read_text())
    dropped = [{"well": "A02", "site": 1, "quality": "er: noise"}] if drop_bad else []
    assert build["plates"][0]["dropped"] == dropped
    assert build["counts"]["flaws"] == {"er: noise": 1} and build["counts"]["fields_absent"] == 0
    assert "er: noise (1)" in (tmp_path / "out" / "README.md").read_text()


def test_a_screen_of_nothing_but_bad_fields(tmp_path):
    planes = [np.zeros((32, 40), np.uint16)] * 2
    with pytest.raises(Exception, match="drop_bad"):
        build_dataset(tmp_path, tmp_path / "out", drop_bad=True, **plain_screen(tmp_path, planes))


@pytest.mark.parametrize("channels", [["dna", "er"], ["dna"]])
def test_channels_of_one_file(tmp_path, channels):
    """Channels that name one file are its planes, in their order; a single one must say which."""
    from dataset_scripts import ScreenColumns
    from wsdino.errors import UserError

    stack = np.random.default_rng(0).integers(0, 9000, (2, 24, 32)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    row = {"P": "p1", "W": "A01", "S": 1, "D": "x", "C": 1, "F": "a.tif"}
    layout = {"plate": "P", "well": "W", "site": "S", "compound": "D", "concentration": "C", "replicate": None}
    given = {"table": pd.DataFrame([row]), "resize": 1.0, "illumination": False, "progress": False}

    def build(pairs):
        columns = ScreenColumns(channels=pairs, **layout)
        build_dataset(tmp_path, tmp_path / "out", columns=columns, **given)
        return load(tmp_path / "out", "all", tmp_path)[0]

    if len(channels) == 2:
        built = build({name: ("F", None) for name in channels})
        assert all((np.asarray(built[name]) == stack[i]).all() for i, name in enumerate(channels))
    else:
        with pytest.raises(UserError, match="a.tif .*holds 2 planes"):
            build({"dna": ("F", None)})
        assert (np.asarray(build({"dna": ("F", None, 1)})["dna"]) == stack[1]).all()
