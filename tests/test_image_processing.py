"""The image processor against tiles cut by hand, on every kind of field it takes, and what it refuses."""

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_wsdino import WSDinoImageProcessor
from modeling_wsdino.image_processing_wsdino import scale_intensities
from pretraining_wsdino.multicrop import log_scaled


def field(height=150, width=170, seed=0, high=20_000):
    return np.random.default_rng(seed).integers(0, high, (height, width)).astype(np.uint16)


def by_hand(plane, size, corners, limit=10_000):
    """Tiles pixel by pixel."""
    tiles = np.zeros((len(corners), 1, size, size))
    for index, (top, left) in enumerate(corners):
        for row in range(size):
            for column in range(size):
                tiles[index, 0, row, column] = min(int(plane[top + row, left + column]), limit) / limit
    return tiles


@pytest.fixture
def processor():
    return WSDinoImageProcessor(tile_size=64)


def test_the_papers_tiles_are_the_centred_squares(processor):
    plane = field()
    # (150 - 128) // 2 = 11 and (170 - 128) // 2 = 21
    expected = by_hand(plane, 64, [(11, 21), (11, 85), (75, 21), (75, 85)])
    values = processor(plane)["pixel_values"]
    assert values.dtype == torch.float32 and values.shape == (4, 1, 64, 64)
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-7)
    assert values.max() == 1.0


def test_the_defaults_are_the_papers():
    values = WSDinoImageProcessor()(field(512, 640))["pixel_values"]
    upper_right = np.minimum(field(512, 640)[32:256, 320:544], 10_000) / 1e4
    np.testing.assert_allclose(values[1, 0].numpy(), upper_right, atol=1e-7)
    assert values.shape == (4, 1, 224, 224)


def test_full_covers_every_pixel_with_the_fewest_tiles(processor):
    plane = field(150, 128)
    corners = [(top, left) for top in (0, 43, 86) for left in (0, 64)]
    values = processor(plane, tiles="full")["pixel_values"]
    np.testing.assert_allclose(values.numpy(), by_hand(plane, 64, corners), atol=1e-7)
    # coverage of a plane whose every pixel is a different number
    numbered = np.arange(150 * 128).reshape(150, 128).astype(np.int32)
    seen = np.concatenate([tile.ravel() for tile in processor.field_tiles(numbered, tiles="full", max_intensity=1e6)])
    assert len(set((seen.astype(np.float64) * 1e6).round().astype(int))) == numbered.size
    assert len(processor.field_tiles(field(64, 64), tiles="full")) == 1


def test_the_original_codes_crops_are_those_of_its_script():
    # x_min, y_min, x_max, y_max as the authors' evaluation script writes them
    corners = [(64, 32, 320, 256), (320, 32, 544, 256), (64, 256, 320, 480), (320, 256, 544, 480)]
    plane = field(512, 640)
    tiles = WSDinoImageProcessor(tiles="original_code").field_tiles(plane)
    for tile, (left, top, right, bottom) in zip(tiles, corners, strict=True):
        np.testing.assert_allclose(tile[0], np.minimum(plane[top:bottom, left:right], 10_000) / 1e4, atol=1e-7)
    with pytest.raises(ValueError, match="512x640"):
        WSDinoImageProcessor().field_tiles(field(640, 512), tiles="original_code")
    with pytest.raises(ValueError, match="make no batch"):
        WSDinoImageProcessor()(plane, tiles="original_code")


def test_a_single_cell_is_a_field_of_one_tile():
    processor = WSDinoImageProcessor(tile_size=64, tile_grid=1)
    cell = field(68, 68)
    np.testing.assert_allclose(processor(cell)["pixel_values"].numpy(), by_hand(cell, 64, [(2, 2)]), atol=1e-7)
    assert processor(field(64, 64))["pixel_values"].shape == (1, 1, 64, 64)
    for tiles in ("paper", "full"):
        with pytest.raises(ValueError, match="60x68 pixels .* at least 64x64"):
            processor(field(60, 68), tiles=tiles)


def test_the_log_scale_is_its_formula_and_clips_no_bright_pixel():
    plane = field(64, 64, high=40_000)
    plane[0, :3] = 0, 200, 1000
    processor = WSDinoImageProcessor(tile_size=64, tile_grid=1, intensity_scale="log")
    values = processor(plane)["pixel_values"][0, 0].numpy()
    expected = [[math.log(max(int(value), 200) / 1000) / 0.8 for value in row] for row in plane]
    np.testing.assert_allclose(values, expected, atol=1e-6)
    assert values.dtype == np.float32 and values[0, 0] == values[0, 1] and values[0, 2] == 0
    eight = WSDinoImageProcessor(tile_size=64, tile_grid=1, intensity_scale="log", max_intensity=255)
    dim = (plane // 160).astype(np.uint8)
    expected = np.log(np.maximum(dim.astype(np.float64), 5.1) / 25.5) / 0.8
    np.testing.assert_allclose(eight(dim)["pixel_values"][0, 0].numpy(), expected, atol=1e-6)
    np.testing.assert_array_equal(scale_intensities(plane, 10_000), np.minimum(plane, 10_000) / np.float32(10_000))


def test_training_scales_intensities_by_the_same_formula():
    plane = torch.arange(0, 65_536, 7, dtype=torch.int32)
    for limit in (10_000, 255):
        shipped = scale_intensities(plane.numpy(), limit, "log")
        np.testing.assert_allclose(log_scaled(plane.float(), limit).numpy(), shipped, atol=1e-6)


def test_every_kind_of_field_gives_the_same_tiles(processor, tmp_path):
    plane = field()
    expected = processor(plane, return_tensors="np")["pixel_values"]
    Image.fromarray(plane).save(tmp_path / "field.png")
    Image.fromarray(plane).save(tmp_path / "field.tif")
    kinds = [
        plane[None],
        Image.fromarray(plane),
        Image.fromarray(plane.astype(np.int32)),
        torch.from_numpy(plane.astype(np.int32)),
        plane.astype(np.float32),
        str(tmp_path / "field.png"),
        tmp_path / "field.tif",
        plane.astype(">u2"),
        np.asfortranarray(plane),
    ]
    assert Image.fromarray(plane).mode == "I;16"
    for kind in kinds:
        np.testing.assert_array_equal(processor(kind, return_tensors="np")["pixel_values"], expected)
    rounded = torch.from_numpy(plane.astype(np.float32)).bfloat16()  # a type that NumPy lacks
    assert torch.equal(processor(rounded)["pixel_values"], processor(rounded.float())["pixel_values"])


def test_several_fields_stand_one_after_the_other(processor):
    planes = [field(seed=seed) for seed in range(3)]
    together = processor(planes)["pixel_values"]
    assert together.shape == (12, 1, 64, 64)
    assert torch.equal(together, torch.cat([processor(plane)["pixel_values"] for plane in planes]))
    assert torch.equal(processor(np.stack(planes)[:, None])["pixel_values"], together)


def test_channels_keep_their_order(processor, tmp_path):
    planes = {name: field(seed=seed) for seed, name in enumerate(("dna", "tubulin", "actin"))}
    stack = np.stack(list(planes.values()))
    expected = processor(stack)["pixel_values"]
    assert expected.shape == (4, 3, 64, 64)
    for index, name in enumerate(planes):
        assert torch.equal(expected[:, index : index + 1], processor(planes[name])["pixel_values"])
    named = WSDinoImageProcessor(tile_size=64, channel_names=["dna", "tubulin", "actin"])
    mixed = {"actin": Image.fromarray(planes["actin"]), "note": "left alone"}
    mixed |= {"dna": planes["dna"], "tubulin": planes["tubulin"]}
    assert torch.equal(named(mixed)["pixel_values"], expected)
    pages = [Image.fromarray(plane) for plane in stack]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    assert torch.equal(processor(tmp_path / "stack.tif")["pixel_values"], expected)


def test_an_opened_file_of_several_pages_is_read_alike_every_time_and_stays_at_its_page(processor, tmp_path):
    stack = np.stack([field(seed=seed) for seed in range(3)])
    pages = [Image.fromarray(plane) for plane in stack]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    with Image.open(tmp_path / "stack.tif") as opened:
        for page in (0, 2, 1):
            opened.seek(page)
            for _ in range(2):
                assert torch.equal(processor(opened)["pixel_values"], processor(stack)["pixel_values"])
                assert opened.tell() == page


def test_the_input_is_left_alone(processor):
    plane = field()
    copy = plane.copy()
    processor(plane)
    assert (plane == copy).all()


def test_an_8_bit_field_is_warned_about_and_uses_its_own_range(processor):
    plane = (field() // 79).astype(np.uint8)
    with pytest.warns(UserWarning, match="8-bit"):
        values = processor(Image.fromarray(plane, mode=None))["pixel_values"]
    np.testing.assert_allclose(values[0, 0].numpy(), plane[11:75, 21:85] / 255, atol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(processor(plane, max_intensity=255)["pixel_values"], values)
        assert torch.equal(WSDinoImageProcessor(tile_size=64, max_intensity=255)(plane)["pixel_values"], values)


def test_a_16_bit_field_is_refused_by_an_8_bit_model():
    """Nearly all of it would be clipped, and features of white images look like any others."""
    processor = WSDinoImageProcessor(tile_size=64, max_intensity=255)
    with pytest.raises(ValueError, match="up to [0-9]+, but .* up to 255"):
        processor(field())
    dim = field() // 80  # 8 bits in a 16-bit file
    assert torch.equal(processor(dim)["pixel_values"], processor(dim.astype(np.uint8))["pixel_values"])
    assert processor(field(), max_intensity=65_535)["pixel_values"].max() < 1


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (field(100, 170), "100x170 pixels .* at least 128x128"),
        (field()[0], r"the shape \(170,\)"),
        (np.stack([field()] * 3, axis=-1), r"the shape \(150, 170, 3\)"),
        (Image.new("RGB", (170, 150)), "a RGB picture"),
        (Image.new("P", (170, 150)), "a P picture"),
        (field() > 3, "array of bool"),
        (np.full((150, 170), np.nan, np.float32), "not finite"),
        (np.zeros((0, 170), np.float32), "0x170 pixels"),
        (field().astype(np.float32) / 20_000, "up to 0.99995, .* name max_intensity"),
        (None, "a NoneType"),
        ({"dna": field()}, "trained on a channel without a name"),
    ],
)
def test_what_is_no_field_is_refused_in_a_sentence(processor, image, words):
    with pytest.raises(ValueError, match=words) as caught:
        processor(image)
    assert "\n" not in str(caught.value)


def test_channels_that_do_not_fit_are_refused_in_a_sentence():
    processor = WSDinoImageProcessor(tile_size=64, channel_names=["dna", "actin"])
    with pytest.raises(ValueError, match="dna, tubulin was given, .* dna, actin"):
        processor({"dna": field(), "tubulin": field()})
    with pytest.raises(ValueError, match=r"channel actin .* \(1, 140, 170\)"):
        processor({"dna": field(), "actin": field(140)})
    with pytest.raises(ValueError, match=r"channel dna .* \(2, 150, 170\)"):
        processor({"dna": np.stack([field()] * 2), "actin": field()})
    with pytest.raises(ValueError, match="make no batch"):
        processor([field(), np.stack([field()] * 2)])


def test_files_that_cannot_be_read_are_named(processor, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.tif"):
        processor(tmp_path / "absent.tif")
    (tmp_path / "text.tif").write_text("hello")
    with pytest.raises(ValueError, match="text.tif cannot be read as an image"):
        processor(tmp_path / "text.tif")
    for name in ("cut.png", "cut.tif"):
        Image.fromarray(field()).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:9000])
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            processor(tmp_path / name)


def test_settings_are_checked_and_kept(tmp_path):
    for values, words in [
        ({"tiles": "some"}, "tiles must be one of"),
        ({"tile_size": 0}, "tile_size must be a positive whole number"),
        ({"tile_size": 112.5}, "tile_size must be a positive whole number"),
        ({"max_intensity": -1}, "max_intensity must be a positive number"),
        ({"intensity_scale": "sqrt"}, "intensity_scale must be one of linear, log"),
        ({"symmetries": 2}, "symmetries must be one of 1, 4, 8"),
    ]:
        with pytest.raises(ValueError, match=words):
            WSDinoImageProcessor(**values)
    processor = WSDinoImageProcessor(tile_size=32, tile_grid=3, tiles="full", max_intensity=4095, channel_names=["a"])
    assert (processor.intensity_scale, processor.symmetries) == ("linear", 1)
    processor.intensity_scale, processor.symmetries = "log", 8
    for wrong in ({"tiles": "some"}, *({"max_intensity": limit} for limit in (0, np.inf, np.nan, "255"))):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            processor(field(), **wrong)
    with pytest.raises(ValueError, match="not finite"):  # the median over tiles would hide it
        processor(np.where(field() > 9000, np.nan, 0.5), max_intensity=1)
    with pytest.raises(ValueError, match="no field"):
        processor([])
    processor.save_pretrained(tmp_path)
    loaded = WSDinoImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert WSDinoImageProcessor.from_pretrained(tmp_path, tile_size=16).tile_size == 16
