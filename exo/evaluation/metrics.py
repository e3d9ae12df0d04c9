"""What samples say of a policy: rewards, win rates, distance from the reference. One value a prompt, then a mean.

Prompts are what is independent, so intervals are over them (`summary`). Left out: drawing and scoring the samples.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

pass

Scores = Sequence[Sequence[float]]  # a row a prompt, a number a completion


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean over prompts, its 95% interval by the bootstrap, and its standard error."""
    low, high = bootstrap(values)
    error = standard_error(values) if len(values) > 1 else 0.0
    return {"mean": sum(values) / len(values), "low": low, "high": high, "standard_error": error}


def means(rewards: Scores) -> list[float]:
    return [sum(row) / len(row) for row in rewards]


def accuracies(rewards: Scores) -> list[float]:
    """Mean of the sigmoid: for log-odds, the probability that the oracle gives to praise (the paper's Fig. 7)."""
    return [sum(_sigmoid(reward) for reward in row) / len(row) for row in rewards]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def spread(rewards: Scores) -> float:
    """Standard deviation over the completions of a prompt, mean over prompts (Fig. 8, appendix D.3)."""
    rows = [torch.tensor(row, dtype=torch.float64).std(correction=0) for row in rewards]
    return float(torch.stack(rows).mean())


def win_rates(ours: Scores, theirs: Scores) -> list[float]:
    """Share of all pairs, one of ours and one of theirs for the same prompt, in which ours is worth more; ties half."""
    return [
        sum((a > b) + 0.5 * (a == b) for a in mine for b in other) / (len(mine) * len(other))
        for mine, other in zip(ours, theirs, strict=True)
    ]


def of_rewards(scores: Scores, before: Scores | None, chosen: Scores | None) -> dict[str, Any]:
    """All that rewards say: mean, spread and accuracy; beside an earlier evaluation the rise and the win rate over it,
    and the win rate over chosen completions."""
    values = means(scores)
    entry: dict[str, Any] = {"reward": summary(values), "spread": spread(scores)}
    entry["accuracy"] = summary(accuracies(scores))
    entry["win_rate"] = {}
    if before is not None:
        entry["rise"] = summary([ours - theirs for ours, theirs in zip(values, means(before), strict=True)])
        entry["win_rate"]["reference"] = summary(win_rates(scores, before))
    if chosen is not None:
        entry["win_rate"]["chosen"] = summary(win_rates(scores, chosen))
    return entry


def kl_k1(differences: Sequence[Sequence[Tensor]]) -> list[float]:
    """KL(pi || ref) of whole completions: mean of log pi - log ref over samples of pi. Unbiased.

    `differences`: for each prompt, for each of its samples, log pi - log ref of each token.
    """
    return [sum(float(sample.sum()) for sample in row) / len(row) for row in differences]


def kl_k3(differences: Sequence[Sequence[Tensor]]) -> list[float]:
    """The same by Schulman's k3, token by token: exp(-d) - 1 + d, which is never negative and varies less.

    Unbiased too: given what went before, each token's term has the mean of the token's own KL.
    """
    return [sum(float((torch.expm1(-sample) + sample).sum()) for sample in row) / len(row) for row in differences]


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
