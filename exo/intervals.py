"""How sure a mean is. Values are one a prompt, so that prompts, not samples, are what is drawn again."""

from collections.abc import Sequence

import torch


def mean_interval(values: Sequence[float], *, draws: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean, always the same for the same values."""
    x = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(x), (draws, len(x)), generator=generator)
    means = x[index].mean(-1)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = means.quantile(tails).tolist()
    return low, high


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.std() / len(x) ** 0.5) if len(x) > 1 else float("nan")
