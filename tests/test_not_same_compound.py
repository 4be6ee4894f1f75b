"""The metric against plain loops, answers known by hand, and the published protocol's counts."""

import csv
import gzip
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import evaluate
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation_wsdino.not_same_compound import neighbours as search
from evaluation_wsdino.not_same_compound import not_same_compound

FOLDER = Path(__file__).parent.parent / "evaluation_wsdino" / "not_same_compound"
OPTIONS = [
    {},
    {"metric": "correlation"},
    {"metric": "euclidean"},
    {"batch_rule": "joined"},
    {"batch_rule": "disjoint"},
    {"batch_rule": "plate"},
    {"k": 3},
    {"k": 5, "metric": "euclidean", "batch_rule": "disjoint"},
]

# The annotated treatments of BBBC021: (MOA, compound, week, treatments). taxol 0.3 comes on top: every week.
SCREEN = [
    ("Actin disruptors", "cytochalasin B", 1, 2), ("Actin disruptors", "cytochalasin D", 2, 1),
    ("Actin disruptors", "latrunculin B", 1, 2), ("Aurora kinase inhibitors", "AZ-A", 1, 6),
    ("Aurora kinase inhibitors", "AZ258", 4, 3), ("Aurora kinase inhibitors", "AZ841", 3, 3),
    ("Cholesterol-lowering", "mevinolin/lovastatin", 9, 3), ("Cholesterol-lowering", "simvastatin", 9, 3),
    ("DNA damage", "chlorambucil", 3, 1), ("DNA damage", "cisplatin", 3, 1), ("DNA damage", "etoposide", 3, 3),
    ("DNA damage", "mitomycin C", 4, 4), ("DNA replication", "camptothecin", 8, 3),
    ("DNA replication", "floxuridine", 9, 2), ("DNA replication", "methotrexate", 2, 1),
    ("DNA replication", "mitoxantrone", 9, 2), ("Eg5 inhibitors", "AZ-C", 3, 7), ("Eg5 inhibitors", "AZ138", 10, 5),
    ("Epithelial", "AZ-J", 5, 3), ("Epithelial", "AZ-U", 10, 3), ("Epithelial", "PP-2", 8, 2),
    ("Kinase inhibitors", "PD-169316", 7, 2), ("Kinase inhibitors", "alsterpaullone", 7, 2),
    ("Kinase inhibitors", "bryostatin", 7, 1), ("Microtubule destabilizers", "colchicine", 1, 1),
    ("Microtubule destabilizers", "demecolcine", 3, 4), ("Microtubule destabilizers", "nocodazole", 1, 2),
    ("Microtubule destabilizers", "vincristine", 3, 7), ("Microtubule stabilizers", "docetaxel", 7, 3),
    ("Microtubule stabilizers", "epothilone B", 1, 3), ("Microtubule stabilizers", "taxol", 1, 2),
    ("Protein degradation", "ALLN", 2, 2), ("Protein degradation", "MG-132", 2, 2),
    ("Protein degradation", "lactacystin", 6, 1), ("Protein degradation", "proteasome inhibitor I", 7, 2),
    ("Protein synthesis", "anisomycin", 4, 2), ("Protein synthesis", "cyclohexamide", 4, 3),
    ("Protein synthesis", "emetine", 3, 3),
]  # fmt: skip
ALL_WEEKS = "|".join(f"Week{week}" for week in (1, 10, 2, 3, 4, 5, 6, 7, 8, 9))


def screen():
    """moas, compounds, batches of the 103 treatments."""
    rows = [(moa, name, f"Week{week}") for moa, name, week, count in SCREEN for _ in range(count)]
    rows.append(("Microtubule stabilizers", "taxol", ALL_WEEKS))
    return tuple(list(column) for column in zip(*rows, strict=True))


# ---------------------------------------------------------------- the oracle: plain loops, one pair at a time


def similarity(a, b, metric):
    if metric == "euclidean":
        return -(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5)
    if metric == "correlation":
        a, b = [x - sum(a) / len(a) for x in a], [y - sum(b) / len(b) for y in b]
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


def median_batch(names):
    names = sorted(names.split("|"), key=lambda name: int(re.findall(r"\d+", name)[-1]))
    return names[(len(names) - 1) // 2]


def same_batch(rule, batches, plates, i, j):
    if rule == "median":
        return median_batch(batches[i]) == median_batch(batches[j])
    if rule == "joined":
        return set(batches[i].split("|")) == set(batches[j].split("|"))
    if rule == "disjoint":
        return bool(set(batches[i].split("|")) & set(batches[j].split("|")))
    return set(plates[i].split("|")) == set(plates[j].split("|"))


def loops(profiles, moas, compounds, batches, plates=None, metric="cosine", k=1, batch_rule="median"):
    """{"nsc" and "nscb": {row: (correct, neighbours, candidates)}} of the scored queries."""
    rows = range(len(moas))
    out = {}
    for name in ("nsc", "nscb"):
        left_out = set()
        if name == "nscb":
            rule = "median" if batch_rule == "plate" else batch_rule
            for moa in set(moas):
                members = [i for i in rows if moas[i] == moa]
                if all(same_batch(rule, batches, plates, i, j) for i in members for j in members if i != j):
                    left_out |= set(members)
        scored = {}
        for i in rows:
            if i in left_out:
                continue
            near = []
            for j in rows:
                if compounds[j] == compounds[i] or j in left_out:
                    continue
                if name == "nscb" and same_batch(batch_rule, batches, plates, i, j):
                    continue
                near.append((-similarity(profiles[i], profiles[j], metric), j))
            if not near:
                continue
            near.sort()
            votes = [moas[j] for _, j in near[:k]]
            winner = max(votes, key=lambda moa: (votes.count(moa), -votes.index(moa)))
            scored[i] = (winner == moas[i], [j for _, j in near[:k]], len(near))
        out[name] = scored
    return out


def check_against_loops(profiles, moas, compounds, batches, plates, options):
    expected = loops(profiles.tolist(), moas, compounds, batches, plates, **options)
    extra = {"plates": plates} if options.get("batch_rule") == "plate" else {}
    result = not_same_compound(profiles, moas, compounds, batches, **extra, **options)
    for name in ("nsc", "nscb"):
        queries = {q["row"]: q for q in result[f"{name}_queries"] if q["excluded"] is None}
        assert sorted(queries) == sorted(expected[name])
        for row, (correct, neighbours, candidates) in expected[name].items():
            assert queries[row]["correct"] == correct
            assert queries[row]["candidates"] == candidates
            assert queries[row]["neighbour"] == neighbours[0]
            assert queries[row].get("neighbours", neighbours) == neighbours
        hits = sum(correct for correct, _, _ in expected[name].values())
        assert (result[f"{name}_correct"], result[f"{name}_total"]) == (hits, len(expected[name]))
        assert result[f"{name}_excluded"] == len(moas) - len(expected[name])
        if expected[name]:
            assert result[name] == hits / len(expected[name])
    return result


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_published_screen_agrees_with_plain_loops(options):
    moas, compounds, batches = screen()
    plates = [f"{b}_a|{b}_b" if i % 2 else f"{b}_c" for i, b in enumerate(batches[:-1])] + ["a|b|c"]
    profiles = np.random.default_rng(3).normal(size=(103, 12))
    check_against_loops(profiles, moas, compounds, batches, plates, options)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_screen_agrees_with_plain_loops(data):
    count = data.draw(st.integers(2, 14))
    pick = lambda names: data.draw(st.lists(st.sampled_from(names), min_size=count, max_size=count))  # noqa: E731
    compounds = pick(["c1", "c2", "c3", "c4", "c5"])
    moa_of = {name: data.draw(st.sampled_from("xyz")) for name in sorted(set(compounds))}
    batches = pick(["Week1", "Week2", "Week10", "Week1|Week2", "Week10|Week2|Week1", "Week2|Week2|Week1"])
    plates = pick(["p1", "p2", "p1|p2", "p2|p1"])
    seed = data.draw(st.integers(0, 2**31))
    profiles = np.random.default_rng(seed).normal(size=(count, 3))
    options = data.draw(st.sampled_from(OPTIONS))
    check_against_loops(profiles, [moa_of[name] for name in compounds], compounds, batches, plates, options)


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_profiles_that_differ_by_less_than_single_precision_tells(spread):
    """Cosines of 1 - spread^2, which single precision would round to ties."""
    moas, compounds, batches = screen()
    profiles = 1 + spread * np.random.default_rng(9).normal(size=(103, 8))
    check_against_loops(profiles, moas, compounds, batches, None, {})
    check_against_loops(profiles, moas, compounds, batches, None, {"batch_rule": "disjoint"})


# ---------------------------------------------------------------- the published protocol


@pytest.mark.parametrize(
    ("rule", "queries"), [("median", 92), ("joined", 92), ("disjoint", 91), ("plate", 92)]
)  # fmt: skip
def test_the_published_table_has_103_and_92_queries(rule, queries):
    moas, compounds, batches = screen()
    profiles = np.random.default_rng(0).normal(size=(103, 4))
    result = not_same_compound(profiles, moas, compounds, batches, batch_rule=rule)
    assert (result["nsc_total"], result["nsc_excluded"]) == (103, 0)
    assert (result["nscb_total"], result["nscb_excluded"]) == (queries, 103 - queries)
    reasons = {query["moa"] for query in result["nscb_queries"] if "occurs in one batch" in (query["excluded"] or "")}
    assert reasons == {"Cholesterol-lowering", "Kinase inhibitors"}
    # Under strict disjointness taxol 0.3, seen in all weeks, has no candidate.
    assert (result["nscb_queries"][102]["excluded"] == "no candidate") == (rule == "disjoint")


def test_candidates_of_taxol_in_every_week_by_hand():
    moas, compounds, batches = screen()
    profiles = np.random.default_rng(0).normal(size=(103, 4))
    count = {
        rule: not_same_compound(profiles, moas, compounds, batches, batch_rule=rule)["nscb_queries"][102]["candidates"]
        for rule in ("median", "joined", "disjoint")
    }
    # 92 treatments, less 3 of taxol; the median week is the fifth, in which AZ-J's 3 treatments lie.
    assert count == {"median": 86, "joined": 89, "disjoint": 0}


def one_hot(values):
    names = sorted(set(values))
    return np.array([[float(value == name) for name in names] for value in values])


def test_features_that_are_the_mechanism_score_everything():
    moas, compounds, batches = screen()
    noise = 0.01 * np.random.default_rng(0).normal(size=(103, 12))
    result = not_same_compound(one_hot(moas) + noise, moas, compounds, batches)
    assert (result["nsc_correct"], result["nscb_correct"]) == (103, 92)
    assert np.trace(result["nsc_confusion"]) == 103 and np.sum(result["nsc_confusion"]) == 103


def test_features_that_are_the_batch_pass_nsc_where_they_can_and_never_nscb():
    """Mechanism and batch confounded: the features know the week alone, and a little of which compound pair."""
    moas = ["x", "x", "y", "y", "x", "y"]
    compounds = ["a", "b", "c", "d", "e", "f"]
    batches = ["Week1", "Week1", "Week2", "Week2", "Week3", "Week4"]
    features = one_hot(batches)
    features[:4, 2:] = one_hot("xxyy") / 5
    result = not_same_compound(features, moas, compounds, batches)
    assert [query["correct"] for query in result["nsc_queries"][:4]] == [True] * 4
    features = one_hot(batches)  # nothing but the week
    result = not_same_compound(features, moas, compounds, batches)
    assert result["nscb_correct"] == 0  # every candidate is equally far, so that a wrong one is taken


def test_a_leaked_compound_number_changes_the_score_and_is_noticed():
    """Compounds numbered in the order of their mechanisms: as a feature the number alone finds the mechanism."""
    moas, compounds, batches = screen()
    numbers = {name: index for index, name in enumerate(dict.fromkeys(compounds))}
    honest = np.random.default_rng(5).normal(size=(103, 40))
    leaked = np.column_stack([honest, [40.0 * numbers[name] for name in compounds]])
    clean = not_same_compound(honest, moas, compounds, batches, metric="euclidean")
    trap = not_same_compound(leaked, moas, compounds, batches, metric="euclidean")
    assert clean["nsc_correct"] <= 20  # chance is about 9
    assert trap["nsc_correct"] >= 60
    # The metric itself may not see such numbers: renaming every compound at random must change nothing.
    rng = np.random.default_rng(6)
    names = dict(zip(numbers, rng.permutation([f"compound {i}" for i in range(38)]), strict=True))
    renamed = not_same_compound(honest, moas, [names[name] for name in compounds], batches, metric="euclidean")
    assert [q["correct"] for q in renamed["nsc_queries"]] == [q["correct"] for q in clean["nsc_queries"]]
    assert [q["neighbour"] for q in renamed["nscb_queries"]] == [q["neighbour"] for q in clean["nscb_queries"]]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shuffled_rows_change_nothing(options):
    moas, compounds, batches = screen()
    rng = np.random.default_rng(8)
    profiles = np.column_stack([rng.integers(0, 2, size=(103, 5)), np.full(103, 2)]).astype(float)  # many exact ties
    profiles[::3] = rng.normal(size=(35, 6))
    first = not_same_compound(profiles, moas, compounds, batches, **options)
    order = rng.permutation(103)
    take = lambda values: [values[i] for i in order]  # noqa: E731
    second = not_same_compound(profiles[order], take(moas), take(compounds), take(batches), **options)
    for name in ("nsc", "nscb"):
        assert first[name] == second[name]
        assert first[f"{name}_confusion"] == second[f"{name}_confusion"]
        assert first[f"{name}_per_moa"] == second[f"{name}_per_moa"]
        for place, row in enumerate(order):
            before, after = first[f"{name}_queries"][row], second[f"{name}_queries"][place]
            for key in ("correct", "excluded", "candidates", "predicted", "neighbour_compound", "tied"):
                assert before[key] == after[key]


@pytest.mark.skipif("WSDINO_BBBC021_METADATA" not in os.environ, reason="needs the official CSVs")
def test_the_screen_above_is_the_official_one():
    folder = Path(os.environ["WSDINO_BBBC021_METADATA"])
    with open(folder / "BBBC021_v1_moa.csv", newline="") as file:
        moa = {(row["compound"], float(row["concentration"])): row["moa"] for row in csv.DictReader(file)}
    weeks = defaultdict(set)
    with gzip.open(folder / "BBBC021_v1_image.csv.gz", "rt", newline="") as file:
        for row in csv.DictReader(file):
            key = (row["Image_Metadata_Compound"], float(row["Image_Metadata_Concentration"]))
            if key in moa and key[0] != "DMSO":
                weeks[key].add(row["Image_Metadata_Plate_DAPI"].split("_")[0])
    official = sorted((moa[key], key[0], "|".join(sorted(value))) for key, value in weeks.items())
    assert official == sorted(zip(*screen(), strict=True))


# ---------------------------------------------------------------- ties, vectors without a direction, votes


def test_of_tied_neighbours_a_wrong_one_is_taken():
    profiles = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    moas, compounds = ["x", "x", "y", "y"], ["a", "b", "c", "d"]
    result = not_same_compound(profiles, moas, compounds)
    assert [q["correct"] for q in result["nsc_queries"]] == [False, False, False, False]
    assert result["nsc_queries"][0]["tied"] == 2
    assert "nscb" not in result


def test_identical_profiles_score_nothing():
    moas, compounds, batches = screen()
    result = not_same_compound(np.ones((103, 8)), moas, compounds, batches)
    assert result["nsc_correct"] == result["nscb_correct"] == 0
    rng = np.random.default_rng(0)
    nearly = np.ones((103, 8)) + 1e-15 * rng.normal(size=(103, 8))
    assert not_same_compound(nearly, moas, compounds, batches)["nsc_correct"] == 0


@pytest.mark.parametrize("bad", [[np.nan, 1.0, 2.0], [np.inf, 0.0, 0.0], [0.0, 0.0, 0.0]])
def test_vectors_without_a_direction(bad):
    profiles = np.array([[1.0, 0.0, 0.0], [1.0, 0.1, 0.0], bad, [0.0, 1.0, 0.0], [0.0, 1.0, 0.1]])
    moas, compounds = ["x", "x", "x", "y", "y"], ["a", "b", "c", "d", "e"]
    with pytest.raises(ValueError, match=r"predictions\[2\] \(c\) has no direction under cosine"):
        not_same_compound(profiles, moas, compounds)
    wrong = not_same_compound(profiles, moas, compounds, invalid="wrong")
    assert (wrong["nsc_correct"], wrong["nsc_total"]) == (4, 5)
    assert wrong["nsc_queries"][2]["neighbour"] is None and not wrong["nsc_queries"][2]["correct"]
    assert 2 not in [query["neighbour"] for query in wrong["nsc_queries"]]


def test_a_constant_vector_has_no_correlation_but_a_cosine():
    profiles = np.array([[0.1, 0.1, 0.1], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    with pytest.raises(ValueError, match="constant"):
        not_same_compound(profiles, ["x", "x", "y"], ["a", "b", "c"], metric="correlation")
    not_same_compound(profiles, ["x", "x", "y"], ["a", "b", "c"])


def test_tiny_and_huge_vectors_keep_their_direction():
    profiles = np.array([[1e-200, 2e-200], [1.0, 2.1], [2e200, 1e200], [2.1, 1.0]])
    result = not_same_compound(profiles, ["x", "x", "y", "y"], ["a", "b", "c", "d"])
    assert result["nsc"] == 1.0


def test_a_far_treatment_makes_no_ties_of_near_ones_under_euclidean():
    """Squared distances by products round at the scale of the farthest profile; near ones are compared again."""
    profiles = [[0.0, 0.0], [0.0, 1.0], [0.0, 1.000001], [1e6, 0.0]]
    moas, compounds = ["x", "x", "y", "y"], ["a", "b", "c", "d"]
    for k in (1, 2):
        query = not_same_compound(profiles, moas, compounds, metric="euclidean", k=k)["nsc_queries"][0]
        assert (query["neighbour"], query["tied"], query["correct"]) == (1, 1, True)
    tied = not_same_compound([*profiles, [0.6, 0.8]], [*moas, "y"], [*compounds, "e"], metric="euclidean")
    assert (tied["nsc_queries"][0]["neighbour"], tied["nsc_queries"][0]["tied"]) == (4, 2)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e160, 1e300])
def test_tiny_and_huge_distances_are_compared(scale):
    profiles = scale * np.array([[0, 0], [0, 1.0], [3, 0], [3, 1.5]])
    result = not_same_compound(profiles, list("xxyy"), list("abcd"), metric="euclidean")
    assert [query["neighbour"] for query in result["nsc_queries"]] == [1, 0, 3, 2]
    assert result["nsc_queries"][2]["similarity"] == pytest.approx(-1.5 * scale)


def test_a_tied_vote_goes_to_the_nearest():
    angles = np.deg2rad([0, 1, 2, 3, 4])
    profiles = np.column_stack([np.cos(angles), np.sin(angles)])
    result = not_same_compound(profiles, ["x", "x", "y", "y", "x"], list("abcde"), k=4)
    assert result["nsc_queries"][0]["neighbours"] == [1, 2, 3, 4]
    assert result["nsc_queries"][0]["predicted"] == "x"
    result = not_same_compound(profiles, ["x", "y", "x", "y", "x"], list("abcde"), k=2)
    assert result["nsc_queries"][0]["predicted"] == "y"


# ---------------------------------------------------------------- several mechanisms per treatment


@pytest.mark.parametrize("k", [1, 3])
def test_a_shared_mechanism_counts(k):
    """By loops: every mechanism of every neighbour is a vote; the nearest with one of the winners decides."""
    moas, compounds, batches = screen()
    rng = np.random.default_rng(2)
    several = [f"{moa}|{moas[rng.integers(103)]}" if rng.random() < 0.4 else moa for moa in moas]
    profiles = rng.normal(size=(103, 6))
    result = not_same_compound(profiles, several, compounds, batches, moa_separator="|", k=k)
    own = [set(name.split("|")) for name in several]
    for query in result["nsc_queries"]:
        row = query["row"]
        others = [other for other in range(103) if compounds[other] != compounds[row]]
        others.sort(key=lambda other: -similarity(profiles[row], profiles[other], "cosine"))
        votes = [name for other in others[:k] for name in own[other]]
        most = {name for name in votes if votes.count(name) == max(map(votes.count, votes))}
        winners = next(own[other] & most for other in others[:k] if own[other] & most)
        assert query["correct"] == bool(winners & own[row])
    for prefix in ("nsc", "nscb"):
        alone = {query["row"] for query in result[f"{prefix}_queries"] if query["excluded"]}
        plain = not_same_compound(profiles, several, compounds, batches, k=k)
        assert result[f"{prefix}_correct"] >= plain[f"{prefix}_correct"] - len(alone)
    # One mechanism in every name: the separator changes nothing.
    assert repr(not_same_compound(profiles, moas, compounds, batches, moa_separator="|")) == repr(
        not_same_compound(profiles, moas, compounds, batches)
    )


def test_of_ties_one_that_shares_no_mechanism_is_taken():
    names = dict(compounds=list("abcd"), moa_separator=";")
    result = not_same_compound(np.ones((4, 2)), ["x;y", "y;z", "z", "x"], **names)
    assert [query["correct"] for query in result["nsc_queries"]] == [False] * 4
    result = not_same_compound(np.ones((3, 2)), ["x;y", "y;z", "z; x"], compounds=list("abc"), moa_separator=";")
    assert result["nsc_correct"] == 3


def test_a_treatment_is_left_out_where_all_its_mechanisms_occur_in_one_batch():
    moas, batches = ["x|y", "x", "y", "z"], ["1", "1", "2", "2"]
    result = not_same_compound(np.eye(4), moas, list("abcd"), batches, moa_separator="|")
    assert [query["excluded"] for query in result["nscb_queries"]] == [
        None, "x occurs in one batch", None, "z occurs in one batch",
    ]  # fmt: skip


# ---------------------------------------------------------------- as an evaluate module


def toy():
    return {
        "predictions": [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]],
        "references": ["x", "x", "y", "y"],
        "compounds": ["a", "b", "c", "d"],
        "batches": ["Week1", "Week2", "Week1", "Week2"],
    }


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("metric")))


def test_the_metric_returns_the_contracts_keys(metric):
    result = metric.compute(**toy())
    assert result["nsc"] == result["nscb"] == 1.0
    keys = ("nsc_correct", "nsc_total", "nscb_correct", "nscb_total", "nscb_excluded")
    assert [result[key] for key in keys] == [4, 4, 4, 4, 0]
    assert all(type(result[key]) is int for key in keys)


def test_the_metric_takes_arrays_series_numbers_and_options(metric):
    table = toy()
    expected = metric.compute(**table, metric="euclidean", k=2)
    frame = pd.DataFrame({key: table[key] for key in ("references", "compounds", "batches")}, index=list("wxyz"))
    numbers = frame["compounds"].map({"a": 10, "b": 20, "c": 30, "d": 40})
    got = metric.compute(
        predictions=pd.DataFrame(table["predictions"], index=list("wxyz")).astype("float32"),
        references=frame["references"],
        compounds=numbers,
        batches=frame["batches"],
        metric="euclidean",
        k=2,
    )
    assert (got["nsc"], got["nscb"]) == (expected["nsc"], expected["nscb"])
    got = metric.compute(**{**table, "predictions": np.array(table["predictions"])})
    assert got["nsc"] == 1.0


def test_the_metric_gathers_batches_and_forgets_them(metric):
    table = toy()
    for half in (slice(0, 2), slice(2, 4)):
        metric.add_batch(**{key: value[half] for key, value in table.items()})
    assert metric.compute()["nsc_total"] == 4
    assert metric.compute(**table)["nsc_total"] == 4


def test_the_metric_keeps_double_precision(metric):
    """Profiles 1e-9 apart are distinguished, which float32 would round away."""
    table = toy()
    table["predictions"] = [[1.0, 0.0], [1.0, 1e-5], [1.0, 1.01e-5], [0.0, 1.0]]
    table["references"] = ["x", "x", "y", "y"]
    assert metric.compute(**table)["nsc_queries"][0]["neighbour"] == 1


def test_the_metric_without_batches_says_what_to_do(metric):
    with pytest.raises(ValueError, match="batches is None: give one per treatment"):
        metric.compute(**{**toy(), "batches": None})
    assert metric.compute(**toy())["nsc"] == 1.0


def test_the_metric_combines_with_others(metric, tmp_path):
    combined = evaluate.combine([metric, evaluate.load(str(FOLDER), cache_dir=str(tmp_path))])
    result = combined.compute(**toy())
    assert [value for key, value in result.items() if key.endswith("nsc")] == [1.0, 1.0]


def test_the_folder_loads_in_a_process_without_this_package(tmp_path):
    """As a metric Space is used: the folder elsewhere, the package out of reach."""
    import shutil

    shutil.copytree(FOLDER, tmp_path / "not_same_compound", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        # The project may be installed here; None makes every import of it fail.
        "import sys; sys.modules['evaluation_wsdino'] = None\n"
        "import evaluate\n"
        f"m = evaluate.load('not_same_compound')\nprint(m.compute(**{toy()!r})['nscb'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment.update(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(tmp_path / "modules"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "1.0", done.stderr


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"references": ["x", "x", "y"]}, "references holds 3 values for 4 profiles"),
        ({"compounds": ["a", "b", "", "d"]}, r"compounds\[2\] is empty"),
        ({"references": ["x", None, "y", "y"]}, r"references\[1\] is empty"),
        ({"references": ["x", float("nan"), "y", "y"]}, r"references\[1\] is empty"),
        ({"compounds": pd.Series(["a", pd.NA, "c", "d"])}, r"compounds\[1\] is empty"),
        ({"batches": [pd.NaT, "Week2", "Week1", "Week2"]}, r"batches\[0\] is empty"),
        ({"batches": ["Week1", "|", "Week1", "Week2"]}, r"batches\[1\] is empty"),
        ({"profiles": [[1.0], [1.0, 2.0], [1.0], [1.0]]}, "not a table of numbers"),
        ({"profiles": [1.0, 2.0, 3.0, 4.0]}, r"shape \(4,\)"),
        ({"metric": "manhattan"}, "metric is 'manhattan': choose one of cosine"),
        ({"batch_rule": "week"}, "batch_rule is 'week'"),
        ({"invalid": "skip"}, "invalid is 'skip'"),
        ({"k": 0}, "k is 0"),
        ({"k": 1.5}, "k is 1.5"),
        ({"plates": ["p1"], "batch_rule": "plate"}, "plates holds 1 values"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change, message):
    table = toy()
    table["profiles"] = table.pop("predictions")
    table["moas"] = table.pop("references")
    change = {{"references": "moas"}.get(key, key): value for key, value in change.items()}
    with pytest.raises(ValueError, match=message):
        not_same_compound(**{**table, **change})


def test_nothing_to_score_is_nan_and_not_zero():
    result = not_same_compound(np.ones((1, 2)), ["x"], ["a"], ["Week1"])
    assert np.isnan(result["nsc"]) and np.isnan(result["nscb"])
    assert (result["nsc_total"], result["nsc_excluded"]) == (0, 1)
    assert not_same_compound(np.ones((0, 2)), [], [], [])["nsc_total"] == 0


def test_blocks_do_not_change_the_answer(monkeypatch):
    moas, compounds, batches = screen()
    profiles = np.random.default_rng(4).normal(size=(103, 7))
    for options in ({}, {"metric": "euclidean", "batch_rule": "disjoint", "k": 3}):
        whole = not_same_compound(profiles, moas, compounds, batches, **options)
        monkeypatch.setattr(search, "_BLOCK", 1)  # 8 rows are looked at, 16 multiplied
        monkeypatch.setattr(search, "_PRODUCT", 2)
        blocks = not_same_compound(profiles, moas, compounds, batches, **options)
        monkeypatch.undo()
        for prefix in ("nsc", "nscb"):
            for one, other in zip(whole[f"{prefix}_queries"], blocks[f"{prefix}_queries"], strict=True):
                assert one.pop("similarity") == pytest.approx(other.pop("similarity"), abs=1e-14)
                assert one == other


# ---------------------------------------------------------------- the card, the page


def test_the_examples_of_the_card_and_the_docstring(monkeypatch):
    import doctest
    import importlib

    monkeypatch.chdir(FOLDER.parent.parent)
    assert doctest.testfile(str(FOLDER / "README.md"), module_relative=False).failed == 0
    module = importlib.import_module("evaluation_wsdino.not_same_compound.not_same_compound")
    example = doctest.DocTestParser().get_doctest(module._INPUTS, {"evaluate": evaluate}, "inputs", None, 0)
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0


def test_the_card_counts_candidates_as_the_metric_does():
    text = (FOLDER / "README.md").read_text()
    for rule, count in (("median", 86), ("joined", 89)):
        line = next(line for line in text.splitlines() if line.startswith(f"| `{rule}`"))
        assert f"{count} candidates" in line


def test_batches_may_be_called_anything():
    """Digits that are no decimal numbers (superscripts, circled) are letters; Arabic-Indic ones are numbers."""
    profiles = np.eye(4)[:, :3] + 0.1
    names = ["²", "Week1²|Week٣", "①", "week 10|week 9|week ½"]
    moas, compounds = ["a", "a", "b", "b"], ["c1", "c2", "c3", "c4"]
    strange = not_same_compound(profiles, moas, compounds, names)
    plain = not_same_compound(profiles, moas, compounds, ["w", "x|y", "v", "r|s|t"])
    assert strange["nscb_queries"] == plain["nscb_queries"]
