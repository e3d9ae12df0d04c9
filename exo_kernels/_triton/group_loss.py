"""Group pass: one program per group sums its sequences and computes softmaxes, divergence and slopes dL/dS_k.

The only second copy of objectives.py, tested against it. All arithmetic is fp64: a group is a few scalars, and the
error of an fp32 sum of 512 tokens exceeds the log-ratios that matter. Sums run in a fixed order, without atomics.
Groups and sequences are ragged and of any length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exo_kernels._triton.common import on_device
from exo_kernels.objectives import Betas

BLOCK_TOKENS = 512
BLOCK_K = 32


@triton.jit
def _sum_sequence(logps, targets, ref, start, end, ignore_index, PER_TOKEN_REF: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of log-probs, of log-ratios (the same without a per-token reference), and the number of tokens."""
    policy = tl.zeros((BLOCK,), tl.float64)
    ratio = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int32)
    for at in range(start, end, BLOCK):
        i = at + tl.arange(0, BLOCK)
        exists = i < end
        scored = tl.load(targets + i, mask=exists, other=ignore_index) != ignore_index
        # loaded even if not scored: waiting for the targets first would double the latency
        logp = tl.where(scored, tl.load(logps + i, mask=exists, other=0.0), 0.0).to(tl.float64)
        policy += logp
        count += tl.where(scored, 1, 0)
        if PER_TOKEN_REF:
            ref_logp = tl.where(scored, tl.load(ref + i, mask=exists, other=0.0), 0.0).to(tl.float64)
            ratio += logp - ref_logp
    total = tl.sum(policy, 0)
    if PER_TOKEN_REF:
        return total, tl.sum(ratio, 0), tl.sum(count, 0)
    return total, total, tl.sum(count, 0)


@triton.jit
def _log_sum_exp(m, total, x):
    """Fold a block into (maximum, sum above it); a sum over -inf alone is 0."""
    new = tl.maximum(m, tl.max(x, 0))
    base = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp(tl.where(m == float("-inf"), 0.0, m - base)) + tl.sum(tl.exp(x - base), 0)
    return new, total


@triton.jit
def _log_target(rewards, k, first, size, exists, m, log_sum, beta_r, log_chosen, log_others, REWARDS: tl.constexpr):
    """Return log q of completions k, eq. 14 or 16-18; a single completion has all the mass."""
    if REWARDS:
        return (tl.load(rewards + k, mask=exists, other=0.0).to(tl.float64) - m) / beta_r - log_sum
    others = log_others - tl.log(tl.maximum(size - 1, 1).to(tl.float64))
    log_q = tl.where(k == first, log_chosen, others)
    return tl.where(size == 1, 0.0, log_q)


@triton.jit(do_not_specialize=["ignore_index"])
def group_loss_kernel(
    logps, targets, ref, rewards,
    seq_offsets, group_offsets,
    loss, slopes, policy, ratios, p_out, q_out, tokens,
    beta_pi: tl.float64, beta_r: tl.float64, log_chosen: tl.float64, log_others: tl.float64, largest: tl.float64,
    ignore_index: tl.int64,
    EXO: tl.constexpr, REWARDS: tl.constexpr, PER_TOKEN_REF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    first = tl.load(group_offsets + group)
    last = tl.load(group_offsets + group + 1)
    size = last - first

    for sequence in range(first, last):
        start = tl.load(seq_offsets + sequence)
        end = tl.load(seq_offsets + sequence + 1)
        logp, ratio, count = _sum_sequence(logps, targets, ref, start, end, ignore_index, PER_TOKEN_REF, BLOCK_TOKENS)
        if not PER_TOKEN_REF:
            ratio = logp - tl.load(ref + sequence).to(tl.float64)
        tl.store(policy + sequence, logp)
        tl.store(ratios + sequence, ratio)
        tl.store(tokens + sequence, count)
    tl.debug_barrier()  # the ratios just stored are read below by other threads

    m = tl.full((), float("-inf"), tl.float64)
    m_r = m
    total = tl.zeros((), tl.float64)
    total_r = total
    for at in range(first, last, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        z = beta_pi * tl.load(ratios + k, mask=k < last, other=float("-inf"))
        m, total = _log_sum_exp(m, total, z)
        if REWARDS:
            r = tl.load(rewards + k, mask=k < last, other=float("-inf")).to(tl.float64)
            m_r = tl.maximum(m_r, tl.max(r, 0))
    if REWARDS:  # subtract their maximum first, so that the division cannot overflow to +inf
        for at in range(first, last, BLOCK_K):
            k = at + tl.arange(0, BLOCK_K)
            r = tl.load(rewards + k, mask=k < last, other=float("-inf")).to(tl.float64)
            total_r += tl.sum(tl.exp((r - m_r) / beta_r), 0)
    log_sum = tl.where(total > 0, m + tl.log(total), float("nan"))  # every completion is impossible, or NaN
    log_sum_r = tl.log(total_r)

    value = tl.zeros((), tl.float64)
    for at in range(first, last, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        exists = k < last
        log_p = beta_pi * tl.load(ratios + k, mask=exists, other=float("-inf")) - log_sum  # eq. 13
        log_q = _log_target(rewards, k, first, size, exists, m_r, log_sum_r, beta_r, log_chosen, log_others, REWARDS)
        if EXO:
            p = tl.exp(log_p)
            value += tl.sum(tl.where(exists & (p != 0), p * (log_p - log_q), 0.0), 0)  # eq. 15, 18
        else:
            q = tl.exp(log_q)
            value -= tl.sum(tl.where(exists & (q != 0), q * log_p, 0.0), 0)  # eq. 19, 7
    value = tl.where(log_sum == log_sum, value, log_sum)  # propagate NaN
    tl.store(loss + group, value)  # inf beyond the range of its dtype

    for at in range(first, last, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        exists = k < last
        log_p = beta_pi * tl.load(ratios + k, mask=exists, other=float("-inf")) - log_sum
        log_q = _log_target(rewards, k, first, size, exists, m_r, log_sum_r, beta_r, log_chosen, log_others, REWARDS)
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        if EXO:
            slope = p * (tl.where(p != 0, log_p - log_q, 0.0) - value)
            slope = tl.where(value > largest, 0.0, slope)  # saturated, as in objectives.exo
        else:
            slope = p - q
        slope = tl.where(log_p == log_p, slope, log_p)
        tl.store(slopes + k, beta_pi * slope, mask=exists)
        tl.store(p_out + k, p, mask=exists)
        tl.store(q_out + k, q, mask=exists)


def group_loss(
    logps: Tensor,  # (n,)
    targets: Tensor,  # (n,) int64
    ref_logps: Tensor,  # (N,) sums, or (n,) per token where per_token_ref
    rewards: Tensor | None,  # (N,)
    seq_offsets: Tensor,  # (N+1,)
    group_offsets: Tensor,  # (G+1,)
    per_token_ref: bool,
    objective: str,
    betas: Betas,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    """Return loss (G,), dL/dS (N,), log-probs (N,), log-ratios (N,), p (N,), q (N,), tokens (N,); computed in fp64."""
    n_groups, n_sequences = group_offsets.numel() - 1, seq_offsets.numel() - 1
    loss = logps.new_empty(n_groups)
    slopes, policy, p, q, tokens = (logps.new_empty(n_sequences) for _ in range(5))
    ratios = logps.new_empty(n_sequences, dtype=torch.float64)
    if n_groups:
        with on_device(logps.device):
            group_loss_kernel[(n_groups,)](
                logps.contiguous(), targets.contiguous(), ref_logps.contiguous(),
                logps if rewards is None else rewards.contiguous(),
                seq_offsets, group_offsets,
                loss, slopes, policy, ratios, p, q, tokens,
                *betas, torch.finfo(logps.dtype).max, ignore_index,
                EXO=objective == "exo", REWARDS=rewards is not None, PER_TOKEN_REF=per_token_ref,
                BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_K=BLOCK_K, enable_fp_fusion=True,
            )  # fmt: skip
    return loss, slopes, policy, ratios.to(logps.dtype), p, q, tokens
