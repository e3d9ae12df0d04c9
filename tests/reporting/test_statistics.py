"""Means over seeds and prompts, computed by hand and simulated; the envelope of points."""

import math
from statistics import fmean

import pytest
import torch

from exo.reporting.statistics import Estimate, crossed_mean, envelope, interpolate, mean_over_seeds


def test_crossed_by_hand():
    """Two seeds, two prompts: 4.5/2 from the prompts, 2/2 from the seeds, minus 1/4 of the residual."""
    estimate = crossed_mean([[1.0, 3.0], [2.0, 6.0]])
    assert estimate.mean == 3.0
    assert estimate.standard_error == pytest.approx(math.sqrt(2.25 + 1 - 0.25))
    assert (estimate.low, estimate.high) == pytest.approx((3 - 1.96 * math.sqrt(3), 3 + 1.96 * math.sqrt(3)))


def test_crossed_of_one_seed_is_the_error_over_prompts():
    assert crossed_mean([[1.0, 2.0, 6.0]]).standard_error == pytest.approx(math.sqrt(7 / 3))


def test_crossed_is_unbiased():
    """The squared error is the variance of a mean over 6 prompts, 5 seeds and noise of variances 1, 4 and 9."""
    torch.manual_seed(0)
    prompts, seeds, noise = torch.randn(2000, 1, 6), 2 * torch.randn(2000, 5, 1), 3 * torch.randn(2000, 5, 6)
    squares = [crossed_mean(table).standard_error ** 2 for table in (prompts + seeds + noise).tolist()]
    assert fmean(squares) == pytest.approx(1 / 6 + 4 / 5 + 9 / 30, rel=0.05)


def test_over_seeds_by_hand():
    first, second = Estimate(1, 0, 2, 0.3), Estimate(3, 2, 4, 0.5)
    estimate = mean_over_seeds([first, second])
    assert estimate is not None and estimate.mean == 2
    assert estimate.standard_error == pytest.approx(math.hypot(0.4, 1.0))
    assert mean_over_seeds([first]) == first
    assert mean_over_seeds([first, None]) is None


def test_the_envelope():
    points = [(3, 2), (1, 1), (1, 0), (2, 0.5), (0.5, -1), (4, 2), (5, 3)]
    assert envelope(points) == [(0.5, -1), (1, 1), (3, 2), (5, 3)]


def test_interpolation_is_constant_after_the_last_point_and_undefined_before_the_first():
    points = [(1.0, 2.0), (3.0, 6.0)]
    heights = [interpolate(points, x) for x in (0.9, 1, 2, 3, 4)]
    assert heights == [None, 2, 4, 6, 6]
