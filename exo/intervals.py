"""How sure a mean is. Values are one a prompt, because prompts are what is independent."""

import math
from collections.abc import Sequence

import torch


def accuracy_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of a mean of values in [0, 1], by Wilson's score.

    Right for values of 0 and 1, few or all alike as they may be; wider than needed for values between.
    """
    n, z = len(values), 1.959964
    mean = sum(values) / n
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.std() / len(x) ** 0.5) if len(x) > 1 else float("nan")


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95% percentile interval of the mean of independent values, the same for the same seed.

    Values that are all alike give an interval without width, however few they are.
    """
    x = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(x), (len(x),), generator=generator) for _ in range(resamples))
    means = torch.stack([x[draw].mean() for draw in draws])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
