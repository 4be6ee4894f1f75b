"""How sure a score is: intervals, a null from shuffled labels, paired comparisons, and curves over epochs and seeds.

A score is a share of treatments, but the treatments of one compound succeed and fail together: 103 treatments are 38
compounds. What is resampled, shuffled or flipped here is therefore the compound; the plain versions stand beside it.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from wsdino.errors import UserError


def wilson_interval(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), as if every treatment were independent.

    Returns
    -------
    (float, float)
        Bounds in [0, 1]; nan where `total` is 0.

    Raises
    ------
    UserError
        `correct` is not from 0 to `total`.
    """
    if not 0 <= correct <= total:
        raise UserError(f"{correct} of {total} is not a share: correct counts from 0 to the total.")
    if not total:
        return (math.nan, math.nan)
    interval = binomtest(int(correct), int(total)).proportion_ci(level, method="wilson")
    return (float(interval.low), float(interval.high))


def _cluster_sums(values: ArrayLike, clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the values (queries, ...) and the number of queries in each cluster."""
    _, codes = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    codes = codes.reshape(-1)
    sums = np.zeros(codes.max(initial=-1) + 1)
    np.add.at(sums, codes, np.asarray(values, dtype=np.float64))
    return sums, np.bincount(codes)


def bootstrap_interval(
    correct: ArrayLike, compounds: Sequence[str], level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the share of `correct`, drawing compounds with replacement.

    The neighbours stay as found: the interval is about which compounds happened to be screened, given this set of
    candidates. Where all treatments, or none, are right, drawing anew shows no spread: then it is Wilson's interval,
    with one answer per compound.

    Few compounds make it somewhat short: of 500 drawn screens of 38 compounds with BBBC021's numbers of treatments it
    held the true share in 93 % where that was 0.5 or 0.8, in 88 % at 0.95 (Wilson's of the treatments: 81 to 86 %).

    Parameters
    ----------
    correct : array-like
        Whether each treatment is right, or its mean over seeds.
    compounds : sequence of str
        The compound of each treatment.
    level : float
        Coverage, such as 0.95.

    Returns
    -------
    (float, float)
        Bounds in [0, 1]; nan for fewer than two compounds.
    """
    sums, sizes = _cluster_sums(correct, compounds)
    if len(sums) < 2:
        return (math.nan, math.nan)
    if sums.sum() in (0, sizes.sum()):
        return wilson_interval(len(sums) if sums.sum() else 0, len(sums), level)
    rng = np.random.default_rng(seed)
    shares = np.empty(draws)
    for start in range(0, draws, 1000):
        picks = rng.integers(0, len(sums), size=(min(1000, draws - start), len(sums)))
        shares[start : start + len(picks)] = sums[picks].sum(axis=1) / sizes[picks].sum(axis=1)
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high))


def permutation_null(queries: Sequence[dict], draws: int = 10_000, seed: int = 0) -> dict:
    """How often shuffled labels score as well: the MOAs of the scored compounds are permuted, the neighbours stay.

    The hypothesis tested is that labels have nothing to do with who is whose neighbour. A small p-value refutes that
    and no more: under NSC the neighbours may have been found through the batch.

    Parameters
    ----------
    queries : list of dict
        `nsc_queries` or `nscb_queries` of the metric.

    Returns
    -------
    dict
        p_value, (1 + draws at least as good) / (1 + draws); null_mean and null_high (95th percentile), shares; draws.
    """
    scored = [query for query in queries if query["excluded"] is None]
    if not scored:
        return {"p_value": math.nan, "null_mean": math.nan, "null_high": math.nan, "draws": 0}
    # What is permuted: a compound's MOA, or each of them where doses of one compound have several.
    names = {moa: code for code, moa in enumerate(sorted({query["moa"] for query in queries}))}
    units = {}
    unit = [units.setdefault((query["compound"], query["moa"]), len(units)) for query in queries]
    labels = np.array([names[moa] for _, moa in units])
    own = np.array([unit[row] for row, query in enumerate(queries) if query["excluded"] is None])
    voters = [query.get("neighbours", [query["neighbour"]]) for query in scored]
    near = np.full((len(scored), max(map(len, voters), default=0) or 1), -1)
    for row, rows in enumerate(voters):
        rows = [unit[other] for other in rows if other is not None]
        near[row, : len(rows)] = rows

    def right(permuted: np.ndarray) -> np.ndarray:
        """How many of the queries are right in each of the labellings (labellings, units)."""
        votes = np.where(near >= 0, permuted[:, near], -1)
        # As the metric counts them: most votes, and of equals the nearest. A query without a neighbour is wrong.
        number = (votes[..., None, :] == votes[..., None]).sum(axis=-1) * (near >= 0)
        winner = np.take_along_axis(votes, number.argmax(axis=-1)[..., None], axis=-1)[..., 0]
        return (winner == permuted[:, own]).sum(axis=1)

    observed = right(labels[None])[0]
    # A mechanism that is left out is neither asked for nor found, so its name is not permuted.
    movable = np.unique(own)
    rng = np.random.default_rng(seed)
    counts = np.empty(draws, dtype=np.int64)
    step = max(1, 200_000 // (near.size * near.shape[1]))
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        permuted = np.tile(labels, (rows, 1))
        permuted[:, movable] = rng.permuted(permuted[:, movable], axis=1)
        counts[start : start + rows] = right(permuted)
    return {
        "p_value": float((1 + (counts >= observed).sum()) / (1 + draws)),
        "null_mean": float(counts.mean() / len(scored)),
        "null_high": float(np.quantile(counts, 0.95) / len(scored)),
        "draws": draws,
    }


def exchange_p(differences: ArrayLike, compounds: Sequence[str], draws: int = 10_000, seed: int = 0) -> float:
    """P-value of a sum of differences (one per treatment) when two sets are exchanged compound by compound.

    All 2^c exchanges of the c compounds whose sum is not 0 are counted where c is at most 16, otherwise `draws`
    random ones. 1 where nothing differs.
    """
    sums = _cluster_sums(differences, compounds)[0] if len(compounds) else np.zeros(0)
    sums = sums[np.abs(sums) > 1e-12]  # means over seeds round
    if not len(sums):
        return 1.0
    if len(sums) <= 16:
        signs = ((np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1) * 2 - 1
    else:
        signs = np.random.default_rng(seed).choice((-1, 1), size=(draws, len(sums)))
    as_large = np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9
    return float(as_large.mean()) if len(sums) <= 16 else float((1 + as_large.sum()) / (1 + draws))


def compare_paired(
    first: Mapping[str, tuple[bool, str]], second: Mapping[str, tuple[bool, str]], draws: int = 10_000, seed: int = 0
) -> dict:
    """Compare two sets of profiles on the same queries.

    Parameters
    ----------
    first, second : dict
        `{treatment: (correct, compound)}` of the scored queries; those in both are compared.

    Returns
    -------
    dict
        compared, gained and lost (treatments right in `second` alone, in `first` alone), difference (second - first, a
        share), p_exact (McNemar's exact test: a fair coin for each changed treatment), p_compound (the two sets
        exchanged compound by compound: all 2^c ways where that is few, else `draws` random ones).
    """
    shared = sorted(set(first) & set(second))
    gained = [name for name in shared if second[name][0] and not first[name][0]]
    lost = [name for name in shared if first[name][0] and not second[name][0]]
    changed = len(gained) + len(lost)
    p_exact = float(binomtest(len(gained), changed, 0.5).pvalue) if changed else 1.0
    difference = (len(gained) - len(lost)) / len(shared) if shared else math.nan
    values = [int(second[name][0]) - int(first[name][0]) for name in shared]
    p_compound = exchange_p(values, [first[name][1] for name in shared], draws, seed)
    return {
        "compared": len(shared),
        "gained": gained,
        "lost": lost,
        "difference": difference,
        "p_exact": p_exact,
        "p_compound": p_compound,
    }


def epoch_curves(curves: Mapping[int, Sequence[tuple[float, float | None]]], window: tuple[float, float]) -> dict:
    """Scores over epochs of several seeds: the mean over a window fixed beforehand, beside each seed's best epoch.

    Parameters
    ----------
    curves : dict of {seed: list of (epoch, score)}
    window : (int, int)
        First and last epoch of the window, both in it.

    Returns
    -------
    dict
        window, window_mean (over seeds, of each seed's mean in the window), window_sd (between seeds, nan for one),
        seeds.<seed>: window_mean, best_epoch, best. `best` is chosen on the test labels: `best_note` says so, and it
        belongs wherever `best` is shown.

    Raises
    ------
    UserError
        If a seed has no score in the window.
    """
    first, last = window
    seeds, means = {}, []
    for seed, points in curves.items():
        points = [(epoch, score) for epoch, score in points if score is not None and math.isfinite(score)]
        inside = [score for epoch, score in points if first <= epoch <= last]
        if not inside:
            raise UserError(f"Seed {seed} has no score from epoch {first} to {last}: choose a window it reached.")
        # Of equally good epochs the first.
        best_epoch, best = max(points, key=lambda point: (point[1], -point[0]))
        means.append(float(np.mean(inside)))
        seeds[str(seed)] = {"window_mean": means[-1], "best_epoch": best_epoch, "best": best}
    return {
        "window": [first, last],
        "window_mean": float(np.mean(means)) if means else math.nan,
        "window_sd": float(np.std(means, ddof=1)) if len(means) > 1 else math.nan,
        "seeds": seeds,
        "best_note": "best epoch chosen on test labels",
    }
