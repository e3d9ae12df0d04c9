"""Metrics of a policy from its samples: rewards, win rates, KL to the reference. One value per prompt, then a mean.

Prompts are independent and completions of one prompt are not, so intervals are over prompts (`summary`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Scores = Sequence[Sequence[float]]  # per prompt, per completion


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the mean over prompts, its 95% bootstrap interval, and its standard error."""
    return interval(values) | {"standard_error": standard_error(values) if len(values) > 1 else 0.0}


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Return the mean and its 95% bootstrap interval."""
    low, high = bootstrap(values, seed)
    return {"mean": sum(values) / len(values), "low": low, "high": high}


def means(rewards: Scores) -> list[float]:
    return [sum(row) / len(row) for row in rewards]


def accuracies(rewards: Scores) -> list[float]:
    """Return the mean sigmoid per prompt: for log-odds, the probability of the positive class (the paper's Fig. 7)."""
    return [sum(_sigmoid(reward) for reward in row) / len(row) for row in rewards]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def spread(rewards: Scores) -> float:
    """Return the standard deviation over a prompt's completions, averaged over prompts (Fig. 8, appendix D.3)."""
    rows = [torch.tensor(row, dtype=torch.float64).std(correction=0) for row in rewards]
    return float(torch.stack(rows).mean())


def win_rates(ours: Scores, theirs: Scores) -> list[float]:
    """Return per prompt the share of pairs (ours, theirs) in which ours has the higher reward; a tie counts half."""
    return [
        sum((a > b) + 0.5 * (a == b) for a in row for b in other) / (len(row) * len(other))
        for row, other in zip(ours, theirs, strict=True)
    ]


def of_rewards(scores: Scores, baseline: Scores | None, chosen: Scores | None) -> dict[str, Any]:
    """Return mean, spread and accuracy of rewards; rise and win rate over the baseline; win rate over `chosen`."""
    values = means(scores)
    entry: dict[str, Any] = {"reward": summary(values), "spread": spread(scores)}
    entry["accuracy"] = summary(accuracies(scores))
    entry["win_rate"] = {}
    if baseline is not None:
        entry["rise"] = summary([ours - theirs for ours, theirs in zip(values, means(baseline), strict=True)])
        entry["win_rate"]["reference"] = summary(win_rates(scores, baseline))
    if chosen is not None:
        entry["win_rate"]["chosen"] = summary(win_rates(scores, chosen))
    return entry


def kl_k1(differences: Sequence[Sequence[Tensor]]) -> list[float]:
    """Return an unbiased estimate of KL(pi || ref) per prompt: the mean of log pi - log ref over samples of pi.

    `differences` has, for each prompt and each of its samples, log pi - log ref of each token.
    """
    return [sum(float(sample.sum()) for sample in row) / len(row) for row in differences]


def kl_k3(differences: Sequence[Sequence[Tensor]]) -> list[float]:
    """Return Schulman's k3 estimate of the same KL: exp(-d) - 1 + d per token, which is never negative.

    It has less variance and is unbiased too: the expectation of a token's term is the KL of that token.
    """
    return [sum(float((torch.expm1(-sample) + sample).sum()) for sample in row) / len(row) for row in differences]


def accuracy_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a mean of values in [0, 1].

    Correct for values of 0 and 1, also if there are few or all are equal; too wide for values in between.
    """
    n, z = len(values), 1.959964
    mean = sum(values) / n
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.std() / len(x) ** 0.5) if len(x) > 1 else float("nan")


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of the mean of independent values; deterministic for a seed.

    If all values are equal, the interval has no width, however few they are.
    """
    x = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(x), (len(x),), generator=generator) for _ in range(resamples))
    means = torch.stack([x[draw].mean() for draw in draws])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
