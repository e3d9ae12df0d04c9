"""Estimate the density ratio of a policy to the reference from samples of the reference (the paper's Figures 3 and 9).

Self-normalised weights turn the reference's samples into samples of the policy. The ratio is that of two kernel density
estimates over log pi_ref, weighted and unweighted, with the same bandwidth.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MIN_EFFECTIVE = 10  # effective samples of a curve that can be trusted


class DensityRatio(NamedTuple):
    log_ref: list[float]  # the grid
    ratio: list[float]  # at each point of the grid
    effective: float  # effective sample size of the weights
    samples: int

    @property
    def thin(self) -> bool:
        """Return whether there are too few effective samples to trust the curve."""
        return self.effective < MIN_EFFECTIVE


def policy_weights(logps: Sequence[float], ref_logps: Sequence[float]) -> Tensor:
    """Return the weights pi / pi_ref, normalised to sum to 1."""
    return (_double(logps) - _double(ref_logps)).softmax(0)


def optimum_weights(rewards: Sequence[float], beta: float) -> Tensor:
    """Return the weights of pi_ref exp(r / beta), the optimum of the objective (eq. 2 of the paper)."""
    return (_double(rewards) / beta).softmax(0)


def density_ratio(ref_logps: Sequence[float], weights: Tensor, points: int = 200) -> DensityRatio:
    """Return the density ratio against log pi_ref over the middle 96% of the reference's samples.

    Outside this range there are too few samples. ValueError if all samples are equally probable.
    """
    x = _double(ref_logps)
    width = silverman(x)
    if not width:
        raise ValueError("density: expected samples of different log-probability; all are equal")
    low, high = x.quantile(torch.tensor([0.02, 0.98], dtype=torch.float64)).tolist()
    grid = torch.linspace(low, high, points, dtype=torch.float64)
    kernels = torch.exp(-0.5 * ((grid[:, None] - x) / width) ** 2)
    ratio = (kernels @ weights) / kernels.mean(1)
    return DensityRatio(grid.tolist(), ratio.tolist(), float(1 / (weights**2).sum()), len(x))


def silverman(x: Tensor) -> float:
    """Return the bandwidth of a Gaussian kernel: 0.9 min(standard deviation, interquartile range / 1.34) n^(-1/5)."""
    low, high = x.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    spread = float(x.std(correction=0))
    return 0.9 * min(spread, (high - low) / 1.34 or math.inf) * len(x) ** -0.2


def _double(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
