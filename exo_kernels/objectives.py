"""The objectives on K log-ratios and the two target distributions: the only place for equations.

Pure functions of (G, K) tensors of log-probabilities; row g is one prompt, column k one completion. Ragged groups are
padded with -inf, which is a probability of zero. Tokens, vocabularies and models are not known here. A new objective is
one function and one entry of OBJECTIVES. Equation numbers are those of arXiv 2402.00856.
"""

import math
import sys
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class LossStats(NamedTuple):
    """Statistics of a loss, detached: N sequences, G groups; fp32 (fp64 for fp64 input) except `tokens`.

    Attributes:
        policy_logps: (N,) sum of the policy's log-probs over tokens with loss.
        implicit_rewards: (N,) beta_pi S_k.
        p: (N,) the policy's distribution over each group, eq. 13.
        q: (N,) the target distribution, eq. 14 or 16-18.
        losses: (G,) the loss of each group.
        tokens: (N,) int64, tokens with loss.
    """

    policy_logps: Tensor
    implicit_rewards: Tensor
    p: Tensor
    q: Tensor
    losses: Tensor
    tokens: Tensor


class Betas(NamedTuple):
    """The numbers of a loss, in the order in which operators and kernels take them."""

    pi: float  # beta_pi
    r: float  # beta_r, with rewards
    log_chosen: float  # without rewards: log-target of the chosen completion
    log_others: float  # log of the mass that the other completions share


LossResult = Tensor | tuple[Tensor, LossStats]  # the second with return_stats=True


def policy_log_probs(
    log_ratios: Tensor,  # (G, K) S_k, -inf where a group has no k-th completion
    beta_pi: float,
) -> Tensor:  # (G, K)
    """Return log p = log softmax_k(beta_pi S_k), eq. 13; NaN if every completion is impossible."""
    return torch.log_softmax(beta_pi * _below_maximum(log_ratios), dim=-1)


def reward_log_target(
    rewards: Tensor,  # (G, K), -inf where a group has no k-th completion
    beta_r: float,
) -> Tensor:  # (G, K)
    """Return log q = log softmax_k(r_k / beta_r), eq. 14."""
    return torch.log_softmax(_below_maximum(rewards) / beta_r, dim=-1)


def _below_maximum(values: Tensor) -> Tensor:
    """Subtract each row's maximum, so that scaling the values by a beta cannot overflow to +inf."""
    return values - values.detach().amax(-1, keepdim=True) if values.shape[-1] else values


def preference_log_targets(objective: str, label_smoothing: float, compat: str | None) -> tuple[float, float]:
    """Return (log q of the chosen, log of the mass that the others share): log(1 - eps), log(eps). Eq. 16-18."""
    if compat == "official":
        return OBJECTIVES[objective].official_log_targets
    return math.log1p(-label_smoothing), math.log(label_smoothing) if label_smoothing else -math.inf


def preference_log_target(
    valid: Tensor,  # (G, K) bool, False where a group has no k-th completion
    log_chosen: float,
    log_others: float,
) -> Tensor:  # (G, K) float64
    """Return log q: 1 - eps on the first completion, eps / (K - 1) on the others; a single completion has all of it."""
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
    """Return the reverse KL, L = sum_k p_k (log p_k - log q_k), eq. 15 and 18, and dL / d(beta_pi S_k).

    A group is saturated if its loss exceeds `largest`, because q is 0 or nearly 0 where p is not. Its loss is inf and
    its slope 0: no finite step could reach q, and an infinite one would make every weight NaN.
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
    """Return the forward KL without its constant, L = - sum_k q_k log p_k, eq. 19 and 7, and dL / d(beta_pi S_k).

    The slope p - q is bounded, so `largest` is not needed.
    """
    q = log_q.exp()
    loss = -torch.where(q != 0, q * log_p, 0.0).sum(-1)
    return loss, log_p.exp() - q


class Objective(NamedTuple):
    """An objective and its conventions."""

    summary: str  # first line of its losses' documentation
    function: Callable[..., tuple[Tensor, Tensor]]  # (log p, log q, largest number of the loss's dtype): loss, slopes
    label_smoothing: float  # default eps on preferences
    needs_smoothing: bool  # eps = 0 would make every loss on preferences infinite
    official_log_targets: tuple[float, float]  # of the published pairwise code; EXO's are unnormalised
    kernel: bool = False  # also in _triton/group_loss.py; otherwise torch computes it on every device


ObjectiveName = Literal["exo", "dpo"]
OBJECTIVES: dict[str, Objective] = {
    "exo": Objective(
        "EXO: reverse KL between the policy's and the target's distribution over each prompt's K completions.",
        exo,
        label_smoothing=1e-3,
        needs_smoothing=True,
        official_log_targets=(0.0, -10.0),
        kernel=True,
    ),
    "dpo": Objective(
        "DPO on K completions: forward KL, L = - sum_k q_k log softmax_k(beta_pi S_k). Eq. 19; K = 2: eq. 7.",
        dpo,
        label_smoothing=0.0,
        needs_smoothing=False,
        official_log_targets=(0.0, -math.inf),
        kernel=True,
    ),
}
