"""Tiles of rows that stay in cache: their size, their softmax, and memory for large results."""

import contextlib
import mmap
from typing import NamedTuple

import torch
from torch import Tensor

from exo_kernels.numerics import accumulator

# Measured on 1 MiB of L2 and 32 MiB of L3 cache: below 2 MiB call overhead dominates, above 8 cache misses.
TILE_BYTES = 4 * 2**20
LAZY_BYTES = 2**25  # above this size the C library maps and unmaps every block anyway


def tile_rows(vocab: int, dtype: torch.dtype) -> int:
    """Return the number of rows of a tile."""
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
    """Compute the softmax of every row, more exactly than torch.

    torch adds up a row one element after another, so a tail below a peak is lost: 1.2e-4 nat at V = 151936. `sum` adds
    pairwise and shows by how much the probabilities miss 1.
    """
    top = z.amax(-1)
    p = torch.softmax(z, -1) if out is None else torch.softmax(z, -1, out=out)
    # torch would split a single row over threads and sum it in another order: it is summed as two
    total = p.sum(-1) if len(p) != 1 else p.expand(2, -1).sum(-1)[:1]  # (c,)
    log_total = total.log() - p.amax(-1).log()  # the largest is 1 / torch's total
    off = (total - 1).abs() > 4 * torch.finfo(z.dtype).eps
    if off.any():  # decided per row, so that the cut into tiles changes no bit
        p.div_(torch.where(off, total, 1.0)[:, None])
    dead = top == -torch.inf
    if dead.any():
        p[dead] = 0.0
        top, log_total = top.masked_fill(dead, 0.0), log_total.masked_fill(dead, 0.0)
    return Softmax(p, top, log_total, dead)


def log_probs(z: Tensor, top: Tensor, log_total: Tensor) -> Tensor:
    """Return log p of every element, (c, V)."""
    return (z - top[:, None]).sub_(log_total[:, None])


def entropy(log_p: Tensor, p: Tensor) -> Tensor:  # (c,)
    """Return - sum p log p, with 0 log 0 = 0."""
    return -(p * log_p.clamp(min=torch.finfo(p.dtype).min)).sum(-1)


def at_targets(
    values: Tensor,  # (c, V)
    targets: Tensor,  # (c,)
) -> tuple[Tensor, Tensor]:  # (c,), (c,) bool
    """Return each row's value at its target (arbitrary if the target is not in [0, V)), and if it is in [0, V)."""
    inside = (targets >= 0) & (targets < values.shape[-1])
    return values.gather(1, targets.where(inside, 0)[:, None])[:, 0], inside


def add_at_targets_(values: Tensor, targets: Tensor, amount: Tensor | float) -> None:
    """Add to each row's value at its target, if it has one."""
    inside = (targets >= 0) & (targets < values.shape[-1])
    values.scatter_add_(1, targets.where(inside, 0)[:, None], (inside * amount).to(values.dtype)[:, None])


def new_zeros(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros. Large buffers are mmapped with huge pages; page faults were half of the time."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or size < LAZY_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
