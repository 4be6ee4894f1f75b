"""What happens when things go wrong: killed runs, killed processes, half-written files, full disks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import load_dataset
from safetensors import SafetensorError
from safetensors.torch import load_file

import train_accelerate
from benchmarks.kill_and_resume import FLAGS, kill_and_resume
from pretraining_wsdino import metrics_log

ROOT = Path(__file__).parents[1]


def weights(run):
    return load_file(run / "dna" / "model" / "model.safetensors")


def train(screen, run, *flags):
    train_accelerate.main(["--dataset", str(screen), "--output_dir", str(run), *FLAGS, *flags])


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(tmp_path):
    """Four kills here; `python -m benchmarks.kill_and_resume` does twenty and prints the count."""
    seen = kill_and_resume(tmp_path, kills=4, epochs=40, seed=1, longest=2.0)
    assert seen["kills"] >= 3


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_end_as_if_it_never_was(tmp_path):
    """The other ends by itself; started on two and finished on one, the losses are nearly the same."""
    seen = kill_and_resume(tmp_path, kills=3, epochs=20, seed=1, longest=4.0, processes=2)
    assert seen["kills"] >= 2 and seen["on_one"] < 1e-3


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_one_process_goes_on_with_the_same_batches(tiny_screen, tmp_path):
    """Rank 1 of two is killed: the launch ends by itself; one process with the same global batch finishes the run."""
    # Without KoLeo, whose neighbours are each process's own, and slowly: see test_two_processes_train_as_one.
    flags = ["--num_train_epochs", "16", "--drop_path_rate", "0", "--koleo_weight", "0", "--learning_rate", "1e-4"]
    train(tiny_screen, tmp_path / "whole", *flags)
    words = [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *("train_accelerate.py", "--dataset", str(tiny_screen), "--output_dir", str(tmp_path / "run"), *FLAGS, *flags),
        *("--per_device_train_batch_size", "2"),
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    checkpoints = tmp_path / "run" / "dna" / "checkpoints"
    while launch.poll() is None and not list(checkpoints.glob("step_*[0-9]")):
        time.sleep(0.05)
    ranks = [pid for pid in children(launch.pid) if environment_of(pid).get("RANK") == "1"]
    assert ranks, "the second process was not found"
    os.kill(ranks[0], signal.SIGKILL)
    _, said = launch.communicate(timeout=120)  # ends by itself instead of hanging
    assert launch.returncode != 0 and "SIGKILL" in said or "-9" in said
    assert not (tmp_path / "run" / "dna" / "model").exists()
    train(tiny_screen, tmp_path / "run", *flags, "--resume")
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, atol=1e-4, rtol=1e-2)


def children(pid):
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(entry.parent.name)
            found += [child, *children(child)]
    return found


def environment_of(pid):
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def test_a_half_written_log_line_and_leftovers_do_not_stop_a_resume(tiny_screen, tmp_path):
    flags = ["--num_train_epochs", "3"]
    train(tiny_screen, tmp_path / "whole", *flags)
    train(tiny_screen, tmp_path / "run", *flags, "--stop_after_epoch", "2")
    folder = tmp_path / "run" / "dna"
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 999, "partner_fallbacks": {"self": 0}')  # ends like a whole line
    leftover = folder / "checkpoints" / "step_99999999.partial"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    (tmp_path / "run" / "settings.json.partial").write_text('{"half')
    train(tiny_screen, tmp_path / "run", *flags, "--resume")
    assert all(
        torch.equal(tensor, weights(tmp_path / "run")[name]) for name, tensor in weights(tmp_path / "whole").items()
    )
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] < 999


def test_two_trainings_of_one_run_folder_do_not_harm_each_other(tiny_screen, tmp_path, capsys):
    """The second is refused while the first lives, also with --resume; killed, the first is gone on with at once."""
    words = ["--dataset", str(tiny_screen), "--output_dir", str(tmp_path / "run"), *FLAGS, "--num_train_epochs", "400"]
    first = subprocess.Popen(
        [sys.executable, "train_accelerate.py", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not list(tmp_path.glob("run/dna/checkpoints/step_*[0-9]")):
            assert first.poll() is None
            time.sleep(0.05)
        with pytest.raises(SystemExit) as ended:
            train_accelerate.main([*words, "--resume"])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert ended.value.code == 2 and "another training" in said and str(tmp_path / "run") in said
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    step = int(max(tmp_path.glob("run/dna/checkpoints/step_*[0-9]")).name.removeprefix("step_"))
    train_accelerate.main([*words, "--resume", "--max_steps", str(step + 1)])
    assert (tmp_path / "run" / "dna" / "model" / "model.safetensors").exists()


def test_a_second_run_that_began_at_the_same_moment_is_refused(tiny_screen, tmp_path, capsys, monkeypatch):
    """Both found no run in the folder; the other one was first to write there."""
    write = train_accelerate.recorded_run

    def as_the_other_begins(arguments):
        found = write(arguments)
        if not (tmp_path / "run").exists():
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "settings.json").write_text("{}")
        return found

    monkeypatch.setattr(train_accelerate, "recorded_run", as_the_other_begins)
    with pytest.raises(SystemExit) as ended:
        train(tiny_screen, tmp_path / "run")
    assert ended.value.code == 2 and "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "run" / "settings.json").read_text() == "{}"


def test_two_builds_of_one_dataset_folder_do_not_harm_each_other(tiny_raw, tmp_path, capsys, monkeypatch):
    """While the first is in the middle of its plates, a second one is refused; the first ends as if alone."""
    from dataset_scripts import prepare

    words = ["--raw", str(tiny_raw), "--output", str(tmp_path / "built"), "--workers", "1"]
    run, said = prepare.build_plates, []

    def while_another_starts(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "build_plates", run)
            with pytest.raises(SystemExit) as ended:
                prepare.main(words)
        said.append((ended.value.code, capsys.readouterr().err))
        run(*arguments)

    monkeypatch.setattr(prepare, "build_plates", while_another_starts)
    prepare.main(words)
    assert said[0][0] == 2 and "wsdino-prepare is building" in said[0][1]
    monkeypatch.setattr(prepare, "build_plates", run)
    prepare.main(["--raw", str(tiny_raw), "--output", str(tmp_path / "alone"), "--workers", "1"])
    first, alone = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.parquet")}
        for name in ("built", "alone")
    )
    assert first and first == alone


def test_a_folder_killed_before_its_settings_were_whole_starts_afresh(tiny_screen, tmp_path):
    (tmp_path / "settings.json.partial").write_text('{"half')
    train(tiny_screen, tmp_path, "--num_train_epochs", "2", "--max_steps", "1")
    assert (tmp_path / "dna" / "model" / "model.safetensors").exists()


def test_a_full_disk_during_a_checkpoint_leaves_the_last_one_whole(tiny_screen, tmp_path, monkeypatch, capsys):
    """The disk fills in the middle of the second checkpoint: one sentence, status 2, the first checkpoint resumes."""
    flags = ["--num_train_epochs", "4"]
    train(tiny_screen, tmp_path / "whole", *flags)
    saves = []
    write = Accelerator.save_state

    def fill(self, folder, **kwargs):
        saves.append(folder)
        if len(saves) == 2:
            Path(folder).mkdir(parents=True)
            (Path(folder) / "model.safetensors").write_bytes(b"half of it")
            raise OSError(28, "No space left on device", folder)
        return write(self, folder, **kwargs)

    monkeypatch.setattr(Accelerator, "save_state", fill)
    with pytest.raises(SystemExit) as ended:
        train(tiny_screen, tmp_path / "run", *flags)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "No space left on device" in said and "Traceback" not in said
    train(tiny_screen, tmp_path / "run", *flags, "--resume")
    assert all(
        torch.equal(tensor, weights(tmp_path / "run")[name]) for name, tensor in weights(tmp_path / "whole").items()
    )


@pytest.mark.parametrize("where", ["the log", "the model"])
def test_a_full_disk_at_the_end_is_told_in_a_sentence(tiny_screen, tmp_path, monkeypatch, capsys, where):
    """The errors of an open file and of the weights' writer name no file."""

    def fill(*_):
        raise OSError(28, "No space left on device") if where == "the log" else SafetensorError("no space left")

    log = (metrics_log, "json", SimpleNamespace(dumps=fill, loads=json.loads))
    model = (train_accelerate, "build_repository", fill)
    monkeypatch.setattr(*(log if where == "the log" else model))
    with pytest.raises(SystemExit) as ended:
        train(tiny_screen, tmp_path / "run", "--num_train_epochs", "1")
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and str(tmp_path / "run") in said and "no space left" in said.lower()
    assert "None" not in said


def test_no_pickle_of_a_checkpoint_is_executed(tiny_screen, tmp_path, capsys):
    """A checkpoint whose files were swapped for a pickle that runs code is named and skipped; nothing runs."""
    import pickle

    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'exploded'}",))

    train(tiny_screen, tmp_path / "run", "--num_train_epochs", "3", "--stop_after_epoch", "2")
    newest = sorted((tmp_path / "run" / "dna" / "checkpoints").iterdir())[-1]
    for file in ("optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl"):
        (newest / file).write_bytes(pickle.dumps(Bomb()))
    capsys.readouterr()
    train(tiny_screen, tmp_path / "run", "--num_train_epochs", "3", "--resume")
    assert f"{newest} is damaged and skipped" in capsys.readouterr().out
    assert not (tmp_path / "exploded").exists()


def test_a_full_disk_during_a_build_ends_in_a_sentence_and_the_build_goes_on_later(tiny_raw, tiny_screen, tmp_path):
    """The largest file that may be written stands for the disk: no plate of the screen fits."""
    resource = pytest.importorskip("resource")
    words = ["-m", "dataset_scripts.prepare", "--raw", tiny_raw, "--output", tmp_path / "built", "--workers", "1"]

    def build(largest):
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
        )

    done = build(20_000)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "error:" in done.stderr.splitlines()[-1] and "File too large" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "built" / "README.md").exists(), "half a dataset must not look like one"
    done = build(resource.RLIM_INFINITY)
    assert done.returncode == 0, done.stderr
    for part in ("annotated", "dmso"):
        found, whole = (load_dataset(str(folder), part, split="train") for folder in (tmp_path / "built", tiny_screen))
        assert found.with_format("arrow")[:] == whole.with_format("arrow")[:]
