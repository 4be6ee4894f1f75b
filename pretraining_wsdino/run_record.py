"""settings.json of a run: what it says, and who may begin or continue the run in its folder."""

import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from wsdino.errors import UserError
from wsdino.files import PARTIAL, claim_folder, locked, write_json
from wsdino.launch import on_main_process
from wsdino.run_folder import RENAMED_SETTINGS, RunFolder, renamed

from .settings import LoopSettings, changed_settings

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy")
# Files that a run may leave behind if it is killed or refused before its first step.
UNBEGUN = ("settings.json" + PARTIAL, ".lock")


def recorded_run(settings: LoopSettings) -> dict[str, Any] | None:
    """What an earlier launch recorded of the run in `--output_dir`, under this version's names; None for a new run.

    Raises
    ------
    UserError
        The folder holds something else, a run that `--resume` does not name, or this run with other settings.
    """
    run = RunFolder(settings.output_dir)
    if not claim_folder(run.path, run.settings_file.name, "run", ignore=UNBEGUN):
        return None
    if not settings.resume:
        raise UserError(f"{run} already holds a run: give --resume to continue it, or another --output_dir.")
    recorded = run.settings()
    recorded |= {key: renamed(recorded[key], RENAMED_SETTINGS) for key in ("arguments", "dataset")}
    before = recorded["arguments"]
    if not isinstance(before.get("channels"), list) or "fields" not in recorded["dataset"]:
        raise UserError(f"{run.settings_file} is damaged: give another --output_dir.")
    changed = changed_settings(before, settings)
    if changed:
        flags = ", ".join(f"--{name}" for name in changed)
        raise UserError(f"{run} holds a run with other settings ({flags}): give another --output_dir.")
    return recorded


def joined_channels(asked: Sequence[str], recorded: dict[str, Any] | None, columns: Sequence[str]) -> list[str]:
    """The channels of this launch and of the run's earlier ones, in the dataset's order where they differ."""
    names = list(dict.fromkeys([*(recorded["arguments"]["channels"] if recorded else []), *asked]))
    if len(names) == len(asked):
        return list(asked)
    return sorted(names, key=lambda name: [*columns, name].index(name))


def describe_launch(state: PartialState) -> dict[str, Any]:
    """Versions, git state, processes and device of this launch."""

    def git(*command: str) -> str | None:
        try:
            words = ["git", *command]
            done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True)  # noqa: S603
        except OSError:  # a machine without git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "git": {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))},
        "processes": state.num_processes,
        "device": str(state.device),
        "threads": torch.get_num_threads(),
    }


@contextmanager
def begun_run(
    settings: LoopSettings, channels: list[str], dataset: dict[str, Any], state: PartialState
) -> Iterator[None]:
    """Write settings.json and hold the run's lock, which a process that dies gives back.

    Earlier launches of the run stay recorded under `earlier_launches`.

    Parameters
    ----------
    channels : list of str
        Of all launches of the run.
    dataset : dict
        At least its `path` and the number of its `fields`.

    Raises
    ------
    UserError
        On every process, where another training holds the folder or has started a run there meanwhile.
    """
    run, launch = RunFolder(settings.output_dir), describe_launch(state)
    sentence = f"another training is writing {run}: wait for its end, or give another --output_dir."
    with ExitStack() as held:

        def begin() -> None:
            held.enter_context(locked(run.lock_file, sentence))
            before = recorded_run(settings)
            earlier = []
            if before:
                last = {key: before[key] for key in launch if key in before}
                earlier = [*before.get("earlier_launches", []), last]
            record = {"arguments": {**asdict(settings), "channels": channels}, "dataset": dataset}
            write_json(run.settings_file, {**record, **launch, "earlier_launches": earlier})

        on_main_process(state, begin)
        yield
