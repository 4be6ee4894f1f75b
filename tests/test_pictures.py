"""Pictures: the mask keeps the named share with the fewest patches, and dims exactly the pixels of the others."""

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluation_wsdino.pictures import GAP, TEXT_HEIGHT, draw_attention, draw_fields, read_sheet, save_sheet
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


def test_a_saved_sheet_gives_back_its_titles_and_pictures(tmp_path):
    maps = attention(2, 3, 8, 10)
    tiles = np.random.default_rng(1).uniform(0.2, 1, size=(2, 64, 80))
    titles = ['Ünïcode <b> 薬 "quoted"', "long " * 60]
    sheet = draw_attention(tiles, maps, np.ones((2, 8, 10), bool), titles, width=WIDTH)
    save_sheet(sheet, tmp_path / "attention_dna.png")
    assert [path.name for path in tmp_path.iterdir()] == ["attention_dna.png"]
    groups = read_sheet(tmp_path / "attention_dna.png")
    assert [title for title, _ in groups] == titles
    for row, (_, cells) in enumerate(groups):
        names = [name for name, _ in cells]
        assert names == ["field", "100% of patches hold the mass", "mean of heads", "head 1", "head 2", "head 3"]
        for column, (_, picture) in enumerate(cells):
            np.testing.assert_array_equal(np.asarray(picture), cell(sheet, row, column, 160))
    fields = draw_fields(list(tiles), ["first", "second"], width=WIDTH)
    save_sheet(fields, tmp_path / "fields_dna.png")
    ((title, cells),) = read_sheet(tmp_path / "fields_dna.png")
    assert title == "" and [name for name, _ in cells] == ["first", "second"]
    np.testing.assert_array_equal(np.asarray(cells[1][1]), cell(fields, 0, 1, 160))


@pytest.mark.parametrize(
    "text",
    [None, "{", "[]", "7", '[{"title": "a", "cells": [{"title": "b", "box": [0, 0, 999, 5]}]}]', '[{"cells": 1}]'],
)
def test_a_picture_without_usable_places_is_shown_whole(tmp_path, text):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    note = PngInfo()
    if text is not None:
        note.add_itxt("wsdino_sheet", text)
    picture.save(tmp_path / "p.png", pnginfo=note)
    ((title, ((name, whole),)),) = read_sheet(tmp_path / "p.png")
    assert title == name == ""
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(picture))


def test_fields_show_the_square_root_of_intensity():
    sheet = draw_fields([np.full((40, 50), 0.25), np.full((40, 50), 4.0)], ["dim", "clipped"], width=WIDTH)
    assert (cell(sheet, 0, 0, 160) == int(0.5 * 255)).all()
    assert (cell(sheet, 0, 1, 160) == 255).all()
