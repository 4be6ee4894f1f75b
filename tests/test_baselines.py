"""Counted nuclei against drawn ones: disks and ellipses whose number, size and shape are known."""

import math

import numpy as np
import pytest

from evaluation_wsdino.baselines import label_nuclei, nuclear_features


def draw(ellipses, shape=(160, 200), background=600, brightness=3000, noise=40, seed=0):
    """A plane of ellipses (row, column, half axes along rows and columns), by the ellipse's own equation."""
    plane = np.full(shape, float(background))
    for row, column, high, wide in ellipses:
        for r in range(shape[0]):
            for c in range(shape[1]):
                if ((r - row) / high) ** 2 + ((c - column) / wide) ** 2 <= 1:
                    plane[r, c] = background + brightness
    plane += np.random.default_rng(seed).normal(0, noise, shape)
    return plane.clip(0).astype(np.uint16)


GRID = [(20 + 30 * row, 20 + 32 * column, 9, 9) for row in range(5) for column in range(6)]


def test_apart_disks_are_counted_and_measured():
    features = nuclear_features(draw(GRID), 10_000)
    drawn = math.pi * 9**2 * 30 / (160 * 200)
    assert features[0] == 30
    assert features[1] == pytest.approx(drawn, rel=0.08)
    assert features[3] == pytest.approx(math.pi * 9**2, rel=0.08)
    assert features[5] < 0.25 and features[6] < 0.15
    assert features[7] == pytest.approx(0.3, rel=0.05)
    assert features.dtype == np.float32 and features.shape == (10,)


def test_touching_nuclei_are_parted_and_fragments_dropped():
    pairs = [(row, column + shift, 9, 9) for row in (25, 75, 125) for column in (30, 110) for shift in (0, 15)]
    specks = [(50, 50, 2, 2), (100, 180, 2, 2)]
    assert nuclear_features(draw(pairs + specks), 10_000)[0] == 12
    assert label_nuclei(draw(pairs + specks) / 10_000.0, smallest=1).max() == 14


def test_small_nuclei_of_a_low_magnification_are_counted():
    small = [(10 + 12 * row, 10 + 12 * column, 2.4, 2.4) for row in range(10) for column in range(10)]
    assert nuclear_features(draw(small, shape=(130, 130)), 10_000)[0] == 100  # 21 pixels or fewer each


def test_eccentricity_of_ellipses():
    for high, wide in ((5, 12), (12, 5), (10, 10)):
        ellipses = [(40, 50, high, wide), (40, 140, high, wide), (120, 90, high, wide)]
        features = nuclear_features(draw(ellipses), 10_000)
        expected = math.sqrt(1 - min(high, wide) ** 2 / max(high, wide) ** 2)
        assert features[0] == 3
        assert features[5] == pytest.approx(expected, abs=0.12 if high == wide else 0.03)


def test_the_middle_areas_are_percentiles_of_the_drawn_ones():
    sizes = [5, 6, 7, 8, 9, 10, 11, 12]
    disks = [(25 + 50 * (number // 4), 25 + 45 * (number % 4), size, size) for number, size in enumerate(sizes)]
    features = nuclear_features(draw(disks), 10_000)
    assert features[0] == 8
    expected = np.percentile([math.pi * size**2 for size in sizes], [25, 50, 75])
    np.testing.assert_allclose(features[2:5], expected, rtol=0.06)


def test_a_field_without_nuclei_is_zero():
    noise = np.random.default_rng(1).normal(600, 40, (160, 200)).astype(np.uint16)
    for plane in (noise, np.full((160, 200), 700, np.uint16), np.zeros((16, 16), np.uint8)):
        np.testing.assert_array_equal(nuclear_features(plane, 10_000), np.zeros(10, np.float32))


def test_every_nucleus_has_one_number_and_is_in_one_piece():
    from scipy import ndimage

    labels = label_nuclei(draw(GRID + [(5, 5, 9, 9), (35, 34, 6, 6)]) / 10_000.0)
    assert sorted(np.unique(labels)) == list(range(labels.max() + 1))
    for number in range(1, labels.max() + 1):
        assert ndimage.label(labels == number, np.ones((3, 3)))[1] == 1


def test_turning_and_mirroring_a_field_changes_nothing():
    plane = draw([(30, 40, 7, 12), (90, 60, 9, 9), (100, 75, 9, 9), (120, 150, 12, 7)], noise=0)
    expected = nuclear_features(plane, 10_000)
    for other in (plane.T, plane[::-1], plane[:, ::-1]):
        np.testing.assert_allclose(nuclear_features(other, 10_000), expected, rtol=0.02, atol=1e-3)


def test_nuclei_are_measured_as_one_by_one():
    """Areas, moments and brightness against a plain loop over the nuclei."""
    scaled = draw([(30, 40, 7, 12), (90, 60, 9, 9), (100, 75, 9, 9), (120, 150, 12, 7), (60, 150, 5, 9)]) / 10_000.0
    labels = label_nuclei(scaled)
    areas, eccentricities, brightness, spreads = [], [], [], []
    for number in range(1, labels.max() + 1):
        pixels = np.argwhere(labels == number)
        moments = np.cov(pixels.T, bias=True) + np.eye(2) / 12  # a pixel is a square, not a point
        small, large = np.linalg.eigvalsh(moments)
        areas.append(len(pixels))
        eccentricities.append(math.sqrt(1 - small / large))
        brightness.append(scaled[labels == number].mean())
        spreads.append(scaled[labels == number].std())
    expected = [len(areas), sum(areas) / scaled.size, *np.percentile(areas, [25, 50, 75])]
    expected += [np.mean(eccentricities), np.std(eccentricities), np.median(brightness), np.std(brightness)]
    expected[7] -= np.median(scaled[labels == 0])
    np.testing.assert_allclose(nuclear_features(scaled * 10_000, 10_000), [*expected, np.mean(spreads)], rtol=1e-5)
