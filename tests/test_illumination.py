"""Illumination correction and resizing, against scikit-image's plain calls, scipy, and loops."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.filters import rank
from skimage.morphology import disk
from skimage.transform import resize

from dataset_scripts.illumination import (
    correct_plane,
    illumination_function,
    illumination_levels,
    median_disk,
    median_radius,
    resize_plane,
    scaled_filter_size,
)


@pytest.fixture
def plane():
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:70, :90]
    smooth = 700 + 3 * row + 2 * column + 300 * np.sin(column / 9)
    return (smooth + rng.normal(0, 60, smooth.shape)).astype(np.uint16)


def median_by_loops(image, radius, border):
    """The median of every disk, the lower of the middle two as a histogram gives it."""
    result = np.zeros_like(image)
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            values = []
            for di in range(-radius, radius + 1):
                for dj in range(-radius, radius + 1):
                    if di * di + dj * dj > radius * radius:
                        continue
                    y, x = i + di, j + dj
                    if border == "inside":
                        if not (0 <= y < image.shape[0] and 0 <= x < image.shape[1]):
                            continue
                    y, x = min(max(y, 0), image.shape[0] - 1), min(max(x, 0), image.shape[1] - 1)
                    values.append(int(image[y, x]))
            values.sort()
            # scikit-image's histogram counts until it passes half: of an even number, the upper middle one.
            result[i, j] = values[len(values) // 2]
    return result


def test_the_paper_s_radius():
    assert median_radius(320) == 136
    assert scaled_filter_size((1024, 1280)) == 320
    assert scaled_filter_size((512, 640)) == 160
    assert scaled_filter_size((2048, 2560)) == 320


@pytest.mark.parametrize("border", ["edge", "inside"])
def test_median_equals_loops(plane, border):
    image = plane[:24, :31]
    assert (median_disk(image, 4, border) == median_by_loops(image, 4, border)).all()


def test_median_equals_scikit_image_on_the_full_grey_scale(plane):
    padded = np.pad(plane, 12, mode="edge")
    with pytest.warns(UserWarning, match="Bad rank filter"):
        expected = rank.median(padded, disk(12))[12:-12, 12:-12]
    assert (median_disk(plane, 12) == expected).all()


def test_the_border_options_differ_only_near_the_border(plane):
    radius = 9
    edge, inside = median_disk(plane, radius, "edge"), median_disk(plane, radius, "inside")
    middle = np.s_[radius:-radius, radius:-radius]
    assert (edge[middle] == inside[middle]).all()
    assert (edge != inside).any()
    with pytest.raises(ValueError, match="border"):
        median_disk(plane, 3, "wrap")


def test_function_is_the_robust_rescale_of_the_median(plane):
    mean = plane + 0.9  # the mean of images has fractions, which CellProfiler cuts off
    median = ndimage.median_filter(plane, footprint=disk(median_radius(30)), mode="nearest").astype(float)
    minimum = np.sort(median.ravel())[int(median.size * 0.02)]
    expected = np.where(median < minimum, minimum, median) / minimum
    levels = illumination_levels(mean, filter_size=30)
    assert levels.dtype == np.uint16
    np.testing.assert_allclose(illumination_function(levels), expected, rtol=1e-6)
    assert illumination_function(levels).min() == 1
    # Saved levels give the function back.
    assert (illumination_function(np.array(levels)) == illumination_function(levels)).all()


def test_a_black_plate_is_left_alone():
    levels = illumination_levels(np.zeros((20, 20)), 10)
    assert (illumination_function(levels) == 1).all()


@pytest.mark.parametrize(
    ("size", "new_size"), [((70, 90), (35, 45)), ((71, 93), (36, 46)), ((64, 64), (20, 41)), ((33, 70), (66, 70))]
)
def test_resize_equals_scikit_image(size, new_size):
    image = np.random.default_rng(1).integers(0, 65535, size).astype(np.uint16)
    expected = resize(image / 65535.0, new_size, order=3, mode="symmetric", anti_aliasing=None)
    found = resize_plane(image.astype(np.float32), new_size) / 65535
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(("size", "new_size"), [((70, 90), (35, 45)), ((71, 93), (36, 46))])
def test_bicubic_resize_equals_scikit_image_0_17(size, new_size):
    """Its resize was a Gaussian and a warp of order 3, which today's warp still is."""
    from skimage.transform import AffineTransform, warp

    image = np.random.default_rng(2).uniform(size=size)
    factors = np.array(size) / np.array(new_size)
    smooth = ndimage.gaussian_filter(image, (factors - 1) / 2, mode="reflect")
    map_ = AffineTransform(scale=factors[::-1], translation=0.5 * factors[::-1] - 0.5)
    expected = warp(smooth, map_, output_shape=new_size, order=3, mode="symmetric")
    found = resize_plane(image.astype(np.float32), new_size, "bicubic")
    np.testing.assert_allclose(found, expected, atol=2e-6)
    with pytest.raises(ValueError, match="interpolation"):
        resize_plane(image.astype(np.float32), new_size, "nearest")


def test_corrected_planes_equal_the_plain_way(plane):
    levels = illumination_levels(plane, 30)
    function = illumination_function(levels)
    bright = plane * 20
    expected = resize(np.clip(bright / 65535.0 / function, 0, 1), (35, 45), order=3, mode="symmetric")
    found = correct_plane(bright, function)
    assert found.dtype == np.uint16
    # One grey level: float32 against float64 at the rounding.
    assert np.abs(found.astype(int) - np.rint(expected * 65535)).max() <= 1
    assert (correct_plane(plane, None, 1.0) == plane).all()


def test_correction_flattens_a_vignette():
    rng = np.random.default_rng(3)
    row, column = np.mgrid[-1:1:48j, -1:1:64j]
    light = 1 - 0.4 * (row**2 + column**2) / 2
    images = [(light * rng.gamma(4, 500, light.shape)).astype(np.uint16) for _ in range(200)]
    function = illumination_function(illumination_levels(np.mean(images, axis=0), 20))
    before = np.mean(images, axis=0)
    after = np.mean([correct_plane(image, function, 1.0) for image in images], axis=0)
    inner = np.s_[6:-6, 6:-6]
    assert before[inner].std() / before[inner].mean() > 0.06
    assert after[inner].std() / after[inner].mean() < 0.05
    corner, middle = np.s_[6:12, 6:12], np.s_[20:28, 28:36]
    assert (
        abs(after[corner].mean() / after[middle].mean() - 1) < 0.03 < 1 - before[corner].mean() / before[middle].mean()
    )


@pytest.mark.slow
def test_full_size_median_equals_scikit_image():
    """The paper's own size; scikit-image on 65,536 bins takes about ten seconds."""
    rng = np.random.default_rng(4)
    mean = ndimage.gaussian_filter(rng.normal(size=(1024, 1280)), 60)
    mean = 900 + 800 * (mean - mean.min()) / np.ptp(mean) + rng.normal(0, 20, mean.shape)
    image = mean.astype(np.uint16)
    with pytest.warns(UserWarning, match="Bad rank filter"):
        expected = rank.median(np.pad(image, 136, mode="edge"), disk(136))[136:-136, 136:-136]
    assert (median_disk(image, 136) == expected).all()
