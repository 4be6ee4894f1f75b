"""Train WS-DINO, one channel or all in turn, on one process or many: the only training loop.

    accelerate launch train_accelerate.py                                        # the demo, on simulated images
    accelerate launch train_accelerate.py --preset paper --dataset data/bbbc021  # the paper's recipe

Everything a step draws (pairs, crop boxes, drop path) is keyed by the seed and the global step, and every schedule is
a function of the step. A checkpoint is therefore the networks, the optimiser, the centre and one number, and a resumed
run goes on exactly where it stopped.
"""

import ctypes
import errno
import gc
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, set_seed
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from dataset_scripts import (
    Planes,
    build_dataset,
    metadata_table,
    open_fields,
    open_planes,
    simulate_screen,
)
from evaluation_wsdino.evaluate_profiles import collapse_verdict, evaluate_set
from modeling_wsdino import WSDinoConfig, WSDinoFeatureExtractionPipeline, WSDinoImageProcessor, WSDinoModel
from modeling_wsdino.build_repository import build_combined_repository, build_repository
from modeling_wsdino.convert_checkpoint import load_backbone
from pretraining_wsdino import (
    CropSpec,
    DinoHead,
    DinoLoss,
    FeatureWindow,
    MultiCropNetwork,
    PairBatchSampler,
    PlanePairs,
    TrainingArguments,
    TrainingError,
    WeakLabelPairCollator,
    WeakLabelPairSampler,
    changed_settings,
    check_arguments,
    cosine_schedule,
    koleo_loss,
    linear_schedule,
    preset_arguments,
    resize_windows,
    update_teacher,
    whiten_patch_embedding,
)
from wsdino.errors import UserError
from wsdino.launch import on_main_process, start_processes

SIMULATED_DEMO = Path("data/simulated_demo")
# What a run that was killed, or refused, before it began leaves in its folder.
UNBEGUN = {"settings.json.partial", ".lock"}
# What an operating system says of a place that the user named and nothing can be written to.
UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


# ---------------------------------------------------------------------------------------------- what a run is given


def parse_arguments(argv: list[str] | None) -> tuple[HfArgumentParser, TrainingArguments]:
    """Flags over the preset's defaults over the paper's defaults."""
    parser = HfArgumentParser(TrainingArguments, prog="train_accelerate.py", description=__doc__.split("\n")[0])
    argv = sys.argv[1:] if argv is None else argv
    preset = parser.parse_known_args([flag for flag in argv if flag not in ("-h", "--help")])[0].preset
    try:
        parser.set_defaults(**preset_arguments(preset))
    except TrainingError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    return parser, arguments


def check_launch(arguments: TrainingArguments) -> None:
    """Refuse a launch that would silently run fewer processes than asked, or in a precision the machine lacks."""
    # While one process downloads a dataset, caches planes or evaluates, the others wait for hours rather than fail.
    state = start_processes("train_accelerate.py")
    trackers = ["all", *map(str, get_available_trackers())]
    for name in arguments.trackers:
        if name not in trackers:
            known = ", ".join(trackers)
            raise TrainingError(f"--trackers {name} is no installed tracker: install it, or use one of {known}.")
    on_gpu = state.device.type == "cuda"
    if arguments.mixed_precision == "bf16" and not (on_gpu or torch.cpu._is_avx512_bf16_supported()):
        raise TrainingError(
            "--mixed_precision bf16 is about six times slower than float32 on this CPU: leave it at no."
        )
    if arguments.mixed_precision == "fp16" and not on_gpu:
        raise TrainingError("--mixed_precision fp16 needs a GPU: leave it at no.")


def avoid_apple_gpu() -> None:
    """Train on the processor of an Apple machine: its GPU lacks float64 and uint16, which targets and crops use."""
    if torch.backends.mps.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def choose_threads(arguments: TrainingArguments) -> None:
    """Give a single CPU process all its cores: `accelerate launch` would leave it one (it sets OMP_NUM_THREADS=1)."""
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    elif alone and PartialState().device.type == "cpu":
        torch.set_num_threads(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )


def load_screen(arguments: TrainingArguments, accelerator: Accelerator):
    """The dataset to train on; without `--dataset`, a small simulated screen, made once under `data/`."""
    path = arguments.dataset
    if path is None:
        path = str(SIMULATED_DEMO)
        SIMULATED_DEMO.parent.mkdir(parents=True, exist_ok=True)
        # Two runs may start at once, and the processes of one do.
        with FileLock(SIMULATED_DEMO.with_name(SIMULATED_DEMO.name + ".lock")):
            if not (SIMULATED_DEMO / "README.md").exists():
                raw = SIMULATED_DEMO.with_name(SIMULATED_DEMO.name + "_raw")
                # 1 / 3.2 of the real resolution: 160 x 200 pixels hold as many cells as the paper's 512 x 640.
                simulate_screen(raw, size="demo", seed=0, scale=1 / 3.2)
                build_dataset(raw, SIMULATED_DEMO)
    label = [] if arguments.weak_label == "none" else [arguments.weak_label]
    with accelerator.local_main_process_first():
        dataset = open_fields(path, [arguments.part], columns=[*arguments.channels, *label])
    return dataset, path


def describe_run(
    arguments: TrainingArguments, channels: list[str], dataset, path: str, accelerator: Accelerator
) -> dict:
    """What settings.json says: arguments, versions, git state, dataset."""

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:  # a machine without git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    packages = ("torch", "transformers", "datasets", "accelerate", "numpy")
    sources = sorted(set(dataset["source"])) if "source" in dataset.column_names else []
    return {
        "arguments": {**asdict(arguments), "channels": channels},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "git": {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))},
        "dataset": {
            "path": path,
            "part": arguments.part,
            "fields": len(dataset),
            "source": sources,
            "fingerprint": dataset.fingerprint,
        },
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "threads": torch.get_num_threads(),
    }


def check_run_folder(arguments: TrainingArguments) -> dict | None:
    """Refuse a folder that holds something else, or this run with other settings.

    Returns:
        What a resumed run goes by, None for a new one: `dataset` as it was given, `fields` of it, `channels`.

    Raises:
        TrainingError: naming the folder and the settings that differ.
    """
    run = Path(arguments.output_dir)
    settings = run / "settings.json"
    if settings.exists():
        if not arguments.resume:
            raise TrainingError(f"{run} already holds a run: give --resume to continue it, or another --output_dir.")
        try:
            recorded = json.loads(settings.read_text())
            before = dict(recorded["arguments"])
            fields, channels = recorded["dataset"]["fields"], list(before["channels"])
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{settings} is damaged ({error}): give another --output_dir.") from error
        changed = changed_settings(before, asdict(arguments))
        if changed:
            flags = ", ".join(f"--{name}" for name in changed)
            raise TrainingError(f"{run} holds a run with other settings ({flags}): give another --output_dir.")
        return {"dataset": before["dataset"], "fields": fields, "channels": channels}
    elif run.exists() and (not run.is_dir() or {path.name for path in run.iterdir()} - UNBEGUN):
        raise TrainingError(f"{run} is not empty and holds no run: give another --output_dir.")
    return None


def channels_of_run(arguments: TrainingArguments, recorded: dict | None, dataset) -> list[str]:
    """The channels of this launch, joined, in the dataset's order, by those that earlier launches of the run named."""
    names = dict.fromkeys([*(recorded["channels"] if recorded else []), *arguments.channels])
    if len(names) == len(arguments.channels):
        return arguments.channels
    return sorted(names, key=lambda name: [*dataset.column_names, name].index(name))


def check_depths(arguments: TrainingArguments, channels: list[str], dataset) -> None:
    """Refuse, before they are trained, channels whose towers cannot become one model.

    Raises:
        TrainingError: one is of 8 bits, another of 16, and no `--max_intensity` is common to them.
    """
    if len(channels) == 1 or arguments.max_intensity is not None:
        return
    present = [name for name in channels if name in dataset.column_names]
    depths = {Planes(dataset.with_images([name]), name).like.dtype: name for name in present}
    if len(depths) > 1:
        which = " and ".join(f"{name} is {dtype}" for dtype, name in depths.items())
        raise TrainingError(f"--channels: {which}, and one model cannot hold both: give each an --output_dir.")


def begin_run(arguments: TrainingArguments, settings: dict, accelerator: Accelerator) -> FileLock:
    """Make the run folder and its settings.json. Nobody else trains into it before the lock is released, or its
    process has died.

    Raises:
        TrainingError: on every process, where another training holds the folder or has begun a run there meanwhile.
    """
    run = Path(arguments.output_dir)
    lock = FileLock(run / ".lock")

    def begin() -> None:
        run.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
            check_run_folder(arguments)
            write_json(run / "settings.json", settings)
        except Timeout as error:
            sentence = f"another training is writing {run}: wait for its end, or give another --output_dir."
            raise TrainingError(sentence) from error
        except TrainingError:
            lock.release()
            raise

    on_main_process(accelerator, begin)
    return lock


def write_json(path: Path, content: dict) -> None:
    """Written beside and renamed, so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that it is not taken for a whole one and nothing is lost."""
    aside = folder.with_name(folder.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


# ---------------------------------------------------------------------------------------------- networks


def initial_backbone(arguments: TrainingArguments, channel: str, drop_path_rate: float = 0.0) -> WSDinoModel:
    """The network that a run starts from: random, or whatever layout `load_backbone` reads."""
    own = {"channel_names": [channel], "drop_path_rate": drop_path_rate}
    if arguments.init == "random":
        config = WSDinoConfig(
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_hidden_layers,
            num_attention_heads=arguments.num_attention_heads,
            patch_size=arguments.patch_size,
            image_size=arguments.global_crop_size,
            initializer_range=arguments.initializer_range,
            patch_embedding=arguments.patch_embedding,
            **own,
        )
        torch.manual_seed(arguments.seed)
        return WSDinoModel(config)
    try:
        return load_backbone(arguments.init, **own)
    except ValueError as error:
        raise TrainingError(f"--init {arguments.init} cannot be loaded: {error}") from error


def parameter_groups(network: torch.nn.Module) -> list[dict]:
    """AdamW's groups as in DINO: weight decay on matrices, none on biases, norms and other vectors."""
    decayed = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in network.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": decayed, "decayed": True}, {"params": plain, "decayed": False, "weight_decay": 0.0}]


# ---------------------------------------------------------------------------------------------- one channel


class Interruption:
    """Turns Ctrl-C and a cluster's SIGTERM into a flag that the loop reads between steps, so that no step is torn."""

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self):
        self._old = {kind: signal.signal(kind, self._note) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, kind, frame):
        self.signal = kind

    def __exit__(self, *_):
        for kind, handler in self._old.items():
            signal.signal(kind, handler)


class ChannelData:
    """One channel's planes, the pairs drawn from them, the crops cut from those, and how many steps they make."""

    def __init__(self, arguments: TrainingArguments, channel: str, dataset, accelerator: Accelerator):
        self.arguments, self.channel, self.accelerator = arguments, channel, accelerator
        a, columns = arguments, dataset.column_names
        dataset = dataset.with_images([channel])
        with accelerator.local_main_process_first():
            self.planes = open_planes(dataset, channel)
        height, width = self.planes.shape[1:]
        least = a.tile_grid * a.tile_size
        if min(height, width) < least:
            raise TrainingError(
                f"--tile_size {a.tile_size} and --tile_grid {a.tile_grid} need images of at least {least} x {least} "
                f"pixels, and {channel} has {height} x {width}: choose smaller ones."
            )
        self.max_intensity = a.max_intensity or (255.0 if self.planes.dtype == np.uint8 else 10_000.0)
        groups = {name: dataset[name] for name in ("plate", "batch") if name in columns}
        if {"plate", "well"} <= set(columns):
            groups["well"] = [f"{plate}/{well}" for plate, well in zip(dataset["plate"], dataset["well"], strict=True)]
        constraint, anchor_group = self._usable_groups(groups)
        self.pairs = WeakLabelPairSampler(
            None if a.weak_label == "none" else dataset[a.weak_label],
            num_images=len(dataset),
            groups=groups,
            constraint=constraint,
            unlabelled=a.unlabelled,
            eligible=self._eligible(dataset),
            anchor_group=anchor_group,
            group_size=a.group_size,
            seed=a.seed,
        )
        self.global_batch = a.batch_size * a.gradient_accumulation_steps * accelerator.num_processes
        self.steps_per_epoch = max(len(self.pairs.rows) // self.global_batch, 1)
        self.total_steps = a.epochs * self.steps_per_epoch
        self.last_step = self.total_steps
        if a.stop_after_epoch is not None:
            self.last_step = min(self.last_step, a.stop_after_epoch * self.steps_per_epoch)
        if a.max_steps is not None:
            self.last_step = min(self.last_step, a.max_steps)
        varied = {"transpose": a.transpose, "brightness_sd": a.brightness_sd}
        self.collator = WeakLabelPairCollator(
            CropSpec(a.global_crops, a.global_crop_size, tuple(a.global_crop_area), **varied),
            CropSpec(a.local_crops, a.local_crop_size, tuple(a.local_crop_area), **varied),
            seed=a.seed,
        )

    def _usable_groups(self, groups: dict) -> tuple[str, str]:
        """`--pair_constraint` and `--anchor_group`; a preset's are loosened where the dataset names no such groups."""
        a, preset = self.arguments, preset_arguments(self.arguments.preset)
        given = {"pair_constraint": a.pair_constraint, "anchor_group": a.anchor_group}
        loose = {"pair_constraint": "image", "anchor_group": "none"}
        for name, value in given.items():
            if value == preset.get(name) and value in ("well", "plate", "batch") and value not in groups:
                given[name] = loose[name]
                self.accelerator.print(
                    f"{self.channel}: the dataset names no {value}, so --{name} {loose[name]} is used in place of the "
                    f"preset's {value}."
                )
        return given["pair_constraint"], given["anchor_group"]

    def _eligible(self, dataset) -> list[bool] | None:
        """Which fields may train: all but those of the compounds held out."""
        excluded = self.arguments.exclude_compounds
        if not excluded:
            return None
        compounds = dataset["compound"] if "compound" in dataset.column_names else []
        unknown = sorted(set(excluded) - set(compounds))
        if unknown:
            raise TrainingError(f"--exclude_compounds {unknown[0]}: no field of the dataset has this compound.")
        return [compound not in excluded for compound in compounds]

    def steps(self, first_step: int) -> Iterator[list[dict]]:
        """This process's micro-batches of every step from `first_step` on."""
        a, accelerator = self.arguments, self.accelerator
        batches = PairBatchSampler(
            self.pairs,
            batch_size=a.batch_size,
            total_steps=self.last_step,
            first_step=first_step,
            accumulation=a.gradient_accumulation_steps,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        loader = DataLoader(
            PlanePairs(self.planes),
            batch_sampler=batches,
            collate_fn=self.collator,
            num_workers=a.num_workers,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator().manual_seed(a.seed),  # leaves the global generator untouched
        )
        micro_batches = iter(loader)
        for _ in range(first_step, self.last_step):
            yield [next(micro_batches) for _ in range(a.gradient_accumulation_steps)]


class ChannelLog:
    """metrics.jsonl of one channel, written by the main process, and the trackers asked for."""

    def __init__(self, path: Path, accelerator: Accelerator, trackers: list[str]):
        self.path, self.accelerator, self.trackers = path, accelerator, trackers

    def open(self, first_step: int) -> None:
        """Keep the lines of steps before `first_step`: those after it will be written again."""
        if not self.accelerator.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if logged_step(line) <= first_step]
        partial = self.path.with_name("metrics.jsonl.partial")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.replace(self.path)

    def append(self, line: dict) -> None:
        """One line, and its numbers to the trackers."""
        if self.accelerator.is_main_process:
            with self.path.open("a") as log:
                log.write(json.dumps(line) + "\n")
        if self.trackers:
            self.accelerator.log({k: v for k, v in line.items() if isinstance(v, int | float)}, step=line["step"])


def logged_step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for a line that a killed run left half-written."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class ChannelRun:
    """Student, teacher and checkpoints of one channel; `train` takes them to the end or to an interruption."""

    def __init__(self, arguments: TrainingArguments, channel: str, dataset, run: Path, path: str = ""):
        self.arguments, self.channel, self.folder = arguments, channel, run / channel
        self.accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            log_with=arguments.trackers or None,
            project_dir=str(self.folder),
            # Every parameter takes part in every backward pass, so the search for unused ones is left out.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False)],
        )
        self.data = ChannelData(arguments, channel, dataset, self.accelerator)
        self.log = ChannelLog(self.folder / "metrics.jsonl", self.accelerator, arguments.trackers)
        self.collapsed = False  # whether the monitors looked so at the last checkpoint
        self._prepare_evaluation(path)
        self._prepare_networks()

    def _prepare_evaluation(self, path: str) -> None:
        """Load what `--eval_every` scores and score noise in its place, so that nothing of it fails after hours."""
        self.evaluated = None

        def load() -> None:
            dataset = open_fields(path, self.arguments.eval_parts, channels=[self.channel])
            self.evaluated = metadata_table(dataset), open_planes(dataset, self.channel)
            self._scores(np.random.default_rng(0).normal(size=(len(dataset), 2)))

        if self.arguments.eval_every:
            on_main_process(self.accelerator, load)

    def _scores(self, features: np.ndarray) -> dict:
        """`evaluate_set` of one row of features for each evaluated field."""
        names = [f"{self.channel}_{index:04d}" for index in range(features.shape[1])]
        profiles = pd.concat([self.evaluated[0], pd.DataFrame(features, columns=names)], axis=1)
        return evaluate_set(profiles, details=False)

    def _prepare_networks(self) -> None:
        a = self.arguments
        student, teacher = self._network(a.drop_path_rate), self._network(0.0)
        if a.whiten_patches:  # once, from thousands of patches; the teacher takes it over
            patches = student.backbone.embeddings.patch_embeddings
            whiten_patch_embedding(
                patches.weight,
                patches.bias,
                self.data.planes,
                self.data.max_intensity,
                rows=self.data.pairs.rows,
                seed=a.seed,
            )
            teacher.load_state_dict(student.state_dict())
        if a.gradient_checkpointing:
            student.backbone.activation_checkpointing_enable()
        teacher.requires_grad_(False).eval()
        if a.compile:  # in place, so that the weights keep their names
            student.backbone.compile()
            teacher.backbone.compile()
        dim = student.backbone.config.hidden_size
        optimizer = torch.optim.AdamW(parameter_groups(student), lr=a.learning_rate, fused=True)
        self.student, self.optimizer = self.accelerator.prepare(student.train(), optimizer)
        self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        self.loss = DinoLoss(
            a.num_prototypes,
            a.student_temperature,
            a.center_momentum,
            a.centering,
            1 if a.weak_label == "none" else a.group_size,
            a.student_sees_globals,
        )
        self.loss.to(self.accelerator.device)
        self.features = FeatureWindow(1024, dim).to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(self.loss, self.features)

    def _network(self, drop_path_rate: float) -> MultiCropNetwork:
        """Backbone and head; two calls give equal weights, and so do the calls of different processes."""
        a = self.arguments
        backbone = initial_backbone(a, self.channel, drop_path_rate)
        check_arguments(a, backbone.config.patch_size)
        torch.manual_seed(a.seed + 1)
        head = DinoHead(
            backbone.config.hidden_size,
            a.num_prototypes,
            hidden_dim=a.head_hidden_dim,
            bottleneck_dim=a.head_bottleneck_dim,
            initializer_range=a.initializer_range,
        )
        return MultiCropNetwork(backbone, head)

    # ------------------------------------------------------------------------------------------ checkpoints

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, newest first."""
        return sorted((self.folder / "checkpoints").glob("step_" + "[0-9]" * 8), reverse=True)

    def save(self, step: int) -> None:
        """A checkpoint written beside and renamed; older ones are pruned after it is whole."""
        target = self.folder / "checkpoints" / f"step_{step:08d}"
        partial = target.with_name(target.name + ".partial")
        if self.accelerator.is_main_process and partial.exists():
            shutil.rmtree(partial)
        self.accelerator.wait_for_everyone()
        problem = None
        try:
            self.accelerator.save_state(str(partial))
        except Exception as error:  # the writers of a full disk's files raise errors of their own, not OSError
            problem = f"{type(error).__name__}: {error}"
        problem = next(filter(None, gather_object([problem])), None)  # of any process, so that none waits for it
        if problem:
            kept = self.checkpoints()
            raise TrainingError(
                f"{partial} could not be written ({problem}); {kept[0] if kept else 'no checkpoint'} is whole: "
                "make room and give --resume."
            )

        def complete() -> None:
            write_json(partial / "progress.json", {"step": step, "global_batch": self.data.global_batch})
            if target.exists():
                shutil.rmtree(target)
            partial.replace(target)
            for old in self.checkpoints()[self.arguments.keep :]:
                shutil.rmtree(old)

        on_main_process(self.accelerator, complete)

    def restore(self) -> int:
        """Load the newest checkpoint that all processes can read; returns the step to go on with, 0 without any.

        Damaged newer ones are set aside: when older ones are pruned, they would be kept for the newest.
        """
        names = on_main_process(self.accelerator, lambda: [folder.name for folder in self.checkpoints()])
        damaged = []
        for name in names:
            folder, found, problem = self.folder / "checkpoints" / name, None, None
            try:
                progress = json.loads((folder / "progress.json").read_text())
                found = progress["step"], progress["global_batch"]
                self.accelerator.load_state(str(folder))
            except Exception as error:  # whatever a damaged file raises, the next older checkpoint is the mend
                problem = f"{type(error).__name__}: {error}"
            # All processes take or skip it together, and go by what the main process found.
            outcomes = gather_object([(found, problem)])
            problem = next((problem for _, problem in outcomes if problem), None)
            if problem and problem.split(":")[0].endswith("MemoryError"):
                raise TrainingError(f"{folder} does not fit into memory ({problem}): make room and give --resume.")
            if problem:
                self.accelerator.print(f"{folder} is damaged and skipped ({problem}).")
                damaged.append(folder)
                continue
            (step, before), now = outcomes[0][0], self.data.global_batch
            if before != now:
                raise TrainingError(
                    f"{folder} was trained with {before} pairs a step and this launch makes {now} (processes x "
                    "--batch_size x --gradient_accumulation_steps): make them equal."
                )
            on_main_process(self.accelerator, lambda: [set_aside(folder) for folder in damaged])
            return step
        if damaged:
            raise TrainingError(
                f"{self.folder / 'checkpoints'} holds no checkpoint that every process can read ({problem}): put "
                "--output_dir on a disk that all machines share, or remove that folder to start the channel again."
            )
        return 0

    # ------------------------------------------------------------------------------------------ the loop

    def train(self) -> bool:
        """Train to the last step, save the teacher's backbone as a model repository. False when interrupted."""
        a, accelerator = self.arguments, self.accelerator
        first_step = self.restore() if a.resume else 0
        model_folder = self.folder / "model"
        if first_step >= self.data.last_step and model_folder.exists():
            accelerator.print(f"{self.channel}: already trained to step {first_step}.")
            return True
        self.log.open(first_step)
        if a.whiten_patches and first_step == 0:  # what training started from, which the seed alone does not give
            self._save_model(self.folder / "initial")
        if a.trackers:
            plain = {k: v for k, v in asdict(a).items() if isinstance(v, int | float | str | bool)}
            accelerator.init_trackers("wsdino", config=plain)
        bar = tqdm(
            total=self.data.last_step,
            initial=first_step,
            desc=f"train {self.channel}",
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        with Interruption() as interruption, bar:
            window, since, line = [], time.perf_counter(), {}
            for step, micro_batches in enumerate(self.data.steps(first_step), first_step):
                monitors = self._step(step, micro_batches)
                stopped = self._agree(step, monitors["loss"], interruption)
                window.append(monitors)
                bar.update()
                at_end = step + 1 == self.data.last_step
                if (step + 1) % a.log_every == 0 or at_end or stopped:
                    line = self._log(step, window, time.perf_counter() - since)
                    bar.set_postfix(loss=f"{line['loss']:.3f}", images_s=f"{line['images_per_second']:.1f}")
                    window, since = [], time.perf_counter()
                epochs_done, rest = divmod(step + 1, self.data.steps_per_epoch)
                if a.eval_every and rest == 0 and epochs_done % a.eval_every == 0:
                    self._evaluate(step, bar)
                    since = time.perf_counter()
                if stopped or at_end or (rest == 0 and epochs_done % a.save_every == 0):
                    self.save(step + 1)
                    if epochs_done >= a.warmup_epochs:
                        self._report_collapse(line, bar)
                if stopped and not at_end:
                    accelerator.print(f"\n{self.channel}: stopped after step {step + 1}; --resume goes on from there.")
                    return False
        self._save_model(model_folder)
        for tracker in accelerator.trackers:  # end_training would also end the process group, which others need
            tracker.finish()
        return True

    def _step(self, step: int, micro_batches: list[dict]) -> dict[str, torch.Tensor]:
        """One optimiser step: schedules, micro-batches, centre, AdamW, teacher. Returns monitors on the device."""
        a, accelerator = self.arguments, self.accelerator
        epoch = step // self.data.steps_per_epoch
        warmup = a.warmup_epochs * self.data.steps_per_epoch
        learning_rate = cosine_schedule(
            step,
            start=a.learning_rate,
            end=a.final_learning_rate,
            total_steps=self.data.total_steps,
            warmup_steps=min(warmup, self.data.total_steps),
        )
        weight_decay = cosine_schedule(
            step, start=a.weight_decay, end=a.final_weight_decay, total_steps=self.data.total_steps
        )
        momentum = cosine_schedule(step, start=a.teacher_momentum, end=1.0, total_steps=self.data.total_steps)
        temperature = linear_schedule(
            epoch,
            start=a.warmup_teacher_temperature,
            end=a.teacher_temperature,
            warmup_epochs=a.warmup_teacher_temperature_epochs,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = weight_decay if group["decayed"] else 0.0

        set_seed(drop_path_seed(a.seed, step, accelerator.process_index))
        collected = []
        for number, batch in enumerate(micro_batches):
            views = [self._views(batch["global"], a.global_crop_size)]
            if a.local_crops:
                views.append(self._views(batch["local"], a.local_crop_size))
            with torch.no_grad():
                teacher_logits, teacher_features = self.teacher(views[:1])
            self.features.add(teacher_features)
            last = number + 1 == len(micro_batches)
            with nullcontext() if last else accelerator.no_sync(self.student):
                student_logits, student_features = self.student(views if a.student_sees_globals else views[1:])
                loss, monitors = self.loss(student_logits, teacher_logits, a.batch_size, temperature)
                total = loss
                if a.koleo_weight:  # each view apart: two views of one image are neighbours by right
                    spread = a.global_crops if a.student_sees_globals else 1
                    seen = student_features[: spread * a.batch_size].split(a.batch_size)
                    monitors["koleo"] = torch.stack([koleo_loss(view) for view in seen]).mean()
                    total = loss + a.koleo_weight * monitors["koleo"]
                    monitors["koleo"] = monitors["koleo"].detach()
                accelerator.backward(total / len(micro_batches))
            collected.append({"loss": loss.detach(), **monitors})
        student = accelerator.unwrap_model(self.student)
        if epoch < a.freeze_last_layer_epochs:
            for parameter in student.head.last_layer.parameters():
                parameter.grad = None
        if a.max_grad_norm > 0:
            accelerator.clip_grad_norm_(self.student.parameters(), a.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.update_center()
        update_teacher(student, accelerator.unwrap_model(self.teacher), momentum)
        means = {name: torch.stack([one[name] for one in collected]).mean() for name in collected[0]}
        self._schedule = {
            "epoch": (step + 1) / self.data.steps_per_epoch,
            "lr": learning_rate,
            "weight_decay": weight_decay,
            "teacher_momentum": momentum,
            "teacher_temperature": temperature,
        }
        return means

    def _views(self, part: dict[str, torch.Tensor], size: int) -> torch.Tensor:
        device = self.accelerator.device
        windows, sizes, flips = (part[name].to(device, non_blocking=True) for name in ("windows", "sizes", "flips"))
        gains = part["log_gains"].to(device, non_blocking=True) if self.arguments.brightness_sd else None
        return resize_windows(
            windows,
            sizes,
            flips,
            size,
            self.data.max_intensity,
            intensity_scale=self.arguments.intensity_scale,
            log_gains=gains,
        )

    def _agree(self, step: int, loss: torch.Tensor, interruption: Interruption) -> bool:
        """Whether any process was asked to stop; all learn it at the same step, and of a bad loss as well."""
        asked = torch.tensor(float(interruption.signal is not None), device=loss.device)
        both = self.accelerator.reduce(torch.stack([loss.float(), asked]), reduction="sum")
        total, stopped = both.tolist()
        if not np.isfinite(total):
            anchors, partners, _ = self.data.pairs.draw(step, self.data.global_batch)
            kept = self.checkpoints()
            raise TrainingError(
                f"{self.channel}: the loss of step {step + 1} is not finite; its images are rows "
                f"{sorted({*anchors.tolist(), *partners.tolist()})}; the last good checkpoint is "
                f"{kept[0] if kept else 'none'}. Lower --learning_rate, set --max_grad_norm 1, or check the images."
            )
        return stopped > 0

    # ------------------------------------------------------------------------------------------ what is written

    def _evaluate(self, step: int, bar) -> None:
        """NSC and NSCB of the teacher on all evaluated fields, appended to metrics.jsonl; the others wait."""

        def evaluate() -> None:
            planes, backbone = self.evaluated[1], self.accelerator.unwrap_model(self.teacher).backbone
            extract = WSDinoFeatureExtractionPipeline(
                model=backbone.eval(), image_processor=self._image_processor(), device=self.accelerator.device
            )
            stream = extract((plane for plane in planes), batch_size=self.arguments.batch_size, return_tensors=True)
            stream = tqdm(stream, total=len(planes), desc=f"evaluate {self.channel}", unit="field")
            features = np.stack([row.numpy() for row in stream])
            scores = self._scores(features)
            wanted = ("nsc", "nscb", "nsc_correct", "nsc_total", "nscb_correct", "nscb_total")
            line = {
                "step": step + 1,
                "epoch": (step + 1) / self.data.steps_per_epoch,
                **{n: scores[n] for n in wanted},
            }
            self.log.append(line)
            bar.write(
                f"{self.channel}, epoch {line['epoch']:g}: NSC {scores['nsc_correct']}/{scores['nsc_total']}, "
                f"NSCB {scores['nscb_correct']}/{scores['nscb_total']}"
            )

        on_main_process(self.accelerator, evaluate)

    def _report_collapse(self, line: dict, bar) -> None:
        """Say when the last monitors begin to look like a collapsed teacher, or cease to: days may hang on it."""
        found = collapse_verdict([line], self.arguments.num_prototypes)
        collapsed = found["verdict"] == "collapsed"
        if collapsed != self.collapsed and self.accelerator.is_main_process:
            what = f"collapsed: {'; '.join(found['reasons'])}" if collapsed else "no longer collapsed"
            bar.write(f"{self.channel}, step {line['step']}: {what}")
        self.collapsed = collapsed

    def _log(self, step: int, window: list[dict[str, torch.Tensor]], seconds: float) -> dict:
        """One line of metrics.jsonl: means over the steps since the last line and over the processes."""
        names = list(window[0])
        means = torch.stack([torch.stack([one[name].float() for name in names]) for one in window]).mean(0)
        means = self.accelerator.reduce(means, reduction="mean").tolist()
        fallbacks: dict[str, int] = {}
        for past in range(step + 1 - len(window), step + 1):
            for level, count in self.data.pairs.draw(past, self.data.global_batch)[2].items():
                fallbacks[level] = fallbacks.get(level, 0) + count
        line = {
            "step": step + 1,
            **self._schedule,
            **dict(zip(names, means, strict=True)),
            "participation_ratio": self.features.participation_ratio(),
            "images_per_second": len(window) * self.data.global_batch / seconds,
            "partner_fallbacks": fallbacks,
        }
        self.log.append(line)
        return line

    def _save_model(self, folder: Path) -> None:
        backbone = self.accelerator.unwrap_model(self.teacher).backbone
        on_main_process(self.accelerator, lambda: build_repository(folder, backbone, self._image_processor()))

    def _image_processor(self) -> WSDinoImageProcessor:
        a = self.arguments
        return WSDinoImageProcessor(
            tile_size=a.tile_size,
            tile_grid=a.tile_grid,
            max_intensity=self.data.max_intensity,
            intensity_scale=a.intensity_scale,
            symmetries=a.symmetries,
        )


def drop_path_seed(seed: int, step: int, process: int) -> int:
    """Seed of everything that torch draws in one step of one process."""
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0])


# ---------------------------------------------------------------------------------------------- the run


def train(arguments: TrainingArguments) -> bool:
    """Train every channel in turn, then join the towers into one model. False when interrupted.

    Raises:
        TrainingError, ScreenError: settings or data that cannot be used.
    """
    avoid_apple_gpu()
    check_launch(arguments)
    if arguments.init == "random":
        check_arguments(arguments, arguments.patch_size)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.tf32
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != expected:
        raise TrainingError(f"{expected} processes were launched but {accelerator.num_processes} work together.")
    choose_threads(arguments)
    recorded = on_main_process(accelerator, lambda: check_run_folder(arguments))
    if recorded and arguments.dataset is None:
        arguments = replace(arguments, dataset=recorded["dataset"])
    dataset, path = load_screen(arguments, accelerator)
    run = Path(arguments.output_dir)
    if recorded and recorded["fields"] != len(dataset):
        raise TrainingError(
            f"{run} trains on {recorded['fields']} fields and --dataset {path} --part {arguments.part} has "
            f"{len(dataset)}: give the dataset that it began with, or another --output_dir."
        )
    channels = channels_of_run(arguments, recorded, dataset)
    check_depths(arguments, channels, dataset)
    with ExitStack() as held:
        for channel in arguments.channels:
            channel_run = ChannelRun(arguments, channel, dataset, run, path)
            # Only now, when every setting has proved usable, does the run begin to exist.
            if channel == arguments.channels[0]:
                settings = describe_run(arguments, channels, dataset, path, accelerator)
                held.callback(begin_run(arguments, settings, accelerator).release)
            if not channel_run.train():
                return False
        towers = {name: run / name / "model" for name in channels}

        def join_towers() -> None:
            if len(towers) > 1 and all(folder.exists() for folder in towers.values()):
                build_combined_repository(run / "model", towers)

        on_main_process(accelerator, join_towers)
    accelerator.print(f"Trained {', '.join(arguments.channels)} into {run}.")
    accelerator.wait_for_everyone()
    # The last holder of the process group joins its thread, which may need Python's lock to end: a network that is
    # freed after the group would keep that lock and wait for ever.
    del channel_run
    gc.collect()
    accelerator.end_training()
    return True


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of giving it back to the system.

    A step frees and takes gigabytes; fresh pages cost up to five times what reused ones do. The limits are those of
    `mallopt(3)`, set for this process alone; elsewhere than on glibc nothing happens.
    """
    trim_threshold, mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)


def main(argv: list[str] | None = None) -> None:
    parser, arguments = parse_arguments(argv)
    keep_freed_memory()
    disable_progress_bar()  # of reading and writing a model's file, which is no work to wait for
    try:
        finished = train(arguments)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        # A file that is open already has no name in the error of a full disk.
        place = error.filename or f"A file in {arguments.output_dir}"
        parser.exit(2, f"{parser.prog}: error: {place} cannot be written ({error.strerror}).\n")
    except SafetensorError as error:  # weights that cannot be read are refused by name where they are read
        parser.exit(2, f"{parser.prog}: error: A model in {arguments.output_dir} cannot be written ({error}).\n")
    if not finished:
        parser.exit(130)


if __name__ == "__main__":
    main()
