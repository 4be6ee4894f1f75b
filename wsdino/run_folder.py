"""A run's folder: the names and places of its settings, channels, checkpoints, profile sets, scores and pictures.

It knows paths and plain JSON, never networks.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .files import read_json


@dataclass(frozen=True)
class ProfileSet:
    """One set of profiles of a run: a network's or a baseline's features of every field."""

    name: str
    caption: str
    uses_network: bool = True


# In the order of every table and page. A file of any other name in `profiles/` is a set of the user's own.
PROFILE_SETS = {
    one.name: one
    for one in (
        ProfileSet("trained", "trained network"),
        ProfileSet("initial", "network that training started from"),
        ProfileSet("untrained", "untrained network of the same shape"),
        ProfileSet("intensity", "intensity statistics", uses_network=False),
        ProfileSet("nuclei", "nuclei counted and measured", uses_network=False),
    )
}


# What earlier versions called settings of training, profile sets and entries of metrics.jsonl: their run folders are
# read under the names of this version.
RENAMED_SETTINGS = {
    "part": "subset",
    "eval_parts": "eval_subsets",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "save_every": "save_every_epochs",
    "keep": "save_total_limit",
    "eval_every": "eval_every_epochs",
    "log_every": "logging_steps",
    "num_workers": "dataloader_num_workers",
    "trackers": "report_to",
}
RENAMED_SETS = {"count": "nuclei"}
RENAMED_METRICS = {"images_per_second": "pairs_per_second"}


def renamed(content: dict, names: Mapping[str, str]) -> dict:
    """The same dictionary with its old keys under their present names."""
    return {names.get(key, key): value for key, value in content.items()}


def ordered_sets(names: Iterable[str]) -> list[str]:
    """Names of profile sets in the order of `PROFILE_SETS`, others after them by name."""
    known = list(PROFILE_SETS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


class RunFolder:
    """Paths inside the folder of one training run.

    Parameters
    ----------
    path : str or Path
        The folder; it need not exist yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def settings_file(self) -> Path:
        """What the run was started with: arguments, versions, dataset."""
        return self.path / "settings.json"

    @property
    def lock_file(self) -> Path:
        """Held by the process that trains in the folder."""
        return self.path / ".lock"

    @property
    def results_file(self) -> Path:
        """Scores of an evaluated run."""
        return self.path / "results.json"

    @property
    def report_file(self) -> Path:
        """The page of the run."""
        return self.path / "report.html"

    @property
    def pictures(self) -> Path:
        """Folder of fields and attention maps."""
        return self.path / "pictures"

    @property
    def profiles(self) -> Path:
        """Folder of the profile sets."""
        return self.path / "profiles"

    def profile_file(self, name: str) -> Path:
        """Profiles of one set, a Parquet file or folder of Parquet parts."""
        return self.profiles / f"{name}.parquet"

    def checkpoint_profiles(self, step: int) -> Path:
        """Profiles of all channels' teachers at one step of training."""
        return self.profiles / "checkpoints" / f"step_{step:08d}.parquet"

    @property
    def combined_model(self) -> Path:
        """Repository of all channels' towers as one model."""
        return self.path / "model"

    def model(self, channel: str) -> Path:
        """Repository of a channel's trained teacher."""
        return self.path / channel / "model"

    def initial_model(self, channel: str) -> Path:
        """Repository of what a channel's training started from, where the seed alone does not give it."""
        return self.path / channel / "initial"

    def metrics_file(self, channel: str) -> Path:
        """Losses and monitors of a channel, one JSON object per line."""
        return self.path / channel / "metrics.jsonl"

    def checkpoints(self, channel: str) -> list[Path]:
        """Whole checkpoints of a channel, newest first."""
        return sorted((self.path / channel / "checkpoints").glob("step_" + "[0-9]" * 8), reverse=True)

    def checkpoint(self, channel: str, step: int) -> Path:
        """Folder of the checkpoint that a channel wrote after `step` optimiser steps."""
        return self.path / channel / "checkpoints" / f"step_{step:08d}"

    def settings(self) -> dict:
        """Content of settings.json: `arguments`, `versions`, `git`, `dataset`, `processes`, `device`, `threads`.

        Raises
        ------
        UserError
            The folder holds no run, or its settings are damaged.
        """
        fix = f"give the folder of a training run, or train one with train_accelerate.py --output_dir {self.path}"
        settings = read_json(self.settings_file, needs=("arguments", "dataset"), fix=fix)
        if not isinstance(settings["arguments"], dict) or not isinstance(settings["dataset"], dict):
            raise UserError(f"{self.settings_file} is damaged: {fix}.")
        return settings

    def results(self) -> dict:
        """Content of results.json, whose keys wsdino-evaluate describes, under the names of this version.

        Raises
        ------
        UserError
            The folder is absent or was not evaluated, or its results are damaged or of another version.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path} is not a folder: give the folder of a training run, such as runs/demo.")
        fix = f"run wsdino-evaluate {self.path} first"
        needs = ("simulated", "sources", "headline", "comparisons", "counts", "protocol", "sets", "versions")
        results = read_json(self.results_file, needs=needs, fix=fix)
        sets, settings = results["sets"], results.get("settings") or {}
        dictionaries = [sets, *(sets.values() if isinstance(sets, dict) else ()), settings, results["headline"]]
        dictionaries += [settings.get(key) or {} for key in ("arguments", "dataset") if isinstance(settings, dict)]
        if results.get("format") != 1 or not sets or not all(isinstance(one, dict) for one in dictionaries):
            raise UserError(f"{self.results_file} is damaged or of another version: {fix}.")
        results["sets"] = renamed(sets, RENAMED_SETS)
        for one in (results["headline"], *results["comparisons"]):
            one |= {key: RENAMED_SETS.get(one[key], one[key]) for key in ("set", "first", "second") if key in one}
        parts = {key: renamed(settings.get(key) or {}, RENAMED_SETTINGS) for key in ("arguments", "dataset")}
        results["settings"] = settings | parts
        return results

    def trained_channels(self) -> list[str]:
        """The run's channels that have a trained model, in the run's order.

        Raises
        ------
        UserError
            No channel is trained yet.
        """
        names = self.settings()["arguments"].get("channels", [])
        trained = [name for name in names if (self.model(name) / "model.safetensors").exists()]
        if not trained:
            raise UserError(
                f"{self.path} holds no trained model yet: finish it with train_accelerate.py --output_dir {self.path} "
                "--resume."
            )
        return trained

    def metrics(self, channel: str) -> list[dict]:
        """Lines of a channel's metrics.jsonl; a last line that a killed run left half-written is left out."""
        path = self.metrics_file(channel)
        lines = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return [renamed(line, RENAMED_METRICS) for line in lines if isinstance(line, dict)]
