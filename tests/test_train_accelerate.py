"""The training command: presets, exact resume, several processes, refusals; the whole way by real commands."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import AutoModel

import train_accelerate
from dataset_scripts import open_fields
from dataset_scripts.simulator import demo
from wsdino import launch
from wsdino.errors import UserError

ROOT = Path(__file__).parents[1]
# A network and crops small enough for the tiny screen's 64 x 80 planes.
SMALL = [
    *(
        "--hidden_size",
        "32",
        "--num_hidden_layers",
        "2",
        "--num_attention_heads",
        "2",
        "--per_device_train_batch_size",
        "4",
    ),
    *("--global_crop_size", "32", "--local_crop_size", "16", "--tile_size", "32"),
    *("--local_crops", "3", "--num_prototypes", "64", "--head_hidden_dim", "32", "--head_bottleneck_dim", "16"),
    *("--logging_steps", "1"),
]


def train(screen, folder, *flags):
    train_accelerate.main(["--dataset", str(screen), "--output_dir", str(folder), *SMALL, *flags])


def weights(folder, channel="dna"):
    return load_file(folder / channel / "model" / "model.safetensors")


def lines(folder, channel="dna"):
    return [json.loads(line) for line in (folder / channel / "metrics.jsonl").read_text().splitlines()]


def command(*words, **environment):
    """A real command in a process of its own; its output and status."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("temperature, collapsed", [("100", True), ("0.04", False)])
def test_a_collapse_is_told_while_training(tiny_screen, tmp_path, capsys, temperature, collapsed):
    """At such a temperature all targets are uniform."""
    flags = [
        "--preset",
        "paper",
        "--init",
        "random",
        "--channels",
        "dna",
        "--num_train_epochs",
        "1",
        "--warmup_epochs",
        "0",
    ]
    flags += [
        "--save_every_epochs",
        "1",
        "--teacher_temperature",
        temperature,
        "--warmup_teacher_temperature",
        temperature,
    ]
    train(tiny_screen, tmp_path / "run", *flags)
    told = [text for text in capsys.readouterr().out.splitlines() if "collapsed" in text]
    assert len(told) == collapsed
    assert all(text.startswith("dna, step") and "nearly uniform" in text for text in told)


def test_an_apple_machine_trains_on_its_processor():
    """In a process of its own, for accelerate chooses a device once."""
    done = command(
        "-c",
        "import torch, accelerate.state, train_accelerate\n"
        "torch.backends.mps.is_available = accelerate.state.is_mps_available = lambda *_: True\n"
        "assert str(accelerate.PartialState().default_device) == 'mps'\n"
        "accelerate.PartialState._reset_state()\n"
        "print(train_accelerate.start_training(train_accelerate.TrainingSettings(), 'x').device)",
    )
    assert done.stdout.split()[-1:] == ["cpu"], done.stderr


def test_paper_preset_is_the_published_recipe():
    arguments = train_accelerate.parse(["--preset", "paper"])
    published = {
        "weak_label": "compound",
        "init": "facebook/dino-vits8",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "patch_size": 8,
        "drop_path_rate": 0.1,
        "global_crops": 2,
        "global_crop_size": 224,
        "global_crop_area": [0.1, 0.2],
        "local_crops": 8,
        "local_crop_size": 96,
        "local_crop_area": [0.04, 0.08],
        "num_prototypes": 65536,
        "head_hidden_dim": 2048,
        "head_bottleneck_dim": 256,
        "freeze_last_layer_epochs": 1,
        "student_temperature": 0.07,
        "teacher_temperature": 0.04,
        "warmup_teacher_temperature": 0.04,
        "center_momentum": 0.8,
        "teacher_momentum": 0.99,
        "num_train_epochs": 400,
        "stop_after_epoch": 200,
        "per_device_train_batch_size": 16,
        "learning_rate": 4e-6,
        "final_learning_rate": 3e-6,
        "warmup_epochs": 10,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "mixed_precision": None,
    }
    ours = asdict(arguments)
    assert {name: ours[name] for name in published} == published


def test_flags_override_the_preset_and_help_shows_its_values(capsys):
    arguments = train_accelerate.parse(["--num_train_epochs", "3"])
    assert (arguments.preset, arguments.num_train_epochs, arguments.hidden_size) == ("demo", 3, 96)
    with pytest.raises(SystemExit) as ended:
        train_accelerate.parse(["--preset", "paper", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "4e-06" in text and "(default: 65536)" in text


def test_resume_in_mid_epoch_is_exact(tiny_screen, tmp_path):
    """Stopped after one step and continued, against never stopped: same weights to the bit, same log."""
    flags = ("--channels", "dna", "--num_train_epochs", "2", "--max_grad_norm", "1", "--drop_path_rate", "0.2")
    train(tiny_screen, tmp_path / "whole", *flags)
    steps = len(lines(tmp_path / "whole"))
    assert steps >= 4 and steps % 2 == 0, "the stop at step 1 must lie inside an epoch"
    train(tiny_screen, tmp_path / "parts", *flags, "--max_steps", "1")
    train(tiny_screen, tmp_path / "parts", *flags, "--resume")
    expected, ours = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert expected.keys() == ours.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, ours[name]), name
    timeless = lambda run: [{k: v for k, v in line.items() if k != "pairs_per_second"} for line in lines(run)]  # noqa: E731
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")


def test_a_machine_without_git_trains(tiny_screen, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    train(tiny_screen, tmp_path / "run", "--channels", "dna", "--max_steps", "1")
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["git"]["commit"] is None


def test_training_moves_the_weights_and_logs_the_schedules(tiny_screen, tmp_path):
    train(
        tiny_screen,
        tmp_path,
        "--channels",
        "actin",
        "--num_train_epochs",
        "2",
        "--warmup_epochs",
        "1",
        "--learning_rate",
        "0.01",
    )
    torch.manual_seed(0)
    arguments = train_accelerate.parse(SMALL)
    start = train_accelerate.initial_backbone(arguments, "actin").state_dict()
    moved = [name for name, tensor in weights(tmp_path, "actin").items() if not torch.equal(tensor, start[name])]
    assert len(moved) > len(start) / 2
    log = lines(tmp_path, "actin")
    per_epoch = len(log) // 2
    assert [line["step"] for line in log] == list(range(1, 2 * per_epoch + 1))
    np.testing.assert_allclose(
        [line["lr"] for line in log[:per_epoch]], np.linspace(0, 0.01, per_epoch) if per_epoch > 1 else [0.0]
    )
    assert log[-1]["epoch"] == 2.0
    for line in log:
        assert (
            math.isfinite(line["loss"]) and 0 <= line["teacher_entropy"] <= line["mean_entropy"] <= math.log(64) + 1e-4
        )
        assert line["loss"] == pytest.approx(line["teacher_entropy"] + line["kl"], abs=1e-4)


def test_prototypes_rest_in_the_first_epoch(tiny_screen, tmp_path):
    flags = ("--channels", "dna", "--num_train_epochs", "2", "--warmup_epochs", "0", "--teacher_momentum", "0.5")
    flags += ("--freeze_last_layer_epochs", "1")
    train(tiny_screen, tmp_path, *flags, "--stop_after_epoch", "1")
    arguments = train_accelerate.parse([*SMALL, *flags])
    start = prototypes_at_start(arguments)
    assert torch.equal(saved_student(tmp_path)["head.last_layer.parametrizations.weight.original1"], start)
    train(tiny_screen, tmp_path, *flags, "--resume")
    assert not torch.equal(saved_student(tmp_path)["head.last_layer.parametrizations.weight.original1"], start)


def prototypes_at_start(arguments):
    from pretraining_wsdino import DinoHead

    torch.manual_seed(arguments.seed + 1)
    head = DinoHead(32, 64, hidden_dim=32, bottleneck_dim=16)
    return head.last_layer.parametrizations.weight.original1.detach()


def saved_student(run):
    newest = sorted((run / "dna" / "checkpoints").iterdir())[-1]
    return load_file(newest / "model.safetensors")


def test_a_damaged_checkpoint_is_named_and_the_older_one_used(tiny_screen, tmp_path, capsys):
    flags = ("--channels", "dna", "--num_train_epochs", "3", "--save_every_epochs", "1")
    train(tiny_screen, tmp_path / "whole", *flags)
    train(tiny_screen, tmp_path / "hurt", *flags, "--stop_after_epoch", "2")
    newest = sorted((tmp_path / "hurt" / "dna" / "checkpoints").iterdir())[-1]
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    capsys.readouterr()
    train(tiny_screen, tmp_path / "hurt", *flags, "--resume")
    assert f"{newest} is damaged" in capsys.readouterr().out
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "hurt")[name]), name


def test_a_damaged_checkpoint_is_not_kept_for_the_newest(tiny_screen, tmp_path):
    """The one that was skipped has a higher step than those that are written next; nothing of it is lost."""
    flags = ("--channels", "dna", "--num_train_epochs", "4", "--save_every_epochs", "1")
    train(tiny_screen, tmp_path, *flags, "--stop_after_epoch", "3", "--save_total_limit", "2")
    folder = tmp_path / "dna" / "checkpoints"
    older, newer = sorted(path.name for path in folder.iterdir())
    (folder / newer / "optimizer.bin").write_bytes(b"hurt")
    train(
        tiny_screen, tmp_path, *flags, "--resume", "--save_total_limit", "1", "--max_steps", str(int(older[-8:]) + 1)
    )
    assert {path.name for path in folder.iterdir()} == {f"step_{int(older[-8:]) + 1:08d}", f"{newer}.damaged"}


def test_a_run_of_which_no_checkpoint_can_be_read_is_not_begun_anew(tiny_screen, tmp_path, capsys):
    """Its weights can be read and its optimiser cannot: they may not be taken for those of step 0."""
    flags = ("--channels", "dna", "--num_train_epochs", "2", "--save_every_epochs", "1")
    train(tiny_screen, tmp_path, *flags, "--stop_after_epoch", "1")
    (checkpoint,) = (tmp_path / "dna" / "checkpoints").iterdir()
    before = lines(tmp_path)
    (checkpoint / "optimizer.bin").write_bytes(b"hurt")
    with pytest.raises(SystemExit) as ended:
        train(tiny_screen, tmp_path, *flags, "--resume")
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and f"{checkpoint.parent} holds no checkpoint that" in said
    assert checkpoint.exists() and lines(tmp_path) == before


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_checkpoint_that_does_not_fit_into_memory_is_not_damaged(tiny_screen, tmp_path, capsys, monkeypatch, error):
    flags = ("--channels", "dna", "--num_train_epochs", "2", "--save_every_epochs", "1")
    train(tiny_screen, tmp_path, *flags)
    load = train_accelerate.Accelerator.load_state
    calls = []

    def full(self, folder):
        calls.append(folder)
        if len(calls) == 1:
            raise error("tried to allocate 2 GiB")
        return load(self, folder)

    monkeypatch.setattr(train_accelerate.Accelerator, "load_state", full)
    kept = sorted((tmp_path / "dna" / "checkpoints").iterdir())
    with pytest.raises(SystemExit) as ended:
        train(tiny_screen, tmp_path, *flags, "--resume")
    assert ended.value.code == 2 and f"{kept[-1]} does not fit into memory" in capsys.readouterr().err
    assert sorted((tmp_path / "dna" / "checkpoints").iterdir()) == kept


@pytest.mark.slow
def test_two_processes_skip_what_one_of_them_cannot_read(tiny_screen, tmp_path):
    """Rank 1 finds the newest checkpoint damaged: both go on from the older one; with no whole one, both end."""
    flags = [
        "--dataset",
        str(tiny_screen),
        *SMALL,
        "--channels",
        "dna",
        "--num_train_epochs",
        "2",
        "--save_every_epochs",
        "1",
    ]
    run = tmp_path / "run"
    train(tiny_screen, run, *flags[2:])
    older, newest = sorted((run / "dna" / "checkpoints").iterdir())
    hurt = """
import os, sys, train_accelerate
load = train_accelerate.Accelerator.load_state
def hurt(self, folder):
    if os.environ["RANK"] == "1" and folder.endswith(tuple(os.environ["HURT"].split())):
        raise OSError("stale handle")
    return load(self, folder)
train_accelerate.Accelerator.load_state = hurt
train_accelerate.main(sys.argv[1:])
"""
    (tmp_path / "hurt.py").write_text(hurt)
    launch = [
        *("-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *(
            str(tmp_path / "hurt.py"),
            *flags,
            "--per_device_train_batch_size",
            "2",
            "--output_dir",
            str(run),
            "--resume",
        ),
        *("--max_steps", str(int(older.name[-8:]) + 1)),
    ]
    settings = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = command(*launch, **settings, HURT=f"{older.name} {newest.name}")
    assert done.returncode != 0 and done.stderr.count("holds no checkpoint that every process can read") == 2
    assert newest.exists()
    done = command(*launch, **settings, HURT=newest.name)
    assert done.returncode == 0, done.stderr
    assert f"{newest} is damaged and skipped (OSError: stale handle)" in done.stdout
    assert not newest.exists() and lines(run)[-1]["step"] == int(older.name[-8:]) + 1


def test_a_run_resumes_on_its_own_dataset(tiny_screen, tmp_path, capsys, monkeypatch):
    """Without --dataset it continues with the recorded one, not a simulated; another number of fields is refused."""
    monkeypatch.chdir(tmp_path)
    fields = datasets.load_dataset(str(tiny_screen), "annotated", split="train")
    fields.to_parquet(tmp_path / "screen" / "train.parquet")
    flags = [*SMALL, "--subset", "default", "--output_dir", "run", "--channels", "dna"]
    train_accelerate.main(["--dataset", "./screen", *flags, "--max_steps", "1"])
    train_accelerate.main([*flags, "--max_steps", "2", "--resume"])
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["dataset"]["path"] == settings["arguments"]["dataset"] == "./screen"
    assert lines(tmp_path / "run")[-1]["step"] == 2 and not (tmp_path / "data").exists()
    fields.select(range(60)).to_parquet(tmp_path / "screen" / "train.parquet")
    with pytest.raises(SystemExit) as ended:
        train_accelerate.main([*flags, "--max_steps", "3", "--resume"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "trains on 72 fields and --dataset ./screen --subset default has 60" in said


def test_a_run_keeps_the_channels_of_all_its_launches(tiny_screen, tmp_path):
    """Whoever trains one channel after the other ends with all of them, and with the model that joins them."""
    train(tiny_screen, tmp_path, "--channels", "tubulin", "--max_steps", "1")
    train(tiny_screen, tmp_path, "--channels", "dna", "--max_steps", "1", "--resume")
    recorded = json.loads((tmp_path / "settings.json").read_text())["arguments"]["channels"]
    joined = AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=True).config.channel_names
    assert recorded == joined == ["dna", "tubulin"]


def test_where_a_gpu_is_left_alone_nothing_asks_for_it(tiny_screen, tmp_path, monkeypatch):
    """ACCELERATE_USE_CPU on a machine with a GPU: the evaluation stays on the CPU, and fp16 is refused."""
    flags = [*SMALL, "--channels", "tubulin", "--eval_every_epochs", "1", "--output_dir", str(tmp_path)]
    settings = train_accelerate.parse([*flags, "--dataset", str(tiny_screen)])
    fields = open_fields(str(tiny_screen), ["annotated"])
    trainer = train_accelerate.channel_trainer(settings, "tubulin", fields)
    trainer.log.open(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    trainer._evaluate(trainer.score, 0, tqdm(disable=True))
    assert {parameter.device.type for parameter in trainer.objective.teacher.parameters()} == {"cpu"}
    assert "nsc" in lines(tmp_path, "tubulin")[-1]
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        train_accelerate.start_training(replace(settings, mixed_precision="fp16"), "x")


def test_networks_are_freed_before_the_next_channel_and_the_end(tiny_screen, tmp_path, monkeypatch):
    """Two channels' networks at once may not fit a GPU. Freed after the process group, PyTorch now and then joins a
    thread of gloo under the lock that this thread waits for."""
    make, networks, alive = train_accelerate.channel_trainer, [], []

    def note(*words):
        alive.extend(one() for one in networks)
        trainer = make(*words)
        networks.append(weakref.ref(trainer.network))
        return trainer

    monkeypatch.setattr(train_accelerate, "channel_trainer", note)
    monkeypatch.setattr(Accelerator, "end_training", lambda self: alive.extend(one() for one in networks))
    train(tiny_screen, tmp_path, "--channels", "dna", "tubulin", "--max_steps", "1")
    assert alive == [None, None, None]


def test_processes_wait_for_one_that_works_for_hours(monkeypatch):
    asked = {}
    state = launch.PartialState()
    monkeypatch.setattr(launch, "PartialState", lambda **given: asked.update(given) or state)
    launch.start_processes("train_accelerate.py")
    assert asked["timeout"].days == 1


@pytest.mark.parametrize("missing", ["moa", "batch", "labels", "controls"])
def test_what_cannot_be_evaluated_is_told_before_training(tiny_screen, tmp_path, capsys, missing):
    """The evaluated part lacks a column, every mechanism or every control: refused before the first step."""
    dataset = datasets.load_dataset(str(tiny_screen), "all", split="train")
    if missing in ("moa", "batch"):
        dataset = dataset.remove_columns(missing)
    elif missing == "labels":
        dataset = dataset.remove_columns("moa").add_column("moa", [""] * len(dataset))
    else:
        dataset = dataset.select([row for row, name in enumerate(dataset["compound"]) if name != "DMSO"])
    dataset.to_parquet(tmp_path / "screen" / "train.parquet")
    flags = ("--channels", "dna", "--subset", "default", "--eval_subsets", "default", "--eval_every_epochs", "1")
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "screen", tmp_path / "run", *flags)
    assert ended.value.code == 2 and "error:" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_channels_of_different_depth_are_refused_before_they_are_trained(tmp_path, capsys):
    random = np.random.default_rng(0)
    images = {
        name: [Image.fromarray(random.integers(0, 255, (66, 90)).astype(dtype)) for _ in range(4)]
        for name, dtype in (("er", np.uint8), ("golgi", np.uint16))
    }
    own = Dataset.from_dict({**images, "gene": ["TP53", "MYC"] * 2})
    for name in images:
        own = own.cast_column(name, datasets.Image())
    own.to_parquet(tmp_path / "screen" / "train.parquet")
    flags = ["--subset", "default", "--weak_label", "gene", "--max_steps", "1", "--channels", "er", "golgi"]
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "screen", tmp_path / "run", *flags)
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "er is uint8 and golgi is uint16" in said
    assert not (tmp_path / "run").exists()


def test_checkpoints_are_pruned_to_the_newest(tiny_screen, tmp_path):
    train(
        tiny_screen,
        tmp_path,
        "--channels",
        "dna",
        "--num_train_epochs",
        "4",
        "--save_every_epochs",
        "1",
        "--save_total_limit",
        "2",
    )
    steps = lines(tmp_path)[-1]["step"]
    kept = sorted(path.name for path in (tmp_path / "dna" / "checkpoints").iterdir())
    assert kept == [f"step_{step:08d}" for step in (steps * 3 // 4, steps)]


def test_evaluation_inside_the_run_equals_evaluation_after_it(tiny_screen, tmp_path):
    """`--eval_every_epochs` appends NSC and NSCB; the last line equals extraction's and evaluation's of the model."""
    import extract_profiles
    from evaluation_wsdino.evaluate_profiles import evaluate_run

    train(tiny_screen, tmp_path, "--channels", "tubulin", "--num_train_epochs", "2", "--eval_every_epochs", "1")
    scored = [line for line in lines(tmp_path, "tubulin") if "nsc" in line]
    assert [line["epoch"] for line in scored] == [1.0, 2.0]
    extract_profiles.main([str(tmp_path), "--sets", "trained"])
    after = evaluate_run(tmp_path)["sets"]["trained"]
    for name in ("nsc", "nscb", "nsc_correct", "nscb_total"):
        assert scored[-1][name] == after[name]


def test_evaluation_does_not_change_what_is_learned(tiny_screen, tmp_path):
    flags = ("--channels", "dna", "--num_train_epochs", "2", "--drop_path_rate", "0.2")
    train(tiny_screen, tmp_path / "plain", *flags)
    train(
        tiny_screen,
        tmp_path / "scored",
        *flags,
        "--eval_every_epochs",
        "1",
        "--save_every_epochs",
        "1",
        "--dataloader_num_workers",
        "1",
    )
    for name, tensor in weights(tmp_path / "plain").items():
        assert torch.equal(tensor, weights(tmp_path / "scored")[name]), name


def test_excluded_compounds_are_never_drawn(tiny_screen, tmp_path):
    dataset = open_fields(str(tiny_screen), ["annotated"])
    held = sorted(set(dataset["compound"]))[0]
    for extra in ([], ["--weak_label", "none"], ["--weak_label", "moa"]):
        flags = [*SMALL, "--output_dir", str(tmp_path), "--exclude_compounds", held, "--channels", "dna", *extra]
        arguments = train_accelerate.parse(flags)
        trainer = train_accelerate.channel_trainer(arguments, "dna", dataset)
        drawn = {row for step in range(40) for part in trainer.data.pairs.draw(step, 50)[:2] for row in part.tolist()}
        assert {dataset["compound"][row] for row in drawn} == set(dataset["compound"]) - {held}


def test_trackers_receive_the_metrics(tiny_screen, tmp_path):
    pytest.importorskip("tensorboard", reason="an optional extra")
    train(tiny_screen, tmp_path, "--channels", "dna", "--num_train_epochs", "1", "--report_to", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = {path.parent for path in (tmp_path / "dna").rglob("events.out.tfevents*")}
    readers = [EventAccumulator(str(folder)).Reload() for folder in folders]
    (events,) = [reader for reader in readers if "loss" in reader.Tags()["scalars"]]
    logged = [event.value for event in events.Scalars("loss")]
    np.testing.assert_allclose(logged, [line["loss"] for line in lines(tmp_path)], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_continues_exactly(tiny_screen, tmp_path, kind):
    """Ctrl-C and a cluster's SIGTERM: a checkpoint, a clear line, status 130, and equal weights after resuming."""
    flags = [
        "--dataset",
        str(tiny_screen),
        *SMALL,
        "--channels",
        "dna",
        "--num_train_epochs",
        "400",
        "--max_steps",
        "300",
    ]
    words = [sys.executable, "train_accelerate.py", *flags, "--output_dir", str(tmp_path / "stopped")]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "stopped" / "dna" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 5):
        time.sleep(0.05)
    process.send_signal(kind)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume continues from" in out
    stopped_at = lines(tmp_path / "stopped")[-1]["step"]
    assert 5 <= stopped_at < 300
    train(tiny_screen, tmp_path / "stopped", *flags[2:][len(SMALL) :], "--resume")
    train(tiny_screen, tmp_path / "whole", *flags[2:][len(SMALL) :])
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "stopped")[name]), name


REFUSALS = [
    (["--weak_label", "moon"], "'moon'"),
    (["--channels", "gold"], "'gold'"),
    (["--channels", "dna", "dna"], "--channels"),
    (["--subset", "moon"], "moon"),
    (["--dataset", "/nowhere/at/all"], "/nowhere/at/all"),
    (["--patch_size", "7"], "--global_crop_size"),
    (["--tile_size", "30"], "--tile_size 30"),
    (["--tile_size", "40"], "80 x 80"),
    (["--global_crop_size", "72"], "--global_crop_size"),
    (["--local_crop_size", "72"], "--local_crop_size"),
    (["--global_crop_area", "0.5", "0.2"], "--global_crop_area"),
    (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size"),
    (["--student_temperature", "0"], "--student_temperature"),
    (["--teacher_momentum", "1.5"], "--teacher_momentum"),
    (["--mixed_precision", "int8"], "--mixed_precision"),
    (["--pair_constraint", "moon"], "--pair_constraint"),
    (["--init", "/nowhere/weights.pth"], "/nowhere/weights.pth"),
    (["--preset", "moon"], "moon"),
    (["--num_train_epochs", "0"], "--num_train_epochs"),
    (["--exclude_compounds", "moonstone"], "moonstone"),
    (["--eval_every_epochs", "1", "--eval_subsets", "moon"], "moon"),
    (["--eval_every_epochs", "-1"], "--eval_every_epochs"),
    (["--local_crops", "0", "--global_crops", "1"], "--local_crops"),
    (["--report_to", "tensorbord"], "tensorbord"),
    (["--objective", "supervised", "--weak_label", "none"], "--weak_label"),
    (["--shuffle_labels", "--weak_label", "none"], "--shuffle_labels"),
]


@pytest.mark.parametrize(
    ("flags", "named"), REFUSALS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_unusable_settings_are_refused_in_one_sentence(tiny_screen, tmp_path, capsys, flags, named):
    with pytest.raises(SystemExit) as ended:
        train(tiny_screen, tmp_path / "run", *flags)
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert ended.value.code == 2 and len(said) == 1 and named in said[0], said
    assert not (tmp_path / "run").exists(), "nothing may be left behind"


def test_a_folder_that_holds_another_run_is_refused(tiny_screen, tmp_path, capsys):
    flags = ("--channels", "dna", "--num_train_epochs", "2", "--max_steps", "1")
    train(tiny_screen, tmp_path / "run", *flags)
    before = weights(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    for more, folder, sentence in (
        ([], "run", "already holds a run: give --resume"),
        (["--resume", "--learning_rate", "0.5"], "run", "other settings (--learning_rate)"),
        (["--resume", "--per_device_train_batch_size", "8"], "run", "4 pairs per step and this launch makes 8"),
        ([], "other", "holds no run"),
    ):
        with pytest.raises(SystemExit) as ended:
            train(tiny_screen, tmp_path / folder, *flags[:4], *more)
        assert ended.value.code == 2 and sentence in capsys.readouterr().err
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, before[name])
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_a_bad_loss_stops_the_run_and_names_the_images(tiny_screen, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train(
            tiny_screen,
            tmp_path,
            "--channels",
            "dna",
            "--num_train_epochs",
            "3",
            "--learning_rate",
            "1e30",
            "--warmup_epochs",
            "0",
        )
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "is not finite; its images are rows [" in said
    assert not (tmp_path / "dna" / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "threads"), [([], len(os.sched_getaffinity(0))), (["--num_threads", "1"], 1)])
def test_a_single_cpu_process_under_accelerate_uses_all_cores(tiny_screen, tmp_path, flags, threads):
    """`accelerate launch` sets OMP_NUM_THREADS=1 for one process, which would halve the demo's speed or worse."""
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines", "1", "--mixed_precision", "no"]
    words = [
        "--dataset",
        str(tiny_screen),
        "--output_dir",
        str(tmp_path),
        *SMALL,
        "--channels",
        "dna",
        "--max_steps",
        "1",
    ]
    done = command(*launch, "--dynamo_backend", "no", "train_accelerate.py", *words, *flags, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "settings.json").read_text())["threads"] == threads


@pytest.mark.slow
def test_a_launch_of_fewer_processes_than_asked_is_refused(tiny_screen, tmp_path):
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    done = command(
        *launch, "train_accelerate.py", "--dataset", str(tiny_screen), "--output_dir", str(tmp_path / "run")
    )
    assert done.returncode != 0 and "one process where several were asked for" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_two_processes_train_as_one(tiny_screen, tmp_path, centering):
    """Same global batch on one process and on two (gloo): equal weights within float32's rounding, in every channel.

    KoLeo is left out: it looks for neighbours among each process's own images, as in DINOv2. The learning rate is low
    because AdamW moves weights whose true gradient is 0 (a key's bias) by rounding noise, a whole learning
    rate per step.
    """
    flags = ["--dataset", str(tiny_screen), *SMALL, "--channels", "dna", "tubulin", "--num_train_epochs", "2"]
    flags += ["--centering", centering, "--koleo_weight", "0", "--learning_rate", "1e-4"]
    train(tiny_screen, tmp_path / "one", *flags[2:])
    done = command(
        *("-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *("train_accelerate.py", *flags, "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "two")),
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "settings.json").read_text())["processes"] == 2
    for channel in ("dna", "tubulin"):
        expected = weights(tmp_path / "one", channel)
        for name, tensor in weights(tmp_path / "two", channel).items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3)
        losses = [[line["loss"] for line in lines(tmp_path / run, channel)] for run in ("one", "two")]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert (tmp_path / "two" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_whole_way_through_real_commands(tmp_path):
    """simulate -> prepare -> train 2 steps -> resume -> extract -> evaluate -> report, as a user types them."""
    raw, built, run = tmp_path / "raw", tmp_path / "built", tmp_path / "run"
    steps = [
        ("-m", "dataset_scripts.simulator.simulate", str(raw), "--size", "tiny"),
        ("-m", "dataset_scripts.prepare", "--raw", str(raw), "--output", str(built)),
        (
            "train_accelerate.py",
            "--dataset",
            str(built),
            "--output_dir",
            str(run),
            *SMALL,
            "--num_train_epochs",
            "1",
            "--max_steps",
            "2",
        ),
        (
            "train_accelerate.py",
            "--dataset",
            str(built),
            "--output_dir",
            str(run),
            *SMALL,
            "--num_train_epochs",
            "1",
            "--resume",
        ),
        ("extract_profiles.py", str(run), "--checkpoints"),
        ("-m", "evaluation_wsdino.evaluate_profiles", str(run)),
        ("-m", "evaluation_wsdino.report", str(run)),
    ]
    for words in steps:
        done = command(*words, HF_HOME=str(tmp_path / "home"))
        assert done.returncode == 0, f"{words}: {done.stderr}"
    assert lines(run, "actin")[1]["step"] == 2 and lines(run, "actin")[-1]["epoch"] == 1.0
    tables = {path.stem: pd.read_parquet(path) for path in (run / "profiles").glob("*.parquet")}
    assert set(tables) == {"trained", "untrained", "initial", "intensity", "nuclei"}
    for name, width in (("trained", 96), ("untrained", 96), ("intensity", 33)):
        features = [column for column in tables[name] if not column.startswith("Metadata_")]
        assert len(features) == width and tables[name][features].notna().all().all()
    assert (tables["trained"]["Metadata_Compound"] == "DMSO").any()
    results = json.loads((run / "results.json").read_text())
    # The last checkpoint's teachers are the trained models.
    last = sorted((run / "profiles" / "checkpoints").glob("*.parquet"))[-1]
    pd.testing.assert_frame_equal(pd.read_parquet(last), tables["trained"], rtol=1e-6)
    assert results["checkpoints"][-1]["nsc"] == results["sets"]["trained"]["nsc"]
    assert results["checkpoints"][-1]["epoch"] == 1.0
    assert results["simulated"] is True
    report = (run / "report.html").read_text()
    assert "simulated" in report.lower() and "http://" not in report.replace("http://www.w3.org", "")


def test_any_dataset_with_images_and_a_label_trains(tmp_path, capsys):
    """A newcomer's own: 8-bit planes of a channel of any name and a label, no plate, batch, compound or control."""
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (66, 90), dtype=np.uint8)) for _ in range(12)]
    own = Dataset.from_dict({"er": images, "gene": ["TP53", "MYC", "none"] * 4})
    own.cast_column("er", datasets.Image()).to_parquet(tmp_path / "screen" / "default" / "train.parquet")
    flags = ["--subset", "default", "--channels", "er", "--weak_label", "gene", "--max_steps", "2"]
    train(tmp_path / "screen" / "default", tmp_path / "run", *flags)
    printed = capsys.readouterr().out
    assert "names no plate, so --pair_constraint image" in printed and "--anchor_group none" in printed
    model = AutoModel.from_pretrained(tmp_path / "run" / "er" / "model", trust_remote_code=True)
    assert model.config.channel_names == ["er"]
    processor = json.loads((tmp_path / "run" / "er" / "model" / "preprocessor_config.json").read_text())
    assert processor["max_intensity"] == 255.0
    train(tmp_path / "screen" / "default", tmp_path / "run", *flags[:-1], "3", "--resume")
    assert lines(tmp_path / "run", "er")[-1]["step"] == 3


def test_two_demos_that_start_at_once_simulate_one_screen(tmp_path, monkeypatch, tiny_screen):
    monkeypatch.chdir(tmp_path)
    made = []

    def simulate(raw, **_):
        made.append(raw)
        time.sleep(0.5)  # long enough for the other run to arrive

    def build(raw, folder):
        shutil.copytree(tiny_screen, folder)

    monkeypatch.setattr(demo, "simulate_screen", simulate)
    monkeypatch.setattr(demo, "build_dataset", build)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: demo.simulated_demo("data/simulated_demo"), range(2)))
    assert len(made) == 1 and set(found) == {"data/simulated_demo"}
