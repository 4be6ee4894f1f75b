"""Schedules against arrays built whole, as the original DINO builds them."""

import numpy as np
import pytest

from pretraining_wsdino import cosine_schedule, linear_schedule


def dino_schedule(base, final, epochs, steps_per_epoch, warmup_epochs):
    """The whole array, from the formula in Caron et al. 2021: linspace warm-up, then half a cosine."""
    warmup = np.linspace(0, base, warmup_epochs * steps_per_epoch) if warmup_epochs else np.array([])
    rest = np.arange(epochs * steps_per_epoch - len(warmup))
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * rest / len(rest)))
    return np.concatenate([warmup, cosine])


@pytest.mark.parametrize("warmup_epochs", [0, 1, 10])
@pytest.mark.parametrize(("base", "final"), [(4e-6, 3e-6), (0.99, 1.0), (0.04, 0.4)])
def test_cosine_schedule_is_dinos_array(base, final, warmup_epochs):
    whole = dino_schedule(base, final, 40, 7, warmup_epochs)
    ours = [
        cosine_schedule(step, start=base, end=final, total_steps=280, warmup_steps=warmup_epochs * 7)
        for step in range(280)
    ]
    np.testing.assert_allclose(ours, whole, rtol=1e-12, atol=1e-15)


def test_cosine_schedule_at_published_points():
    at = lambda step: cosine_schedule(step, start=4e-6, end=3e-6, total_steps=400, warmup_steps=10)  # noqa: E731
    assert at(0) == 0.0
    assert at(9) == pytest.approx(4e-6)
    assert at(10) == pytest.approx(4e-6)
    assert at(205) == pytest.approx(3.5e-6)
    assert at(10_000) == at(399)


def test_a_single_warmup_step_starts_at_zero():
    assert cosine_schedule(0, start=1.0, end=0.0, total_steps=10, warmup_steps=1) == 0.0


def test_linear_schedule():
    values = [linear_schedule(epoch, start=0.04, end=0.07, warmup_epochs=4) for epoch in range(6)]
    np.testing.assert_allclose(values, [0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert linear_schedule(0, start=0.02, end=0.04, warmup_epochs=0) == 0.04
