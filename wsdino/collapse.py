"""Whether a teacher's monitors look like collapse: said while training runs, and of its log afterwards."""

import math
from collections.abc import Mapping
from typing import Any

# Names of the monitors in a line of metrics.jsonl.
MONITORS = ("teacher_entropy", "mean_entropy", "kl", "participation_ratio")


def collapse_verdict(
    monitors: Mapping[str, float], num_prototypes: int | None = None, untrained_ratio: float | None = None
) -> dict[str, Any]:
    """Whether monitors look like a collapsed teacher.

    Parameters
    ----------
    monitors : mapping
        Finite values by name: `teacher_entropy` and `mean_entropy`, the mean entropy of the targets and the entropy of
        the mean target in nats, and `participation_ratio` of the teacher's features; what is absent is not judged.
    num_prototypes : int, optional
        Outputs of the head, K; without it a nearly uniform teacher cannot be recognised.
    untrained_ratio : float, optional
        Participation ratio of the untrained network's features, below which a trained one is suspect. (Images that
        differ most in brightness give a ratio near 1 even to random weights.)

    Returns
    -------
    dict
        `verdict`, "collapsed", "suspect" or "healthy", and `reasons`, a list of clauses.
    """
    collapsed, suspect = [], []
    uniform = math.log(num_prototypes) if num_prototypes else None
    unit = uniform or math.log(2)
    teacher, mean = monitors.get("teacher_entropy"), monitors.get("mean_entropy")
    if mean is not None and mean < 0.05 * unit:
        collapsed.append(f"the teacher gives every image the same prototype (mean entropy {mean:.3g})")
    if uniform and teacher is not None and teacher > 0.99 * uniform:
        collapsed.append(f"the teacher's targets are nearly uniform (entropy {teacher:.3g} of {uniform:.3g})")
    if teacher is not None and mean is not None and mean - teacher < 0.02 * unit:
        suspect.append(f"the targets hardly differ between images (difference of the entropies {mean - teacher:.3g})")
    ratio = monitors.get("participation_ratio", math.inf)
    if ratio < 1.5 and (untrained_ratio is None or ratio < 0.9 * untrained_ratio):
        suspect.append(f"the features vary along about one direction (participation ratio {ratio:.3g})")
    verdict = "collapsed" if collapsed else "suspect" if suspect else "healthy"
    return {"verdict": verdict, "reasons": collapsed + suspect}
