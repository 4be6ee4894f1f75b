"""The preset for single cells by its real command: a dataset of small crops to a model that takes them as they are."""

import datasets
import numpy as np
import pytest
from transformers import pipeline

import train_accelerate

SMALL = [
    *(
        "--hidden_size",
        "32",
        "--num_hidden_layers",
        "2",
        "--num_attention_heads",
        "2",
        "--per_device_train_batch_size",
        "8",
    ),
    *("--num_prototypes", "16", "--head_hidden_dim", "32", "--head_bottleneck_dim", "16"),
    *("--logging_steps", "1"),
]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Forty crops of 68 x 68 pixels, five per gene: a bright blob whose width depends on the gene."""
    random = np.random.default_rng(0)
    axis = np.arange(68) - 33.5
    square = axis[:, None] ** 2 + axis**2
    planes = []
    for row in range(40):
        blob = 6000 * np.exp(-square / (2 * (4 + 2 * (row % 8)) ** 2))
        planes.append(np.clip(600 + blob + random.normal(0, 60, (68, 68)), 0, 65535).astype(np.uint16))
    folder = tmp_path_factory.mktemp("cells") / "genes"
    features = datasets.Features({"er": datasets.Image(), "gene": datasets.Value("string")})
    table = {"er": planes, "gene": [f"gene {row % 8}" for row in range(40)]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(folder / "data" / "train.parquet")
    return folder


def train(folder, output, *flags):
    train_accelerate.main(
        [
            "--preset",
            "cells",
            "--dataset",
            str(folder),
            "--subset",
            "default",
            "--channels",
            "er",
            "--weak_label",
            "gene",
        ]
        + ["--output_dir", str(output), *SMALL, *flags]
    )


@pytest.mark.parametrize("label", ["gene", "none"])
def test_cells_train_and_their_model_takes_a_cell_without_further_settings(cells, tmp_path, label):
    train(cells, tmp_path / "run", "--weak_label", label, "--max_steps", "3")
    extract = pipeline("feature-extraction", model=str(tmp_path / "run" / "er" / "model"), trust_remote_code=True)
    cell = np.random.default_rng(1).integers(300, 20_000, (68, 68), dtype=np.uint16)
    features = np.array(extract(cell))
    assert features.shape[-1] == 32 and np.isfinite(features).all()
    processor = extract.image_processor
    assert (processor.tile_size, processor.tile_grid, processor.symmetries) == (64, 1, 4)
    # The mean over the identity, a mirror image, a quarter turn and a half turn: a half turn exchanges two of them.
    assert not np.allclose(features, np.array(extract(np.roll(cell, 9, axis=0))), atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--group_size", "3"], "--group_size"),
        (["--unlabelled", "self"], "--group_size"),
        (["--symmetries", "2"], "--symmetries"),
        (["--local_crops", "0", "--global_crops", "2"], "--student_sees_globals"),
        (["--whiten_patches"], "--whiten_patches"),
        (["--tile_grid", "2"], "--tile_grid"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(cells, tmp_path, capsys, flags, named):
    with pytest.raises(SystemExit) as stopped:
        train(cells, tmp_path / "run", *flags)
    assert stopped.value.code == 2 and named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
