"""The implementation for any device, in plain torch: a few rows at a time, in tiles that stay in cache.

Beyond the gradient that must be returned it holds one or two tiles of TILE_BYTES, never a second (n, V) buffer. Rows
without loss are not read, and where the system gives zero pages not written either. Left out: autograd and operator
registration (ops.py), checks (validation.py), the equations (objectives.py).
"""

import contextlib
import mmap
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from exo_kernels import groups, objectives

# Measured on 1 MiB of second-level and 32 MiB of third-level cache: below 2 MiB the calls cost, above 8 the misses.
TILE_BYTES = 4 * 2**20
VIEW_BYTES = 2**18  # neighbours of this size are worth a tile of their own: a view costs a call, a copy its bytes
LAZY_BYTES = 2**25  # above, the C library maps and unmaps every block anyway


class _Tile(NamedTuple):
    rows: tuple[Tensor | int, Tensor | slice]  # index into (N, T); a slice where the rows are neighbours
    logits: Tensor  # (c, V), a view wherever torch can give one
    targets: Tensor  # (c,)


def _tiles(logits: Tensor, targets: Tensor, wanted: Tensor) -> Iterator[_Tile]:
    """Cut the wanted rows of (N, T, V) logits into tiles: views of neighbours, copies of what lies scattered."""
    n, t = wanted.nonzero(as_tuple=True)
    ns, ts = n.tolist(), t.tolist()
    row_bytes = logits.shape[-1] * _accumulator(logits.dtype).itemsize
    step = max(1, TILE_BYTES // max(row_bytes, 1))
    a = 0
    while a < len(ns):
        b = min(a + step, len(ns))
        run = a + 1
        while run < b and ns[run] == ns[a] and ts[run] - ts[a] == run - a:
            run += 1
        rows: tuple[Tensor | int, Tensor | slice] = (n[a:b], t[a:b])
        if run == b or (run - a) * row_bytes >= VIEW_BYTES:
            b, rows = run, (ns[a], slice(ts[a], ts[run - 1] + 1))
        yield _Tile(rows, logits[rows], targets[rows])
        a = b


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scaled(x: Tensor, temperature: float) -> Tensor:
    """logits / temperature in the accumulator's dtype; x itself where nothing has to change."""
    x = x.to(_accumulator(x.dtype))
    return x if temperature == 1.0 else x / temperature


def _all_minus_inf(x: Tensor, result: Tensor) -> Tensor:  # (c,) bool
    """Rows whose every logit is -inf. Softmax makes them NaN, so only rows that came out NaN are read again."""
    suspect = result.isnan().nonzero(as_tuple=True)[0]
    found = torch.zeros_like(result, dtype=torch.bool)
    found[suspect] = x[suspect].eq(-torch.inf).all(-1)
    return found


def token_logps(
    logits: Tensor,  # (N, T, V)
    targets: Tensor,  # (N, T) int64
    temperature: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (N, T), (N, T) or (0,), (0,)
    """Log-probabilities of the targets, entropies where asked (both 0 in rows without loss), nothing to save."""
    dtype = _accumulator(logits.dtype)
    logps = torch.zeros(targets.shape, dtype=dtype, device=logits.device)
    entropies = torch.zeros(targets.shape if entropy else (0,), dtype=dtype, device=logits.device)
    buffer = None
    for rows, x, y in _tiles(logits, targets, targets != ignore_index):
        x = _scaled(x, temperature)
        if buffer is None or len(buffer) < len(x):
            buffer = x.new_empty(x.shape)
        log_p = torch.log_softmax(x, -1, out=buffer[: len(x)])
        inside = (y >= 0) & (y < x.shape[-1])
        logp = log_p.gather(1, y.where(inside, 0)[:, None])[:, 0]
        dead = _all_minus_inf(x, logp)
        logps[rows] = logp.masked_fill(dead, -torch.inf).masked_fill(~inside, torch.nan)
        if entropy:
            h = -(log_p.exp() * log_p.clamp(min=torch.finfo(dtype).min)).sum(-1)  # 0 log 0 is 0
            entropies[rows] = h.masked_fill(dead, 0.0)
    return logps, entropies, logps.new_empty(0)


def new_gradient(logits: Tensor) -> Tensor:
    """Zeros. Large ones are fresh pages of the system, huge where it has them: half of all time was their faults."""
    size = logits.numel() * logits.element_size()
    if logits.device.type != "cpu" or size < LAZY_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=logits.dtype).view(logits.shape)


def token_logps_backward(
    grad: Tensor,  # (N, T, V): zeros to fill, or the logits themselves to overwrite
    grad_logps: Tensor,  # (N, T)
    grad_entropies: Tensor | None,  # (N, T)
    logits: Tensor,  # (N, T, V)
    targets: Tensor,  # (N, T) int64
    entropies: Tensor,  # (N, T), or (0,)
    saved: Tensor,  # (0,): softmax is cheaper done again than remembered
    temperature: float,
    ignore_index: int,
) -> None:
    """Fill grad, row by row, with (g (onehot(target) - p) - h p (log p + H)) / temperature.

    g and h are the gradients of the row's log-probability and of its entropy H.
    """
    scored = targets != ignore_index
    wanted = scored & (grad_logps != 0) if grad_entropies is None else scored
    # softmax straight into the gradient needs no tile of its own, but must not overwrite logits still to be read
    straight = grad is not logits and grad_entropies is None and grad.dtype == _accumulator(grad.dtype)
    for rows, x, y in _tiles(logits, targets, wanted):
        z = _scaled(x, temperature)
        g = (grad_logps[rows] / temperature).to(z.dtype)[:, None]
        in_place = straight and isinstance(rows[1], slice)
        p = torch.softmax(z, -1, out=grad[rows]) if in_place else torch.softmax(z, -1)
        dead = _all_minus_inf(z, p[:, 0])
        if dead.any():
            p[dead] = 0.0
        if grad_entropies is None:
            dz = p.mul_(-g)
        else:
            h = (grad_entropies[rows] / temperature).to(z.dtype)[:, None]
            log_p = torch.where(p > 0, torch.log_softmax(z, -1), 0.0)
            dz = p.mul_(-(g + h * (log_p + entropies[rows][:, None])))
        inside = (y >= 0) & (y < x.shape[-1])
        dz.scatter_add_(1, y.where(inside, 0)[:, None], g * inside[:, None])
        if not in_place:
            grad[rows] = dz.to(grad.dtype)
    if grad is logits:
        grad[~wanted] = 0.0


def group_loss(
    logps: Tensor,  # (n,)
    targets: Tensor,  # (n,) int64
    ref_logps: Tensor,  # (N,) sums, or (n,) per token where per_token_ref
    rewards: Tensor | None,  # (N,)
    seq_offsets: Tensor,  # (N+1,)
    group_offsets: Tensor,  # (G+1,)
    per_token_ref: bool,
    objective: str,
    beta_pi: float,
    beta_r: float,
    log_targets: tuple[float, float],
    ignore_index: int,
) -> tuple[Tensor, ...]:
    """Loss (G,), dL/dS (N,), log-probs (N,), log-ratios (N,), p (N,), q (N,), tokens (N,); computed in fp64."""
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
    log_p = objectives.policy_log_probs(groups.to_matrix(ratios, group_offsets, width), beta_pi)
    if rewards is None:
        log_q = objectives.preference_log_target(mask, *log_targets)
    else:
        log_q = objectives.reward_log_target(groups.to_matrix(rewards.double(), group_offsets, width), beta_r)
    loss, dz = objectives.OBJECTIVES[objective](log_p, log_q)
    results = loss, beta_pi * dz[mask], policy, ratios, log_p.exp()[mask], log_q.exp()[mask], tokens
    return tuple(result.to(logps.dtype) for result in results)
