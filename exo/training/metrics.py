"""Metrics of preference losses."""

import torch
from torch import Tensor

from exo.data.collate import Batch
from exo_kernels import LossStats

MEAN_SQUARE = "log_ratios/mean_square"  # of S_k, the sequence log-ratios
METRICS = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/stuck"]
STUCK = -3.0  # of the margin beta_pi (S_best - S_worst)


def _sums(metrics: dict[str, list[float]]) -> dict[str, tuple[float, int]]:
    return {name: (sum(values), len(values)) for name, values in metrics.items()}


def preference_metrics(stats: LossStats, batch: Batch, beta_pi: float) -> dict[str, list[float]]:
    """Metrics by their usual names, one value a group; a group that prefers nothing has none of most."""
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    sizes = batch.group_size.tolist()
    implicit = stats.implicit_rewards.double().cpu().split(sizes)
    logps = stats.policy_logps.double().cpu().split(sizes)
    wanted = stats.q.double().cpu().split(sizes)
    # preferences are rewards of which the first completion has the higher
    targets = batch.rewards.cpu().split(sizes) if batch.rewards is not None else None
    for i, size in enumerate(sizes):
        found[MEAN_SQUARE].append(float((implicit[i] / beta_pi).square().mean()))
        found["target/entropy"].append(float(-torch.special.xlogy(wanted[i], wanted[i]).sum()))
        found["target/ess"].append(float(1 / wanted[i].square().sum()))
        target = targets[i] if targets is not None else -torch.arange(size).clamp(max=1).double()
        if size < 2 or bool((target == target[0]).all()):
            continue  # nothing is preferred here
        best, worst = int(target.argmax()), int(target.argmin())
        found["rewards/chosen"].append(float(implicit[i][best]))
        found["rewards/rejected"].append(float(implicit[i][worst]))
        found["rewards/margins"].append(float(implicit[i][best] - implicit[i][worst]))
        found["rewards/accuracies"].append(ranking_accuracy(implicit[i], target))
        # so badly ranked that EXO's gradient has all but vanished (0.3 of what it was at the start, and falling)
        found["rewards/stuck"].append(float(implicit[i][best] - implicit[i][worst] < STUCK))
        found["logps/chosen"].append(float(logps[i][best]))
        found["logps/rejected"].append(float(logps[i][worst]))
    return found


def ranking_accuracy(scores: Tensor, target: Tensor) -> float:
    """Share of the pairs that `target` ranks which `scores` rank alike; ties in the scores count one half."""
    ranked = target[:, None] > target[None, :]
    difference = scores[:, None] - scores[None, :]
    right = (difference > 0).double() + 0.5 * (difference == 0)
    return float(right[ranked].mean())
