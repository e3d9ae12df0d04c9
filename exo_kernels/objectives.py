"""The objectives on K log-ratios, and the two target distributions: every equation stands here once.

Pure functions of (G, K) tensors of log-probabilities; row g is one prompt, column k one completion. Ragged groups are
padded with -inf, which is a probability of zero and costs nothing. Nothing here knows of tokens, vocabularies or
models. A new objective is one function and one entry of OBJECTIVES. Equation numbers are those of arXiv 2402.00856.
"""

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# log-targets of the published pairwise code; those of EXO are unnormalised, unlike the paper's eq. 16-18
OFFICIAL_LOG_TARGETS = {"exo": (0.0, -10.0), "dpo": (0.0, -math.inf)}


class LossStats(NamedTuple):
    """Statistics of a loss, detached: N sequences, G groups; fp32 (fp64 for fp64 input) except `tokens`."""

    policy_logps: Tensor  # (N,) sum of the policy's log-probs over tokens with loss
    implicit_rewards: Tensor  # (N,) beta_pi S_k
    p: Tensor  # (N,) the policy's distribution over each group, eq. 13
    q: Tensor  # (N,) the target's, eq. 14 or 16-18
    losses: Tensor  # (G,)
    tokens: Tensor  # (N,) int64, tokens with loss


def policy_log_probs(
    log_ratios: Tensor,  # (G, K) S_k, -inf where a group has no k-th completion
    beta_pi: float,
) -> Tensor:  # (G, K)
    """log p = log softmax_k(beta_pi S_k). Eq. 13. NaN if every completion is impossible."""
    return torch.log_softmax(beta_pi * _below_maximum(log_ratios), dim=-1)


def reward_log_target(
    rewards: Tensor,  # (G, K), -inf where a group has no k-th completion
    beta_r: float,
) -> Tensor:  # (G, K)
    """log q = log softmax_k(r_k / beta_r). Eq. 14."""
    return torch.log_softmax(_below_maximum(rewards) / beta_r, dim=-1)


def _below_maximum(values: Tensor) -> Tensor:
    """Subtract each row's maximum, so that scaling the values by a beta cannot overflow to +inf."""
    return values - values.detach().amax(-1, keepdim=True) if values.shape[-1] else values


def preference_log_targets(objective: str, label_smoothing: float, compat: str | None) -> tuple[float, float]:
    """(log q of the chosen, log of the mass that the others share): log(1 - eps), log(eps). Eq. 16-18."""
    if compat == "official":
        return OFFICIAL_LOG_TARGETS[objective]
    return math.log1p(-label_smoothing), math.log(label_smoothing) if label_smoothing else -math.inf


def preference_log_target(
    valid: Tensor,  # (G, K) bool, False where a group has no k-th completion
    log_chosen: float,
    log_others: float,
) -> Tensor:  # (G, K) float64
    """log q: 1 - eps on the first completion, eps / (K - 1) on each other; one completion alone has it all."""
    sizes = valid.sum(-1, keepdim=True)  # (G, 1)
    others = log_others - torch.log((sizes - 1).clamp(min=1).double())
    first = torch.arange(valid.shape[-1], device=valid.device) == 0
    log_q = torch.where(first, log_chosen, others)
    log_q = torch.where(sizes == 1, 0.0, log_q)
    return log_q.masked_fill(~valid, -math.inf)


def exo(
    log_p: Tensor,  # (G, K)
    log_q: Tensor,  # (G, K)
    largest: float = sys.float_info.max,
) -> tuple[Tensor, Tensor]:  # (G,), (G, K)
    """Reverse KL: L = sum_k p_k (log p_k - log q_k), eq. 15 and 18; and dL / d(beta_pi S_k).

    A group is saturated if its loss exceeds `largest`, because q is 0 or nearly 0 where p is not: its loss is inf and
    its slope 0, because no finite step could reach q and an infinite one would make every weight NaN.
    """
    p = log_p.exp()
    gap = torch.where(p != 0, log_p - log_q, 0.0)  # 0 log 0 is 0
    saturated = (p * gap).detach().sum(-1) > largest
    gap = gap.masked_fill(saturated.unsqueeze(-1), 0.0)
    loss = (p * gap).sum(-1)
    slopes = p * (gap - loss.unsqueeze(-1))
    return loss.masked_fill(saturated, math.inf), slopes


def dpo(
    log_p: Tensor,  # (G, K)
    log_q: Tensor,  # (G, K)
    largest: float = sys.float_info.max,
) -> tuple[Tensor, Tensor]:  # (G,), (G, K)
    """Forward KL without its constant: L = - sum_k q_k log p_k, eq. 19 and 7; and dL / d(beta_pi S_k).

    The slope p - q is bounded, so `largest` does not matter here.
    """
    q = log_q.exp()
    loss = -torch.where(q != 0, q * log_p, 0.0).sum(-1)
    return loss, log_p.exp() - q


# of log p, log q and the largest number that the loss's dtype holds
OBJECTIVES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"exo": exo, "dpo": dpo}
LABEL_SMOOTHING = {"exo": 1e-3, "dpo": 0.0}  # eps unless the caller says otherwise, else 0; the paper's for EXO
