"""Does a killed run lose anything? Kills training at random moments, resumes it, and compares bit for bit.

    python -m benchmarks.kill_and_resume --kills 20

A tiny screen is simulated; one run is left alone, another is killed (SIGKILL) at random moments, inside steps,
checkpoint writes, evaluations and start-up, and resumed after each. Both must end with the same weights to the bit,
and the same log but for its timings.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

FLAGS = (
    "--channels dna --hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --batch_size 4 --tile_size 32 "
    "--global_crop_size 32 --local_crop_size 16 --local_crops 3 --num_prototypes 64 --head_hidden_dim 32 "
    "--head_bottleneck_dim 16 --drop_path_rate 0.2 --log_every 1 --save_every 1 --eval_every 2"
).split()


def train(dataset: str, run: str, epochs: int) -> None:
    import train_accelerate

    said = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    train_accelerate.main(["--dataset", dataset, "--output_dir", run, "--epochs", str(epochs), "--resume", *FLAGS])


def log_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "dna" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def kill_and_resume(folder: Path, kills: int, epochs: int, seed: int, longest: float) -> dict:
    """Run both runs in `folder`; returns what was seen. Raises AssertionError where the killed run differs."""
    from safetensors.torch import load_file

    from dataset_scripts import build_dataset, simulate_screen

    simulate_screen(folder / "raw", size="tiny", seed=0, progress=False)
    build_dataset(folder / "raw", folder / "built", progress=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_accelerate"])  # children start warm, so that kills fall inside training

    def start(run: str):
        process = context.Process(target=train, args=(str(folder / "built"), str(folder / run), epochs))
        process.start()
        return process

    whole = start("whole")
    whole.join()
    assert whole.exitcode == 0, "the run that is left alone failed"
    draw, moments, done = random.Random(seed), {"start-up": 0, "checkpoint": 0, "training": 0}, 0
    while done < kills:
        process = start("killed")
        process.join(draw.uniform(0.02, longest))
        if process.exitcode is not None:  # it finished first; what is left of the kills has nothing to hit
            assert process.exitcode == 0, f"a resumed run failed with status {process.exitcode}"
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        done += 1
        checkpoints = folder / "killed" / "dna" / "checkpoints"
        if not checkpoints.exists():
            moments["start-up"] += 1
        else:
            moments["checkpoint" if list(checkpoints.glob("*.partial")) else "training"] += 1
    last = start("killed")
    last.join()
    assert last.exitcode == 0, "the run could not be resumed to its end"
    ours, expected = (load_file(folder / run / "dna" / "model" / "model.safetensors") for run in ("killed", "whole"))
    assert ours.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not tensor.equal(ours[name])]
    assert not different, f"{len(different)} tensors differ"
    assert log_of(folder / "killed") == log_of(folder / "whole"), "the logs differ"
    return {"kills": done, "moments": moments, "steps": log_of(folder / "whole")[-1]["step"], "tensors": len(expected)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=3.0, help="seconds that a run is left alive at most")
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seen = kill_and_resume(Path(folder), given.kills, given.epochs, given.seed, given.longest)
    print(
        f"killed {seen['kills']} times ({seen['moments']}) on the way to step {seen['steps']}; all {seen['tensors']} "
        f"tensors and the log are equal to the uninterrupted run's; {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
