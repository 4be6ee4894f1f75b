"""Is the training step fast? Ours against the plain one, interleaved in one run, with equal results checked first.

    python -m benchmarks.train_step                 # ViT-S/8, the paper's crops and head, batch 2, CPU
    python -m benchmarks.train_step --bf16          # bfloat16 as well, on a CPU that computes in it
    python -m benchmarks.train_step --gpu           # batch 16, float32 and bf16 against plain float32
    python -m benchmarks.train_step --data          # what the loader costs beside the step

Plain is `benchmarks/plain_dino.py`: softmax attention written out, one loss per pair of views, AdamW and the teacher's
average one parameter at a time, memory as the system gives it. A step is everything from cut windows to the moved
teacher. Each kind lives in a process of its own and they take turns; figures are medians, and the share is of the
matrix-product rate measured between the turns, with the operations that the plain step needs. All start from the same
weights: the float32 losses of every step and the gradients of the first one must agree, or the command fails.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch

import train_accelerate
from benchmarks.plain_dino import PlainDino
from dataset_scripts import Fields
from modeling_wsdino.checkpoint_layouts import to_dino_key
from pretraining_wsdino import PairBatchSampler, Trainer, TrainingSettings
from pretraining_wsdino.self_distillation import views_of
from wsdino.launch import keep_freed_memory


def screen(rows: int, height: int = 512, width: int = 640) -> Fields:
    """Noise of the right size and depth: the cost of a step does not depend on what the images show."""
    random = np.random.default_rng(0)
    planes = [random.integers(400, 4095, (height, width), dtype=np.uint16) for _ in range(rows)]
    columns = {"dna": planes, "compound": [f"compound {row % 4}" for row in range(rows)]}
    features = datasets.Features({"dna": datasets.Image(), "compound": datasets.Value("string")})
    return Fields.from_dataset(datasets.Dataset.from_dict(columns, features=features))


def operations(a, hidden: int, layers: int, ratio: float = 4.0) -> float:
    """Floating-point operations of one image's plain step: forward of both networks, backward twice the student's."""

    def forward(views: int, size: int) -> float:
        tokens = (size // a.patch_size) ** 2 + 1
        block = 2 * tokens * hidden * hidden * (4 + 2 * ratio) + 4 * tokens * tokens * hidden
        return views * (layers * block + 2 * tokens * 3 * a.patch_size**2 * hidden)

    teacher = forward(a.global_crops, a.global_crop_size)
    return teacher + 3 * (teacher + forward(a.local_crops, a.local_crop_size))


def matmul_rate(device: str, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """Operations per second of a square matrix product, the best of a few."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(repeats):
        start = now(device)
        a @ b
        times.append(now(device) - start)
    return 2 * size**3 / min(times)


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_run(settings: TrainingSettings, dataset: Fields, folder: str) -> Trainer:
    return train_accelerate.channel_trainer(replace(settings, output_dir=folder), "dna", dataset)


def batches(run, steps: int) -> list[dict]:
    sampler = PairBatchSampler(run.data.pairs, batch_size=run.settings.per_device_train_batch_size, total_steps=steps)
    return [run.data.collate([run.data.images[pair] for pair in pairs]) for pairs in sampler]


def plain_of(run) -> PlainDino:
    network = run.objective.student
    projection = {name.removeprefix("mlp."): value for name, value in network.head.mlp.named_parameters("mlp")}
    weight = network.head.last_layer.parametrizations.weight
    projection |= {"length": weight.original0, "direction": weight.original1}
    device = run.accelerator.device
    plain = PlainDino(
        {name: value.to(device) for name, value in network.backbone.to_dino_state_dict().items()},
        projection,
        heads=run.settings.num_attention_heads,
        patch=run.settings.patch_size,
    )
    plain.center = plain.center.to(device)
    return plain


def plain_step(run, plain: PlainDino, batch: dict, learning_rate: float) -> tuple[float, dict]:
    a = run.settings
    seen = views_of(batch, a, run.objective.max_intensity, run.objective.device)
    whole, parts = (list(views.split(a.per_device_train_batch_size)) for views in seen)
    return plain.step(whole, parts, learning_rate=learning_rate, momentum=a.teacher_momentum)


def keep_gradients(run) -> dict:
    """A dictionary that the run's first step fills with the gradients it hands to AdamW, under plain_dino's names."""
    network, kept = run.objective.student, {}
    names = {parameter: ("backbone", to_dino_key(name)) for name, parameter in network.backbone.named_parameters()}
    names |= {parameter: ("head", name) for name, parameter in network.head.mlp.named_parameters()}
    weight = network.head.last_layer.parametrizations.weight
    names |= {weight.original0: ("head", "length"), weight.original1: ("head", "direction")}

    def keep(*_):
        kept.update({name: parameter.grad.float().cpu().clone() for parameter, name in names.items()})
        hook.remove()

    hook = run.optimizer.optimizer.register_step_pre_hook(keep)
    return kept


def largest_gradient_difference(first: dict, second: dict) -> float:
    """Of all parameters, the largest norm of the difference relative to the first's norm."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).norm() / first[name].norm()) for name in first)


def worker(kind: str, device: str, arguments, folder: str, rounds: int, connection) -> None:
    """A process that holds one kind of step and takes one whenever it is asked: (seconds, loss)."""
    if kind.startswith("plain"):
        run = make_run(arguments, screen(64), folder)
        plain = plain_of(run)
    else:
        keep_freed_memory()  # part of what is compared: the plain process keeps the defaults
        run = make_run(replace(arguments, mixed_precision="bf16" if "bf16" in kind else "no"), screen(64), folder)
        gradients = keep_gradients(run)
    steps = batches(run, rounds + 1)
    connection.send("ready")
    for step in iter(connection.recv, None):
        start = now(device)
        if kind.startswith("plain"):
            loss, gradients = plain_step(run, plain, steps[step], arguments.learning_rate)
        else:
            loss = float(run.step(step, [steps[step]])["loss"])
        connection.send((now(device) - start, loss))
        if step == 0:  # the round that warms up
            torch.save({name: value.cpu() for name, value in gradients.items()}, Path(folder, f"{kind}.pt"))
    connection.send(torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0)


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, help="pairs per step: 2 on a CPU, 16 on a GPU if not given")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind, after one that warms up")
    parser.add_argument("--gpu", action="store_true", help="run on the GPU and time bf16 as well")
    parser.add_argument("--bf16", action="store_true", help="time bf16 on a CPU, too")
    parser.add_argument("--data", action="store_true", help="time the cutting of windows alone, too")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    given = parser.parse_args()
    if given.gpu and not torch.cuda.is_available():
        parser.exit(2, "train_step: error: --gpu was given, but torch sees no GPU.\n")
    if given.bf16 and not given.gpu and not torch.cpu._is_avx512_bf16_supported():
        parser.exit(2, "train_step: error: --bf16 was given, but this CPU does not compute in bfloat16.\n")
    device = "cuda" if given.gpu else "cpu"
    if not given.gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # the workers', too: a run would take a GPU that is there
    arguments = train_accelerate.parse(["--preset", "paper", "--init", "random", "--channels", "dna"])
    batch = given.batch_size or (16 if given.gpu else 2)
    arguments = replace(
        arguments, per_device_train_batch_size=batch, drop_path_rate=0.0, warmup_epochs=0, freeze_last_layer_epochs=0
    )
    bf16 = given.gpu or given.bf16
    kinds = ["plain float32", "ours float32"] + ["ours bf16"] * bf16
    figures: dict = {"hardware": hardware(device), "batch_size": batch}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    losses: dict[str, list[float]] = {kind: [] for kind in kinds}
    rates: dict[str, list[float]] = {"float32": [], "bf16": []}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        workers = {}
        for kind in kinds:
            mine, theirs = context.Pipe()
            words = (kind, device, arguments, folder, given.rounds, theirs)
            process = context.Process(target=worker, args=words, daemon=True)
            process.start()
            assert mine.recv() == "ready"
            workers[kind] = mine
        for step in range(given.rounds + 1):
            for kind, connection in workers.items():
                connection.send(step)
                seconds, loss = connection.recv()
                times[kind].append(seconds)
                losses[kind].append(loss)
            rates["float32"].append(matmul_rate(device, torch.float32, 8192 if given.gpu else 2048))
            if bf16:
                rates["bf16"].append(matmul_rate(device, torch.bfloat16, 8192 if given.gpu else 2048))
        for kind, connection in workers.items():
            connection.send(None)
            figures[f"{kind}, peak GPU memory GiB"] = connection.recv()

        difference = max(abs(a - b) for a, b in zip(losses["plain float32"], losses["ours float32"], strict=True))
        gradients = [torch.load(Path(folder, f"{kind}.pt")) for kind in ("plain float32", "ours float32")]
        turned = largest_gradient_difference(*gradients)
        figures |= {"largest loss difference, float32": difference, "largest gradient difference, float32": turned}
        work = operations(arguments, arguments.hidden_size, arguments.num_hidden_layers) * batch
        print(f"{figures['hardware']}; batch {batch}, {work / batch / 1e9:.0f} GFLOP per image")
        plain_time = statistics.median(times["plain float32"][1:])
        for kind, seconds in times.items():
            median, rate = statistics.median(seconds[1:]), statistics.median(rates[kind.split()[1]])
            share, speedup = work / median / rate, plain_time / median
            figures[kind] = {"seconds per step": median, "share of matmul rate": share, "speed-up": speedup}
            print(
                f"{kind:14} {median:7.3f} s/step  {batch / median:8.2f} images/s  {work / median / 1e9:7.0f} GFLOP/s "
                f"= {share:4.0%} of the matmul rate ({rate / 1e9:.0f}), {speedup:5.2f}x"
            )
            if given.gpu:
                print(f"{'':14} peak GPU memory {figures[f'{kind}, peak GPU memory GiB']:.1f} GiB")
        print(f"float32: {given.rounds + 1} losses agree to {difference:.1e}, gradients of the first to {turned:.1e}")
        if difference > 1e-4 or turned > 1e-3:
            raise SystemExit("The steps disagree: the figures above compare different things.")
        if given.data:
            run = make_run(arguments, screen(64), folder)
            start = time.perf_counter()
            cut = len(batches(run, 20))
            a_batch = (time.perf_counter() - start) / cut
            figures["seconds to cut a batch in one process"] = a_batch
            print(f"cutting a batch of windows takes {a_batch * 1e3:.1f} ms in one process")
    if given.output:
        given.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
