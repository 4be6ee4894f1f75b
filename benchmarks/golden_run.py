"""Does a change of the code leave the numbers alone? Short runs of two checkouts, compared to the bit.

    python -m benchmarks.golden_run make CHECKOUT DATASET FOLDER   # 20 steps, profiles and scores with two seeds
    python -m benchmarks.golden_run compare FOLDER OTHER   # exit status 1 if losses, features or scores differ

`make` runs the commands of any checkout of this project on one thread, on a dataset folder that both checkouts share,
such as the demo's `data/simulated_demo`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

SEEDS = (0, 1)
MONITORS = ("loss", "kl", "koleo", "teacher_entropy", "mean_entropy")
SCORES = ("nsc_correct", "nsc_total", "nscb_correct", "nscb_total")
RENAMED_SETS = {"count": "nuclei"}


def make(checkout: Path, dataset: Path, folder: Path) -> None:
    """Train, extract and evaluate with both seeds into `folder/run0` and `folder/run1`."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    for seed in SEEDS:
        run = folder / f"run{seed}"
        shutil.rmtree(run, ignore_errors=True)
        train = ["--preset", "demo", "--dataset", dataset, "--seed", seed, "--max_steps", 20, "--log_every", 1]
        train += ["--num_threads", 1, "--output_dir", run]
        evaluate = f"from evaluation_wsdino.evaluate_profiles import main; main([{str(run)!r}])"
        for words in (["train_accelerate.py", *train], ["extract_profiles.py", run], ["-c", evaluate]):
            subprocess.run([sys.executable, *map(str, words)], cwd=checkout, env=environment, check=True)


def differences(first: Path, second: Path) -> list[str]:
    """What differs between two runs: monitors of every step, features of every set, counts of every score."""
    found = []
    for path in sorted(first.glob("*/metrics.jsonl")):
        other = second / path.relative_to(first)
        lines, others = ([json.loads(line) for line in each.read_text().splitlines()] for each in (path, other))
        for line, its in zip(lines, others, strict=True):
            found += [f"{path}: {name} of step {line['step']}" for name in MONITORS if line[name] != its[name]]
    for path in sorted((first / "profiles").glob("*.parquet")):
        other = second / "profiles" / path.name
        if not other.exists():
            other = other.with_stem(RENAMED_SETS.get(path.stem, path.stem))
        ours, theirs = pd.read_parquet(path), pd.read_parquet(other)
        names = [name for name in ours if not name.startswith("Metadata_")]
        if not np.array_equal(ours[names].to_numpy(), theirs[names].to_numpy()):
            found.append(f"{path}: features")
    sets, others = (json.loads((run / "results.json").read_text())["sets"] for run in (first, second))
    for name, scores in sets.items():
        its = others[name if name in others else RENAMED_SETS.get(name, name)]
        found += [f"{first}: {key} of {name}" for key in SCORES if scores[key] != its[key]]
    return found


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if len(words) == 4 and words[0] == "make":
        make(*(Path(word).resolve() for word in words[1:]))
    elif len(words) == 3 and words[0] == "compare":
        folders = [Path(word) for word in words[1:]]
        found = [line for seed in SEEDS for line in differences(*(folder / f"run{seed}" for folder in folders))]
        print("\n".join(found) or "equal")
        sys.exit(bool(found))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
