"""How long NSC and NSCB take, and in how much memory: ours against a loop over pandas rows, equal answers checked.

    python benchmarks/metric.py            # 103 and 2,000 treatments, then 20,000 in a process of its own
    python benchmarks/metric.py --quick    # without the 20,000

Prints one JSON line per question.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation_wsdino.not_same_compound import not_same_compound  # noqa: E402


def screen(treatments, dimensions=1152, seed=0):
    """Profiles, moas, compounds and batches: 12 MOAs, about 3 treatments per compound, 10 batches, a weak signal."""
    rng = np.random.default_rng(seed)
    compound = rng.integers(0, max(24, treatments // 3), size=treatments)
    moa = compound % 12
    batch = (compound // 12) % 10
    profiles = rng.normal(size=(12, dimensions))[moa] * 0.08 + rng.normal(size=(treatments, dimensions))
    return profiles, [f"moa {i}" for i in moa], [f"c{i}" for i in compound], [f"Week{i + 1}" for i in batch]


def pandas_loop(profiles, moas, compounds, batches):
    """The plain way: for each treatment drop rows from a DataFrame, compute the cosines, take the largest."""
    features = pd.DataFrame(profiles)
    labels = pd.DataFrame({"moa": moas, "compound": compounds, "batch": batches})
    in_batches = labels.groupby("moa")["batch"].nunique()
    answers = {}
    for name in ("nsc", "nscb"):
        right = []
        table, names = features, labels
        if name == "nscb":
            keep = ~labels["moa"].isin(in_batches.index[in_batches == 1])
            table, names = features[keep], labels[keep]
        for index in names.index:
            drop = names["compound"] == names.loc[index, "compound"]
            if name == "nscb":
                drop |= names["batch"] == names.loc[index, "batch"]
            remaining = table.drop(drop[drop].index)
            query = table.loc[index].to_numpy()
            cosine = remaining.to_numpy() @ query
            cosine = cosine / np.linalg.norm(remaining.to_numpy(), axis=1) / np.linalg.norm(query)
            nearest = remaining.index[int(np.argmax(cosine))]
            right.append(names.loc[nearest, "moa"] == names.loc[index, "moa"])
        answers[name] = (int(np.sum(right)), len(right))
    return answers


def timed(function, *arguments, repeats=1):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function(*arguments)
        times.append(time.perf_counter() - start)
    return median(times), result


def compare(treatments, repeats):
    table = screen(treatments)
    not_same_compound(*screen(50))  # imports and threads are up
    # Before and after the loop, so that both see the machine equally busy.
    before, result = timed(not_same_compound, *table, repeats=repeats)
    plain, expected = timed(pandas_loop, *table)
    ours = (before + timed(not_same_compound, *table, repeats=repeats)[0]) / 2
    got = {name: (result[f"{name}_correct"], result[f"{name}_total"]) for name in ("nsc", "nscb")}
    assert got == expected, (got, expected)
    return {
        "treatments": treatments,
        "dimensions": 1152,
        "ours_ms": round(1000 * ours, 2),
        "pandas_loop_ms": round(1000 * plain, 1),
        "times_faster": round(plain / ours),
        "equal": True,
        "nsc": result["nsc"],
    }


def memory(field):
    """MiB of this process, from Linux's /proc: VmRSS what it holds, VmHWM the most it held."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def large(treatments=20_000):
    table = screen(treatments)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from what is held now
    before = memory("VmRSS")
    seconds, result = timed(not_same_compound, *table)
    extra = memory("VmHWM") - before
    return {
        "treatments": treatments,
        "dimensions": 1152,
        "ours_s": round(seconds, 1),
        "extra_memory_mib": round(extra),
        "profiles_mib": round(table[0].nbytes / 2**20),
        "nsc": result["nsc"],
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out the 20,000 treatments")
    parser.add_argument("--large", action="store_true", help="the 20,000 treatments alone")
    arguments = parser.parse_args(argv)
    if arguments.large:
        print(json.dumps(large()))
        return
    print(json.dumps({"cores": len(os.sched_getaffinity(0)), "threads": os.environ.get("OMP_NUM_THREADS")}))
    print(json.dumps(compare(103, repeats=50)))
    print(json.dumps(compare(2000, repeats=7)))
    if not arguments.quick:
        sys.stdout.flush()
        subprocess.run([sys.executable, __file__, "--large"], check=True)


if __name__ == "__main__":
    main()
