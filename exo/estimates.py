"""What samples say of a policy: rewards, win rates, distance from the reference. One value a prompt, then a mean.

Prompts are what is independent, so intervals are over them (`summary`). Left out: drawing and scoring the samples.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from exo import intervals

Scores = Sequence[Sequence[float]]  # a row a prompt, a number a completion


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean over prompts, its 95% interval by the bootstrap, and its standard error."""
    low, high = intervals.bootstrap(values)
    error = intervals.standard_error(values) if len(values) > 1 else 0.0
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
