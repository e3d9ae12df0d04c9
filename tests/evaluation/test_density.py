"""Density ratios from weighted samples, compared with closed forms."""

import math

import pytest
import torch

from exo.evaluation import density


def test_a_policy_that_is_the_reference_has_ratio_one():
    ref = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curve = density.density_ratio(ref.tolist(), density.policy_weights((ref - 7).tolist(), ref.tolist()))
    assert curve.ratio == pytest.approx([1.0] * len(curve.ratio))
    assert curve.effective == pytest.approx(100)


def test_a_tilted_normal():
    """Check a normal x = log pi_ref and pi / pi_ref = exp(a x), smoothed with bandwidth h.

    The ratio is then exp((a x - a^2 / 2) / (1 + h^2)).
    """
    places = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    ref, a = torch.special.ndtri(places), 0.7
    curve = density.density_ratio(ref.tolist(), density.policy_weights(((1 + a) * ref).tolist(), ref.tolist()))
    h = 0.9 * min(1.0, 2 * 0.6744898 / 1.34) * 20_000**-0.2
    assert density.silverman(ref) == pytest.approx(h, rel=1e-3)
    expected = [math.exp((a * x - a * a / 2) / (1 + h * h)) for x in curve.log_ref]
    assert curve.ratio == pytest.approx(expected, rel=0.01)
    assert curve.log_ref[0] == pytest.approx(-2.054, abs=1e-2)
    assert curve.effective == pytest.approx(20_000 * math.exp(-a * a), rel=0.01)


def test_the_bandwidth_uses_the_quartiles_if_tails_are_long():
    x = torch.tensor([-100.0, 0, 1, 2, 3, 4, 5, 6, 7, 100], dtype=torch.float64)
    assert density.silverman(x) == pytest.approx(0.9 * (5.75 - 1.25) / 1.34 * 10**-0.2)


def test_the_optimum_follows_rewards_over_beta():
    assert density.optimum_weights([0.0, math.log(3)], 0.5).tolist() == pytest.approx([0.1, 0.9])


def test_equal_samples_have_no_curve():
    with pytest.raises(ValueError, match="all are equal"):
        density.density_ratio([-3.0] * 5, torch.full((5,), 0.2, dtype=torch.float64))
