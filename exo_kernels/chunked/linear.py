"""Operations between two matmuls on a chunk of rows by the vocabulary: tile by tile, in place, in cache.

A chunk comes in as a = h W^T. Its logits are z = outer * cap(a + bias), cap(x) = tanh(inner x) or x. Out goes the
gradient of the rows' negative log-probs, (p - onehot) cap'(a + bias): what is still missing, a coefficient a row, is
cheaper on the thin side of the matmul that follows. Left out: the matmuls, the schedules (schedules.py).
"""

import torch
from torch import Tensor

from exo_kernels.chunked import tiles
from exo_kernels.numerics import LogitTransform


def _logits_(x: Tensor, bias: Tensor | None, curve: LogitTransform) -> Tensor | None:
    """Turn a tile of a into logits, in place; returns cap' where that is not 1."""
    slope = None
    if bias is not None:
        x.add_(bias[: x.shape[1]])
    if curve.capped:
        x.mul_(curve.inner).tanh_()
        slope = 1 - x * x
    if curve.outer != 1.0:
        x.mul_(curve.outer)
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


def new_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised. In small pages, which a matmul touches while they are in cache: huge ones cost 8% of the call."""
    return torch.empty(shape, dtype=dtype, device=device)


def chunk_logps(
    a: Tensor,  # (M, V) accumulators
    bias: Tensor | None,  # (V,), may be padded
    targets: Tensor,  # (M,) int64
    curve: LogitTransform,
    entropy: bool,
) -> tuple[Tensor, Tensor]:  # (3, M), (M,) or (0,)
    """Of every row the logit of its target (NaN where that is none), the top logit, log sum exp above it; entropy.

    A row of nothing but -inf has the top -inf, and 0 above it; chunk_gradient wants 0 for both.
    """
    stats, entropies = _allocate(a, entropy)
    step = tiles.tile_rows(a.shape[1], a.dtype)
    for i in range(0, len(a), step):
        rows = slice(i, i + step)
        tile = a[rows].clone()
        _logits_(tile, bias, curve)
        _score(tile, targets[rows], entropy, stats[:, rows], entropies[rows])
    return stats, entropies


def chunk_logps_and_gradient(
    out: Tensor,  # (M, V): a itself
    a: Tensor,  # (M, V) accumulators
    bias: Tensor | None,
    targets: Tensor,  # (M,) int64
    curve: LogitTransform,
) -> Tensor:  # (3, M)
    """The stats of `chunk_logps`, and in `out` the gradient of the negative log-probs, up to a factor a row."""
    stats, entropies = _allocate(a, False)
    step = tiles.tile_rows(a.shape[1], a.dtype)
    for i in range(0, len(a), step):
        rows = slice(i, i + step)
        slope = _logits_(a[rows], bias, curve)
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
    curve: LogitTransform,
    stats: Tensor,  # (3, M)
    entropies: Tensor | None,  # (M,)
    g: Tensor | None,  # (M,)
    h: Tensor | None,  # (M,)
) -> None:
    """The same gradient from stats that are known; with g and h, that of - g log p(target) - h H."""
    step = tiles.tile_rows(a.shape[1], a.dtype)
    for i in range(0, len(a), step):
        rows = slice(i, i + step)
        z = a[rows]
        slope = _logits_(z, bias, curve)
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
    """The cap's derivative; and zeros for rows without a log-prob, which their coefficients make NaN or do not."""
    if slope is not None:
        d.mul_(slope)
    nothing = stats.sum(0).isnan()
    if nothing.any():
        d[nothing] = 0.0
    if out.data_ptr() != d.data_ptr():
        out.copy_(d)
