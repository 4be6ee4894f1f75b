"""What the log of a training says: its last loss, its monitors, and whether the teacher looks collapsed."""

import math
from collections.abc import Iterable, Mapping

from wsdino import collapse
from wsdino.run_folder import RunFolder


def collapse_verdict(
    lines: Iterable[Mapping], num_prototypes: int | None = None, untrained_ratio: float | None = None
) -> dict:
    """Whether the last monitors of a `metrics.jsonl` look like a collapsed teacher.

    Parameters
    ----------
    lines : iterable of dict
        The log's lines in order.
    num_prototypes, untrained_ratio
        As of `wsdino.collapse.collapse_verdict`, which judges them.

    Returns
    -------
    dict
        verdict: "collapsed", "suspect", "healthy" or "unknown" (no monitors); reasons: sentences; last: the values.
    """
    last = {}
    for line in lines:
        for name in collapse.MONITORS:
            if isinstance(line.get(name), int | float) and math.isfinite(line[name]):
                last[name] = float(line[name])
    if not last:
        return {"verdict": "unknown", "reasons": ["no monitors were logged"], "last": {}}
    return {**collapse.collapse_verdict(last, num_prototypes, untrained_ratio), "last": last}


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
