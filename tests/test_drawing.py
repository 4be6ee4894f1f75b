"""Drawn fields and crops: the facts of the real camera, sizes, phenotypes, and crops against the field they are of."""

from dataclasses import asdict, fields

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
from dataset_scripts.simulator.cells import place_cells
from dataset_scripts.simulator.phenotypes import RANGES, SHARES


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


def field_of_crops(seed, phenotype, optics, monkeypatch, **settings):
    """Crops, and the field and cells they must be of, drawn once more from the same state."""
    sizes = []
    real = drawing._draw

    def noting(rng, image_size, *others):
        sizes.append(image_size)
        return real(rng, image_size, *others)

    monkeypatch.setattr(drawing, "_draw", noting)
    crops = draw_crops(np.random.default_rng(seed), phenotype, optics, **settings)
    (image_size,) = sizes
    field = draw_field(np.random.default_rng(seed), image_size, phenotype, optics)
    return crops, field, place_cells(np.random.default_rng(seed), image_size, phenotype, optics, 1.0)


@pytest.mark.parametrize(("seed", "sparse"), [(0, False), (1, False), (2, True)])
def test_crops_are_the_field_s_pixels_at_the_nuclei(seed, sparse, monkeypatch):
    """Without jitter, by a plain loop over the nuclei: no cell twice, and none left out where they are few."""
    rng = np.random.default_rng([8, seed])
    phenotype, optics = Phenotype(density=0.1) if sparse else mechanism_blend(rng), random_optics(rng)
    crops, field, cells = field_of_crops(seed, phenotype, optics, monkeypatch, count=60, size=40, jitter=0)
    expected = set()
    for y, x in zip(cells.nucleus_row, cells.nucleus_column, strict=True):
        top, left = round(float(y)) - 20, round(float(x)) - 20
        if top >= 0 and left >= 0 and top + 40 <= field.shape[1] and left + 40 <= field.shape[2]:
            expected.add(field[:, top : top + 40, left : left + 40].tobytes())
    found = [crop.tobytes() for crop in crops]
    assert len(set(found)) == len(found) == min(len(expected), 60) > 15
    assert sparse == (len(expected) < 60)
    assert set(found) <= expected


def test_crops_lie_within_the_jitter_of_a_nucleus(monkeypatch):
    crops, field, cells = field_of_crops(1, Phenotype(), Optics(), monkeypatch, count=6)
    assert crops.shape == (6, 3, 68, 68) and crops.dtype == np.uint16 and not (crops % 16).any()
    windows = np.lib.stride_tricks.sliding_window_view(field[0], (68, 68))
    for crop in crops:
        ((top, left),) = np.argwhere((windows[:, :, ::9, ::9] == crop[0, ::9, ::9]).all(axis=(2, 3)))
        assert (field[:, top : top + 68, left : left + 68] == crop).all()
        away = np.maximum(abs(cells.nucleus_row - top - 34), abs(cells.nucleus_column - left - 34))
        assert away.min() <= 4.5


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
        assert 0.6 <= random_optics(rng).blur <= 1.7
