"""Every output of the pipeline is the model's own, for every kind of input, and mistakes are refused."""

import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from small_fields import CHANNELS, make_fields, make_model
from transformers.pipelines.pt_utils import KeyDataset

from modeling_wsdino import WSDinoFeatureExtractionPipeline, WSDinoImageProcessor, attention_mass_mask


def make_pipeline(channels=("dna",), **kwargs):
    model = make_model(list(channels))
    processor = WSDinoImageProcessor(tile_size=32)
    return WSDinoFeatureExtractionPipeline(model=model, image_processor=processor, device="cpu", **kwargs)


def plain_symmetries(tile, count):
    """The tile under symmetries of the square, pixel by pixel."""
    n = len(tile)
    places = {
        "as it is": lambda i, j: (i, j),
        "mirrored": lambda i, j: (i, n - 1 - j),
        "quarter turn": lambda i, j: (j, n - 1 - i),
        "half turn": lambda i, j: (n - 1 - i, n - 1 - j),
        "three quarters": lambda i, j: (n - 1 - j, i),
        "upside down": lambda i, j: (n - 1 - i, j),
        "transposed": lambda i, j: (j, i),
        "other diagonal": lambda i, j: (n - 1 - j, n - 1 - i),
    }
    return [
        np.array([[tile[place(i, j)] for j in range(n)] for i in range(n)]) for place in list(places.values())[:count]
    ]


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("channels", [["dna"], CHANNELS], ids=["one channel", "combined"])
def test_features_are_averaged_over_symmetries_before_the_median(channels, count):
    pipe = make_pipeline(channels)
    (field,) = make_fields(1, len(channels))
    towers = pipe.model.towers.values() if len(channels) > 1 else [pipe.model]
    tiles = []
    for tile in pipe.image_processor.field_tiles(field):
        parts = []
        for tower, plane in zip(towers, tile, strict=True):
            views = [torch.tensor(view)[None, None] for view in plain_symmetries(plane, count)]
            with torch.no_grad():
                parts.append(np.mean([tower(view).pooler_output[0].numpy() for view in views], axis=0))
        tiles.append(np.concatenate(parts))
    expected = np.median(tiles, axis=0)
    expected = expected / np.linalg.norm(expected) if len(channels) > 1 else expected
    np.testing.assert_allclose(pipe(field, outputs="tiles", symmetries=count), tiles, atol=1e-5)
    np.testing.assert_allclose(pipe([field, field], symmetries=count, batch_size=2), [expected] * 2, atol=1e-5)
    pipe.image_processor.symmetries = count
    np.testing.assert_allclose(pipe(field), expected, atol=1e-5)
    pipe.image_processor.symmetries = 8
    np.testing.assert_allclose(pipe(field, symmetries=count), expected, atol=1e-5)
    if count == 8:  # a cell is the same cell however it lies under the microscope
        square = field[..., :70, :70]
        for turned in (np.rot90(square, 1, (-2, -1)), square[..., ::-1]):
            np.testing.assert_allclose(pipe(turned.copy()), pipe(square), atol=1e-5)


def test_the_combined_vector_has_unit_length_and_one_channel_has_not():
    (field,) = make_fields(1, 3)
    assert np.linalg.norm(make_pipeline(CHANNELS)(field)) == pytest.approx(1, abs=1e-6)
    assert abs(np.linalg.norm(make_pipeline()(field[0])) - 1) > 0.1


@pytest.mark.parametrize(("count", "grid"), [(4, 2), (9, 3), (1, 1)])
def test_the_median_is_numpys_for_even_and_odd_numbers_of_tiles(count, grid):
    pipe = make_pipeline()
    pipe.image_processor.tile_grid = grid
    field = make_fields(1, 1, shape=(100, 100))[0]
    tiles = np.array(pipe(field, outputs="tiles"))
    assert tiles.shape == (count, 32)
    np.testing.assert_allclose(pipe(field), np.median(tiles, axis=0), atol=1e-6)


def test_every_output_is_the_models_own():
    pipe = make_pipeline()
    model, field = pipe.model, make_fields(1, 1)[0]
    pixel_values = pipe.image_processor(field)["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values)
        maps = model.attention_maps(pixel_values)
    tiles = pipe(field, outputs="tiles", return_tensors=True)
    patches = pipe(field, outputs="patches", return_tensors=True)
    attention = pipe([field, field], outputs="attention", return_tensors=True, batch_size=2)[1]
    torch.testing.assert_close(tiles, expected.pooler_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches, expected.last_hidden_state[:, 1:].reshape(4, 4, 4, 32), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention, maps, atol=1e-5, rtol=1e-5)
    assert np.shape(pipe(field, outputs="attention")) == (4, 2, 4, 4)
    assert attention_mass_mask(attention).float().mean() < 0.9


def test_fields_of_different_sizes_share_a_batch_when_all_of_each_is_tiled():
    pipe = make_pipeline()
    fields = [make_fields(1, 1, shape=shape)[0] for shape in ((32, 32), (70, 90), (33, 64))]
    together = pipe(fields, tiles="full", batch_size=3)
    np.testing.assert_allclose(together, [pipe(field, tiles="full") for field in fields], atol=1e-5)
    assert [len(pipe(field, tiles="full", outputs="tiles")) for field in fields] == [1, 9, 4]


def test_the_original_codes_way_takes_the_lower_median_of_its_crops():
    pipe = make_pipeline()
    fields = make_fields(2, 1, shape=(512, 640))
    lefts = {64: 256, 320: 224}  # and the widths of the crops there
    expected = []
    for field in fields:
        scaled = torch.from_numpy(np.minimum(field, 10_000).astype(np.float32) / 10_000)
        with torch.no_grad():
            crops = [
                pipe.model(scaled[None, :, top : top + 224, left : left + width]).pooler_output
                for top in (32, 256)
                for left, width in lefts.items()
            ]
        expected.append(torch.median(torch.cat(crops), dim=0).values.numpy())
    np.testing.assert_allclose(pipe(fields, tiles="original_code", batch_size=2), expected, atol=1e-5)
    patches = pipe(fields[0], tiles="original_code", outputs="patches", return_tensors=True)
    assert [tuple(tile.shape) for tile in patches] == [(28, 32, 32), (28, 28, 32)] * 2
    assert np.shape(pipe(fields[0], tiles="original_code", outputs="patches")[0]) == (28, 32, 32)


def test_a_loaders_worker_gets_no_model():
    """It would be pickled for each worker where processes are not forked, and open a context on a GPU."""
    pipe, fields = make_pipeline(), make_fields(3, 1)
    loader = pipe.get_iterator(fields, 0, 1, {}, {}, {}).loader.loader
    sent = pickle.dumps(loader.dataset.process)
    assert len(sent) < 10_000 and not any(name.encode() in sent for name in ("WSDinoModel", "Pipeline"))
    tiles = pickle.loads(sent)(fields[0])["tiles"]
    assert all(torch.equal(one, other) for one, other in zip(tiles, pipe.preprocess(fields[0])["tiles"], strict=True))


def test_streams_are_read_as_they_are_asked_for():
    pipe, taken = make_pipeline(), []

    def stream():
        for index, field in enumerate(make_fields(20, 1)):
            taken.append(index)
            yield field

    results = iter(pipe(stream(), batch_size=4))
    next(results)
    assert len(taken) <= 5  # the stock pipelines look one ahead
    assert len(list(results)) == 19


def test_a_last_short_batch_and_no_fields_at_all():
    pipe = make_pipeline()
    fields = make_fields(5, 1)
    np.testing.assert_allclose(pipe(fields, batch_size=4), [pipe(field) for field in fields], atol=1e-5)
    assert pipe([]) == [] and list(pipe(field for field in [])) == []
    np.testing.assert_allclose(pipe(tuple(fields[:2])), pipe(fields[:2]), atol=1e-6)


def test_half_precision_gives_float32_near_the_exact():
    field = make_fields(1, 3)[0]
    pipe = make_pipeline(CHANNELS)
    exact = pipe(field, return_tensors=True)
    pipe.model.to(torch.bfloat16)
    half = pipe(field, return_tensors=True)
    assert half.dtype == torch.float32 and torch.dot(exact, half) > 0.98


def test_half_precision_on_a_cpu_is_warned_about():
    model, processor = make_model(["dna"]).to(torch.bfloat16), WSDinoImageProcessor(tile_size=32)
    with pytest.warns(UserWarning, match="bfloat16 on a CPU"):
        WSDinoFeatureExtractionPipeline(model=model, image_processor=processor, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_pipeline()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_gives_the_same_features():
    fields = make_fields(3, 1)
    pipe = make_pipeline()
    expected = pipe(fields, batch_size=3)
    pipe.model.compile(fullgraph=True)
    np.testing.assert_allclose(pipe(fields, batch_size=3), expected, atol=1e-5)


def test_three_channels_for_one():
    """Gray replicated to RGB, as the paper feeds it, is fine; three different channels are a mistake."""
    pipe = make_pipeline()
    (field,) = make_fields(1, 3)
    replicated = np.repeat(field[:1], 3, axis=0)
    np.testing.assert_allclose(pipe(replicated), pipe(field[0]), atol=1e-4)
    with pytest.warns(UserWarning, match="three different channels, but this model knows dna alone"):
        pipe(field)


def test_mistakes_are_refused_in_a_sentence():
    pipe, combined = make_pipeline(), make_pipeline(CHANNELS)
    (field,) = make_fields(1, 3)
    for call, words in [
        (lambda: pipe(field[:2]), "has 2 channels, but this model takes 1 .dna."),
        (lambda: combined(field[0]), "has 1 channels, but this model takes 3 .dna, tubulin, actin."),
        (lambda: pipe({"actin": field[0]}), "actin was given, .* trained on dna"),
        (lambda: pipe(field[:1, :50]), "50x90 pixels .* at least 64x64"),
        (lambda: pipe(field[0], outputs="tokens"), "outputs must be one of"),
        (lambda: pipe(field[0], tiles="none"), "tiles must be one of"),
        (lambda: pipe(field[0], symmetries=3), "symmetries must be one of 1, 4, 8"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="poool"):
        pipe(field[0], poool=True)


class Screen(torch.utils.data.Dataset):
    """A dataset with two channels, as `datasets` gives them."""

    column_names = ["dna", "actin", "well"]

    def __init__(self):
        self.fields = make_fields(3, 2)

    def __len__(self):
        return len(self.fields)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return {"dna": self.fields[index][0], "actin": self.fields[index][1], "well": "B02"}


def test_another_channels_column_is_refused():
    pipe = make_pipeline()
    assert np.shape(list(pipe(KeyDataset(Screen(), "dna"), batch_size=2))) == (3, 32)
    with pytest.raises(ValueError, match=r"column actin .* trained on dna: give KeyDataset\(dataset, 'dna'\)"):
        pipe(KeyDataset(Screen(), "actin"))


def test_a_dataset_of_several_channels_needs_no_key():
    screen = Screen()
    combined = make_pipeline(["dna", "actin"])
    expected = [combined(field) for field in screen.fields]
    np.testing.assert_allclose(list(combined(screen, batch_size=2)), expected, atol=1e-5)
    pictures = {name: [Image.fromarray(row[name]) for row in screen] for name in ("actin", "dna")}
    features = Features({"actin": ImageFeature(), "dna": ImageFeature(), "well": Value("string")})
    table = Dataset.from_dict(pictures | {"well": ["B02"] * 3}, features=features)
    np.testing.assert_allclose(list(combined(table, batch_size=2)), expected, atol=1e-5)
    np.testing.assert_allclose(list(combined(table.to_iterable_dataset(), batch_size=2)), expected, atol=1e-5)
    with pytest.raises(ValueError, match="columns actin, well, but this model needs dna"):
        combined(table.remove_columns("dna"))
    with pytest.raises(ValueError, match="the dataset has the splits train, test: give one of them"):
        combined(DatasetDict(train=table, test=table))


def test_a_column_of_a_dataset_is_streamed():
    pipe, screen = make_pipeline(), Screen()
    pictures = {name: [Image.fromarray(row[name]) for row in screen] for name in ("actin", "dna")}
    table = Dataset.from_dict(pictures, features=Features({"actin": ImageFeature(), "dna": ImageFeature()}))
    expected = [pipe(row["dna"]) for row in screen]
    for source in (table, table.to_iterable_dataset()):
        np.testing.assert_allclose(list(pipe(source["dna"], batch_size=2)), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"column actin .* trained on dna: give KeyDataset\(dataset, 'dna'\)"):
        pipe(table["actin"])
