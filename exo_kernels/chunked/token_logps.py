"""Token pass and its backward pass on logits: a few rows at a time, in tiles that stay in cache.

Beyond the returned gradient it holds one or two tiles, never a second (n, V) buffer. Rows without loss are not read,
and not written either if the system provides zero pages.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from exo_kernels.chunked import tiles
from exo_kernels.numerics import accumulator

VIEW_BYTES = 2**18  # adjacent rows of this size are a separate tile: a view costs a call, a copy its bytes


class _Tile(NamedTuple):
    rows: tuple[Tensor | int, Tensor | slice]  # index into (N, T); a slice if the rows are adjacent
    logits: Tensor  # (c, V), a view if possible
    targets: Tensor  # (c,)


def _tiles(logits: Tensor, targets: Tensor, mask: Tensor) -> Iterator[_Tile]:
    """Cut the masked rows of (N, T, V) logits into tiles: views of adjacent rows, copies of scattered ones."""
    n, t = mask.nonzero(as_tuple=True)
    ns, ts = n.tolist(), t.tolist()
    row_bytes = logits.shape[-1] * accumulator(logits.dtype).itemsize
    step = tiles.tile_rows(logits.shape[-1], logits.dtype)
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


def _scaled(x: Tensor, temperature: float) -> Tensor:
    """Return logits / temperature in the accumulator's dtype; x itself if nothing changes."""
    x = x.to(accumulator(x.dtype))
    return x if temperature == 1.0 else x / temperature


def token_logps(
    logits: Tensor,  # (N, T, V)
    targets: Tensor,  # (N, T) int64
    temperature: float,
    ignore_index: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (N, T), (N, T) or (0,), (0,)
    """Return log-probs of the targets, entropies if requested (both 0 in rows without loss), nothing to save."""
    dtype = accumulator(logits.dtype)
    logps = torch.zeros(targets.shape, dtype=dtype, device=logits.device)
    entropies = torch.zeros(targets.shape if entropy else (0,), dtype=dtype, device=logits.device)
    buffer = None
    for rows, x, y in _tiles(logits, targets, targets != ignore_index):
        z = _scaled(x, temperature)
        if buffer is None or len(buffer) < len(z):
            buffer = z.new_empty(z.shape)
        s = tiles.softmax(z, out=buffer[: len(z)])
        target, inside = tiles.at_targets(z, y)
        logps[rows] = (target - s.top - s.log_total).masked_fill(~inside, torch.nan)
        if entropy:
            entropies[rows] = tiles.entropy(tiles.log_probs(z, s.top, s.log_total), s.p)
    return logps, entropies, logps.new_empty(0)


def new_gradient(logits: Tensor) -> Tensor:
    """Return zeros: rows without loss are not written."""
    return tiles.new_zeros(logits.shape, logits.dtype, logits.device)


def token_logps_backward(
    grad: Tensor,  # (N, T, V): zeros to fill, or the logits themselves to overwrite
    grad_logps: Tensor,  # (N, T)
    grad_entropies: Tensor | None,  # (N, T)
    logits: Tensor,  # (N, T, V)
    targets: Tensor,  # (N, T) int64
    entropies: Tensor,  # (N, T), or (0,)
    saved: Tensor,  # (0,): recomputing the softmax is cheaper than saving it
    temperature: float,
    ignore_index: int,
) -> None:
    """Fill grad, row by row, with (g (onehot(target) - p) - h p (log p + H)) / temperature.

    g and h are the gradients of the row's log-probability and of its entropy H.
    """
    scored = targets != ignore_index
    mask = scored & (grad_logps != 0) if grad_entropies is None else scored
    # softmax straight into the gradient needs no other tile, but must not overwrite logits still to be read
    straight = grad is not logits and grad_entropies is None and grad.dtype == accumulator(grad.dtype)
    for rows, x, y in _tiles(logits, targets, mask):
        z = _scaled(x, temperature)
        g = (grad_logps[rows] / temperature).to(z.dtype)
        in_place = straight and isinstance(rows[1], slice)
        s = tiles.softmax(z, out=grad[rows] if in_place else None)
        if grad_entropies is None:
            dz = s.p.mul_(-g[:, None])
        else:
            h = (grad_entropies[rows] / temperature).to(z.dtype)[:, None]
            log_p = torch.where(s.p > 0, tiles.log_probs(z, s.top, s.log_total), 0.0)
            dz = s.p.mul_(-(g[:, None] + h * (log_p + entropies[rows][:, None])))
        tiles.add_at_targets_(dz, y, g)
        if not in_place:
            grad[rows] = dz.to(grad.dtype)
    if grad is logits:
        grad[~mask] = 0.0
