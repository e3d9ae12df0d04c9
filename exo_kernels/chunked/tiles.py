"""Tiles of the vocabulary, shared by both passes: their size, their softmax, and memory for large results."""

import contextlib
import mmap
from typing import NamedTuple

import torch
from torch import Tensor

from exo_kernels.numerics import accumulator

# Measured on 1 MiB of second-level and 32 MiB of third-level cache: below 2 MiB the calls cost, above 8 the misses.
TILE_BYTES = 4 * 2**20
LAZY_BYTES = 2**25  # above, the C library maps and unmaps every block anyway


def tile_rows(vocab: int, dtype: torch.dtype) -> int:
    """Rows of accumulators that make a tile."""
    return max(1, TILE_BYTES // max(vocab * accumulator(dtype).itemsize, 1))


class Softmax(NamedTuple):
    """Rows of probabilities, and log p = (z - top) - log_total. A row of nothing but -inf has p = 0 and both 0."""

    p: Tensor  # (c, V)
    top: Tensor  # (c,)
    log_total: Tensor  # (c,)
    dead: Tensor  # (c,) bool, rows of nothing but -inf


def softmax(
    z: Tensor,  # (c, V)
    out: Tensor | None = None,  # like z; may be z
) -> Softmax:
    """Softmax of every row, exact where torch's alone is not.

    torch adds a row up one element after another, so a tail below a peak is lost: 1.2e-4 nat at V = 151936. `sum` adds
    pairwise and tells by how much the probabilities miss 1.
    """
    top = z.amax(-1)
    p = torch.softmax(z, -1) if out is None else torch.softmax(z, -1, out=out)
    total = _sum(p)
    log_total = total.log() - p.amax(-1).log()  # the largest is 1 / torch's total
    off = (total - 1).abs() > 4 * torch.finfo(z.dtype).eps
    if off.any():  # a matter of its own for every row: how rows are cut into tiles changes no bit
        p.div_(torch.where(off, total, 1.0)[:, None])
    dead = top == -torch.inf
    if dead.any():
        p[dead] = 0.0
        top, log_total = top.masked_fill(dead, 0.0), log_total.masked_fill(dead, 0.0)
    return Softmax(p, top, log_total, dead)


def _sum(p: Tensor) -> Tensor:  # (c,)
    """Row by row. A row alone would be split over threads and added up in another order: it is made two."""
    return p.sum(-1) if len(p) != 1 else p.expand(2, -1).sum(-1)[:1]


def log_probs(z: Tensor, top: Tensor, log_total: Tensor) -> Tensor:
    """log p of every element, (c, V)."""
    return (z - top[:, None]).sub_(log_total[:, None])


def entropy(log_p: Tensor, p: Tensor) -> Tensor:  # (c,)
    """- sum p log p, 0 log 0 being 0."""
    return -(p * log_p.clamp(min=torch.finfo(p.dtype).min)).sum(-1)


def at_targets(
    values: Tensor,  # (c, V)
    targets: Tensor,  # (c,)
) -> tuple[Tensor, Tensor]:  # (c,), (c,) bool
    """Each row's value at its target, anything where the target is not in [0, V); and whether it is."""
    inside = (targets >= 0) & (targets < values.shape[-1])
    return values.gather(1, targets.where(inside, 0)[:, None])[:, 0], inside


def add_at_targets_(values: Tensor, targets: Tensor, amount: Tensor | float) -> None:
    """Add to each row's value at its target, where it has one."""
    inside = (targets >= 0) & (targets < values.shape[-1])
    values.scatter_add_(1, targets.where(inside, 0)[:, None], (inside * amount).to(values.dtype)[:, None])


def new_zeros(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. Large ones are fresh pages of the system, huge where it has them: half of all time was their faults."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or size < LAZY_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
