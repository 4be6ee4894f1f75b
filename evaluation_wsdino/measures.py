"""Measures beside NSC and NSCB: do replicates agree, does the batch show, and are matches ranked first.

All work on field tables (see `profiles`) or on vectors with labels, before or after normalization alike.
"""

import importlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.neighbors import NearestNeighbors

from wsdino.errors import UserError

from .profile_table import CONTROL, feature_columns, features_of
from .profiles import aggregate_profiles


def plate_profiles(profiles: pd.DataFrame, controls: bool = False) -> pd.DataFrame:
    """The mean vector of each treatment on each plate, one row each; DMSO only with `controls`."""
    rows = profiles if controls else profiles[profiles["Metadata_Compound"] != CONTROL]
    columns = [column for names in feature_columns(profiles).values() for column in names]
    groups = rows.groupby(["Metadata_Treatment", "Metadata_Plate"], sort=True)
    kept = [column for column in ("Metadata_Compound", "Metadata_MOA", "Metadata_Batch") if column in rows.columns]
    return pd.concat([groups[kept].first(), groups[columns].mean()], axis=1).reset_index()


def average_precisions(vectors: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Average precision with which each row finds its positives among its positives and negatives, by cosine.

    Parameters
    ----------
    vectors : (rows, features) array
    positive, negative : (rows, rows) bool arrays
        What each row is to find, and what it is to be told from. A tie is broken against it.

    Returns
    -------
    (rows,) array
        From 0 to 1; nan for a row without a positive.
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.where(norms > 0, norms, 1.0)
    found = np.full(len(vectors), np.nan)
    for row in np.flatnonzero(positive.any(axis=1)):
        candidates = np.flatnonzero(positive[row] | negative[row])
        own = positive[row, candidates]
        cosine = (vectors[candidates] @ vectors[row]).round(12)  # equal vectors differ by rounding
        ranks = np.flatnonzero(own[np.lexsort((own, -cosine))]) + 1
        found[row] = (np.arange(1, len(ranks) + 1) / ranks).mean()
    return found


def replicate_precision(normalized: pd.DataFrame) -> pd.Series:
    """Average precision of each treatment's plates in finding one another among those of DMSO, by treatment.

    Needs no mechanisms. Treatments on a single plate are left out.
    """
    table = plate_profiles(normalized, controls=True)
    control = (table["Metadata_Compound"] == CONTROL).to_numpy()
    treatment, plate = table["Metadata_Treatment"].to_numpy(str), table["Metadata_Plate"].to_numpy(str)
    positive = (treatment[:, None] == treatment) & (plate[:, None] != plate) & ~control[:, None]
    found = average_precisions(features_of(table), positive, np.broadcast_to(control, positive.shape))
    return pd.Series(found, treatment, name="replicate_map").dropna().groupby(level=0).mean()


def mechanism_precision(treatments: pd.DataFrame, separator: str | None = None) -> pd.Series:
    """Average precision of each treatment in finding those of other compounds with its MOA, by treatment.

    Parameters
    ----------
    treatments : pandas.DataFrame
        As of `aggregate_profiles`, each with a MOA. A treatment whose MOA no other compound has is left out.
    separator : str, optional
        What joins the MOAs of a treatment with several; treatments that share one have the same.
    """
    moa, compound = (treatments[f"Metadata_{name}"].to_numpy(str) for name in ("MOA", "Compound"))
    own = [{name.strip() for name in names.split(separator)} if separator else {names} for names in moa]
    same = np.array([[not one.isdisjoint(other) for other in own] for one in own], dtype=bool).reshape(
        len(own), len(own)
    )
    found = average_precisions(features_of(treatments), same & (compound[:, None] != compound), ~same)
    return pd.Series(found, treatments["Metadata_Treatment"], name="moa_map").dropna()


def replicate_reproducibility(profiles: pd.DataFrame, draws: int = 1000, seed: int = 0) -> dict:
    """Share of treatments whose plates agree better than plates of different treatments do ("percent replicating").

    A treatment's score is the median cosine between its plates' mean vectors; it replicates if that is above the 95th
    percentile of as many plates (at most 10) drawn from different treatments on different plates (Way et al. 2022,
    Cell Systems 13).

    Returns
    -------
    dict
        share (nan without treatments on two plates), replicating, treatments, median (of their scores).
    """
    table = plate_profiles(profiles)
    columns = [column for names in feature_columns(table).values() for column in names]
    vectors = table[columns].to_numpy(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.where(norms > 0, norms, 1.0)
    treatments, plates = table["Metadata_Treatment"].to_numpy(str), table["Metadata_Plate"].to_numpy(str)
    members = {name: np.flatnonzero(treatments == name) for name in np.unique(treatments)}
    members = {name: rows for name, rows in members.items() if len(rows) > 1}
    nothing = {"share": float("nan"), "replicating": 0, "treatments": 0, "median": float("nan")}
    if not members or len(np.unique(treatments)) < 2:
        return nothing
    rng = np.random.default_rng(seed)

    def score(rows: np.ndarray) -> float:
        upper = np.triu_indices(len(rows), 1)
        return float(np.median((vectors[rows] @ vectors[rows].T)[upper]))

    thresholds = {}
    for size in sorted({min(len(rows), len(np.unique(treatments)), 10) for rows in members.values()}):
        null = []
        for _ in range(20 * draws):
            rows = rng.permutation(len(treatments))
            # The first row of each treatment, then of each plate: rows that share neither.
            rows = rows[np.sort(np.unique(treatments[rows], return_index=True)[1])]
            rows = rows[np.sort(np.unique(plates[rows], return_index=True)[1])][:size]
            if len(rows) == size:
                null.append(score(rows))
            if len(null) == draws:
                break
        if not null:
            return nothing
        thresholds[size] = np.quantile(null, 0.95)
    scores = {name: score(rows) for name, rows in members.items()}
    sizes = {name: min(len(rows), len(np.unique(treatments)), 10) for name, rows in members.items()}
    replicating = sum(scores[name] > thresholds[sizes[name]] for name in scores)
    return {
        "share": float(replicating / len(scores)),
        "replicating": int(replicating),
        "treatments": len(scores),
        "median": float(np.median(list(scores.values()))),
    }


def batch_effect(vectors: ArrayLike, batches: Sequence[str]) -> dict:
    """How far `vectors` (rows, features) give away the batch they come from.

    Meant for control fields, which should look alike everywhere. A plate lies in one batch: what sets plates and wells
    apart shows here too, so that values above those expected are not the batch's doing alone.

    Returns
    -------
    dict
        variance_explained: share of the summed variance that lies between the batches' means (0 none, 1 all);
        expected_variance: the same for shuffled batches, (batches - 1) / (rows - 1);
        neighbour_share: share of rows whose nearest other row (Euclidean) is of the same batch; expected_neighbour:
        the same by chance. nan for fewer than two batches.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    names, codes = np.unique(np.asarray(batches, dtype=object).astype(str), return_inverse=True)
    count = len(vectors)
    if len(names) < 2 or count <= len(names):
        names = ("variance_explained", "expected_variance", "neighbour_share", "expected_neighbour")
        return dict.fromkeys(names, float("nan"))
    centred = vectors - vectors.mean(axis=0)
    sizes = np.bincount(codes)
    means = np.zeros((len(names), vectors.shape[1]))
    np.add.at(means, codes, centred)
    means /= sizes[:, None]
    total = (centred**2).sum()
    explained = float((sizes[:, None] * means**2).sum() / total) if total > 0 else float("nan")
    nearest = NearestNeighbors(n_neighbors=1).fit(centred).kneighbors(return_distance=False)[:, 0]
    return {
        "variance_explained": explained,
        "expected_variance": (len(names) - 1) / (count - 1),
        "neighbour_share": float((codes[nearest] == codes).mean()),
        "expected_neighbour": float((sizes * (sizes - 1)).sum() / (count * (count - 1))),
    }


def mean_average_precision(profiles: pd.DataFrame, null_size: int = 1000, seed: int = 0) -> dict:
    """Mean average precision (mAP) of replicates of a treatment, and of treatments of an MOA, by `copairs`.

    Replicates: the other plates' profiles of a treatment among those of DMSO. MOA: treatments of other compounds with
    the same MOA among those of other MOAs (Kalinin et al. 2025). Needs the package copairs (`pip install copairs`).

    Returns
    -------
    dict
        replicate and moa: {"map": mean over groups, "significant": share of groups with a corrected p below 0.05,
        "groups": their number}.
    """
    try:
        copairs = importlib.import_module("copairs.map")
    except ImportError:
        raise UserError("mAP is computed by the package copairs: pip install copairs.") from None
    columns = [column for names in feature_columns(profiles).values() for column in names]

    def summary(table: pd.DataFrame, pairs: dict, group: str) -> dict:
        metadata = table.drop(columns=columns)
        features = table[columns].to_numpy(np.float64)
        scores = copairs.average_precision(metadata, features, **pairs, progress_bar=False)
        scores = scores[scores["average_precision"].notna() & (scores[group] != CONTROL)]
        if not len(scores):
            return {"map": float("nan"), "significant": float("nan"), "groups": 0}
        scores = copairs.mean_average_precision(
            scores, [group], null_size=null_size, threshold=0.05, seed=seed, progress_bar=False
        )
        return {
            "map": float(scores["mean_average_precision"].mean()),
            "significant": float(scores["below_corrected_p"].mean()),
            "groups": len(scores),
        }

    plates = profiles.groupby(["Metadata_Treatment", "Metadata_Plate"], sort=True)[columns].mean().reset_index()
    plates["Metadata_Control"] = plates["Metadata_Treatment"] == CONTROL
    treatments = aggregate_profiles(profiles[profiles["Metadata_MOA"].fillna("") != ""])
    return {
        "replicate": summary(
            plates,
            {
                "pos_sameby": ["Metadata_Treatment"],
                "pos_diffby": ["Metadata_Plate"],
                "neg_sameby": [],
                "neg_diffby": ["Metadata_Control"],
            },
            "Metadata_Treatment",
        ),
        "moa": summary(
            treatments,
            {
                "pos_sameby": ["Metadata_MOA"],
                "pos_diffby": ["Metadata_Compound"],
                "neg_sameby": [],
                "neg_diffby": ["Metadata_MOA"],
            },
            "Metadata_MOA",
        ),
    }
