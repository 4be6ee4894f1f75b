"""Pictures: the mask keeps the named share with the fewest patches, and dims exactly the pixels of the others."""

import numpy as np
import torch

from evaluation_wsdino.pictures import GAP, TEXT_HEIGHT, draw_attention, draw_fields
from modeling_wsdino import attention_mass_mask

WIDTH = 200


def attention(count, heads, height, width):
    values = np.random.default_rng(0).exponential(size=(count, heads, height, width)) ** 2
    return (values / values.sum((2, 3), keepdims=True)).astype(np.float32)


def cell(sheet, row, column, height):
    """Pixels of one cell of the sheet."""
    top = GAP + row * (height + TEXT_HEIGHT + GAP) + TEXT_HEIGHT
    left = GAP + column * (WIDTH + GAP)
    return np.asarray(sheet)[top : top + height, left : left + WIDTH].astype(int)


def test_the_mask_keeps_its_share_with_the_fewest_patches():
    means = attention(5, 3, 7, 9).mean(1)
    masks = attention_mass_mask(torch.from_numpy(means), 0.6).numpy()
    for values, mask in zip(means.astype(np.float64), masks, strict=True):
        total, needed = 0.0, 0
        for value in sorted(values.ravel().tolist(), reverse=True):
            if total >= 0.6 * values.sum():
                break
            total, needed = total + value, needed + 1
        assert mask.sum() == needed < mask.size, "no fewer would do, and not all are kept"
        assert values[mask].sum() >= 0.6 * values.sum()
        assert values[mask].min() >= values[~mask].max()


def test_dimmed_pixels_are_exactly_the_masked_patches():
    """The patch under each pixel's centre says whether it is shown as it is or at a quarter of its brightness."""
    maps = attention(2, 3, 8, 10)
    tiles = np.random.default_rng(1).uniform(0.2, 1, size=(2, 64, 80))
    masks = attention_mass_mask(torch.from_numpy(maps.mean(1)), 0.6).numpy()
    sheet = draw_attention(tiles, maps, masks, ["first", "second"], width=WIDTH)
    height = 160
    for row in range(2):
        whole, thresholded = cell(sheet, row, 0, height), cell(sheet, row, 1, height)
        assert whole.min() > 3, "dimming would not show in black"
        for y in range(height):
            for x in range(WIDTH):
                kept = masks[row, int((y + 0.5) * 8 / height), int((x + 0.5) * 10 / WIDTH)]
                expected = whole[y, x] if kept else whole[y, x] // 4
                assert (thresholded[y, x] == expected).all(), (row, y, x)


def test_every_head_has_its_own_map_brightest_where_it_attends_most():
    maps = attention(1, 3, 8, 10)
    masks = np.ones((1, 8, 10), bool)
    sheet = draw_attention(np.full((1, 64, 80), 0.5), maps, masks, ["tile"], width=WIDTH)
    for column, values in enumerate([maps[0].mean(0), *maps[0]], start=2):
        shown = cell(sheet, 0, column, 160).sum(2).reshape(8, 20, 10, 20)
        assert (shown == shown[:, :1, :, :1]).all(), "a patch is one square"
        brightness = shown[:, 0, :, 0]
        assert brightness.flat[values.argmax()] == 3 * 255 and brightness.flat[values.argmin()] == 0
        order = np.argsort(values.ravel())
        assert (np.diff(brightness.ravel()[order]) >= 0).all()


def test_fields_show_the_square_root_of_intensity():
    sheet = draw_fields([np.full((40, 50), 0.25), np.full((40, 50), 4.0)], ["dim", "clipped"], width=WIDTH)
    assert (cell(sheet, 0, 0, 160) == int(0.5 * 255)).all()
    assert (cell(sheet, 0, 1, 160) == 255).all()
