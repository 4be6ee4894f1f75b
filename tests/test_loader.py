"""wsdino.loader: little shared memory, dead loader processes and signals to the whole group never end in a wait."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

import train_accelerate
from wsdino import loader
from wsdino.errors import UserError
from wsdino.loader import batches, check_shared_memory, shared_bytes, worker_count

ROOT = Path(__file__).parents[1]
Usage = namedtuple("Usage", "total used free")
LAUNCH = [
    *("-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]


@pytest.mark.parametrize(("asked", "device", "expected"), [(3, "cpu", 3), (None, "cpu", 0), (0, "cuda", 0)])
def test_workers(asked, device, expected):
    assert worker_count(asked, torch.device(device)) == expected
    assert 1 <= worker_count(None, torch.device("cuda")) <= 8


def test_bytes_of_a_batch():
    batch = {
        "a": torch.zeros(3, 5, dtype=torch.uint16),
        "b": [torch.zeros(2), {"c": torch.zeros(1, dtype=torch.bool)}],
    }
    assert shared_bytes({**batch, "fallbacks": {"self": 3}}) == 30 + 8 + 1


@pytest.mark.parametrize(
    ("megabytes", "workers", "fits"), [(0.256, 1, False), (64, 8, False), (64, 0, True), (900, 8, True)]
)
def test_little_shared_memory_is_named_with_the_ways_out(monkeypatch, megabytes, workers, fits):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, int(megabytes * 1e6)))
    monkeypatch.setattr(loader, "SHARED_MEMORY", Path("/"))
    batch = {"windows": torch.zeros(5_000_000, dtype=torch.uint16)}
    if fits:
        return check_shared_memory(batch, workers, 1, "num_workers")
    with pytest.raises(UserError) as refused:
        check_shared_memory(batch, workers, 1, "num_workers")
    for word in (f"{megabytes:.1f} MB", f"{36 * workers + 1} MB", "--shm-size", "--ipc=host", "--num_workers 0"):
        assert word in str(refused.value)


class Deadly(Dataset):
    """Its fourth item ends the process that asks for it."""

    def __len__(self):
        return 8

    def __getitem__(self, row):
        if row == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1)


def test_a_killed_loader_process_is_one_sentence():
    with pytest.raises(UserError, match="--num_workers 0"):
        list(batches(DataLoader(Deadly(), num_workers=1), "num_workers"))


def test_other_errors_of_a_loader_stay_defects():
    with pytest.raises(RuntimeError, match="mine") as raised:
        list(batches((_ for _ in ()).throw(RuntimeError("mine")), "num_workers"))
    assert not isinstance(raised.value, UserError)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["256k", "64m"])
def test_training_in_a_container_of_little_shared_memory(tiny_screen, tmp_path, size):
    """In a mount namespace of its own: works, or one sentence within seconds."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no mount namespace")
    words = [
        sys.executable,
        "train_accelerate.py",
        "--dataset",
        str(tiny_screen),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    words += [*SMALL, "--dataloader_num_workers", "2"]
    script = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec " + " ".join(words)
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    if size == "64m":
        assert done.returncode == 0, done.stderr
    else:
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and "/dev/shm" in last and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kind"), [(1, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_to_the_whole_group_leaves_a_checkpoint(tiny_screen, tmp_path, processes, kind):
    """As clusters and terminals send it: to launcher, training and loader processes. It resumes to the bit."""
    flags = ["--dataset", str(tiny_screen), *SMALL, "--num_train_epochs", "400", "--max_steps", "150"]
    flags += ["--logging_steps", "1", "--dataloader_num_workers", "1", "--num_threads", "1"]
    flags += ["--per_device_train_batch_size", str(4 // processes), "--koleo_weight", "0"]

    def begin(run, *more):
        words = ["train_accelerate.py", *flags, "--output_dir", str(run), *more]
        return subprocess.Popen(
            [sys.executable, *(LAUNCH if processes > 1 else []), *words],
            cwd=ROOT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    stopped, log = begin(tmp_path / "stopped"), tmp_path / "stopped" / "dna" / "metrics.jsonl"
    while stopped.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 3):
        time.sleep(0.05)
    # torchrun gives each rank a session of its own.
    ranks = [stopped.pid] if processes == 1 else children(stopped.pid)
    for group in {stopped.pid, *ranks}:
        os.killpg(group, kind)
    said, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 130 or processes > 1, said
    assert "--resume continues" in said and "DataLoader worker" not in said
    (checkpoint,) = (tmp_path / "stopped" / "dna" / "checkpoints").glob("step_*[0-9]")
    assert 3 <= int(checkpoint.name.removeprefix("step_")) < 150
    for run, more in (("stopped", ["--resume"]), ("whole", [])):
        process = begin(tmp_path / run, *more)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
    models = (tmp_path / run / "dna" / "model" / "model.safetensors" for run in ("whole", "stopped"))
    whole, resumed = map(load_file, models)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def children(parent):
    """Direct children of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_the_first_step_of_a_run_refuses_too_many_workers(tiny_screen, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1000))
    words = ["--dataset", tiny_screen, "--output_dir", tmp_path / "run", *SMALL, "--dataloader_num_workers", "2"]
    with pytest.raises(SystemExit) as ended:
        train_accelerate.main([str(word) for word in words])
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
