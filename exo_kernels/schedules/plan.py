"""Choice of the schedule and the chunks of a call, from shapes, needed gradients and the memory budget.

Units: bytes, rows, floating-point operations. `explain` uses the functions that make the choice.
"""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from exo_kernels import validation
from exo_kernels.numerics import accumulator
from exo_kernels.schedules import matmul

SCHEDULES = ("auto", "deferred", "group", "store", "recompute")
NO_GRAD = "score"  # no schedule, because nothing needs a gradient
MOST_ROWS = 8192  # of a chunk: with more, the matmuls gain nothing
MOST_BYTES = 2**63 - 1  # what int64 holds
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Needs(NamedTuple):
    """Which gradients a call needs, and what it computes."""

    hidden: bool
    weight: bool
    bias: bool
    entropy: bool  # gradients through the entropies
    reduced_loss: bool  # a fused loss with a reduction, which knows every coefficient before it returns

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


class Sizes(NamedTuple):
    """Sizes that decide the bytes and the operations of a call."""

    rows: int  # of the input, with and without loss
    hidden: int  # D
    vocab: int  # V of the largest part of the head on any rank
    dtype: torch.dtype
    device: torch.device
    stacked: bool  # the same matmuls take the reference's rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a chunk's row: logits, gradients if they have another dtype, and rows of width D."""
        acc, n = accumulator(self.dtype), 2 if self.stacked else 1
        wide = n * acc.itemsize
        if matmul.gradient_dtype(self.dtype, self.device) != acc:
            wide += self.dtype.itemsize
        thin = (n + 1) * acc.itemsize + self.dtype.itemsize
        return matmul.padded(self.vocab) * wide + self.hidden * thin

    @property
    def stored_row_bytes(self) -> int:
        return matmul.padded(self.vocab) * matmul.gradient_dtype(self.dtype, self.device).itemsize

    @property
    def fixed_bytes(self) -> int:
        """Bytes beside a chunk of any length: a block of a 16-bit weight in fp32, if it must be converted."""
        converted = self.dtype.itemsize < 4 and not matmul.multiplies_16_bits(self.device)
        return min(matmul.BLOCK_BYTES, self.vocab * self.hidden * 4) if converted else 0

    def chunk_rows(self, budget: int) -> int:
        return min(MOST_ROWS, max(1, (budget - self.fixed_bytes) // self.row_bytes))


class Plan(NamedTuple):
    """The plan of a call. Operations and bytes are those of forward and backward together."""

    schedule: str
    reason: str
    rows: int  # of the input
    rows_with_loss: int
    chunk_rows: int  # most rows of a chunk
    chunks: int  # forward
    oversized_groups: int  # under `group`: larger than a chunk, so each is recomputed alone
    flops: int
    bound_flops: int  # lower bound of any method
    extra_bytes: int  # beyond inputs, returned gradients and one fp32 weight gradient

    def __str__(self) -> str:
        n = self.oversized_groups
        over = f"; groups larger than a chunk, which recompute: {n}" if n else ""
        return (
            f"{self.schedule}: {self.reason}. {self.rows_with_loss} of {self.rows} rows carry loss,"
            f" chunks: {self.chunks} of at most {self.chunk_rows} rows{over}; {self.flops / 1e9:.4g} GFLOP"
            f" ({self.flops / max(self.bound_flops, 1):.2f} x the bound), {self.extra_bytes / 2**20:.4g} MiB extra"
        )


def parse_budget(value: int | str) -> int:
    """Return bytes from an integer or from text: 2**29, "512MiB", "4 GiB", "0.5GB"."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{0,18})?)\s*([a-zA-Z]*)\s*", value, re.ASCII)
        if match and match[2].upper() in UNITS and float(match[1]) > 0:
            return min(MOST_BYTES, max(1, int(float(match[1]) * UNITS[match[2].upper()])))
    elif isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_BYTES:
        return value
    validation.fail("memory_budget", "bytes > 0 as an integer or as text like '512MiB'", validation.describe(value))


def choose(schedule: str, needs: Needs, sizes: Sizes, budget: int) -> tuple[str, str]:
    """Return the schedule and the reason. An explicit one is taken or refused."""
    validation.choice("schedule", schedule, SCHEDULES)
    if not needs.any:
        return NO_GRAD, "nothing needs gradients"
    if schedule != "auto":
        _check_schedule(schedule, needs)
        return schedule, "requested"
    if needs.entropy:
        return "recompute", "entropies with gradients need a second look at the logits"
    if not needs.weight and not needs.bias:
        return "deferred", "the head is frozen"
    if needs.reduced_loss:
        return "group", "the head is trained and the loss is called as one"
    if sizes.rows * sizes.stored_row_bytes + sizes.row_bytes <= budget:
        return "store", "one copy of the logits' gradients fits the budget"
    return "recompute", "a copy of the logits' gradients does not fit the budget"


def _check_schedule(schedule: str, needs: Needs) -> None:
    if needs.entropy and schedule != "recompute":
        validation.fail("schedule", "'recompute' or 'auto' for entropies with gradients", repr(schedule))
    if schedule == "deferred" and not needs.hidden:
        expected = "another than 'deferred', whose point is the gradient of the hidden states"
        validation.fail("schedule", expected, repr(schedule))
    if schedule == "group" and not needs.reduced_loss:
        expected = "another than 'group', which needs a fused loss with reduction 'mean' or 'sum'"
        validation.fail("schedule", expected, repr(schedule))


def even(n: int, most: int) -> list[slice]:
    """Cut n rows into the fewest chunks of at most `most` rows, of nearly equal size."""
    count = -(-n // most)
    return [slice(i * n // count, (i + 1) * n // count) for i in range(count)]


class GroupChunk(NamedTuple):
    """Groups that the schedule `group` takes together."""

    groups: slice
    parts: list[slice]  # of the rows with loss: one chunk, or several for a group larger than a chunk


def group_chunks(
    counts: Sequence[int],  # (G,) rows with loss of every group
    most: int,
) -> list[GroupChunk]:
    """Fill chunks of at most `most` rows evenly with complete groups; a larger group is alone."""
    fitting = sum(c for c in counts if c <= most)
    target = max(1, -(-fitting // max(1, -(-fitting // most))))
    bounds, n = [0], 0
    for g, count in enumerate(counts):
        # close a chunk when it is as full as the others, or when the next group does not fit
        if g > bounds[-1] and (n >= target or n + count > most):
            bounds.append(g)
            n = 0
        n += count
    chunks, first = [], 0
    for a, b in itertools.pairwise([*bounds, len(counts)]):
        n = sum(counts[a:b])
        chunks.append(GroupChunk(slice(a, b), [slice(first + p.start, first + p.stop) for p in even(n, most)]))
        first += n
    return chunks


def explain(
    schedule: str,
    reason: str,
    needs: Needs,
    sizes: Sizes,
    budget: int,
    counts: Sequence[int],  # (G,) rows with loss of every group
) -> Plan:
    """Return the plan of a call, given the choice."""
    n, most = sum(counts), sizes.chunk_rows(budget)
    over = [c for c in counts if c > most] if schedule == "group" else []
    if schedule == "group":
        chunks = [part.stop - part.start for unit in group_chunks(counts, most) for part in unit.parts]
    else:
        chunks = [s.stop - s.start for s in even(n, most)]
    unit = 2 * n * sizes.hidden * sizes.vocab  # one matmul
    head_needed = needs.weight or needs.bias
    products = 1 + needs.hidden + needs.weight + sizes.stacked
    recompute = 2 * sum(over) * sizes.hidden * sizes.vocab
    if schedule == "recompute" or (schedule == "deferred" and head_needed):
        recompute = unit
    extra = max(chunks, default=0) * sizes.row_bytes + sizes.fixed_bytes
    if schedule == "store":
        extra += n * sizes.stored_row_bytes
    if schedule == "deferred":  # the saved tensor lives until the gradient is made from it
        extra = max(extra, sizes.rows * sizes.hidden * sizes.dtype.itemsize)
    counted = (sizes.rows, n, most, len(chunks), len(over))
    return Plan(schedule, reason, *counted, products * unit + recompute, products * unit, extra if n else 0)
