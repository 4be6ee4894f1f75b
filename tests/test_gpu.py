"""What only a GPU can show; without one these tests are skipped. `make gpu` runs them and then the benchmarks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import SMALL
from safetensors.torch import load_file
from training_run import channel_run, micro_batches

import train_accelerate
from benchmarks import gpu

ROOT = Path(__file__).parents[1]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine")
# Largest differences of a step's loss from eager float32 on the CPU.
BOUNDS = [
    ({}, 1e-5),
    ({"tf32": True}, 2e-2),
    ({"mixed_precision": "bf16"}, 5e-2),
    ({"mixed_precision": "fp16"}, 2e-2),
    ({"compile": True}, 1e-4),
    ({"mixed_precision": "bf16", "compile": True}, 5e-2),
    ({"gradient_checkpointing": True}, 1e-5),
]


def losses(folder, device, steps=3, **changes):
    """Losses of the first steps on a device, in a state of their own."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    os.environ["ACCELERATE_USE_CPU"] = "true" if device == "cpu" else "false"
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = changes.get("tf32", False)
        run = channel_run(folder, drop_path_rate=0.0, **changes)
        assert run.accelerator.device.type == device
        return [float(run.step(step, micro_batches(run, step))["loss"]) for step in range(steps)]
    finally:
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        del os.environ["ACCELERATE_USE_CPU"]


@on_gpu
@pytest.mark.parametrize(
    ("changes", "bound"), BOUNDS, ids=lambda value: " ".join(value) if isinstance(value, dict) else ""
)
def test_steps_equal_the_cpu_s(tmp_path, changes, bound):
    np.testing.assert_allclose(losses(tmp_path, "cuda", **changes), losses(tmp_path, "cpu"), atol=bound, rtol=bound)


@on_gpu
def test_nothing_waits_for_the_device_inside_a_step(tmp_path):
    """Copies from pinned memory may start; a synchronisation raises."""
    run = channel_run(tmp_path, centering="sinkhorn", koleo_weight=0.1)
    made = run._batches(0)
    run.step(0, next(made))  # what is cached is made now
    batch = next(made)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step(1, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_stopped_run_resumes(tiny_screen, tmp_path):
    words = ["--dataset", str(tiny_screen), *SMALL, "--num_train_epochs", "2", "--logging_steps", "1"]
    train_accelerate.main([*words, "--output_dir", str(tmp_path / "parts"), "--max_steps", "2"])
    train_accelerate.main([*words, "--output_dir", str(tmp_path / "parts"), "--max_steps", "4", "--resume"])
    train_accelerate.main([*words, "--output_dir", str(tmp_path / "whole"), "--max_steps", "4"])
    whole, parts = (load_file(tmp_path / run / "dna" / "model" / "model.safetensors") for run in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-5, rtol=1e-4)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tiny_screen, tmp_path):
    words = ["train_accelerate.py", "--dataset", str(tiny_screen), *SMALL, "--koleo_weight", "0", "--max_steps", "3"]
    for processes in (1, 2):
        launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", str(processes)]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--multi_gpu"] * (processes > 1)
        more = ["--output_dir", str(tmp_path / str(processes)), "--logging_steps", "1"]
        more += ["--per_device_train_batch_size", str(4 // processes)]
        subprocess.run([sys.executable, *launch, *words, *more], cwd=ROOT, check=True)
    logs = [(tmp_path / str(n) / "dna" / "metrics.jsonl").read_text().splitlines() for n in (1, 2)]
    one, two = ([json.loads(line)["loss"] for line in log] for log in logs)
    np.testing.assert_allclose(one, two, rtol=1e-4)


@on_gpu
def test_extraction_equals_the_cpu_s(tiny_screen, tmp_path, finished_run):
    import pandas as pd

    import extract_profiles

    for device in ("cpu", "cuda"):
        extract_profiles.main(
            ["--model", str(finished_run / "dna" / "model"), "--dataset", str(tiny_screen), "--device", device]
            + ["--output", str(tmp_path / f"{device}.parquet"), "--channels", "dna"]
        )
    one, other = (pd.read_parquet(tmp_path / f"{device}.parquet") for device in ("cpu", "cuda"))
    names = [name for name in one if name.startswith("dna_")]
    np.testing.assert_allclose(one[names], other[names], atol=1e-4)


@on_gpu
@pytest.mark.parametrize(("preset", "most"), [("paper", 40), ("fast", 40), ("demo", 4), ("cells", 4)])
def test_peak_memory_of_each_preset(tmp_path, preset, most):
    """GiB for one step from random weights, on noise of the paper's size."""
    from dataclasses import replace

    from benchmarks.train_step import batches, make_run, screen

    torch.cuda.reset_peak_memory_stats()
    settings = train_accelerate.parse(
        ["--preset", preset, "--init", "random", "--channels", "dna", "--weak_label", "compound"]
    )
    plain = replace(settings, mixed_precision="no", pair_constraint="image", anchor_group="none")
    run = make_run(plain, screen(256), str(tmp_path))
    run.step(0, batches(run, 1))
    assert torch.cuda.max_memory_allocated() < most * 2**30


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_walks_through_on_a_cpu(tmp_path, capsys):
    gpu.main(["--device", "cpu", "--small", "--output", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    most = len(gpu.CASES) if torch.cpu._is_avx512_bf16_supported() else 3
    assert len(found["cases"]) == most and all(case["seconds"] > 0 for case in found["cases"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2 and "no GPU" in capsys.readouterr().err
