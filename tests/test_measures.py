"""Replicate agreement, batch effect and mAP on data whose answers are known."""

import numpy as np
import pandas as pd
import pytest

from evaluation_wsdino.measures import batch_effect, mean_average_precision, plate_profiles, replicate_reproducibility
from wsdino.errors import UserError


def replicates(noise, seed=0, treatments=12, plates=4, width=20):
    rng = np.random.default_rng(seed)
    rows, values = [], []
    for t in range(treatments):
        centre = rng.normal(size=width)
        for p in range(plates):
            for site in (1, 2):
                rows.append((f"Week1_{p}", f"C{t:02d}", site, f"c{t}", f"c{t}_1", f"moa{t % 4}", "Week1"))
                values.append(centre + noise * rng.normal(size=width))
    for p in range(plates):
        for site in range(4):
            rows.append((f"Week1_{p}", "B02", site, "DMSO", "DMSO", "DMSO", "Week1"))
            values.append(noise * rng.normal(size=width))
    names = ("Plate", "Well", "Site", "Compound", "Treatment", "MOA", "Batch")
    frame = pd.DataFrame(rows, columns=[f"Metadata_{name}" for name in names])
    return frame.join(pd.DataFrame(np.array(values), columns=[f"dna_{i:04d}" for i in range(width)]))


def test_plate_profiles_are_means_of_fields():
    frame = replicates(1.0)
    table = plate_profiles(frame).set_index(["Metadata_Treatment", "Metadata_Plate"])
    assert len(table) == 12 * 4
    rows = frame[(frame["Metadata_Treatment"] == "c3_1") & (frame["Metadata_Plate"] == "Week1_2")]
    assert table.loc[("c3_1", "Week1_2"), "dna_0005"] == pytest.approx(rows["dna_0005"].mean())


def test_clear_replicates_agree_and_noise_does_not():
    clear = replicate_reproducibility(replicates(0.1))
    assert clear["share"] == 1.0 and clear["treatments"] == 12 and clear["median"] > 0.95
    frame = replicates(1.0, treatments=60)
    features = [column for column in frame if not column.startswith("Metadata_")]
    frame[features] = np.random.default_rng(1).normal(size=(len(frame), len(features)))
    noise = replicate_reproducibility(frame)
    assert noise["share"] < 0.2  # five in a hundred by construction


def test_one_plate_alone_has_no_replicates():
    frame = replicates(0.1, plates=1)
    assert np.isnan(replicate_reproducibility(frame)["share"])


def test_batch_effect_by_hand():
    vectors = np.array([[0.0, 1], [0, -1], [4, 1], [4, -1]])
    got = batch_effect(vectors, ["a", "a", "b", "b"])
    assert got["variance_explained"] == pytest.approx(16 / 20)  # between: 4 x 2^2, within: 4 x 1^2
    assert got["neighbour_share"] == 1.0
    assert got["expected_neighbour"] == pytest.approx(1 / 3) and got["expected_variance"] == pytest.approx(1 / 3)
    crossed = batch_effect(vectors, ["a", "b", "a", "b"])
    assert crossed["variance_explained"] == pytest.approx(4 / 20) and crossed["neighbour_share"] == 0.0
    assert np.isnan(batch_effect(vectors, ["a"] * 4)["variance_explained"])


def test_the_expected_values_are_what_shuffled_batches_give():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 3))
    batches = np.array(["a"] * 25 + ["b"] * 10 + ["c"] * 5)
    found = [batch_effect(vectors, rng.permutation(batches)) for _ in range(300)]
    for measured, expected in (("variance_explained", "expected_variance"), ("neighbour_share", "expected_neighbour")):
        assert np.mean([item[measured] for item in found]) == pytest.approx(found[0][expected], abs=0.02)


def test_map_against_a_plain_loop():
    pytest.importorskip("copairs", reason="mAP is computed by copairs, an optional extra")
    frame = replicates(1.5)
    got = mean_average_precision(frame, null_size=200)
    features = [column for column in frame if not column.startswith("Metadata_")]
    means = frame.groupby(["Metadata_Treatment", "Metadata_Plate"])[features].mean()
    unit = means.div(np.linalg.norm(means, axis=1), axis=0)
    scores = {}
    for key, vector in unit.iterrows():
        if key[0] == "DMSO":
            continue
        ranked = sorted(
            ((float(vector @ other), name[0] == key[0]) for name, other in unit.iterrows()
             if name != key and name[0] in (key[0], "DMSO")), reverse=True
        )  # fmt: skip
        hits, precision = 0, []
        for rank, (_, right) in enumerate(ranked, 1):
            hits += right
            if right:
                precision.append(hits / rank)
        scores.setdefault(key[0], []).append(np.mean(precision))
    expected = np.mean([np.mean(values) for values in scores.values()])
    assert got["replicate"]["map"] == pytest.approx(expected, abs=1e-4)
    assert got["replicate"]["groups"] == 12 and got["moa"]["groups"] == 4


def test_map_without_copairs_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "copairs.map", None)
    with pytest.raises(UserError, match="pip install copairs"):
        mean_average_precision(replicates(1.0))
