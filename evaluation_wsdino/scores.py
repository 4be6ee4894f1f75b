"""The scores of one set of profiles: NSC and NSCB with intervals, other measures, a map, and comparisons of sets."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from wsdino.errors import UserError
from wsdino.settings import setting

from .measures import (
    batch_effect,
    mean_average_precision,
    mechanism_precision,
    replicate_precision,
    replicate_reproducibility,
)
from .normalization import TypicalVariationNormalizer
from .not_same_compound.not_same_compound import not_same_compound
from .profile_table import CONTROL, feature_columns, features_of, is_named
from .profiles import aggregate_profiles, normalize_profiles
from .uncertainty import bootstrap_interval, compare_paired, permutation_null, wilson_interval

PREFIXES = ("nsc", "nscb")
# Numbers (fields x features) up to which a set is scored on one thread; BBBC021 at the paper's size has 4 million.
# More threads gain nothing there (fitting TVN to 1320 x 384: 80 ms on 1, 2 or 4), and where cores are busy they wait
# for one another: t-SNE of 103 treatments took 0.4 s on one thread and 66 s on four of four busy cores.
ONE_THREAD_BELOW = 20_000_000
WHITENING = {"guarded": {}, "regularized": {"rank_guard": None}, "plain": {"regularization": 0, "rank_guard": None}}


@dataclass
class Protocol:
    """How profiles become scores; the defaults are the paper's, with guarded whitening."""

    metric: Literal["cosine", "correlation", "euclidean"] = setting("cosine", "What is nearest.")
    k: int = setting(1, "Nearest neighbours that vote.", low=1)
    batch_rule: Literal["median", "joined", "disjoint", "plate"] = setting(
        "median",
        "The batch of a treatment seen in several: the median one, their joined name, or all of them. plate: a "
        "neighbour on other plates suffices, also of the same batch.",
    )
    whitening: Literal["guarded", "regularized", "plain"] = setting(
        "guarded",
        "TVN: plain is the paper's; regularized mixes in the mean variance; guarded also drops uncertain directions.",
    )
    unit: Literal["plate", "well", "field"] = setting("plate", "What fields are averaged in first.")
    moa_separator: str | None = setting(
        None, "What joins the mechanisms of a treatment with several, such as |; a neighbour that shares one is right."
    )

    def normalizer(self) -> TypicalVariationNormalizer:
        """The normalizer of this protocol, not yet fitted."""
        return TypicalVariationNormalizer(**WHITENING[self.whitening])

    def metric_options(self) -> dict:
        """Options of the not_same_compound metric."""
        names = ("metric", "k", "batch_rule", "moa_separator")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def description(self) -> dict:
        """The words in results.json for what was done."""
        unit = f"mean within a {self.unit}; {self.unit}s: median" if self.unit != "field" else "median"
        return {
            "normalization": f"{self.normalizer()!r}, fitted on DMSO fields, each channel alone",
            "aggregation": f"fields: {unit}; channels concatenated; L2",
            **self.metric_options(),
            "exclude": "single_batch",
        }


def evaluate_set(
    profiles: pd.DataFrame,
    normalizer: TypicalVariationNormalizer | None = None,
    *,
    protocol: Protocol | None = None,
    details: bool = True,
    plot: bool = True,
    retrieval: bool = False,
) -> dict:
    """Scores of one profile table, all channels together and each alone.

    Parameters
    ----------
    profiles : pandas.DataFrame
        One row per field, DMSO and treated, as `read_profiles` gives it.
    normalizer : transformer, optional
        A clone per channel is fitted on DMSO fields; the protocol's if not given.
    details : bool
        False leaves out intervals, null, map and measures: the quick look that training takes.
    plot : bool
        Place the treatments on a map.
    retrieval : bool
        Compute mAP too (needs copairs).

    Returns
    -------
    dict
        The entry of results.json (see `results`).

    Raises
    ------
    UserError
        The table lacks what a score needs: batches, or two DMSO fields.
    """
    if "Metadata_Batch" not in profiles.columns or not is_named(profiles["Metadata_Batch"]).any():
        raise UserError("No field has a Metadata_Batch: name the batch of every field, one name if there was one.")
    protocol = protocol or Protocol()
    with threadpool_limits(1 if profiles.size < ONE_THREAD_BELOW else None):
        return _evaluate_set(profiles, normalizer or protocol.normalizer(), protocol, details, plot, retrieval)


def _evaluate_set(
    profiles: pd.DataFrame,
    normalizer: TypicalVariationNormalizer,
    protocol: Protocol,
    details: bool,
    plot: bool,
    retrieval: bool,
) -> dict:
    """The work of `evaluate_set`."""
    normalized = normalize_profiles(profiles, normalizer)
    treatments = labelled_treatments(normalized, protocol.unit)
    metadata = [column for column in treatments.columns if str(column).startswith("Metadata_")]
    options = protocol.metric_options()
    result = score_treatments(treatments, **options)
    result["treatments"] = treatments["Metadata_Treatment"].tolist()
    result["batches"] = treatments["Metadata_Batch"].tolist()
    result["channels"] = {}
    raw = feature_columns(profiles)
    for channel, names in feature_columns(treatments).items():
        scores = score_treatments(treatments[metadata + names], **options)
        summary = {key: value for key, value in scores.items() if not isinstance(value, list | dict)}
        summary |= score_intervals(scores) if details else {}
        summary["participation_ratio"] = participation_ratio(profiles[raw[channel]])
        summary["features"] = len(raw[channel])
        result["channels"][channel] = summary
    if not details:
        return result
    result |= score_intervals(result)
    for prefix in PREFIXES:
        result[f"{prefix}_null"] = permutation_null(result[f"{prefix}_queries"])
    if plot and len(treatments):
        result["map"], result["map_method"] = map_treatments(features_of(treatments))
    five = score_treatments(treatments, **{**options, "k": 5})
    result["five_nearest"] = {prefix: five[prefix] for prefix in PREFIXES}
    result["average_precision"] = {"replicate": _mean_precision(replicate_precision(normalized), normalized)}
    result["average_precision"]["moa"] = _mean_precision(
        mechanism_precision(treatments, protocol.moa_separator), normalized
    )
    result["reproducibility"] = replicate_reproducibility(normalized)
    result["batch_effect"] = control_batch_effect(profiles, normalizer)
    if retrieval:
        result["retrieval"] = mean_average_precision(normalized)
    return result


def labelled_treatments(normalized: pd.DataFrame, unit: str) -> pd.DataFrame:
    """The aggregated profiles of the treatments that have a MOA; no row where none has, as in a screen of genes."""
    treated = normalized["Metadata_Compound"] != CONTROL
    if "Metadata_MOA" not in normalized:
        normalized = normalized.assign(Metadata_MOA="")
    labelled = is_named(normalized["Metadata_MOA"])
    if (labelled & treated).any():
        return aggregate_profiles(normalized[labelled], unit=unit)
    return aggregate_profiles(normalized, unit=unit)[:0]


def _mean_precision(precision: pd.Series, profiles: pd.DataFrame) -> dict:
    """Mean over treatments of an average precision, and its interval by compound."""
    compounds = profiles.groupby("Metadata_Treatment")["Metadata_Compound"].first()[precision.index]
    low, high = bootstrap_interval(precision, compounds)
    return {"value": float(precision.mean()), "low": low, "high": high, "treatments": len(precision)}


def score_treatments(treatments: pd.DataFrame, **options: Any) -> dict:
    """NSC and NSCB of aggregated profiles (see `aggregate_profiles`): the metric's dictionary."""
    if options.get("batch_rule") == "plate":
        options["plates"] = treatments["Metadata_Plate"].tolist()
    return not_same_compound(
        features_of(treatments),
        treatments["Metadata_MOA"].tolist(),
        treatments["Metadata_Compound"].tolist(),
        treatments["Metadata_Batch"].tolist(),
        # A network that gives every field the same vector has no directions to compare: it is scored, as wrong.
        invalid="wrong",
        **options,
    )


def score_intervals(scores: dict) -> dict[str, tuple[float, float]]:
    """nsc_wilson, nsc_bootstrap, nscb_wilson and nscb_bootstrap, 95 %, of the metric's dictionary."""
    intervals = {}
    for prefix in PREFIXES:
        scored = [query for query in scores[f"{prefix}_queries"] if query["excluded"] is None]
        intervals[f"{prefix}_wilson"] = wilson_interval(scores[f"{prefix}_correct"], scores[f"{prefix}_total"])
        intervals[f"{prefix}_bootstrap"] = bootstrap_interval(
            [query["correct"] for query in scored], [query["compound"] for query in scored]
        )
    return intervals


def control_batch_effect(profiles: pd.DataFrame, normalizer: TypicalVariationNormalizer) -> dict[str, dict]:
    """`batch_effect` on DMSO fields, before and after normalization: {"before": ..., "after": ...}.

    After is measured on fields that the normalization has not seen: it is fitted on one half of the DMSO fields and
    applied to the other, both ways, and averaged. Before: each feature divided by its standard deviation.
    """
    control = profiles[profiles["Metadata_Compound"] == CONTROL].reset_index(drop=True)
    batches = control["Metadata_Batch"].astype(str)
    features = features_of(control)
    scale = features.std(axis=0)
    # Every other field of each plate, in the order of wells and sites.
    order = [column for column in ("Metadata_Plate", "Metadata_Well", "Metadata_Site") if column in control.columns]
    half = control.sort_values(order, kind="stable").groupby("Metadata_Plate").cumcount().sort_index() % 2
    parts = {"before": [], "after": []}
    for fitted_on in (0, 1):
        unseen = (half != fitted_on).to_numpy()
        if (~unseen).sum() < 2:
            continue
        # Rows of the other half are renamed, so that the normalization is not fitted on them.
        table = control.assign(Metadata_Compound=np.where(unseen, "held out", CONTROL))
        normalized = normalize_profiles(table, normalizer)
        parts["before"].append(batch_effect(features[unseen] / np.where(scale > 0, scale, 1.0), batches[unseen]))
        parts["after"].append(batch_effect(features_of(normalized[unseen]), batches[unseen]))
    names = ("variance_explained", "expected_variance", "neighbour_share", "expected_neighbour")
    return {
        when: {name: float(np.mean([part[name] for part in found])) if found else float("nan") for name in names}
        for when, found in parts.items()
    }


def participation_ratio(features: np.ndarray) -> float:
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


def map_treatments(vectors: np.ndarray, seed: int = 0) -> tuple[list[list[float]], str]:
    """Two coordinates per row for a picture, and the method: t-SNE by cosine, or PCA below 8 rows and above 5,000.

    A single column, which t-SNE cannot start from, is PCA's too.
    """
    count = len(vectors)
    if count < 8 or count > 5000 or vectors.shape[1] < 2 or not np.any(vectors):
        centred = vectors - vectors.mean(axis=0)
        left, singular, _ = np.linalg.svd(centred, full_matrices=False)
        points = np.zeros((count, 2))
        points[:, : min(2, len(singular))] = (left * singular)[:, :2]
        return points.round(4).tolist(), "PCA"
    # Rows are unit vectors, whose Euclidean distances order as their cosines do.
    perplexity = min(30.0, (count - 1) / 4)
    with threadpool_limits(1):  # see ONE_THREAD_BELOW
        points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors)
    return points.round(3).tolist(), f"t-SNE, perplexity {perplexity:g}, seed {seed}"


def compare_sets(first: dict, second: dict, prefix: str) -> dict:
    """`compare_paired` of two entries of results.json, by treatment; prefix is "nsc" or "nscb"."""
    return compare_paired(answers(first, prefix), answers(second, prefix))


def answers(scores: dict, prefix: str) -> dict[str, tuple[bool, str]]:
    """(correct, compound) of each treatment that was scored."""
    return {
        name: (query["correct"], query["compound"])
        for name, query in zip(scores["treatments"], scores[f"{prefix}_queries"], strict=True)
        if query["excluded"] is None
    }


def held_out(scores: dict, compounds: list[str]) -> dict:
    """NSC and NSCB of the treatments of `compounds` alone, those that training did not see: counts of each."""
    counts = {"compounds": sorted(compounds)}
    for prefix in PREFIXES:
        queries = [query for query in scores[f"{prefix}_queries"] if query["compound"] in set(compounds)]
        queries = [query for query in queries if query["excluded"] is None]
        counts[f"{prefix}_correct"] = sum(query["correct"] for query in queries)
        counts[f"{prefix}_total"] = len(queries)
    return counts
