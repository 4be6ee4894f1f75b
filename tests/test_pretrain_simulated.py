"""wsdino-pretrain: the cache of drawn cells, and a start that training takes."""

import json

import numpy as np
import pytest
import torch

import pretrain_simulated
from dataset_scripts.simulator import drawn_cells
from dataset_scripts.simulator.drawn_cells import DrawingSettings, draw_cells, open_drawn_cells
from dataset_scripts.simulator.phenotypes import Phenotype
from modeling_wsdino import WSDinoModel
from wsdino.errors import UserError

SMALL = DrawingSettings(phenotypes=6, cells=2)


def test_a_phenotypes_cells_depend_on_the_seed_and_its_number_alone(tmp_path):
    whole, alone = drawn_cells.draw_part(SMALL, 0), drawn_cells.draw_part(DrawingSettings(phenotypes=3, cells=2), 0)
    rows = whole["phenotype"] < 3
    for name in ("dna", "tubulin", "actin", "phenotype", "optics"):
        assert np.array_equal(whole[name][rows], alone[name])
    assert not np.array_equal(whole["numbers"], drawn_cells.draw_part(DrawingSettings("ranges", 6, 2), 0)["numbers"])


def test_a_cache_is_completed_and_one_of_other_settings_refused(tmp_path):
    folder = tmp_path / "cells"
    draw_cells(folder, SMALL)
    first = open_drawn_cells(folder, "actin")
    assert first.planes.dtype == np.uint16 and first.planes.shape[1:] == (68, 68)
    assert set(first.optics) == {0, 1} and first.numbers.shape == (6, len(Phenotype.__dataclass_fields__))
    assert all(np.sum(first.phenotype[first.optics == 0] == index) <= 2 for index in range(6))
    (folder / "part-00000.npz").unlink()
    with pytest.raises(UserError, match="part-00000.npz"):
        open_drawn_cells(folder, "actin")
    draw_cells(folder, SMALL)
    assert np.array_equal(open_drawn_cells(folder, "actin").planes, first.planes)
    with pytest.raises(UserError, match="phenotypes"):
        draw_cells(folder, DrawingSettings(phenotypes=7, cells=2))
    with pytest.raises(UserError, match="golgi"):
        open_drawn_cells(folder, "golgi")


def test_the_command_writes_a_start_that_loads(tmp_path, capsys):
    words = ["--output_dir", tmp_path / "run", "--drawn_cells", tmp_path / "cells", "--phenotypes", 8, "--cells", 2]
    words += [
        "--per_device_train_batch_size",
        8,
        "--num_train_steps",
        3,
        "--hidden_size",
        12,
        "--num_hidden_layers",
        1,
    ]
    words += ["--channels", "dna", "--draw_processes", 1, "--logging_steps", 1]
    pretrain_simulated.main([str(word) for word in words])
    model = WSDinoModel.from_pretrained(tmp_path / "run" / "dna" / "model")
    assert model(torch.zeros(1, 1, 64, 64)).pooler_output.shape == (1, 12)
    lines = [json.loads(line) for line in (tmp_path / "run" / "dna" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(np.isfinite(line["loss"]) for line in lines)
    assert "simulated" in (tmp_path / "run" / "dna" / "model" / "README.md").read_text()
    pretrain_simulated.main([str(word) for word in words])
    assert "already trained" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        pretrain_simulated.main([*[str(word) for word in words], "--channels", "golgi"])
    assert ended.value.code == 2 and "golgi" in capsys.readouterr().err
