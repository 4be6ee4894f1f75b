"""Intervals and tests against published values, enumeration, and data whose answer is known."""

import itertools
import math

import numpy as np
import pytest

from evaluation_wsdino.uncertainty import (
    bootstrap_interval,
    compare_paired,
    epoch_curves,
    permutation_null,
    wilson_interval,
)
from wsdino.errors import UserError


def test_wilson_against_newcombes_published_examples():
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    for correct, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                      (1, 29, 0.0061, 0.1718)):  # fmt: skip
        got = wilson_interval(correct, total)
        assert got == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    assert all(math.isnan(value) for value in wilson_interval(0, 0))
    with pytest.raises(UserError, match="5 of 4 is not a share"):
        wilson_interval(5, 4)


def test_the_bootstrap_agrees_with_enumerating_all_draws():
    correct = [1, 1, 1, 0, 0, 1, 0]
    compounds = ["a", "a", "a", "b", "b", "c", "d"]
    members = {name: [x for x, c in zip(correct, compounds, strict=True) if c == name] for name in "abcd"}
    shares = []
    for draw in itertools.product("abcd", repeat=4):
        drawn = [x for name in draw for x in members[name]]
        shares.append(sum(drawn) / len(drawn))
    low, high = np.quantile(shares, [0.1, 0.9])
    assert bootstrap_interval(correct, compounds, level=0.8, draws=200_000) == pytest.approx((low, high), abs=1e-9)


def test_clusters_widen_the_interval():
    """Ten compounds of ten treatments that succeed or fail together know no more than ten answers."""
    correct = np.repeat([1, 1, 1, 1, 1, 1, 1, 0, 0, 0], 10)
    compounds = np.repeat(np.arange(10), 10)
    low, high = bootstrap_interval(correct, compounds)
    wilson = wilson_interval(70, 100)
    assert high - low > 2 * (wilson[1] - wilson[0])
    independent = bootstrap_interval(correct, np.arange(100))
    assert independent == pytest.approx(wilson, abs=0.03)


def test_all_right_is_not_certainty():
    low, high = bootstrap_interval([1] * 30, np.repeat(np.arange(10), 3))
    assert high == 1.0 and low == pytest.approx(wilson_interval(10, 10)[0])
    assert bootstrap_interval([0] * 30, np.repeat(np.arange(10), 3))[0] == 0.0
    assert all(math.isnan(value) for value in bootstrap_interval([1, 0], ["a", "a"]))


def queries(moas, neighbours):
    names = [f"c{index}" for index in range(len(moas))]
    return [
        {
            "moa": moa, "compound": names[row], "neighbour": near,
            "correct": near is not None and moas[near] == moa, "excluded": None,
        }
        for row, (moa, near) in enumerate(zip(moas, neighbours, strict=True))
    ]  # fmt: skip


def test_the_permutation_null_agrees_with_every_permutation():
    moas, neighbours = list("xxyyz"), [1, 0, 3, 2, 0]
    observed = 4
    counts = []
    for labels in itertools.permutations(moas):
        counts.append(sum(labels[row] == labels[near] for row, near in enumerate(neighbours)))
    exact = np.mean([count >= observed for count in counts])
    null = permutation_null(queries(moas, neighbours), draws=20_000)
    assert null["p_value"] == pytest.approx(exact, abs=0.01)
    assert null["null_mean"] == pytest.approx(np.mean(counts) / 5, abs=0.01)


def test_the_permutation_null_keeps_compounds_whole_and_skips_left_out_queries():
    many = queries(list("xxyy"), [1, 0, 3, None])
    for query in many:
        query["compound"] = "same"
        query["moa"] = "x"
    # One compound only: dealing its label anew changes nothing, and the p-value is 1.
    assert permutation_null(many, draws=50)["p_value"] == 1.0
    for query in many:
        query["excluded"] = "occurs in one batch"
    assert permutation_null(many)["draws"] == 0


def test_the_permutation_null_deals_no_label_of_a_mechanism_that_is_left_out():
    """As in NSCB: no query of it is scored and no candidate has it, so none of the scored ones may be given it."""
    moas, neighbours = list("xxyyzzzz"), [1, 0, 3, 1, 5, 4, 7, 6]
    many = queries(moas, neighbours)
    for query in many[4:]:
        query["excluded"] = "z occurs in one batch"
    counts = []
    for labels in itertools.permutations(moas[:4]):
        counts.append(sum(labels[row] == labels[near] for row, near in enumerate(neighbours[:4])))
    null = permutation_null(many, draws=20_000)
    assert null["p_value"] == pytest.approx(np.mean([count >= 3 for count in counts]), abs=0.01)
    assert null["null_mean"] == pytest.approx(np.mean(counts) / 4, abs=0.01)


def test_the_permutation_null_is_of_the_vote_where_several_neighbours_vote():
    moas, neighbours = list("xxyyz"), [[2, 1, 4], [0, 3, 2], [3, 0, 1], [2, 4], [3, 2, 0]]

    def score(labels):
        right = 0
        for row, near in enumerate(neighbours):
            votes = [labels[other] for other in near]
            right += max(votes, key=lambda vote: (votes.count(vote), -votes.index(vote))) == labels[row]
        return right

    many = queries(moas, [near[0] for near in neighbours])
    for query, near in zip(many, neighbours, strict=True):
        query["neighbours"] = near
    counts = [score(labels) for labels in itertools.permutations(moas)]
    null = permutation_null(many, draws=20_000)
    assert null["p_value"] == pytest.approx(np.mean([count >= score(moas) for count in counts]), abs=0.01)
    assert null["null_mean"] == pytest.approx(np.mean(counts) / 5, abs=0.01)


def test_the_permutation_null_of_a_compound_with_two_mechanisms():
    """As of one that hits another target at a higher dose: each of its mechanisms is shuffled by itself."""
    many = queries(list("xyxy"), [2, 3, 0, 1])
    many[1]["compound"] = many[0]["compound"]
    null = permutation_null(many, draws=20_000)
    assert null["p_value"] == pytest.approx(1 / 3, abs=0.02)  # of the 6 ways to deal x, x, y, y two match all


def answers(*values, compounds=None):
    return {f"t{i}": (bool(v), (compounds or range(len(values)))[i]) for i, v in enumerate(values)}


def test_mcnemar_by_the_binomial_formula():
    first = answers(*[0] * 9 + [1] * 2 + [1] * 20)
    second = answers(*[1] * 9 + [0] * 2 + [1] * 20)
    got = compare_paired(first, second)
    expected = 2 * sum(math.comb(11, k) for k in range(3)) / 2**11
    assert got["p_exact"] == pytest.approx(expected)
    assert (len(got["gained"]), len(got["lost"]), got["compared"]) == (9, 2, 31)
    assert got["difference"] == pytest.approx(7 / 31)
    assert got["p_compound"] == pytest.approx(expected)  # a compound each: the same coin


def test_one_compound_that_changes_is_one_coin():
    compounds = ["a"] * 8 + ["b"]
    got = compare_paired(answers(*[0] * 9, compounds=compounds), answers(*[1] * 8 + [0], compounds=compounds))
    assert got["p_exact"] == pytest.approx(2 / 2**8)
    assert got["p_compound"] == 1.0  # exchanging the one compound gives as large a difference


def test_many_changed_compounds_are_drawn_at_random():
    first, second = answers(*[0] * 30), answers(*[1] * 24 + [0] * 6)
    got = compare_paired(first, second)
    assert 1 / 10_001 == pytest.approx(got["p_compound"])
    got = compare_paired(answers(*[0] * 15 + [1] * 15), answers(*[1] * 15 + [0] * 15))
    assert got["p_compound"] == 1.0 and got["p_exact"] == 1.0


def test_no_change_and_nothing_shared():
    assert compare_paired(answers(1, 0), answers(1, 0))["p_exact"] == 1.0
    nothing = compare_paired({"a": (True, "a")}, {"b": (True, "b")})
    assert nothing["compared"] == 0 and math.isnan(nothing["difference"])


def test_curves_over_epochs_and_seeds_by_hand():
    curves = {0: [(10, 0.5), (20, 0.9), (30, 0.6), (40, 0.8)], 1: [(10, 0.4), (20, 0.4), (30, 0.7), (40, None)]}
    got = epoch_curves(curves, (30, 40))
    assert got["window_mean"] == pytest.approx(0.7)  # (0.6 + 0.8) / 2 and 0.7
    assert got["window_sd"] == pytest.approx(0.0)
    assert got["seeds"]["0"]["best_epoch"] == 20 and got["seeds"]["0"]["best"] == 0.9
    assert got["best_note"] == "best epoch chosen on test labels"
    with pytest.raises(UserError, match="Seed 1 has no score from epoch 35 to 40"):
        epoch_curves(curves, (35, 40))
