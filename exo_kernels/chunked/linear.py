"""Scores and gradients of a chunk of rows between two matmuls: tile by tile, in place, in cache.

The input is a = h W^T. Its logits are z = outer * cap(a + bias), cap(x) = tanh(inner x) or x. The output is the
gradient of the rows' negative log-probs, (p - onehot) cap'(a + bias); the missing coefficient of each row is cheaper on
the thin side of the matmul that follows.
"""

import torch
from torch import Tensor

from exo_kernels.chunked import tiles
from exo_kernels.numerics import LogitTransform


def _logits_(x: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor | None:
    """Turn a tile of a into logits, in place; return cap' if it is not 1."""
    slope = None
    if bias is not None:
        x.add_(bias[: x.shape[1]])
    if transform.capped:
        x.mul_(transform.inner).tanh_()
        slope = 1 - x * x
    if transform.outer != 1.0:
        x.mul_(transform.outer)
    return slope


def _score(z: Tensor, targets: Tensor, entropy: bool, stats: Tensor, entropies: Tensor) -> tiles.Softmax:
    """Fill the tile's stats (3, c) and entropies (c,); softmax in place unless the entropy needs the logits again."""
    target, inside = tiles.at_targets(z, targets)
    s = tiles.softmax(z, out=None if entropy else z)
    stats[0] = target.masked_fill(~inside, torch.nan)
    stats[1] = s.top.masked_fill(s.dead, -torch.inf)
    stats[2] = s.log_total
    if entropy:
        entropies.copy_(tiles.entropy(tiles.log_probs(z, s.top, s.log_total), s.p))
    return s


def _allocate(a: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    return a.new_empty(3, len(a)), a.new_empty(len(a) if entropy else 0)


def chunk_logps(
    a: Tensor,  # (M, V) accumulators
    bias: Tensor | None,  # (V,), may be padded
    targets: Tensor,  # (M,) int64
    transform: LogitTransform,
    entropy: bool,
) -> tuple[Tensor, Tensor]:  # (3, M), (M,) or (0,)
    """Return every row's target logit (NaN without one), top logit and log sum above it; and the entropies.

    A row of nothing but -inf has the top -inf, and 0 above it; chunk_gradient expects 0 for both.
    """
    stats, entropies = _allocate(a, entropy)
    step = tiles.tile_rows(a.shape[1], a.dtype)
    for i in range(0, len(a), step):
        rows = slice(i, i + step)
        tile = a[rows].clone()
        _logits_(tile, bias, transform)
        _score(tile, targets[rows], entropy, stats[:, rows], entropies[rows])
    return stats, entropies


def chunk_logps_and_gradient(
    out: Tensor,  # (M, V): a itself
    a: Tensor,  # (M, V) accumulators
    bias: Tensor | None,
    targets: Tensor,  # (M,) int64
    transform: LogitTransform,
) -> Tensor:  # (3, M)
    """Return the stats of `chunk_logps`; write the gradient of the negative log-probs, up to a factor per row."""
    stats, entropies = _allocate(a, False)
    step = tiles.tile_rows(a.shape[1], a.dtype)
    for i in range(0, len(a), step):
        rows = slice(i, i + step)
        slope = _logits_(a[rows], bias, transform)
        p = _score(a[rows], targets[rows], False, stats[:, rows], entropies).p
        tiles.add_at_targets_(p, targets[rows], -1.0)
        stats[1, rows].masked_fill_(stats[1, rows] == -torch.inf, 0.0)
        _finish(out[rows], p, slope, stats[:, rows])
    return stats


def chunk_gradient(
    out: Tensor,  # (M, V): a itself
    a: Tensor,  # (M, V) accumulators
    bias: Tensor | None,
    targets: Tensor,  # (M,) int64
    transform: LogitTransform,
    stats: Tensor,  # (3, M)
    entropies: Tensor | None,  # (M,)
    g: Tensor | None,  # (M,)
    h: Tensor | None,  # (M,)
) -> None:
    """Write the same gradient, given the stats; with g and h, that of - g log p(target) - h H."""
    step = tiles.tile_rows(a.shape[1], a.dtype)
    for i in range(0, len(a), step):
        rows = slice(i, i + step)
        z = a[rows]
        slope = _logits_(z, bias, transform)
        top, log_total = stats[1, rows], stats[2, rows]
        if g is None or h is None or entropies is None:
            d = z.sub_(top[:, None]).exp_().mul_(log_total.neg().exp()[:, None])
            tiles.add_at_targets_(d, targets[rows], -1.0)
        else:
            log_p = tiles.log_probs(z, top, log_total)
            p = log_p.exp()
            log_p = torch.where(p > 0, log_p, 0.0)
            d = p.mul_(g[rows, None] + h[rows, None] * log_p.add_(entropies[rows, None]))
            tiles.add_at_targets_(d, targets[rows], -g[rows])
        _finish(out[rows], d, slope, stats[:, rows])


def _finish(out: Tensor, d: Tensor, slope: Tensor | None, stats: Tensor) -> None:
    """Multiply by the cap's derivative; write zeros for rows without a log-prob, whose coefficients decide on NaN."""
    if slope is not None:
        d.mul_(slope)
    nothing = stats.sum(0).isnan()
    if nothing.any():
        d[nothing] = 0.0
    if out.data_ptr() != d.data_ptr():
        out.copy_(d)
