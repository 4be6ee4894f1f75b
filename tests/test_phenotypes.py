"""Batches of drawn cells against their definition, and their loss against plain loops."""

import math

import numpy as np
import pytest
import torch

from pretraining_wsdino.phenotypes import PhenotypeGroupSampler, PhenotypeLoss, standardised_logs
from wsdino.errors import UserError


def drawn(seed=0, phenotypes=40):
    """Phenotype and optics of cells: up to six per phenotype and optics, some phenotypes without any under one."""
    random = np.random.default_rng(seed)
    table = [
        (number, optics)
        for number in range(phenotypes)
        for optics in (0, 1)
        for _ in range(random.integers(0, 7))
    ]  # fmt: skip
    return np.array(table)[random.permutation(len(table))].T


def test_a_block_holds_every_phenotype_under_both_optics():
    phenotypes, optics = drawn()
    sampler = PhenotypeGroupSampler(phenotypes, optics, block=24, group_size=3, seed=2)
    cells = {(p, o): set(np.flatnonzero((phenotypes == p) & (optics == o))) for p in range(40) for o in (0, 1)}
    seen = set()
    for step in range(400):
        rows, partners, fallbacks = sampler.draw(step, 48)
        assert (rows == partners).all() and not fallbacks
        for block in rows.reshape(2, 2, 4, 3):
            names = [[{int(phenotypes[row]) for row in group} for group in half] for half in block]
            assert names[0] == names[1] and all(len(name) == 1 for name in names[0])
            assert len(set.union(*names[0])) == 4
            for number, half in enumerate(block):
                for group, (name,) in zip(half, names[number], strict=True):
                    assert set(optics[group]) == {number}
                    assert len(set(group)) == min(3, len(cells[name, number]))
        seen |= set(rows.tolist())
    both = [p for p in range(40) if cells[p, 0] and cells[p, 1]]
    assert seen == {row for p in both for o in (0, 1) for row in cells[p, o]} == set(sampler.rows)
    again = PhenotypeGroupSampler(phenotypes, optics, block=24, group_size=3, seed=2)
    np.testing.assert_array_equal(again.draw(7, 48)[0], sampler.draw(7, 48)[0])


@pytest.mark.parametrize(("block", "phenotypes"), [(10, 40), (24, 3)])
def test_batches_that_cannot_be_made_are_refused(block, phenotypes):
    with pytest.raises(UserError, match="batch"):
        PhenotypeGroupSampler(*drawn(phenotypes=phenotypes), block=block, group_size=3)


def test_the_loss_against_plain_loops():
    torch.manual_seed(0)
    groups, size, dim, temperature = 5, 2, 8, 0.2
    loss = PhenotypeLoss(
        dim, 3, group_size=size, temperature=temperature, regression_weight=0.7, contrast_weight=0.3
    )  # fmt: skip
    features, numbers = torch.randn(2 * groups * size, dim), torch.randn(2 * groups * size, 3)
    ours, monitors = loss(features, numbers)
    regression = 0.0
    for row in range(len(features)):
        guess = loss.regressor(features[row])
        regression += sum(float((guess[n] - numbers[row, n]) ** 2) for n in range(3)) / (3 * len(features))
    vectors = [[], []]
    for optics in (0, 1):
        for group in range(groups):
            first = (optics * groups + group) * size
            vector = loss.projector(sum(features[first + one] for one in range(size)) / size)
            vectors[optics].append(vector / vector.norm())
    contrast = 0.0
    for here, there in ((0, 1), (1, 0)):
        for group in range(groups):
            similar = [float(vectors[here][group] @ other) / temperature for other in vectors[there]]
            contrast -= (similar[group] - math.log(sum(math.exp(s) for s in similar))) / (2 * groups)
    assert float(monitors["regression"]) == pytest.approx(regression, rel=1e-5)
    assert float(monitors["contrast"]) == pytest.approx(contrast, rel=1e-5)
    assert float(ours) == pytest.approx(0.7 * regression + 0.3 * contrast, rel=1e-5)


def test_standardised_logs():
    random = np.random.default_rng(0)
    numbers = np.column_stack([random.uniform(0, 3, 200), np.full(200, 0.4), np.exp(random.normal(size=200))])
    ours = standardised_logs(numbers)
    np.testing.assert_allclose(ours.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(ours.std(0), [1, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(np.argsort(ours[:, 0]), np.argsort(numbers[:, 0]))
