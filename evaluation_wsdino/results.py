"""All scores of a run folder, as results.json holds them.

results.json
------------
format            1, raised when a key below changes its meaning
simulated         true if any field's Metadata_Source says so; sources: the distinct sources
settings          the run's settings.json (null without one); versions: of what computed the scores
protocol          normalization, aggregation, metric, batch_rule, exclude: the words for what was done
counts            fields, dmso_fields, treatments; scored_treatments (those with a mechanism), their compounds and
                  moas; plates, batches
sets.<set>        of each profile file: nsc, nscb, nsc_correct, nsc_total, nscb_correct, nscb_total, nscb_excluded, ...
                  (every key of the not_same_compound metric), nsc_wilson, nsc_bootstrap (95 % intervals, treatments
                  taken as independent, and compounds drawn anew), nsc_null (see `permutation_null`), and for nscb;
                  treatments (names in the order of the queries' `row`), batches, map and map_method (two coordinates
                  per treatment, in the headline's set alone),
                  average_precision (replicate and moa: value, low, high, treatments; see `replicate_precision`),
                  five_nearest (nsc and nscb when five neighbours vote), reproducibility (`replicate_reproducibility`),
                  batch_effect (`control_batch_effect`), retrieval (`mean_average_precision`, where it was asked for),
                  held_out (`held_out`, where --exclude_compounds kept compounds out of training),
                  channels.<channel> (nsc, nscb, ... and their intervals of that channel alone; participation_ratio of
                  its raw features)
training.<channel> last_step, last_loss, and collapse: verdict ("healthy", "suspect", "collapsed" or "unknown"),
                  reasons (sentences), last (the monitors' last values)
checkpoints       of each profiles/checkpoints/step_<step>.parquet: step, epoch (with training logs), and all channels'
                  nsc, nscb, nsc_correct, nsc_total, nscb_correct, nscb_total at that step; [] where none was extracted
comparisons       for every set but the headline's: {"first": set, "second": headline's, "nsc": ..., "nscb": ...}, see
                  `compare_paired`
notes             sentences that belong beside the scores wherever they are shown
headline          the set the run is about ("trained", otherwise "initial", otherwise the last) and its nsc and nscb
"""

import math
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from wsdino.errors import UserError
from wsdino.files import write_json
from wsdino.run_folder import RENAMED_SETS, RunFolder, ordered_sets

from .profile_table import CONTROL, TableSettings, is_named, read_profiles
from .scores import PREFIXES, Protocol, compare_sets, evaluate_set, held_out
from .training_log import epochs_per_step, training_summary

TABLES = ("*.csv", "*.csv.gz", "*.tsv", "*.parquet")
NO_MECHANISM = (
    "No treatment has a mechanism of action (MOA), so NSC and NSCB are left out: see how well replicates agree."
)
VERSIONS_OF = ("wsdino", "numpy", "pandas", "scikit-learn", "evaluate", "torch", "transformers", "datasets")


def profile_files(run: RunFolder) -> dict[str, Path]:
    """The profile file of every set of a run, in the order of all tables.

    Raises
    ------
    UserError
        There is none.
    """
    paths = [path for pattern in TABLES for path in sorted(run.profiles.glob(pattern))]
    names = [path.name.partition(".")[0] for path in paths]
    files = {RENAMED_SETS.get(name, name): path for name, path in zip(names, paths, strict=True)}
    if not files:
        raise UserError(f"{run.profiles} holds no .parquet file: run wsdino-extract {run} first.")
    return {name: files[name] for name in ordered_sets(files)}


def headline_set(files: Iterable[str]) -> str:
    """The set that a run is about: "trained", otherwise "initial", otherwise the last."""
    return next((name for name in ("trained", "initial") if name in files), list(files)[-1])


def evaluate_run(
    run_folder: str | Path,
    *,
    protocol: Protocol | None = None,
    table: TableSettings | None = None,
    retrieval: bool = False,
    progress: bool = True,
) -> dict:
    """Score every profile set of a run folder and write its results.json.

    Parameters
    ----------
    run_folder : str or Path
        Holds `profiles/<set>.parquet`, and where training wrote them `settings.json` and `<channel>/metrics.jsonl`.
        A table of another program there (also .csv, .csv.gz or .tsv) takes its labels from the run's own profiles, by
        plate and well.
    table : TableSettings, optional
        How the tables are read.
    retrieval : bool
        See `evaluate_set`.

    Returns
    -------
    dict
        What was written (see the module's docstring).

    Raises
    ------
    UserError
        There is no such folder, no profile file, or one that cannot be scored.
    """
    run, protocol = RunFolder(run_folder), protocol or Protocol()
    if not run.path.is_dir():
        raise UserError(f"{run} is not a folder: name a run folder, like runs/demo.")
    files = profile_files(run)
    settings = run.settings() if run.settings_file.exists() else None
    arguments = settings["arguments"] if settings else {}
    excluded_compounds = arguments.get("exclude_compounds") or []
    headline = headline_set(files)
    sets, counts, sources, labels = {}, {}, set(), None
    notes = _notes(arguments, excluded_compounds)
    for name in tqdm(files, desc="Scoring", unit="set", disable=None if progress else True):
        profiles = read_profiles(files[name], table, labels)
        labels = profiles if labels is None else labels
        notes += [f"{name}: {profiles.attrs.pop('note')}"] if "note" in profiles.attrs else []
        sets[name] = _scored(files[name], profiles, protocol=protocol, plot=name == headline, retrieval=retrieval)
        if excluded_compounds:
            sets[name]["held_out"] = held_out(sets[name], excluded_compounds)
        counts[name] = _counts(profiles)
        if "Metadata_Source" in profiles.columns:
            sources |= set(profiles["Metadata_Source"].dropna().astype(str))
    channels = sets["untrained"]["channels"] if "untrained" in sets else {}
    results = {
        "format": 1,
        "simulated": any("simulated" in source.lower() for source in sources),
        "sources": sorted(sources),
        "notes": notes + ([] if counts[headline]["scored_treatments"] else [NO_MECHANISM]),
        "headline": {"set": headline, **{prefix: sets[headline][prefix] for prefix in PREFIXES}},
        "comparisons": [
            {
                "first": name,
                "second": headline,
                **{prefix: compare_sets(sets[name], sets[headline], prefix) for prefix in PREFIXES},
            }
            for name in files
            if name != headline
        ],
        "counts": counts[headline],
        "protocol": protocol.description(),
        "sets": sets,
        "checkpoints": _checkpoints(run, protocol, table, progress),
        "training": training_summary(
            run, arguments, {name: part["participation_ratio"] for name, part in channels.items()}
        ),
        "settings": settings,
        "versions": _versions(),
    }
    results = _as_json(results)
    write_json(run.results_file, results)
    return results


def _scored(path: Path, profiles: pd.DataFrame, **options: Any) -> dict:
    """`evaluate_set`, whose refusal names the file."""
    try:
        return evaluate_set(profiles, **options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _checkpoints(run: RunFolder, protocol: Protocol, table: TableSettings | None, progress: bool) -> list[dict]:
    """All channels' scores at each checkpoint that was extracted, by rising step."""
    per_step, lines = epochs_per_step(run), []
    paths = sorted(run.profiles.glob("checkpoints/step_*.parquet"))
    for path in tqdm(paths, desc="Scoring", unit="checkpoint", disable=None if progress else True):
        number = path.stem.removeprefix("step_")
        if not number.isdecimal():
            raise UserError(f"{path} is not named like step_00000100.parquet: rename or remove it.")
        scores = _scored(path, read_profiles(path, table), protocol=protocol, details=False)
        names = [f"{prefix}{suffix}" for prefix in PREFIXES for suffix in ("", "_correct", "_total")]
        epoch = {"epoch": int(number) * per_step} if per_step is not None else {}
        lines.append({"step": int(number), **epoch, **{name: scores[name] for name in names}})
    return lines


def _notes(arguments: dict, excluded_compounds: list[str]) -> list[str]:
    """Sentences about what training saw."""
    if arguments.get("weak_label") != "moa":
        return []
    if excluded_compounds:
        return [
            "Training saw the MOA of every treatment but those of the compounds kept out: all scores but theirs are "
            "those of a training set."
        ]
    return ["Training saw the MOA of every treatment: these scores are those of a training set."]


def _counts(profiles: pd.DataFrame) -> dict[str, int]:
    """The numbers of fields, treatments, plates and so on of a table."""
    treated = profiles[profiles["Metadata_Compound"] != CONTROL]
    scored = treated[is_named(treated["Metadata_MOA"])] if "Metadata_MOA" in treated else treated[:0]
    return {
        "fields": len(profiles),
        "dmso_fields": len(profiles) - len(treated),
        "treatments": int(treated["Metadata_Treatment"].nunique()),
        "scored_treatments": int(scored["Metadata_Treatment"].nunique()),
        "compounds": int(scored["Metadata_Compound"].nunique()),
        "moas": int(scored["Metadata_MOA"].astype(str).str.strip().nunique()) if len(scored) else 0,
        "plates": int(profiles["Metadata_Plate"].nunique()),
        "batches": int(profiles["Metadata_Batch"].nunique()),
    }


def _versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    versions = {"python": platform.python_version()}
    for package in VERSIONS_OF:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    return versions


def _as_json(value: Any) -> Any:
    """The same value with numbers that JSON lacks (nan, inf) as null, and numpy's numbers as Python's."""
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
