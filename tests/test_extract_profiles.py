"""Extraction against plain loops, of runs and of any network; other tools read what it writes; what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from extraction_run import (
    CHANNELS,
    SIZE,
    extract,
    features_of,
    make_model,
    plain_features,
    refused,
    screen_rows,
    small_dataset,
)
from PIL import Image
from safetensors.torch import save_file

from dataset_scripts.open_dataset import METADATA
from evaluation_wsdino.baselines import nuclear_features
from modeling_wsdino import WSDinoConfig, WSDinoImageProcessor, WSDinoModel, build_repository


@pytest.fixture
def run(random_run, tmp_path):
    """A copy of the run to write into."""
    return Path(shutil.copytree(random_run, tmp_path / "run"))


# ------------------------------------------------------------------------------------------- what is extracted


def test_every_set_of_a_run_equals_a_plain_loop(run, tiny_screen):
    (run / "profiles").mkdir()
    (run / "profiles" / "count.parquet").write_bytes(b"the set nuclei of an earlier version")
    extract(run, "--batch_size", 7, "--shard_fields", 30)
    names = ["intensity", "nuclei", "trained", "untrained"]
    assert sorted(path.name for path in (run / "profiles").iterdir()) == [f"{name}.parquet" for name in names]
    tables = {name: pd.read_parquet(run / "profiles" / f"{name}.parquet") for name in names}
    rows = list(screen_rows(tiny_screen))
    for name, table in tables.items():
        assert len(table) == len(rows), name
        for column, metadata in METADATA.items():
            assert table[f"Metadata_{metadata}"].tolist() == [row[column] for row in rows], (name, column)
    torch.manual_seed(5)
    random = WSDinoModel(WSDinoConfig(**SIZE)).eval()
    for channel in CHANNELS:
        trained = WSDinoModel.from_pretrained(run / channel / "model").eval()
        expected = np.stack([plain_features(trained, row[channel]) for row in rows])
        np.testing.assert_allclose(features_of(tables["trained"], channel), expected, atol=2e-4)
        expected = np.stack([plain_features(random, row[channel]) for row in rows[:5]])
        np.testing.assert_allclose(features_of(tables["untrained"], channel)[:5], expected, atol=2e-4)
    assert features_of(tables["trained"]).columns.tolist() == [f"{c}_{i:04d}" for c in CHANNELS for i in range(32)]
    assert (features_of(tables["trained"]).dtypes == np.float32).all()


def test_sets_without_a_network_load_none_but_for_the_pictures(run, monkeypatch):
    from modeling_wsdino import run_networks

    loaded = []
    load = run_networks.load_backbone
    monkeypatch.setattr(run_networks, "load_backbone", lambda source, **more: (loaded.append(source), load(source))[1])
    extract(run, "--sets", "intensity", "nuclei", "trained", "untrained")
    assert loaded == [run / channel / "model" for channel in CHANNELS], "each once"


def test_intensity_features_against_a_second_library(run, tiny_screen):
    from scipy import stats

    extract(run, "--sets", "intensity")
    table = pd.read_parquet(run / "profiles" / "intensity.parquet")
    for number, row in enumerate(list(screen_rows(tiny_screen))[:6]):
        for channel in CHANNELS:
            scaled = row[channel].astype(np.float64).ravel() / 10_000
            scores = stats.scoreatpercentile(scaled, [1, 5, 25, 50, 75, 95, 99])
            clipped = sum(value > 1 for value in scaled.tolist()) / scaled.size
            expected = [scaled.mean(), scaled.std(), stats.skew(scaled), *scores, clipped]
            np.testing.assert_allclose(features_of(table, channel).iloc[number], expected, rtol=2e-4)


def test_checkpoints_of_all_channels(run, tiny_screen, capsys):
    """Teachers of the steps that every channel keeps; student, head and the steps of one channel are left alone."""
    teachers = {}
    for number, channel in enumerate(CHANNELS):
        for step in (20, 40) if channel == "actin" else (10, 20, 40):
            folder = run / channel / "checkpoints" / f"step_{step:08d}"
            folder.mkdir(parents=True)
            for seed, file in ((1, "model"), (2, "model_1")):
                teacher = make_model([channel], seed + 10 * step + 100 * number)
                state = {f"backbone.{name}": tensor for name, tensor in teacher.state_dict().items()}
                save_file(state | {"head.mlp.0.weight": torch.zeros(3)}, folder / f"{file}.safetensors")
            teachers[channel, step] = teacher
    (run / "dna" / "checkpoints" / "step_00000050.partial").mkdir()
    extract(run, "--sets", "trained", "--checkpoints")
    paths = sorted((run / "profiles" / "checkpoints").iterdir())
    assert [path.name for path in paths] == ["step_00000020.parquet", "step_00000040.parquet"]
    rows = list(screen_rows(tiny_screen))[:4]
    for path, step in zip(paths, (20, 40), strict=True):
        table = pd.read_parquet(path)
        for channel in CHANNELS:
            expected = np.stack([plain_features(teachers[channel, step], row[channel]) for row in rows])
            np.testing.assert_allclose(features_of(table, channel)[:4], expected, atol=2e-4)
    with open(run / "actin" / "checkpoints" / "step_00000020" / "model_1.safetensors", "r+b") as file:
        file.truncate(500)
    assert "step_00000020" in refused(capsys, run, "--sets", "trained", "--checkpoints")


def test_nuclei_are_of_the_nuclear_stain_whatever_was_trained(run, tiny_screen, tmp_path, capsys):
    path = run / "profiles" / "nuclei.parquet"
    extract(run, "--sets", "count", "--channels", "tubulin")  # its name in earlier versions
    assert "nuclei" in capsys.readouterr().err
    table = pd.read_parquet(path)
    rows = list(screen_rows(tiny_screen))
    assert features_of(table).columns.tolist() == [f"dna_{index:04d}" for index in range(10)]
    assert table["Metadata_Well"].tolist() == [row["well"] for row in rows]
    for number in range(0, len(rows), 7):
        expected = nuclear_features(rows[number]["dna"], 10_000)
        np.testing.assert_array_equal(features_of(table).iloc[number], expected)
    extract(run, "--sets", "nuclei", "--nuclear_channel", "actin")
    assert features_of(pd.read_parquet(path)).columns[0] == "actin_0000"
    assert "--nuclear_channel lipids" in refused(capsys, run, "--nuclear_channel", "lipids")
    # A screen without a column dna is not counted in another stain unasked.
    kept = ("tubulin", *METADATA)
    features = Features({name: ImageFeature() if name == "tubulin" else Value("string") for name in kept})
    content = {name: [row[name] if name == "tubulin" else str(row[name]) for row in rows[:4]] for name in kept}
    (tmp_path / "other").mkdir()
    Dataset.from_dict(content, features=features).to_parquet(tmp_path / "other" / "train.parquet")
    path.unlink()
    words = ("--dataset", tmp_path / "other", "--parts", "default", "--channels", "tubulin")
    extract(run, *words, "--sets", "nuclei", "intensity")
    assert "--nuclear_channel" in capsys.readouterr().out and not path.exists()
    assert len(pd.read_parquet(run / "profiles" / "intensity.parquet")) == 4


def test_tiles_of_the_whole_field(run, tiny_screen):
    extract(run, "--sets", "trained", "--channels", "dna", "--tiles", "full")
    table = pd.read_parquet(run / "profiles" / "trained.parquet")
    model = WSDinoModel.from_pretrained(run / "dna" / "model").eval()
    corners = [(top, left) for top in (0, 32) for left in (0, 24, 48)]
    for number, row in enumerate(list(screen_rows(tiny_screen))[:6]):
        expected = plain_features(model, row["dna"], corners)
        np.testing.assert_allclose(features_of(table).iloc[number], expected, atol=2e-4)


def test_fields_smaller_than_the_grid_of_tiles(run, tmp_path, capsys):
    """All of such a field fits in tiles; statistics need none, and pictures show as much as there is."""
    rng = np.random.default_rng(0)
    planes = [rng.integers(0, 12_000, (44, 50)).astype(np.uint16) for _ in range(3)]
    words = (run, "--dataset", small_dataset(tmp_path / "small", planes), "--subsets", "all", "--channels", "dna")
    assert "at least 64x64" in refused(capsys, *words, "--sets", "trained")
    extract(*words, "--sets", "intensity", "nuclei")
    extract(*words, "--sets", "trained", "--tiles", "full")
    profiles = {name: pd.read_parquet(run / "profiles" / f"{name}.parquet") for name in ("trained", "nuclei")}
    model = WSDinoModel.from_pretrained(run / "dna" / "model").eval()
    for number, plane in enumerate(planes):
        expected = plain_features(model, plane, [(top, left) for top in (0, 12) for left in (0, 18)])
        np.testing.assert_allclose(features_of(profiles["trained"]).iloc[number], expected, atol=2e-4)
        np.testing.assert_array_equal(features_of(profiles["nuclei"]).iloc[number], nuclear_features(plane, 10_000))
    assert {path.name for path in (run / "pictures").iterdir()} == {"fields_dna.png", "attention_dna.png"}


def test_half_precision_is_close_and_another_set(run):
    extract(run, "--sets", "trained", "--channels", "dna")
    path = run / "profiles" / "trained.parquet"
    exact = features_of(pd.read_parquet(path)).to_numpy()
    extract(run, "--sets", "trained", "--channels", "dna", "--precision", "bf16")
    half = features_of(pd.read_parquet(path)).to_numpy()
    assert half.dtype == np.float32
    assert 0 < np.abs(half - exact).max() < 0.1 * np.abs(exact).max()


def test_original_code_tiles_take_the_lower_median(tmp_path, capsys):
    rng = np.random.default_rng(0)
    planes = [rng.integers(0, 12_000, (512, 640)).astype(np.uint16) for _ in range(2)]
    dataset = small_dataset(tmp_path / "large", planes)
    model = make_model(["dna"])
    build_repository(tmp_path / "model", model, WSDinoImageProcessor(tile_size=32))
    words = (
        "--model",
        tmp_path / "model",
        "--dataset",
        dataset,
        "--subsets",
        "all",
        "--output",
        tmp_path / "p.parquet",
    )
    extract(*words, "--tiles", "original_code")
    table = pd.read_parquet(tmp_path / "p.parquet")
    for number, plane in enumerate(planes):
        tokens = []
        for top, left, width in ((32, 64, 256), (32, 320, 224), (256, 64, 256), (256, 320, 224)):
            tile = np.minimum(plane[top : top + 224, left : left + width] / 10_000, 1)
            with torch.no_grad():
                tokens.append(model(torch.tensor(tile, dtype=torch.float32)[None, None]).pooler_output[0])
        expected = torch.stack(tokens).median(dim=0).values
        np.testing.assert_allclose(features_of(table).iloc[number], expected, atol=2e-4)
    sizes = [np.zeros((64, 80), np.uint16)]
    other = small_dataset(tmp_path / "small", sizes)
    said = refused(capsys, *words, "--tiles", "original_code", "--dataset", other)
    assert "512x640" in said


def test_pycytominer_and_copairs_read_the_file_as_it_is(run):
    pytest.importorskip("pycytominer", reason="the oldest supported packages are older than its own")
    from copairs.map import average_precision
    from pycytominer import aggregate, feature_select, normalize
    from pycytominer.cyto_utils import infer_cp_features

    extract(run, "--sets", "trained")
    path = str(run / "profiles" / "trained.parquet")
    table = pd.read_parquet(path)
    assert infer_cp_features(table, metadata=True) == [f"Metadata_{name}" for name in METADATA.values()]
    names = features_of(table).columns.tolist()
    control = (table["Metadata_Compound"] == "DMSO").to_numpy()
    normalized = normalize(path, features=names, samples="Metadata_Compound == 'DMSO'", method="standardize")
    values = table[names].to_numpy(np.float64)
    expected = (values - values[control].mean(0)) / values[control].std(0)
    np.testing.assert_allclose(normalized[names], expected, rtol=1e-3, atol=1e-3)
    strata = ["Metadata_Plate", "Metadata_Well", "Metadata_Treatment", "Metadata_MOA"]
    wells = aggregate(normalized, strata=strata, features=names, operation="median")
    assert len(wells) == len(table[strata].drop_duplicates())
    one = wells.iloc[0]
    rows = (table[strata] == one[strata]).all(axis=1).to_numpy()
    np.testing.assert_allclose(one[names].astype(float), np.median(expected[rows], axis=0), rtol=1e-3, atol=1e-3)
    selected = feature_select(wells, features=names, operation=["variance_threshold", "correlation_threshold"])
    kept = [column for column in selected if column in names]
    assert 0 < len(kept) <= len(names) and len(selected) == len(wells)
    treated = wells[wells["Metadata_Treatment"] != "DMSO"].reset_index(drop=True)
    scores = average_precision(
        treated[strata],
        treated[names].to_numpy(),
        pos_sameby=["Metadata_MOA"],
        pos_diffby=["Metadata_Well"],
        neg_sameby=[],
        neg_diffby=["Metadata_MOA"],
        progress_bar=False,
    )
    assert scores["average_precision"].notna().any()


# ------------------------------------------------------------------------------------------- bad input


def test_bad_input_ends_in_one_sentence_and_writes_nothing(run, tiny_screen, tmp_path, capsys):
    output = tmp_path / "out" / "p.parquet"
    model = ("--model", run / "dna" / "model")
    common = ("--dataset", tiny_screen, "--output", output)
    small = small_dataset(tmp_path / "tiny", [np.zeros((40, 50), np.uint16)])
    eight = small_dataset(tmp_path / "eight", [np.zeros((64, 80), np.uint8)] * 2)
    empty = small_dataset(tmp_path / "empty", [])
    twice = small_dataset(tmp_path / "twice", [np.zeros((64, 80), np.uint16)] * 2)
    mixed = small_dataset(tmp_path / "mixed", [np.zeros((64, 80), np.uint16), np.zeros((64, 82), np.uint16)])
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "other.parquet").write_text("someone's notes")
    damaged = Path(shutil.copytree(run / "dna" / "model", tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:300])
    every = ("--subsets", "all", "--output", output)
    cases = {  # what the sentence names
        (): "--model",
        (tmp_path / "absent",): "settings.json",
        (run, "--model", "x"): "--model",
        (run, "--output", output): "--output",
        (run, "--sets", "imagined"): "imagined",
        (run, "--batch_size", 0): "--batch_size",
        (run, "--channels", "lipids"): "--channels lipids",
        (run, "--device", "nonsense"): "--device nonsense",
        (*model,): "--dataset",
        ("--model", tmp_path / "absent", *common): "absent",
        ("--model", damaged, *common): "damaged",
        ("--model", "nobody/nothing", *common): "nobody/nothing",
        ("--model", run / "model", "--dataset", twice, *every): "tubulin",
        (*model, *common, "--channels", "actin"): "--channels actin",
        (*model, "--dataset", tmp_path / "absent", "--output", output): "absent",
        (*model, *common, "--subsets", "weird"): "weird",
        (*model, *common, "--subsets", "dmso", "all"): "twice",
        (*model, "--dataset", small, *every): "40x50",
        (*model, "--dataset", eight, *every): "8-bit",
        (*model, "--dataset", empty, *every): "empty",
        (*model, "--dataset", tiny_screen, "--output", tmp_path / "file" / "p.parquet"): "file/p.parquet",
        (*model, "--dataset", tiny_screen, "--output", tmp_path / "other.parquet"): "other.parquet",
        (*model, "--dataset", tiny_screen, "--output", tmp_path): str(tmp_path),
        (*model, *common, "--pictures", tmp_path / "file"): str(tmp_path / "file"),
        (*model, *common, "--pictures", tmp_path / "file" / "pictures"): str(tmp_path / "file"),
    }
    for words, named in cases.items():
        assert named in refused(capsys, *words), words
        assert not output.exists() and not output.parent.exists(), words
    assert (tmp_path / "other.parquet").read_text() == "someone's notes"
    for workers in (0, 1):  # found while extracting: whole parts stay, no profile file comes to be
        said = refused(capsys, *model, "--dataset", mixed, *every, "--num_workers", workers)
        assert said.startswith("wsdino-extract: error: row 1: dna is uint16 of shape (64, 82)")
        assert not output.exists()
    (run / "pictures").write_text("not a folder")
    assert str(run / "pictures") in refused(capsys, run, "--sets", "intensity") and not (run / "profiles").exists()


def test_a_dataset_that_says_nothing_of_its_fields(tmp_path, capsys):
    """It trains by any label; profiles without a column to know them by would be of no use."""
    planes = [Image.fromarray(np.full((32, 32), i, np.uint16)) for i in range(2)]
    dataset = Dataset.from_dict({"er": planes, "gene": ["a", "b"]}).cast_column("er", ImageFeature())
    (tmp_path / "own").mkdir()
    dataset.to_parquet(tmp_path / "own" / "train.parquet")
    words = ("--dataset", str(tmp_path / "own"), "--subsets", "default", "--output", str(tmp_path / "p.parquet"))
    build_repository(tmp_path / "model", make_model(["er"]), WSDinoImageProcessor(tile_size=32))
    with pytest.raises(SystemExit) as ended:
        extract("--model", str(tmp_path / "model"), *words)
    assert ended.value.code == 2
    assert "has none of the columns batch, compound, " in capsys.readouterr().err
    assert not (tmp_path / "p.parquet").exists()
