"""The evaluation of one run folder: profiles in, results.json out, and the command `wsdino-evaluate RUN`.

For every `profiles/<set>.parquet`: TVN fitted on DMSO a channel at a time, fields averaged within a plate, the median
of plates within a treatment, channels concatenated, unit length, NSC and NSCB (Cross-Zamirski et al. 2022, section 2).

results.json
------------
format            1, raised when a key below changes its meaning
simulated         true if any field's Metadata_Source says so; sources: the distinct sources
settings          the run's settings.json as it stands (null without one); versions: of what computed the scores
protocol          normalization, aggregation, metric, batch_rule, exclude: the words for what was done
counts            fields, dmso_fields, treatments; scored_treatments (those with a mechanism), their compounds and
                  moas; plates, batches
sets.<set>        of each profile file: nsc, nscb, nsc_correct, nsc_total, nscb_correct, nscb_total, nscb_excluded, ...
                  (every key of the not_same_compound metric), nsc_wilson, nsc_bootstrap (95 % intervals, treatments
                  taken as independent, and compounds drawn anew), nsc_null (see `permutation_null`), and for nscb;
                  treatments (names in the order of the queries' `row`), batches, map and map_method (two coordinates
                  a treatment, in the headline's set alone),
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
headline          the set the run is about ("trained", else the last) and its nsc and nscb
"""

import argparse
import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from .measures import batch_effect, mean_average_precision, replicate_reproducibility
from .normalization import TypicalVariationNormalizer
from .not_same_compound.not_same_compound import not_same_compound
from .profiles import (
    CONTROL,
    ProfileError,
    aggregate_profiles,
    feature_columns,
    is_named,
    normalize_profiles,
    read_profiles,
)
from .uncertainty import bootstrap_interval, compare_paired, permutation_null, wilson_interval

# The order in which sets are shown; others follow by name.
SETS = ("untrained", "intensity", "nuclei", "count", "initial", "trained")
# Numbers (fields x features) up to which a set is scored on one thread; BBBC021 at the paper's size has 4 million.
# More threads gain nothing there (fitting TVN to 1320 x 384: 80 ms on 1, 2 or 4), and where cores are busy they wait
# for one another: t-SNE of 103 treatments took 0.4 s on one thread and 66 s on four of four busy cores.
ONE_THREAD_BELOW = 20_000_000


def participation_ratio(features):
    """Effective number of dimensions of `features` (rows, dimensions): (sum of variances)^2 / sum of their squares.

    The variances are those along the principal directions: from 1 (all rows on a line) to the number of dimensions;
    0 for identical rows.
    """
    features = np.asarray(features, dtype=np.float64)
    centred = features - features.mean(axis=0)
    total = (centred**2).sum()
    if total <= 1e-24 * max((features**2).sum(), 1e-300):
        return 0.0
    # The sum of squared eigenvalues is that of the squared entries of the covariance, or of the smaller product.
    product = centred.T @ centred if centred.shape[0] >= centred.shape[1] else centred @ centred.T
    return float(total**2 / (product**2).sum())


def collapse_verdict(lines, num_prototypes=None, untrained_ratio=None):
    """Whether the last monitors of a `metrics.jsonl` look like a collapsed teacher.

    Parameters
    ----------
    lines : list of dict
        The log's lines in order, as in the run folder's description.
    num_prototypes : int or None
        Outputs of the head, K; without it a near-uniform teacher cannot be told.
    untrained_ratio : float or None
        Participation ratio of the untrained network's features, below which a trained one is suspect. (Pictures that
        differ most in brightness give a ratio near 1 even to random weights.)

    Returns
    -------
    dict
        verdict: "collapsed", "suspect", "healthy" or "unknown" (no monitors); reasons: sentences; last: the values.
    """
    names = ("teacher_entropy", "mean_entropy", "kl", "participation_ratio")
    last = {}
    for line in lines:
        for name in names:
            if isinstance(line.get(name), (int, float)) and math.isfinite(line[name]):
                last[name] = float(line[name])
    if not last:
        return {"verdict": "unknown", "reasons": ["no monitors were logged"], "last": {}}
    collapsed, suspect = [], []
    uniform = math.log(num_prototypes) if num_prototypes else None
    if "mean_entropy" in last and last["mean_entropy"] < 0.05 * (uniform or math.log(2)):
        collapsed.append(f"the teacher gives every image the same prototype (mean entropy {last['mean_entropy']:.3g})")
    if uniform and last.get("teacher_entropy", 0.0) > 0.99 * uniform:
        collapsed.append(
            f"the teacher's targets are nearly uniform (entropy {last['teacher_entropy']:.3g} of {uniform:.3g})"
        )
    if "teacher_entropy" in last and "mean_entropy" in last:
        information = last["mean_entropy"] - last["teacher_entropy"]
        if information < 0.02 * (uniform or math.log(2)):
            suspect.append(f"the targets hardly differ between images (difference of the entropies {information:.3g})")
    ratio = last.get("participation_ratio", math.inf)
    if ratio < 1.5 and (untrained_ratio is None or ratio < 0.9 * untrained_ratio):
        suspect.append(f"the features vary along about one direction (participation ratio {ratio:.3g})")
    verdict = "collapsed" if collapsed else "suspect" if suspect else "healthy"
    return {"verdict": verdict, "reasons": collapsed + suspect, "last": last}


def read_metrics(path):
    """The lines of a metrics.jsonl; a last line cut short by a killed run is left out."""
    lines = []
    try:
        text = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path} is not text ({error.reason}): restore it from the training.") from None
    for number, line in enumerate(text, 1):
        if line.strip():
            try:
                content = json.loads(line)
            except json.JSONDecodeError:
                content = None
            if isinstance(content, dict):
                lines.append(content)
            elif number < len(text):
                raise ProfileError(f"{path}, line {number}, is not a JSON object: remove that line.")
    return lines


def _versions():
    versions = {"python": platform.python_version()}
    for package in ("wsdino", "numpy", "pandas", "scikit-learn", "evaluate", "torch", "transformers", "datasets"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    return versions


def score_treatments(treatments, **options):
    """NSC and NSCB of aggregated profiles (see `aggregate_profiles`): the metric's dictionary."""
    columns = _features(treatments)
    if options.get("batch_rule") == "plate":
        options["plates"] = treatments["Metadata_Plate"].tolist()
    return not_same_compound(
        treatments[columns].to_numpy(np.float64),
        treatments["Metadata_MOA"].tolist(),
        treatments["Metadata_Compound"].tolist(),
        treatments["Metadata_Batch"].tolist(),
        # A network that gives every field the same vector has no directions to compare: it is scored, as wrong.
        invalid="wrong",
        **options,
    )


def evaluate_set(
    profiles, normalizer=None, *, group_by=None, unit="plate", details=True, plot=True, retrieval=False, **options
):
    """Scores of one profile table, all channels together and each alone.

    Parameters
    ----------
    profiles : pandas.DataFrame
        One row a field, DMSO and treated, as `read_profiles` gives it.
    normalizer : transformer or None
        Fitted on DMSO fields, a clone a channel; None is `TypicalVariationNormalizer()`.
    group_by : str or None
        Metadata column of the groups that a normalizer with `groups` aligns.
    unit : {"plate", "well", "field"}
        See `aggregate_profiles`.
    details : bool
        False leaves out intervals, null, map and measures: the quick look that training takes.
    plot : bool
        Place the treatments on a map.
    retrieval : bool
        Compute mAP too (needs copairs).
    **options
        Passed to the metric (`batch_rule`, `metric`, `k`, ...).

    Returns
    -------
    dict
        The entry of results.json (see the module's docstring).
    """
    for column in ("Metadata_MOA", "Metadata_Batch"):
        if column not in profiles.columns:
            raise ProfileError(f"The profiles have no column {column}: extract them from a dataset that has it.")
    if not is_named(profiles["Metadata_Batch"]).any():
        raise ProfileError("No field has a Metadata_Batch: name the batch of every field, one name if there was one.")
    with threadpool_limits(1 if profiles.size < ONE_THREAD_BELOW else None):
        return _evaluate_set(
            profiles, normalizer or TypicalVariationNormalizer(), group_by, unit, details, plot, retrieval, options
        )


def _evaluate_set(profiles, normalizer, group_by, unit, details, plot, retrieval, options):
    """The work of `evaluate_set`."""
    normalized = normalize_profiles(profiles, normalizer, group_by)
    labelled = is_named(normalized["Metadata_MOA"])
    if not (labelled & (normalized["Metadata_Compound"] != CONTROL)).any():
        raise ProfileError("No treated field has a Metadata_MOA: NSC needs the MOA of at least two compounds.")
    treatments = aggregate_profiles(normalized[labelled], unit=unit)
    metadata = [column for column in treatments.columns if str(column).startswith("Metadata_")]
    columns = _features(treatments)
    result = score_treatments(treatments, **options)
    result["treatments"] = treatments["Metadata_Treatment"].tolist()
    result["batches"] = treatments["Metadata_Batch"].tolist()
    result["channels"] = {}
    raw = feature_columns(profiles)
    for channel, names in feature_columns(treatments).items():
        scores = score_treatments(treatments[metadata + names], **options)
        summary = {key: value for key, value in scores.items() if not isinstance(value, (list, dict))}
        summary |= score_intervals(scores) if details else {}
        summary["participation_ratio"] = participation_ratio(profiles[raw[channel]])
        summary["features"] = len(raw[channel])
        result["channels"][channel] = summary
    if not details:
        return result
    result |= score_intervals(result)
    for prefix in ("nsc", "nscb"):
        result[f"{prefix}_null"] = permutation_null(result[f"{prefix}_queries"])
    if plot:
        result["map"], result["map_method"] = map_treatments(treatments[columns].to_numpy())
    five = score_treatments(treatments, **{**options, "k": 5})
    result["five_nearest"] = {prefix: five[prefix] for prefix in ("nsc", "nscb")}
    result["reproducibility"] = replicate_reproducibility(normalized)
    result["batch_effect"] = control_batch_effect(profiles, normalizer, group_by)
    if retrieval:
        result["retrieval"] = mean_average_precision(normalized)
    return result


def score_intervals(scores):
    """nsc_wilson, nsc_bootstrap, nscb_wilson and nscb_bootstrap, 95 %, of the metric's dictionary."""
    intervals = {}
    for prefix in ("nsc", "nscb"):
        scored = [query for query in scores[f"{prefix}_queries"] if query["excluded"] is None]
        intervals[f"{prefix}_wilson"] = wilson_interval(scores[f"{prefix}_correct"], scores[f"{prefix}_total"])
        intervals[f"{prefix}_bootstrap"] = bootstrap_interval(
            [query["correct"] for query in scored], [query["compound"] for query in scored]
        )
    return intervals


def control_batch_effect(profiles, normalizer, group_by=None):
    """`batch_effect` on DMSO fields, before and after normalization: {"before": ..., "after": ...}.

    After is measured on fields that the normalization has not seen (it is fitted on one half of the DMSO fields and
    applied to the other, both ways, and averaged): on the fields it was fitted on, removing each batch's mean would
    look perfect by construction. Before: each feature divided by its standard deviation.
    """
    control = profiles[profiles["Metadata_Compound"] == CONTROL].reset_index(drop=True)
    batches = control["Metadata_Batch"].astype(str)
    features = control[_features(control)].to_numpy(np.float64)
    scale = features.std(axis=0)
    # Every other field of each plate, in the order of wells and sites.
    order = [column for column in ("Metadata_Plate", "Metadata_Well", "Metadata_Site") if column in control.columns]
    half = control.sort_values(order, kind="stable").groupby("Metadata_Plate").cumcount().sort_index() % 2
    parts = {"before": [], "after": []}
    for fitted_on in (0, 1):
        unseen = (half != fitted_on).to_numpy()
        # Rows of the other half are renamed, so that the normalization is not fitted on them.
        table = control.assign(Metadata_Compound=np.where(unseen, "held out", CONTROL))
        try:
            normalized = normalize_profiles(table, normalizer, group_by)
        except ProfileError:
            continue  # too few fields to halve
        parts["before"].append(batch_effect(features[unseen] / np.where(scale > 0, scale, 1.0), batches[unseen]))
        parts["after"].append(batch_effect(normalized.loc[unseen, _features(normalized)], batches[unseen]))
    names = ("variance_explained", "expected_variance", "neighbour_share", "expected_neighbour")
    return {
        when: {name: float(np.mean([part[name] for part in found])) if found else float("nan") for name in names}
        for when, found in parts.items()
    }


def _features(profiles):
    return [column for names in feature_columns(profiles).values() for column in names]


def map_treatments(vectors, seed=0):
    """Two coordinates a row for a picture, and the method: t-SNE by cosine, or PCA below 8 rows and above 5,000.

    A single column, which t-SNE cannot start from, is PCA's too.
    """
    count = len(vectors)
    if count < 8 or count > 5000 or vectors.shape[1] < 2 or not np.any(vectors):
        centred = vectors - vectors.mean(axis=0)
        left, singular, _ = np.linalg.svd(centred, full_matrices=False)
        points = np.zeros((count, 2))
        points[:, : min(2, len(singular))] = (left * singular)[:, :2]
        return points.round(4).tolist(), "PCA"
    from sklearn.manifold import TSNE

    # Rows are unit vectors, whose Euclidean distances order as their cosines do.
    perplexity = min(30.0, (count - 1) / 4)
    with threadpool_limits(1):  # see ONE_THREAD_BELOW
        points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors)
    return points.round(3).tolist(), f"t-SNE, perplexity {perplexity:g}, seed {seed}"


def _answers(scores, prefix):
    return {
        name: (query["correct"], query["compound"])
        for name, query in zip(scores["treatments"], scores[f"{prefix}_queries"], strict=True)
        if query["excluded"] is None
    }


def compare_sets(first, second, prefix):
    """`compare_paired` of two entries of results.json, by treatment; prefix is "nsc" or "nscb"."""
    return compare_paired(_answers(first, prefix), _answers(second, prefix))


def _counts(profiles):
    treated = profiles[profiles["Metadata_Compound"] != CONTROL]
    scored = treated[is_named(treated["Metadata_MOA"])]
    return {
        "fields": len(profiles),
        "dmso_fields": len(profiles) - len(treated),
        "treatments": int(treated["Metadata_Treatment"].nunique()),
        "scored_treatments": int(scored["Metadata_Treatment"].nunique()),
        "compounds": int(scored["Metadata_Compound"].nunique()),
        "moas": int(scored["Metadata_MOA"].astype(str).str.strip().nunique()),
        "plates": int(profiles["Metadata_Plate"].nunique()),
        "batches": int(profiles["Metadata_Batch"].nunique()),
    }


def held_out(scores, compounds):
    """NSC and NSCB of the treatments of `compounds` alone, those that training did not see: counts of each."""
    counts = {"compounds": sorted(compounds)}
    for prefix in ("nsc", "nscb"):
        queries = [query for query in scores[f"{prefix}_queries"] if query["compound"] in set(compounds)]
        queries = [query for query in queries if query["excluded"] is None]
        counts[f"{prefix}_correct"] = sum(query["correct"] for query in queries)
        counts[f"{prefix}_total"] = len(queries)
    return counts


def _arguments(run):
    """The training's arguments in settings.json, {} without it."""
    settings = _settings(run) or {}
    arguments = settings.get("arguments") if isinstance(settings, dict) else None
    return arguments if isinstance(arguments, dict) else {}


def _training(run, sets):
    training = {}
    channels = sets["untrained"]["channels"] if "untrained" in sets else {}
    untrained = {name: part["participation_ratio"] for name, part in channels.items()}
    prototypes = _arguments(run).get("num_prototypes")
    prototypes = prototypes if isinstance(prototypes, int) and prototypes > 1 else None
    for log in sorted(run.glob("*/metrics.jsonl")):
        lines = read_metrics(log)
        steps = [line for line in lines if isinstance(line.get("loss"), (int, float))]
        training[log.parent.name] = {
            "last_step": steps[-1].get("step") if steps else None,
            "last_loss": steps[-1]["loss"] if steps else None,
            "collapse": collapse_verdict(lines, prototypes, untrained.get(log.parent.name)),
        }
    return training


def _checkpoints(run, normalizer, progress, options):
    """All channels' scores at each checkpoint that was extracted, by rising step."""
    rates = [
        line["epoch"] / line["step"]
        for log in sorted(run.glob("*/metrics.jsonl"))
        for line in read_metrics(log)
        if isinstance(line.get("epoch"), (int, float)) and isinstance(line.get("step"), (int, float)) and line["step"]
    ]
    lines = []
    paths = sorted(run.glob("profiles/checkpoints/step_*.parquet"))
    options = {name: value for name, value in options.items() if name != "retrieval"}
    for path in tqdm(paths, desc="Scoring", unit="checkpoint", disable=None if progress else True):
        try:
            step = int(path.stem.removeprefix("step_"))
            scores = evaluate_set(read_profiles(path), normalizer, details=False, **options)
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from None
        except ValueError:
            raise ProfileError(f"{path} is not named like step_00000100.parquet: rename or remove it.") from None
        counts = [f"{prefix}{suffix}" for prefix in ("nsc", "nscb") for suffix in ("", "_correct", "_total")]
        epoch = {"epoch": step * rates[-1]} if rates else {}
        lines.append({"step": step, **epoch, **{name: scores[name] for name in counts}})
    return lines


def _settings(run):
    path = run / "settings.json"
    return read_json(path, "restore it from the training") if path.exists() else None


def read_json(path, mend):
    """The content of a JSON file, or a ProfileError that names it and the mend."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ProfileError(f"{path} is not JSON ({error.msg}, line {error.lineno}): {mend}.") from None
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path} is not text ({error.reason}): {mend}.") from None


def _finite(value):
    """The same value with numbers that JSON lacks (nan, inf) as null, and numpy's numbers as Python's."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def evaluate_run(run_folder, *, normalizer=None, progress=True, **options):
    """Score every profile set of a run folder and write its results.json.

    Parameters
    ----------
    run_folder : str or Path
        Holds `profiles/<set>.parquet`, and where training wrote them `settings.json` and `<channel>/metrics.jsonl`.
    normalizer, **options
        See `evaluate_set`.

    Returns
    -------
    dict
        What was written (see the module's docstring).

    Raises
    ------
    ProfileError
        If there is no such folder, no profile file, or one that cannot be scored.
    """
    run = Path(run_folder)
    if not run.is_dir():
        raise ProfileError(f"{run} is not a folder: name a run folder, like runs/demo.")
    files = {path.stem: path for path in run.glob("profiles/*.parquet")}
    if not files:
        raise ProfileError(f"{run / 'profiles'} holds no .parquet file: run wsdino-extract {run} first.")
    order = sorted(files, key=lambda name: (SETS.index(name) if name in SETS else len(SETS), name))
    normalizer = normalizer or TypicalVariationNormalizer()
    unit = options.get("unit", "plate")
    arguments = _arguments(run)
    excluded_compounds = arguments.get("exclude_compounds") or []
    notes = []
    if arguments.get("weak_label") == "moa":
        notes.append(
            "Training saw the MOA of every treatment but those of the compounds kept out: all scores but theirs are "
            "those of a training set."
            if excluded_compounds
            else "Training saw the MOA of every treatment: these scores are those of a training set."
        )
    main_set = "trained" if "trained" in files else order[-1]
    sets, counts, sources = {}, {}, set()
    for name in tqdm(order, desc="Scoring", unit="set", disable=None if progress else True):
        profiles = read_profiles(files[name])
        try:
            sets[name] = evaluate_set(profiles, normalizer, plot=name == main_set, **options)
        except ProfileError as error:
            raise ProfileError(f"{files[name]}: {error}") from None
        if excluded_compounds:
            sets[name]["held_out"] = held_out(sets[name], excluded_compounds)
        counts[name] = _counts(profiles)
        if "Metadata_Source" in profiles.columns:
            sources |= set(profiles["Metadata_Source"].dropna().astype(str))
    results = {
        "format": 1,
        "simulated": any("simulated" in source.lower() for source in sources),
        "sources": sorted(sources),
        "notes": notes,
        "headline": {"set": main_set, "nsc": sets[main_set]["nsc"], "nscb": sets[main_set]["nscb"]},
        "comparisons": [
            {
                "first": name,
                "second": main_set,
                **{prefix: compare_sets(sets[name], sets[main_set], prefix) for prefix in ("nsc", "nscb")},
            }
            for name in order
            if name != main_set
        ],
        "counts": counts[main_set],
        "protocol": {
            "normalization": f"{normalizer!r}, fitted on DMSO fields, each channel alone",
            "aligned_by": options.get("group_by"),
            "aggregation": f"fields: mean within a {unit}; {unit}s: median; channels concatenated; L2"
            if unit != "field"
            else "fields: median; channels concatenated; L2",
            "metric": options.get("metric", "cosine"),
            "k": options.get("k", 1),
            "batch_rule": options.get("batch_rule", "median"),
            "exclude": options.get("exclude", "single_batch"),
        },
        "sets": sets,
        "checkpoints": _checkpoints(run, normalizer, progress, options),
        "training": _training(run, sets),
        "settings": _settings(run),
        "versions": _versions(),
    }
    results = _finite(results)
    partial = run / "results.json.partial"
    partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, run / "results.json")
    return results


def format_table(results):
    """A short text table of a run's scores, one line a set and, below each, one a channel."""

    def share(score, prefix):
        value = score[prefix]
        if value is None:
            return "no query"
        return f"{100 * value:5.1f} % ({score[f'{prefix}_correct']}/{score[f'{prefix}_total']})"

    def interval(score, prefix):
        low, high = score[f"{prefix}_bootstrap"]
        return "" if low is None else f"{100 * low:.0f}-{100 * high:.0f} %"

    lines = [f"{'':<24}{'NSC':>18}{'NSCB':>18}{'dimensions in use':>20}"]
    for name, scores in results["sets"].items():
        lines.append(f"{name:<24}{share(scores, 'nsc'):>18}{share(scores, 'nscb'):>18}")
        line = f"{interval(scores, 'nsc'):>18}{interval(scores, 'nscb'):>18}"
        lines.append(f"{'  95 %, by compound':<24}{line}")
        for channel, part in scores["channels"].items():
            ratio = f"{part['participation_ratio']:.1f} of {part['features']}"
            lines.append(f"  {channel:<22}{share(part, 'nsc'):>18}{share(part, 'nscb'):>18}{ratio:>20}")
    for comparison in results["comparisons"]:
        for prefix in ("nsc", "nscb"):
            part = comparison[prefix]
            if part["compared"]:
                lines.append(
                    f"{comparison['second']} against {comparison['first']}, {prefix.upper()}: "
                    f"{100 * part['difference']:+.1f} points ({len(part['gained'])} gained, {len(part['lost'])} lost, "
                    f"p = {part['p_compound']:.2g} by compound)"
                )
    for channel, training in results["training"].items():
        verdict = training["collapse"]
        lines.append(f"training, {channel}: {'; '.join([verdict['verdict'], *verdict['reasons']])}")
    counts = results["counts"]
    lines.append(
        f"{counts['scored_treatments']} treatments of {counts['compounds']} compounds, {counts['moas']} MOAs, "
        f"{counts['plates']} plates, {counts['batches']} batches"
    )
    lines += results["notes"]
    if results["simulated"]:
        lines.append("SIMULATED data: these figures say nothing about real cells.")
    return "\n".join(lines)


def main(argv=None):
    """The command `wsdino-evaluate RUN`."""
    parser = argparse.ArgumentParser(
        prog="wsdino-evaluate",
        description="Score the profiles of a run folder (NSC and NSCB) and write its results.json. Every file in its "
        "folder profiles is a set, also one of another network: wsdino-extract --model facebook/dino-vits8 --channels "
        "... --dataset ... --output RUN/profiles/imagenet.parquet.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="run folder with profiles/<set>.parquet")
    parser.add_argument("--metric", choices=("cosine", "correlation", "euclidean"), default="cosine")
    parser.add_argument("--k", type=int, default=1, help="neighbours that vote")
    parser.add_argument(
        "--batch_rule",
        choices=("median", "joined", "disjoint", "plate"),
        default="median",
        help="the batch of a treatment seen in several: the median one, their joined name, or all of them; plate: "
        "other plates suffice, also of the same batch",
    )
    parser.add_argument(
        "--whitening",
        choices=("guarded", "regularized", "plain"),
        default="guarded",
        help="TVN: plain is the paper's; regularized mixes in the mean variance; guarded also drops unsure directions",
    )
    parser.add_argument(
        "--align",
        choices=("none", "center", "scale", "coral"),
        default="none",
        help="before TVN, give each plate's or batch's DMSO fields the same mean, and spread, or covariance",
    )
    parser.add_argument("--align_by", choices=("plate", "batch"), default="plate", help="the groups of --align")
    parser.add_argument(
        "--unit", choices=("plate", "well", "field"), default="plate", help="what fields are averaged in first"
    )
    parser.add_argument("--retrieval", action="store_true", help="compute mAP too (needs the package copairs)")
    arguments = parser.parse_args(argv)
    whitening = {
        "guarded": {},
        "regularized": {"rank_guard": None},
        "plain": {"regularization": 0, "rank_guard": None},
    }[arguments.whitening]
    align = None if arguments.align == "none" else arguments.align
    try:
        if arguments.k < 1:
            raise ProfileError(f"--k is {arguments.k}: give at least 1.")
        results = evaluate_run(
            arguments.run,
            normalizer=TypicalVariationNormalizer(**whitening, groups=align),
            group_by=f"Metadata_{arguments.align_by.title()}" if align else None,
            unit=arguments.unit,
            retrieval=arguments.retrieval,
            metric=arguments.metric,
            k=arguments.k,
            batch_rule=arguments.batch_rule,
        )
    except (ProfileError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(format_table(results))
    print(f"Written: {Path(arguments.run) / 'results.json'}")


if __name__ == "__main__":
    main()
