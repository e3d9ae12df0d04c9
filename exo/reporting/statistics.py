"""Estimates of means over prompts and seeds, and the upper envelope of points."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from exo.evaluation.metrics import standard_error


class Estimate(NamedTuple):
    """A mean with its 95% interval, as in evaluation.json."""

    mean: float
    low: float
    high: float
    standard_error: float


def mean_over_seeds(values: Sequence[Estimate | None]) -> Estimate | None:
    """Return the mean over seeds of means over prompts; None if a seed lacks the metric.

    All seeds share the prompts, so the average standard error over prompts is not divided by the number of seeds. The
    standard error between seeds is added in quadrature. The result is slightly too large, never too small.
    """
    estimates = [value for value in values if value is not None]
    if len(estimates) < len(values):
        return None
    if len(estimates) == 1:
        return estimates[0]
    means = [estimate.mean for estimate in estimates]
    over_prompts = fmean(estimate.standard_error for estimate in estimates)
    return _normal_estimate(fmean(means), math.hypot(over_prompts, standard_error(means)))


def crossed_mean(values: Sequence[Sequence[float]]) -> Estimate:
    """Return the mean of a table with a row per seed and a column per prompt, both random.

    The variances of the prompts' means and of the seeds' means both contain the residual, so it is subtracted from the
    second: s_prompts^2 / P + max(0, s_seeds^2 / S - s_residual^2 / (P S)).
    """
    seeds = [fmean(row) for row in values]
    prompts = [fmean(column) for column in zip(*values, strict=True)]
    mean = fmean(seeds)
    variance = standard_error(prompts) ** 2 if len(prompts) > 1 else 0.0
    if len(seeds) > 1 and len(prompts) > 1:
        residuals = [
            value - seed - prompt + mean
            for row, seed in zip(values, seeds, strict=True)
            for value, prompt in zip(row, prompts, strict=True)
        ]
        residual = sum(x * x for x in residuals) / ((len(seeds) - 1) * (len(prompts) - 1))
        variance += max(0.0, standard_error(seeds) ** 2 - residual / (len(seeds) * len(prompts)))
    return _normal_estimate(mean, math.sqrt(variance))


def _normal_estimate(mean: float, error: float) -> Estimate:
    return Estimate(mean, mean - 1.96 * error, mean + 1.96 * error, error)


def envelope(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point with a smaller or equal x exceeds, sorted by x."""
    upper: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not upper or y > upper[-1][1]:
            upper.append((x, y))
    return upper


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """Return the height at x of the line through points sorted by x.

    The line is constant after the last point. Returns None before the first.
    """
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1] if x >= points[-1][0] else None
