"""Group pass: sums, K-way softmaxes, divergence and slopes, in fp64. Equations: objectives.py."""

import torch
from torch import Tensor

from exo_kernels import groups, objectives


def group_loss(
    logps: Tensor,  # (n,)
    targets: Tensor,  # (n,) int64
    ref_logps: Tensor,  # (N,) sums, or (n,) per token where per_token_ref
    rewards: Tensor | None,  # (N,)
    seq_offsets: Tensor,  # (N+1,)
    group_offsets: Tensor,  # (G+1,)
    per_token_ref: bool,
    objective: str,
    betas: objectives.Betas,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    """Return loss (G,), dL/dS (N,), log-probs (N,), log-ratios (N,), p (N,), q (N,), tokens (N,); computed in fp64."""
    scored = targets != ignore_index
    tokens = groups.segment_sum(scored.double(), seq_offsets)
    policy = groups.segment_sum(logps.double().masked_fill(~scored, 0.0), seq_offsets)
    if per_token_ref:
        difference = (logps.double() - ref_logps.double()).masked_fill(~scored, 0.0)
        ratios = groups.segment_sum(difference, seq_offsets)
    else:
        ratios = policy - ref_logps.double()
    width = int(group_offsets.diff().max()) if group_offsets.numel() > 1 else 0
    mask = groups.group_mask(group_offsets, width)  # (G, K)
    log_p = objectives.policy_log_probs(groups.to_matrix(ratios, group_offsets, width), betas.pi)
    if rewards is None:
        log_q = objectives.preference_log_target(mask, betas.log_chosen, betas.log_others)
    else:
        log_q = objectives.reward_log_target(groups.to_matrix(rewards.double(), group_offsets, width), betas.r)
    loss, dz = objectives.OBJECTIVES[objective].function(log_p, log_q, torch.finfo(logps.dtype).max)
    results = loss, betas.pi * dz[mask], policy, ratios, log_p.exp()[mask], log_q.exp()[mask], tokens
    return tuple(result.to(logps.dtype) for result in results)
