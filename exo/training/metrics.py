"""Metrics of preference losses."""

import torch
from torch import Tensor

from exo.data.collate import Batch
from exo_kernels import LossStats

MEAN_SQUARE = "log_ratios/mean_square"  # of S_k, the sequence log-ratios
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/stuck",
           "logps/chosen", "logps/rejected", "target/entropy", "target/ess", MEAN_SQUARE)  # fmt: skip
# Of the margin beta_pi (S_best - S_worst): below it EXO's gradient has all but vanished (0.3 of what it was at the
# start, and falling).
STUCK = -3.0


def sums(metrics: dict[str, list[float]]) -> dict[str, tuple[float, int]]:
    """Return (sum, count) of each metric."""
    return {name: (sum(values), len(values)) for name, values in metrics.items()}


def preference_metrics(stats: LossStats, batch: Batch, beta_pi: float) -> dict[str, list[float]]:
    """Return a list of values for each of METRICS, one per group.

    A group whose completions are all equally good has values for the target and the mean square only.
    """
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    sizes = batch.group_size.tolist()
    implicit = stats.implicit_rewards.double().cpu().split(sizes)
    logps = stats.policy_logps.double().cpu().split(sizes)
    probabilities = stats.q.double().cpu().split(sizes)
    # preferences are rewards of which the first completion has the higher
    targets = batch.rewards.cpu().split(sizes) if batch.rewards is not None else None
    for i, size in enumerate(sizes):
        values[MEAN_SQUARE].append(float((implicit[i] / beta_pi).square().mean()))
        values["target/entropy"].append(float(-torch.special.xlogy(probabilities[i], probabilities[i]).sum()))
        values["target/ess"].append(float(1 / probabilities[i].square().sum()))
        target = targets[i] if targets is not None else -torch.arange(size).clamp(max=1).double()
        if size < 2 or bool((target == target[0]).all()):
            continue
        best, worst = int(target.argmax()), int(target.argmin())
        values["rewards/chosen"].append(float(implicit[i][best]))
        values["rewards/rejected"].append(float(implicit[i][worst]))
        values["rewards/margins"].append(float(implicit[i][best] - implicit[i][worst]))
        values["rewards/accuracies"].append(ranking_accuracy(implicit[i], target))
        values["rewards/stuck"].append(float(implicit[i][best] - implicit[i][worst] < STUCK))
        values["logps/chosen"].append(float(logps[i][best]))
        values["logps/rejected"].append(float(logps[i][worst]))
    return values


def ranking_accuracy(scores: Tensor, target: Tensor) -> float:
    """Return the share of the pairs that `target` ranks and `scores` rank alike; a tie in the scores counts 1/2."""
    ranked = target[:, None] > target[None, :]
    difference = scores[:, None] - scores[None, :]
    right = (difference > 0).double() + 0.5 * (difference == 0)
    return float(right[ranked].mean())
