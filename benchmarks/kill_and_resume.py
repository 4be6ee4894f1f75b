"""Does a killed run lose anything? Kills training at chosen and random moments, resumes it, and compares bit for bit.

    python -m benchmarks.kill_and_resume --kills 20
    python -m benchmarks.kill_and_resume --kills 20 --processes 2

A tiny screen is simulated; one run is left alone, another is killed (SIGKILL) again and again and resumed after each:
at random moments, inside checkpoint writes and inside evaluations by turns. Both must end with the same weights to the
bit, and the same log but for its timings. With two processes (gloo) one of them is killed, the other must end by
itself; and a run that was started on two processes continues on one, with the same global batches and nearly the same
losses.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import tempfile
import time
from collections import Counter
from pathlib import Path

FLAGS = (
    "--channels dna --hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 "
    "--per_device_train_batch_size 4 --tile_size 32 --global_crop_size 32 --local_crop_size 16 "
    "--local_crops 3 --num_prototypes 64 --head_hidden_dim 32 --head_bottleneck_dim 16 --drop_path_rate 0.2 "
    "--logging_steps 1 --save_every_epochs 1 --eval_every_epochs 2"
).split()
# The same global batch on two processes. KoLeo's neighbours and drop path's draws are each process's own: without them
# one process must find nearly the same losses.
TWO = "--per_device_train_batch_size 2 --koleo_weight 0 --drop_path_rate 0".split()
ONE = "--per_device_train_batch_size 4 --koleo_weight 0 --drop_path_rate 0".split()
AIMS = ("any moment", "checkpoint", "evaluation")


def train(dataset: str, run: str, flags: list[str], environment: dict[str, str]) -> None:
    """What a child process does; its output is appended to `<run>.<rank>.log`."""
    os.environ.update(environment)
    import torch

    import train_accelerate

    torch.set_num_threads(1)
    said = os.open(f"{run}.{environment.get('RANK', 0)}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    train_accelerate.main(["--dataset", dataset, "--output_dir", run, "--resume", *FLAGS, *flags])


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def log_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "dna" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "pairs_per_second"} for line in lines]


class Launch:
    """One or two processes of one run."""

    def __init__(self, context, dataset: Path, run: Path, flags: list[str], processes: int):
        self.run, self.log = run, Path(f"{run}.0.log")
        port, children = free_port(), []
        for rank in range(processes):
            environment = {"OMP_NUM_THREADS": "1"}
            if processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            children.append(context.Process(target=train, args=(str(dataset), str(run), flags, environment)))
        self.children = children
        for child in children:
            child.start()

    def running(self) -> bool:
        return all(child.exitcode is None for child in self.children)

    def finish(self) -> None:
        for child in self.children:
            child.join()
            assert child.exitcode == 0, f"a run failed with status {child.exitcode}: {self.tail(2000)}"

    def tail(self, size: int) -> str:
        """The end of the first process's output."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(self.log.stat().st_size - size, 0))
            return file.read().decode(errors="replace")

    def moment(self) -> str:
        """What the run is in the middle of."""
        checkpoints = self.run / "dna" / "checkpoints"
        if not checkpoints.exists():
            return "start-up"
        if list(checkpoints.glob("*.partial")):
            return "checkpoint"
        bars = [line for line in self.tail(400).replace("\r", "\n").split("\n") if line.strip("\x1b[A ")]
        return "evaluation" if bars and "evaluate dna" in bars[-1] else "training"

    def kill_within(self, seconds: float, aim: str, victims: list[int]) -> str | None:
        """Kill `victims` after `seconds`, or then as soon as the run is where it is aimed at. None: it had ended."""
        until = time.monotonic() + seconds
        while self.running() and time.monotonic() < until:
            time.sleep(0.01)
        patience = time.monotonic() + 30
        while aim != "any moment" and self.running() and self.moment() != aim and time.monotonic() < patience:
            time.sleep(0.0005)
        if not self.running():
            return None
        moment = self.moment()
        for rank in victims:
            os.kill(self.children[rank].pid, signal.SIGKILL)
        for child in self.children:
            child.join(120)
            assert child.exitcode is not None, "the process that was not killed hangs"
            assert child.exitcode != 0, "the process that was not killed went on alone"
        return moment


def kill_and_resume(folder: Path, kills: int, epochs: int, seed: int, longest: float, processes: int = 1) -> dict:
    """Run both runs in `folder`; returns what was seen. Raises AssertionError where the killed run differs."""
    from safetensors.torch import load_file

    from dataset_scripts import build_dataset, simulate_screen

    simulate_screen(folder / "raw", size="tiny", seed=0, progress=False)
    build_dataset(folder / "raw", folder / "built", progress=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_accelerate"])  # children start warm, so that kills fall inside training
    flags = [*(TWO if processes > 1 else []), "--num_train_epochs", str(epochs)]

    def start(run: str, flags=flags, processes=processes) -> Launch:
        return Launch(context, folder / "built", folder / run, flags, processes)

    start("whole").finish()
    draw, moments = random.Random(seed), Counter()
    while moments.total() < kills:
        victims = [draw.randrange(processes)]
        aim = AIMS[moments.total() % len(AIMS)]
        launch = start("killed")
        moment = launch.kill_within(draw.uniform(0.02, longest), aim, victims)
        if moment is None:  # it finished first; what is left of the kills has nothing to hit
            launch.finish()
            break
        moments[moment] += 1
    start("killed").finish()
    ours, expected = (load_file(folder / run / "dna" / "model" / "model.safetensors") for run in ("killed", "whole"))
    assert ours.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not tensor.equal(ours[name])]
    assert not different, f"{len(different)} tensors differ"
    assert log_of(folder / "killed") == log_of(folder / "whole"), "the logs differ"
    whole = log_of(folder / "whole")
    seen = {"kills": moments.total(), "moments": dict(moments), "steps": whole[-1]["step"], "tensors": len(expected)}
    if processes > 1:
        half = [*flags, "--stop_after_epoch", str(epochs // 2)]
        start("fewer", half).finish()
        start("fewer", [*ONE, "--num_train_epochs", str(epochs)], 1).finish()
        pairs = [(a["loss"], b["loss"]) for a, b in zip(log_of(folder / "fewer"), whole, strict=True) if "loss" in a]
        seen["on_one"] = max(abs(a - b) / b for a, b in pairs)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=3.0, help="seconds that a run is left alive at most")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seen = kill_and_resume(Path(folder), given.kills, given.epochs, given.seed, given.longest, given.processes)
    print(
        f"{given.processes} process(es), killed {seen['kills']} times ({seen['moments']}) on the way to step "
        f"{seen['steps']}; all {seen['tensors']} tensors and the log are equal to the uninterrupted run's; "
        f"{time.perf_counter() - start:.0f} s"
    )
    if "on_one" in seen:
        print(f"started on two, finished on one: losses differ by at most {100 * seen['on_one']:.2g} %")


if __name__ == "__main__":
    main()
