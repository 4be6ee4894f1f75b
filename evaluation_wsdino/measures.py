"""Measures beside NSC and NSCB: do replicates agree, does the batch show, and are matches ranked first.

All work on field tables (see `profiles`) or on vectors with labels, before or after normalization alike.
"""

import importlib

import numpy as np
import pandas as pd
from sklearn.neighbors import NearestNeighbors

from wsdino.errors import UserError

from .profile_table import CONTROL, feature_columns
from .profiles import aggregate_profiles


def plate_profiles(profiles, group="Metadata_Treatment"):
    """The mean vector of each treatment on each plate, DMSO left out: one row each, metadata and features."""
    treated = profiles[profiles["Metadata_Compound"] != CONTROL]
    columns = [column for names in feature_columns(profiles).values() for column in names]
    keys = [group, "Metadata_Plate"]
    means = treated.groupby(keys, sort=True)[columns].mean()
    kept = [column for column in ("Metadata_Compound", "Metadata_MOA", "Metadata_Batch") if column in treated.columns]
    metadata = treated.groupby(keys, sort=True)[kept].first()
    return pd.concat([metadata, means], axis=1).reset_index()


def replicate_reproducibility(profiles, draws=1000, seed=0):
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

    def score(rows):
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


def batch_effect(vectors, batches):
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


def mean_average_precision(profiles, null_size=1000, seed=0):
    """mAP of retrieving replicates of a treatment, and treatments of an MOA, with corrected p-values, by `copairs`.

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

    def summary(table, pairs, group):
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
