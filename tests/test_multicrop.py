"""Crops against one-crop-at-a-time resizing by torch's own bicubic kernel, and boxes against their definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretraining_wsdino import CropSpec, cut_window, draw_boxes, resize_windows
from pretraining_wsdino.multicrop import draw_log_gains
from pretraining_wsdino.settings import check_area
from wsdino.errors import UserError


def plane(height=120, width=150, dtype=np.uint16, seed=0):
    high = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, high, (height, width), endpoint=True, dtype=dtype)


@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize(("dtype", "clip"), [(np.uint16, 10_000.0), (np.uint8, 255.0)])
def test_windows_resized_together_equal_single_crops(size, dtype, clip):
    random = np.random.default_rng(1)
    field = plane(dtype=dtype)
    boxes = draw_boxes(random, CropSpec(12, size, (0.03, 0.5)), field.shape)
    tallest, widest = boxes[:, 2].max(), boxes[:, 3].max()
    windows = np.zeros((12, tallest, widest), dtype=dtype)
    for window, box in zip(windows, boxes, strict=True):
        cut_window(field, box, out=window)
    ours = resize_windows(
        torch.from_numpy(windows), torch.from_numpy(boxes[:, 2:4]), torch.from_numpy(boxes[:, 4:6] > 0), size, clip
    )
    assert ours.shape == (12, 1, size, size)
    assert {tuple(flips) for flips in boxes[:, 4:6]} == {(0, 0), (0, 1), (1, 0), (1, 1)}, (
        "the draw should test all flips"
    )
    for crop, (top, left, height, width, left_right, up_down, _) in zip(ours, boxes, strict=True):
        cut = np.minimum(field[top : top + height, left : left + width].astype(np.float32), clip) / clip
        cut = torch.from_numpy(cut)[None, None]
        plain = F.interpolate(cut, (size, size), mode="bicubic", align_corners=False, antialias=False)[0]
        if left_right:
            plain = plain.flip(-1)
        if up_down:
            plain = plain.flip(-2)
        torch.testing.assert_close(crop, plain, atol=5e-6, rtol=0)


def test_all_symmetries_brightness_and_logarithmic_input():
    """Against one crop at a time: logarithm, torch's bicubic, flips, transposition, and a shift for the gain."""
    random, spec = np.random.default_rng(2), CropSpec(64, 24, (0.05, 0.3), transpose=0.5, brightness_sd=0.3)
    field = plane(seed=5)
    boxes, gains = draw_boxes(random, spec, field.shape), draw_log_gains(random, spec)
    assert len({tuple(flips) for flips in boxes[:, 4:]}) == 8
    assert gains.std() == pytest.approx(0.3, rel=0.3)
    windows = np.zeros((64, boxes[:, 2].max(), boxes[:, 3].max()), dtype=np.uint16)
    for window, box in zip(windows, boxes, strict=True):
        cut_window(field, box, out=window)
    arguments = torch.from_numpy(windows), torch.from_numpy(boxes[:, 2:4]), torch.from_numpy(boxes[:, 4:] > 0), 24, 1e4
    log_gains = torch.from_numpy(gains)
    log = resize_windows(*arguments, intensity_scale="log", log_gains=log_gains)
    linear = resize_windows(*arguments, log_gains=log_gains)
    for one, other, gain, (top, left, height, width, left_right, up_down, turned) in zip(
        log, linear, gains, boxes, strict=True
    ):
        cut = torch.from_numpy(field[top : top + height, left : left + width].astype(np.float32))[None, None]
        scaled = (cut.clamp(min=200) / 1000).log() / 0.8, cut.clamp(max=1e4) / 1e4
        plain = [F.interpolate(each, (24, 24), mode="bicubic", align_corners=False)[0] for each in scaled]
        plain = [each.flip([axis for axis, flip in ((-1, left_right), (-2, up_down)) if flip]) for each in plain]
        plain = [each.transpose(1, 2) if turned else each for each in plain]
        torch.testing.assert_close(one, plain[0] + gain / 0.8, atol=5e-5, rtol=0)
        torch.testing.assert_close(other, plain[1] * np.exp(gain), atol=5e-5, rtol=0)


def test_rectangular_windows():
    windows = torch.from_numpy(plane(40, 50)[None].copy())
    ours = resize_windows(windows, torch.tensor([[33, 47]]), torch.zeros(1, 2, dtype=torch.bool), 24, 65535.0)
    plain = F.interpolate(windows[:, None, :33, :47].float() / 65535, (24, 24), mode="bicubic", align_corners=False)
    torch.testing.assert_close(ours, plain, atol=5e-6, rtol=0)


def test_more_windows_than_are_resized_at_a_time():
    """150 windows of up to 100 x 80 pixels are worked off in several parts: each must find its own rows again."""
    random = np.random.default_rng(3)
    sizes = np.column_stack([random.integers(60, 101, 150), random.integers(50, 81, 150)])
    flips = random.random((150, 2)) < 0.5
    windows = plane(150 * 100, 80, seed=4).reshape(150, 100, 80)
    ours = resize_windows(torch.from_numpy(windows), torch.from_numpy(sizes), torch.from_numpy(flips), 40, 65535.0)
    assert windows.size > 2 * 2**19
    for crop, window, (height, width), (left_right, up_down) in zip(ours, windows, sizes, flips, strict=True):
        cut = torch.from_numpy(window[:height, :width].astype(np.float32) / 65535)[None, None]
        expected = F.interpolate(cut, (40, 40), mode="bicubic", align_corners=False)[0]
        expected = expected.flip([axis for axis, flipped in ((-1, left_right), (-2, up_down)) if flipped])
        torch.testing.assert_close(crop, expected, atol=5e-6, rtol=0)


def test_crops_keep_float32_under_autocast():
    """Training may run in bfloat16, which has 8 bits; its pixels have 16."""
    windows = torch.from_numpy(plane(50, 50)[None].copy())
    arguments = torch.tensor([[41, 50]]), torch.tensor([[True, False]]), 32, 65535.0
    with torch.autocast("cpu", torch.bfloat16):
        inside = resize_windows(windows, *arguments)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, resize_windows(windows, *arguments), atol=1e-7, rtol=0)


def test_another_device_than_a_processor(monkeypatch):
    """No GPU is needed to see that nothing is called that only processors have: the meta device has shapes alone."""
    arguments = [torch.zeros(3, 50, 40, dtype=torch.uint16), torch.full((3, 2), 40), torch.zeros(3, 2) > 0]
    monkeypatch.setattr(torch, "channel_shuffle", lambda *_: pytest.fail("CUDA has no channel_shuffle"))
    crops = resize_windows(*(each.to("meta") for each in arguments), 32, 65535.0)
    assert crops.device.type == "meta" and crops.shape == (3, 1, 32, 32) and crops.is_contiguous()


def test_no_windows():
    none = torch.zeros(0, 5, 6, dtype=torch.uint16), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2) > 0
    assert resize_windows(*none, 8, 255.0).shape == (0, 1, 8, 8)


def test_boxes_are_inside_square_and_of_the_drawn_area():
    boxes = draw_boxes(np.random.default_rng(0), CropSpec(5000, 96, (0.04, 0.08)), (512, 640))
    top, left, height, width = boxes[:, :4].T
    assert (height == width).all()
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 512).all() and (left + width <= 640).all()
    share = height * width / (512 * 640)
    assert share.min() >= 0.0395 and share.max() <= 0.0805
    assert share.mean() == pytest.approx(0.06, abs=0.0005)
    # Uniform places: the fraction of the free range has mean 1/2 and variance 1/12.
    free = top / (512 - height)
    assert free.mean() == pytest.approx(0.5, abs=0.02)
    assert free.var() == pytest.approx(1 / 12, abs=0.005)
    np.testing.assert_allclose(boxes[:, 4:].mean(0), [0.5, 0.5, 0], atol=0.03)


def test_a_box_never_exceeds_the_shorter_side():
    boxes = draw_boxes(np.random.default_rng(0), CropSpec(50, 64, (0.9, 1.0)), (64, 400))
    assert (boxes[:, 2:4] == 64).all() and (boxes[:, 0] == 0).all()


@pytest.mark.parametrize("area", [(0.0, 0.1), (0.3, 0.2), (0.1, 1.5), (0.1,), (float("nan"), 0.5)])
def test_an_impossible_area_is_refused_by_its_flag(area):
    with pytest.raises(UserError, match="--local_crop_area"):
        check_area("--local_crop_area", area)
