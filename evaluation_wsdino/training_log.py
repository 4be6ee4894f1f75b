"""What the log of a training says: its last loss, its monitors, and whether the teacher looks collapsed."""

import math
from collections.abc import Iterable, Mapping

from wsdino.run_folder import RunFolder

MONITORS = ("teacher_entropy", "mean_entropy", "kl", "participation_ratio")


def collapse_verdict(
    lines: Iterable[Mapping], num_prototypes: int | None = None, untrained_ratio: float | None = None
) -> dict:
    """Whether the last monitors of a `metrics.jsonl` look like a collapsed teacher.

    Parameters
    ----------
    lines : iterable of dict
        The log's lines in order.
    num_prototypes : int, optional
        Outputs of the head, K; without it a nearly uniform teacher cannot be recognised.
    untrained_ratio : float, optional
        Participation ratio of the untrained network's features, below which a trained one is suspect. (Images that
        differ most in brightness give a ratio near 1 even to random weights.)

    Returns
    -------
    dict
        verdict: "collapsed", "suspect", "healthy" or "unknown" (no monitors); reasons: sentences; last: the values.
    """
    last = {}
    for line in lines:
        for name in MONITORS:
            if isinstance(line.get(name), int | float) and math.isfinite(line[name]):
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


def training_summary(run: RunFolder, arguments: Mapping, untrained: Mapping[str, float]) -> dict[str, dict]:
    """Last step, last loss and collapse verdict of each channel that has a log.

    Parameters
    ----------
    arguments : mapping
        The training's arguments in settings.json, empty without it.
    untrained : mapping
        Participation ratio of the untrained network's features, by channel.
    """
    prototypes = arguments.get("num_prototypes")
    prototypes = prototypes if isinstance(prototypes, int) and prototypes > 1 else None
    summary = {}
    for channel in logged_channels(run):
        lines = run.metrics(channel)
        steps = [line for line in lines if isinstance(line.get("loss"), int | float)]
        summary[channel] = {
            "last_step": steps[-1].get("step") if steps else None,
            "last_loss": steps[-1]["loss"] if steps else None,
            "collapse": collapse_verdict(lines, prototypes, untrained.get(channel)),
        }
    return summary


def epochs_per_step(run: RunFolder) -> float | None:
    """By how much of an epoch a step advances, from the last line of the last channel's log that names both."""
    rates = [
        line["epoch"] / line["step"]
        for channel in logged_channels(run)
        for line in run.metrics(channel)
        if isinstance(line.get("epoch"), int | float) and isinstance(line.get("step"), int | float) and line["step"]
    ]
    return rates[-1] if rates else None


def logged_channels(run: RunFolder) -> list[str]:
    """Channels that have a log, by name."""
    return [path.parent.name for path in sorted(run.path.glob("*/metrics.jsonl"))]
