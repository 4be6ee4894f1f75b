"""Does a long run grow? Memory, open files, threads and disk over hundreds of short epochs, each evaluated and saved.

    python -m benchmarks.soak --epochs 300

A tiny simulated screen is trained on with an evaluation and a checkpoint every epoch, so that an hour of a real run's
housekeeping passes in a minute. The process is watched from outside; growth is the slope of a straight line fitted to
what was seen after the first quarter, which is left out because caches and allocators still fill in it.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.kill_and_resume import train


def measure(pid: int, epoch: float, run: Path, caches: Path) -> dict[str, float]:
    """What a process and its run hold at one moment; KiB of memory and disk."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    log = run / "dna" / "metrics.jsonl"
    return {
        "epoch": epoch,
        "memory, KiB": int(status["VmRSS"].split()[0]),
        "open files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
        "files on disk": sum(1 for folder in (run, caches) for _ in files(folder)),
        "disk without the log, KiB": sum(size for f in (run, caches) for path, size in files(f) if path != log) / 1024,
        "log, KiB": log.stat().st_size / 1024,
    }


def files(folder: Path):
    """Path and size of every file; those that vanish meanwhile are left out."""
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                yield path, path.stat().st_size
        except OSError:
            continue


def last_epoch(run: Path) -> float:
    """The epoch of the newest whole line of the log; 0 where there is none yet."""
    try:
        lines = (run / "dna" / "metrics.jsonl").read_bytes()[-4000:].splitlines()[1:]
    except OSError:
        return 0.0
    for line in reversed(lines):
        try:
            return json.loads(line)["epoch"]
        except ValueError:
            continue
    return 0.0


def soak(folder: Path, epochs: int, seconds_apart: float) -> list[dict[str, float]]:
    """Train `epochs` epochs in `folder`; what was measured on the way, between checkpoints."""
    from dataset_scripts import build_dataset, simulate_screen

    simulate_screen(folder / "raw", size="tiny", seed=0, progress=False)
    build_dataset(folder / "raw", folder / "built", progress=False)
    caches, run = folder / "caches", folder / "run"
    environment = {"HF_HOME": str(caches), "TMPDIR": str(caches / "tmp"), "HF_HUB_OFFLINE": "1"}
    (caches / "tmp").mkdir(parents=True)
    flags = ["--epochs", str(epochs), "--eval_every", "1", "--num_threads", "1"]
    os.environ.update(environment)  # before the child imports what reads it
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=train, args=(str(folder / "built"), str(run), flags, environment))
    process.start()
    seen = []
    while process.exitcode is None:
        process.join(seconds_apart)
        epoch = last_epoch(run)
        # Inside a checkpoint write there is one more on disk, for a moment.
        if process.exitcode is None and epoch and not list(run.glob("dna/checkpoints/*.partial")):
            try:
                seen.append(measure(process.pid, epoch, run, caches))
            except OSError:  # it ended meanwhile
                break
    process.join()
    assert process.exitcode == 0, f"the run failed: {Path(f'{run}.0.log').read_text()[-2000:]}"
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seconds_apart", type=float, default=1.0)
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seen = soak(Path(folder), given.epochs, given.seconds_apart)
    kept = [one for one in seen if one["epoch"] >= given.epochs / 4]
    print(
        f"{given.epochs} epochs, each evaluated and saved, in {time.perf_counter() - start:.0f} s; "
        f"{len(kept)} measurements from epoch {kept[0]['epoch']:.0f} on"
    )
    print(f"{'':<28}{'first':>12}{'last':>12}{'largest':>12}{'an epoch':>12}")
    for name in list(kept[0])[1:]:
        values = np.array([one[name] for one in kept])
        slope = np.polyfit([one["epoch"] for one in kept], values, 1)[0]
        print(f"{name:<28}{values[0]:>12.0f}{values[-1]:>12.0f}{values.max():>12.0f}{slope:>12.3f}")


if __name__ == "__main__":
    main()
