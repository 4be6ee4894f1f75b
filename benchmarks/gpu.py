"""What this machine's GPU makes of a training step and of extraction: the second half of `make gpu`.

    python -m benchmarks.gpu                         # every case; gpu-<device name>.json beside this file, and a table
    python -m benchmarks.gpu --device cpu --small    # walks every line of it on a machine without a GPU

A step is the paper's (ViT-S/8, its crops and head) from random weights on noise, from windows to the moved teacher.
Each case lives in a process of its own, since precision belongs to a process. The share is of the matrix-product rate
measured in that process in the same arithmetic.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import train_accelerate
from benchmarks import train_step
from modeling_wsdino import WSDinoFeatureExtractionPipeline, WSDinoImageProcessor
from wsdino.launch import keep_freed_memory

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_prototypes": 64, "head_hidden_dim": 32,
    "head_bottleneck_dim": 16, "global_crop_size": 64, "local_crop_size": 32, "local_crops": 2, "tile_size": 64,
}  # fmt: skip


@dataclass
class Case:
    """One way to take a step, or (`precision` alone) to extract."""

    what: str = "step"
    precision: str = "no"
    tf32: bool = False
    compile: bool = False
    batch: int = 16
    loader: bool = False

    def __str__(self) -> str:
        arithmetic = "tf32" if self.tf32 else {"no": "float32"}.get(self.precision, self.precision)
        extras = ", compiled" * self.compile + ", with the loader" * self.loader
        return f"{self.what}, {arithmetic}, batch {self.batch}{extras}"


CASES = [
    Case(),
    Case(tf32=True),
    Case(precision="bf16"),
    Case(precision="bf16", compile=True),
    Case(precision="bf16", batch=64),
    Case(precision="bf16", batch=64, compile=True),
    Case(precision="bf16", batch=64, loader=True),
    Case(what="extraction"),
    Case(what="extraction", precision="bf16"),
]


def settings_of(case: Case, small: bool, folder: str) -> train_accelerate.TrainingSettings:
    """The paper's step for a case, or a small one."""
    words = ["--preset", "paper", "--init", "random", "--channels", "dna", "--output_dir", folder]
    return replace(
        train_accelerate.parse(words),
        mixed_precision=case.precision,
        tf32=case.tf32,
        compile=case.compile,
        per_device_train_batch_size=min(case.batch, 2) if small else case.batch,
        dataloader_num_workers=(1 if small else None) if case.loader else 0,
        **(SMALL if small else {}),
    )


def measure(case: Case, device: str, small: bool) -> dict[str, float]:
    """Run a case in this process."""
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.tf32
    rows, size, steps = (8, 512, 2) if small else (256, 8192, 12)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.precision, torch.float32)
    rate = train_step.matmul_rate(device, dtype, size)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(case, small, folder)
        run = train_step.make_run(settings, train_step.screen(rows), folder)
        found = extraction(run, case, device) if case.what == "extraction" else step(run, case, device, steps, rate)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return {**found, "matmul TFLOP/s": rate / 1e12, "peak GiB": memory, "watts": watts()}


def step(run: train_accelerate.Trainer, case: Case, device: str, steps: int, rate: float) -> dict[str, float]:
    """Median seconds of a step after two that warm up, and its share of the matrix-product rate."""
    run.last_step = steps + 2
    made = run._batches(0) if case.loader else iter([[batch] for batch in train_step.batches(run, 2)] * steps)
    seconds, following = [], next(made)
    for number in range(steps + 2):
        start = train_step.now(device)
        monitors = run.step(number, following)
        following = next(made, following)  # while the device works
        seconds.append(train_step.now(device) - start)
    s = run.settings
    median = statistics.median(seconds[2:])
    work = train_step.operations(s, s.hidden_size, s.num_hidden_layers) * s.per_device_train_batch_size
    pairs = s.per_device_train_batch_size / median
    return {"seconds": median, "pairs/s": pairs, "share": work / median / rate, "loss": float(monitors["loss"])}


def extraction(run: train_accelerate.Trainer, case: Case, device: str) -> dict[str, float]:
    """Fields per second of the pipeline, planes given as arrays."""
    processor = WSDinoImageProcessor(tile_size=run.settings.tile_size, tile_grid=2)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    model = run.objective.model().to(dtype)
    extract = WSDinoFeatureExtractionPipeline(model=model, image_processor=processor, device=model.device)
    planes = [np.asarray(plane) for plane in run.data.images.planes]
    seconds = []
    for _ in range(2):
        start = train_step.now(device)
        features = list(extract((plane for plane in planes), batch_size=case.batch, return_tensors=True))
        seconds.append(train_step.now(device) - start)
    assert len(features) == len(planes)
    return {"seconds": seconds[1] / len(planes), "fields/s": len(planes) / seconds[1]}


def watts() -> float:
    """Power that the first GPU draws now; NaN where nothing tells."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return float("nan")
    words = [program, "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    told = subprocess.run(words, capture_output=True, text=True).stdout.split()
    try:
        return float(told[0])
    except (IndexError, ValueError):
        return float("nan")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a small network, two steps of each case")
    parser.add_argument("--output", type=Path, help="JSON; beside this file if not given")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "benchmarks.gpu: error: torch sees no GPU here; try --device cpu --small.\n")
    if given.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if given.case:
        print(json.dumps(measure(Case(**json.loads(given.case)), given.device, given.small)))
        return
    name = train_step.hardware(given.device)
    found, words = (
        {"device": name, "torch": torch.__version__, "small": given.small, "cases": {}},
        ["--small"] * given.small,
    )
    print(f"{name}, torch {torch.__version__}")
    for case in CASES:
        if given.device == "cpu" and case.precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
            print(f"{case!s:44} left out: this CPU does not compute in bfloat16")
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", "--device", given.device, *words]
        done = subprocess.run([*command, "--case", json.dumps(asdict(case))], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{case}: {done.stderr}")
        figures = found["cases"][str(case)] = json.loads(done.stdout.splitlines()[-1])
        print(f"{case!s:44}", ", ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
    slug = "-".join(name.split(",")[0].lower().replace("(", "").replace(")", "").split())
    path = given.output or Path(__file__).with_name(f"gpu-{slug}.json")
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(f"Written to {path}.")


if __name__ == "__main__":
    main()
