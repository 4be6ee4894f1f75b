"""TVN against scikit-learn's PCA and Ledoit-Wolf, and against plain formulas."""

import doctest

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.utils.estimator_checks import parametrize_with_checks

from evaluation_wsdino import TypicalVariationNormalizer, normalization

VARIANTS = [
    TypicalVariationNormalizer(),
    TypicalVariationNormalizer(regularization=0, rank_guard=None),
    TypicalVariationNormalizer(regularization=0.1, rank_guard=None),
]


@parametrize_with_checks(VARIANTS)
def test_it_is_a_scikit_learn_estimator(estimator, check):
    check(estimator)


def control(fields=200, features=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(fields, features)) @ rng.normal(size=(features, features)) + 5


def test_plain_whitening_is_pca_whitening():
    dmso, treated = control(), control(30, seed=1)
    ours = TypicalVariationNormalizer(regularization=0, rank_guard=None).fit(dmso)
    theirs = PCA(whiten=True).fit(dmso)
    np.testing.assert_allclose(np.abs(ours.transform(treated)), np.abs(theirs.transform(treated)), rtol=1e-8)
    np.testing.assert_allclose(np.cov(ours.transform(dmso).T), np.eye(10), atol=1e-10)
    assert ours.regularization_ == 0


@pytest.mark.parametrize("fields", [12, 50, 2000])
def test_the_automatic_share_is_ledoit_and_wolfs(fields):
    dmso = control(fields, 20)
    ours = TypicalVariationNormalizer(rank_guard=None).fit(dmso)
    assert ours.regularization_ == pytest.approx(ledoit_wolf(dmso)[1], rel=1e-9)


def test_regularized_whitening_by_the_plain_formula():
    dmso, treated = control(60), control(7, seed=1)
    share = 0.3
    ours = TypicalVariationNormalizer(regularization=share, rank_guard=None).fit(dmso).transform(treated)
    covariance = np.cov(dmso.T)
    mixed = (1 - share) * covariance + share * np.trace(covariance) / 10 * np.eye(10)
    centred = treated - dmso.mean(axis=0)
    # Whitening is fixed but for a rotation, so what must agree are the inner products.
    np.testing.assert_allclose(ours @ ours.T, centred @ np.linalg.inv(mixed) @ centred.T, rtol=1e-9)


def test_with_fewer_fields_than_features_only_seen_directions_are_kept():
    dmso = control(15, 40)
    plain = TypicalVariationNormalizer(regularization=0, rank_guard=None).fit(dmso)
    assert plain.transform(dmso).shape == (15, 14)  # 15 fields less their mean span 14 directions
    guarded = TypicalVariationNormalizer().fit(dmso)
    assert guarded.transform(dmso).shape == (15, 7)
    limited = TypicalVariationNormalizer(n_components=3).fit(dmso)
    assert limited.transform(dmso).shape == (15, 3)


def test_unseen_fields_do_not_explode_under_the_guard():
    """Spread of new fields in the whitened space, where 1 is as expected: plain whitening underestimates it."""
    rng = np.random.default_rng(0)
    spread = np.arange(1.0, 101.0) ** -1.0
    dmso, new = rng.normal(size=(104, 100)) * spread, rng.normal(size=(500, 100)) * spread
    worst = {}
    for name, options in {"plain": {"regularization": 0, "rank_guard": None}, "guarded": {}}.items():
        worst[name] = TypicalVariationNormalizer(**options).fit(dmso).transform(new).var(axis=0).max()
    assert worst["plain"] > 100
    assert worst["guarded"] < 4


def test_duplicated_and_constant_columns():
    dmso = np.column_stack([control(50, 3), np.ones(50), control(50, 3)[:, 0]])
    fitted = TypicalVariationNormalizer(regularization=0, rank_guard=None).fit(dmso)
    assert fitted.transform(dmso).shape == (50, 3)
    assert np.isfinite(fitted.transform(dmso + 1)).all()


def test_a_constant_control_gives_zeros_and_not_nan():
    fitted = TypicalVariationNormalizer().fit(np.ones((5, 4)))
    np.testing.assert_array_equal(fitted.transform(np.arange(8.0).reshape(2, 4)), np.zeros((2, 1)))


def test_signs_do_not_depend_on_the_order_of_fields():
    dmso = control(80, 6)
    first = TypicalVariationNormalizer().fit(dmso).transform(dmso[:5])
    np.testing.assert_allclose(TypicalVariationNormalizer().fit(dmso[::-1]).transform(dmso[:5]), first, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regularization": 2}, "regularization is 2"),
        ({"regularization": "some"}, "regularization is 'some'"),
        ({"rank_guard": 0}, "rank_guard is 0"),
        ({"n_components": 0}, "n_components is 0"),
    ],
)
def test_bad_parameters_are_refused_in_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        TypicalVariationNormalizer(**options).fit(control())


def test_the_example_in_the_docstring():
    assert doctest.testmod(normalization).failed == 0
