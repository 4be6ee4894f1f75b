"""Drawn fields and crops: the facts of the real camera, sizes, phenotypes, and crops against the field they are of."""

import hashlib
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
from scipy import ndimage

from dataset_scripts.simulator import (
    Optics,
    Phenotype,
    draw_crops,
    draw_field,
    drawing,
    mechanism_blend,
    mechanism_phenotypes,
    random_optics,
    random_phenotype,
)
from dataset_scripts.simulator.cells import cell_map
from dataset_scripts.simulator.optics import photograph
from dataset_scripts.simulator.phenotypes import DETAILS, RANGES, SHARES


def test_untreated_fields_have_the_real_camera_s_grey_levels():
    """Ranges about what four real fields show: background, nuclei, and pixels above 10,000."""
    planes = np.concatenate(
        [draw_field(np.random.default_rng(seed), (512, 640), Phenotype(), Optics()) for seed in range(3)], axis=1
    )
    dna, tubulin, actin = planes
    for plane in planes:
        assert 380 <= np.percentile(plane, 1) <= 1100
    # Real: 95 % of DNA pixels below 1,904, 99 % below 2,464; tubulin 3,936 and 4,848; actin 9,552 and 13,936.
    assert 1500 < np.percentile(dna, 96) < 2700
    assert 2000 < np.percentile(tubulin, 97) < 4900
    assert 6000 < np.percentile(actin, 96) < 13000
    assert (dna > 10000).mean() < 0.0004
    assert (tubulin > 10000).mean() < 0.039
    assert 0.002 < (actin > 10000).mean() < 0.06


def test_cells_keep_their_size_in_a_smaller_image():
    """Nuclei by thresholding and labelling, as an outsider would measure them."""

    def nuclei(size, scale=1.0):
        areas = []
        for seed in range(3):
            plane = draw_field(np.random.default_rng(seed), size, Phenotype(), Optics(vignette=0), scale)[0]
            labels, count = ndimage.label(ndimage.gaussian_filter(plane.astype(float), 1) > 1300)
            areas += list(ndimage.sum(labels > 0, labels, range(1, count + 1)))
        return np.median(areas), len(areas)

    large, many = nuclei((480, 600))
    small, few = nuclei((240, 300))
    assert 0.85 < small / large < 1.15
    assert 2.5 < many / few < 6
    half, _ = nuclei((240, 300), scale=0.5)
    assert 0.18 < half / large < 0.33
    # About 38 raw pixels across.
    assert 30 < 2 * np.sqrt(large / np.pi) < 44


def test_each_mechanism_looks_different_from_untreated():
    """Drastic phenotypes: some plain measure moves by more than two standard deviations of untreated fields."""

    def measures(phenotype, seeds):
        rows = []
        for seed in seeds:
            planes = draw_field(np.random.default_rng([1, seed]), (300, 400), phenotype, Optics()).astype(float)
            labels, count = ndimage.label(ndimage.gaussian_filter(planes[0], 1) > 1200)
            areas = ndimage.sum(labels > 0, labels, range(1, count + 1))
            areas = areas[areas > 15]
            row = [np.log(np.median(areas)), np.log(len(areas)), areas.std() / areas.mean()]
            for plane in planes:
                signal = plane - np.percentile(plane, 2)
                fine = signal - ndimage.gaussian_filter(signal, 2)
                row += [np.log(fine.std() / signal.std()), np.log(np.percentile(signal, 99.5) / signal.mean())]
            rows.append(row)
        return np.array(rows)

    untreated = measures(Phenotype(), range(12))
    middle, spread = untreated.mean(0), untreated.std(0)
    for name, phenotype in mechanism_phenotypes().items():
        moved = np.abs(measures(phenotype, range(100, 104)).mean(0) - middle) / spread
        assert moved.max() > 2, (name, moved)


def crops_and_windows(seed, phenotype, optics, monkeypatch, **settings):
    """Crops, the cells and image size that each was drawn with, and all cells of the field they are of."""
    drawn, placed = [], []
    draw, place = drawing._draw, drawing.place_cells

    def noting(rng, cells, image_size, *others):
        drawn.append((cells, image_size))
        return draw(rng, cells, image_size, *others)

    def placing(rng, image_size, *others):
        placed.append((place(rng, image_size, *others), image_size))
        return placed[-1][0]

    monkeypatch.setattr(drawing, "_draw", noting)
    monkeypatch.setattr(drawing, "place_cells", placing)
    crops = draw_crops(np.random.default_rng(seed), phenotype, optics, **settings)
    ((cells, image_size),) = placed
    return crops, drawn, cells, image_size


@pytest.mark.parametrize(("seed", "sparse"), [(0, False), (1, False), (2, True)])
def test_crops_are_windows_at_the_nuclei_of_one_field(seed, sparse, monkeypatch):
    """By a plain loop over the nuclei: no cell twice, none left out where they are few, and the field's cell map."""
    rng = np.random.default_rng([8, seed])
    phenotype, optics = Phenotype(density=0.1) if sparse else mechanism_blend(rng), random_optics(rng)
    crops, windows, cells, field = crops_and_windows(seed, phenotype, optics, monkeypatch, count=60, size=40, jitter=0)
    corners = set()
    for y, x in zip(cells.nucleus_row, cells.nucleus_column, strict=True):
        top, left = round(float(y)) - 20, round(float(x)) - 20
        if top >= 0 and left >= 0 and top + 40 <= field[0] and left + 40 <= field[1]:
            corners.add((top, left))
    assert len(windows) == len(crops) == min(len(corners), 60) > 15
    assert sparse == (len(corners) < 60)
    # The whole field's map of cells, with a border as wide as a crop's margin.
    margin = drawing.MARGIN
    wide = (field[0] + 2 * margin, field[1] + 2 * margin)
    whole = cell_map(cells.around(np.array([-margin, -margin]), wide), wide)
    found = set()
    for near, size in windows:
        assert size == (40 + 2 * margin, 40 + 2 * margin)
        shift = {(float(a), float(b)) for a, b in zip(cells.row, cells.column, strict=True)}
        for top, left in corners - found:
            if all((y + top - margin, x + left - margin) in shift for y, x in zip(near.row, near.column, strict=True)):
                cut = np.s_[top : top + size[0], left : left + size[1]]
                label, depth, rim = cell_map(near, size)
                if np.array_equal(label >= 0, whole[0][cut] >= 0) and np.allclose(depth, whole[1][cut]):
                    assert np.allclose(rim, whole[2][cut])
                    found.add((top, left))
                    break
        else:
            pytest.fail("a window is at no nucleus")


def test_crops_lie_within_the_jitter_of_a_nucleus(monkeypatch):
    crops, windows, _, _ = crops_and_windows(1, Phenotype(), Optics(), monkeypatch, count=6)
    assert crops.shape == (6, 3, 68, 68) and crops.dtype == np.uint16 and not (crops % 16).any()
    for crop, (cells, (side, _)) in zip(crops, windows, strict=True):
        away = np.maximum(abs(cells.nucleus_row - side / 2), abs(cells.nucleus_column - side / 2))
        assert away.min() <= 4.5
        # A nucleus is in the middle, brighter than the background.
        assert np.median(crop[0, 30:38, 30:38]) > 1.5 * np.percentile(crop[0], 1)


def test_fields_without_details_never_change():
    """Digests of fields that were drawn before there were details: simulated screens must stay what they were."""
    digests = []
    phenotypes = [Phenotype(), *mechanism_phenotypes().values()]
    optics = [Optics(), Optics(gain=(1.1, 0.9, 1.2), blur=1.2, centre=(0.2, 0.9))]
    for seed in (0, 5, 6, 9):
        rng = np.random.default_rng(seed)
        field = draw_field(rng, (150, 170), phenotypes[seed], optics[seed > 0], scale=0.5 if seed == 6 else 1.0)
        digests.append(hashlib.sha256(field.tobytes()).hexdigest()[:12])
    assert digests == ["147d33dd28b4", "735e6dccf9e2", "179fc4fe6307", "47a32e6f1f00"]
    rng = np.random.default_rng(4)
    mechanisms = phenotypes[1:]
    varied = mechanisms[0].blend(mechanisms[3], 0.2).vary(rng, 0.09)
    assert rng.uniform() == pytest.approx(0.5220870022114477)  # details that are absent take no draw
    assert varied.variability == pytest.approx(0.099173053, abs=1e-9)


def mean(plane):
    return plane.mean()


def fine(plane):
    return (plane - ndimage.gaussian_filter(plane, 2)).std()


def rows(plane):
    return plane[:, 70:].mean(axis=1).std()


def coarse(plane):
    return (ndimage.gaussian_filter(plane, 1) - ndimage.gaussian_filter(plane, 4)).std() / fine(plane)


@pytest.mark.parametrize(
    ("detail", "channel", "measure", "sign", "base"),
    [
        ("chromatin", 0, fine, 1, {}),
        ("chromatin_coarse", 0, coarse, 1, {"chromatin": 0.3}),
        ("nucleus_rim", 0, mean, 1, {}),
        ("nucleus_dome", 0, fine, -1, {}),  # the nucleus fades towards its outline
        ("packing", 0, mean, 1, {"fragmented": 0.9}),
        ("figures", 0, mean, -1, {"rounded": 0.9}),
        ("defocus", 2, fine, -1, {"rounded": 0.9}),
        ("smoothness", 2, fine, -1, {"spikes": 0.45, "density": 0.3}),
        ("glow", 2, mean, 1, {"rounded": 0.5}),
        ("floating", 0, mean, 1, {}),
        ("debris", 0, fine, 1, {}),
        ("vacuoles", 1, mean, -1, {}),
        ("thickness", 1, mean, -1, {}),
        ("nuclear_shadow", 1, mean, -1, {}),
        ("tubulin_network", 1, mean, 1, {}),
        ("tubulin_sparsity", 1, fine, 1, {"tubulin_network": 2.0}),
        ("tubulin_edge", 1, mean, 1, {}),
        ("actin_mesh", 2, fine, 1, {}),
        ("actin_cortex", 2, mean, 1, {}),
        ("actin_ruffles", 2, mean, 1, {"density": 0.4}),
        ("actin_specks", 2, fine, 1, {}),
        ("filopodia", 2, mean, 1, {"density": 0.3, "actin_fibres": 0.0, "actin_puncta": 0.0}),
    ],
)
def test_details_do_what_they_say(detail, channel, measure, sign, base):
    """The highest value of a detail against none, by a plain measure of one channel, over several fields."""
    optics = Optics(read_noise=0.0, shot_noise=0.0, vignette=0.0)
    without = replace(Phenotype(), **base)
    measured = [
        [
            measure(draw_field(np.random.default_rng(seed), (160, 160), phenotype, optics)[channel].astype(float))
            for seed in range(5)
        ]
        for phenotype in (without, replace(without, **{detail: DETAILS[detail][1]}))
    ]
    assert sign * np.log(np.mean(measured[1]) / np.mean(measured[0])) > 0.01


@pytest.mark.parametrize(
    ("number", "value", "measure", "sign"),
    [("haze", 0.5, fine, -1), ("smear", 0.5, fine, -1), ("stripes", 5.0, rows, 1), ("hot", 1e-3, fine, 1)],
)
def test_optics_do_what_they_say(number, value, measure, sign):
    """On a flat picture with one bright square; smear shows as the correlation of a pixel's noise with the next's."""
    signal = np.zeros((96, 96), np.float32)
    signal[30:60, 30:60] = 8000
    base = Optics(vignette=0.0, haze_width=8.0, haze=0.001)
    planes = [
        photograph(np.random.default_rng(1), (signal,), optics)[0].astype(float)
        for optics in (base, replace(base, **{number: value}))
    ]
    if number == "smear":
        dark = planes[1][:, 70:] - planes[1][:, 70:].mean()
        correlation = (dark[:, 1:] * dark[:, :-1]).mean() / (dark**2).mean()
        assert correlation == pytest.approx(value / (1 + value**2), abs=0.08)
    else:
        assert sign * np.log(measure(planes[1]) / measure(planes[0])) > 0.02


def test_damaged_crops_have_a_plane_of_pure_noise():
    crops = draw_crops(np.random.default_rng(0), Phenotype(), Optics(damaged=1.0), 12)
    signal = crops - crops.mean(axis=(2, 3), keepdims=True)
    neighbours = (signal[..., 1:] * signal[..., :-1]).mean(axis=(2, 3)) / (signal**2).mean(axis=(2, 3))
    noisy = (abs(neighbours) < 0.1).sum(axis=1)
    assert set(noisy) == {1, 3}


def test_the_same_seed_draws_the_same_crops():
    def crops(seed):
        rng = np.random.default_rng(seed)
        return draw_crops(rng, random_phenotype(rng), random_optics(rng), 3)

    assert np.array_equal(crops(1), crops(1)) and not np.array_equal(crops(1), crops(2))


def test_a_phenotype_without_cells_gives_no_crops():
    nowhere = Phenotype(clustering=3.0)  # no place of the landscape is high enough
    crops = draw_crops(np.random.default_rng(0), nowhere, Optics(), 4, size=50)
    assert crops.shape == (0, 3, 50, 50) and crops.dtype == np.uint16


def test_random_phenotypes_stay_in_their_ranges_and_every_number_varies():
    assert set(RANGES) == {each.name for each in fields(Phenotype)}
    rng = np.random.default_rng(0)
    drawn = [asdict(random_phenotype(rng)) for _ in range(400)]
    for name, (low, high, _) in RANGES.items():
        values = np.array([each[name] for each in drawn])
        assert low <= values.min() and values.max() <= high
        tenth = 0.1 * (high - low)
        assert values.min() < low + tenth and values.max() > high - tenth, name
    table = np.array([list(each.values()) for each in drawn])
    assert abs(np.corrcoef(table.T) - np.eye(len(RANGES))).max() < 0.25  # they are independent
    for phenotype in [Phenotype(), *mechanism_phenotypes().values()]:  # every mechanism is within reach
        assert all(RANGES[name][0] <= value <= RANGES[name][1] for name, value in asdict(phenotype).items())


def test_blends_of_mechanisms_can_be_drawn():
    rng = np.random.default_rng(0)
    for _ in range(200):
        blend = mechanism_blend(rng)
        assert all(0 <= getattr(blend, name) <= 0.97 for name in SHARES)
        assert 0.25 <= blend.density <= 1
        assert 0.5 <= random_optics(rng).blur <= 3.5
