"""Which schedule a call takes, why, and in which chunks; decided from shapes, from what needs gradients and the budget.

Units: bytes, rows, floating-point operations. Left out: the work itself (schedules.py). `explain` prints what is
decided here, with the same functions that decide it.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from exo_kernels import validation
from exo_kernels.numerics import accumulator
from exo_kernels.schedules import matmul

SCHEDULES = ("auto", "deferred", "group", "store", "recompute")
NO_GRAD = "score"  # no schedule at all: nothing needs a gradient
MOST_ROWS = 8192  # of a chunk: beyond, the matmuls gain nothing
MOST_BYTES = 2**63 - 1  # what int64 holds
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Needs(NamedTuple):
    """Which gradients a call needs, and of which function."""

    hidden: bool
    weight: bool
    bias: bool
    entropy: bool  # gradients through the entropies
    whole_loss: bool  # a reduced loss called as one, which knows every coefficient before it returns

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


class Sizes(NamedTuple):
    """The sizes that determine the bytes and the operations of a call."""

    rows: int  # of the input, with and without loss
    hidden: int  # D
    vocab: int  # V of this rank's part of the head, the largest of all ranks
    dtype: torch.dtype
    device: torch.device
    stacked: bool  # the reference's rows beside the policy's

    @property
    def row_bytes(self) -> int:
        """Of a chunk: its logits, its gradients where they cannot take their place, and the thin rows beside them."""
        acc = accumulator(self.dtype)
        sides = 2 if self.stacked else 1
        wide = matmul.padded(self.vocab) * acc.itemsize * sides
        if matmul.gradient_dtype(self.dtype, self.device) != acc:
            wide += matmul.padded(self.vocab) * self.dtype.itemsize
        thin = self.hidden * ((sides + 1) * acc.itemsize + self.dtype.itemsize)
        return wide + thin

    @property
    def stored_row_bytes(self) -> int:
        return matmul.padded(self.vocab) * matmul.gradient_dtype(self.dtype, self.device).itemsize

    @property
    def fixed_bytes(self) -> int:
        """Held beside a chunk of any length: a block of a 16-bit weight in fp32, where it must be converted."""
        converted = self.dtype.itemsize < 4 and not matmul.multiplies_16_bits(self.device)
        return min(matmul.BLOCK_BYTES, self.vocab * self.hidden * 4) if converted else 0

    def chunk_rows(self, budget: int) -> int:
        return min(MOST_ROWS, max(1, (budget - self.fixed_bytes) // self.row_bytes))


class Plan(NamedTuple):
    """The schedule of a call. Operations and bytes are those of forward and backward together."""

    schedule: str
    reason: str
    rows: int  # of the input
    rows_with_loss: int
    chunk_rows: int  # most rows of a chunk
    chunks: int  # forward
    oversized_groups: int  # of `group`: larger than a chunk, so they take `recompute`, each alone
    flops: int
    bound_flops: int  # what no method can go below
    extra_bytes: int  # beyond inputs, returned gradients and one fp32 weight gradient

    def __str__(self) -> str:
        over = (
            f"; groups larger than a chunk, which recompute: {self.oversized_groups}" if self.oversized_groups else ""
        )
        return (
            f"{self.schedule}: {self.reason}. {self.rows_with_loss} of {self.rows} rows carry loss,"
            f" chunks: {self.chunks} of at most {self.chunk_rows} rows{over}; {self.flops / 1e9:.4g} GFLOP"
            f" ({self.flops / max(self.bound_flops, 1):.2f} x the bound), {self.extra_bytes / 2**20:.4g} MiB extra"
        )


def parse_budget(value: int | str) -> int:
    """Bytes, as an integer or as text: 2**29, "512MiB", "4 GiB", "0.5GB"."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{0,18})?)\s*([a-zA-Z]*)\s*", value, re.ASCII)
        if found and found[2].upper() in UNITS and float(found[1]) > 0:
            return min(MOST_BYTES, max(1, int(float(found[1]) * UNITS[found[2].upper()])))
    elif isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_BYTES:
        return value
    validation.fail("memory_budget", "bytes > 0 as an integer or as text like '512MiB'", validation.describe(value))


def choose(schedule: str, needs: Needs, sizes: Sizes, budget: int) -> tuple[str, str]:
    """The schedule and the reason. An explicit one is taken or refused."""
    validation.choice("schedule", schedule, SCHEDULES)
    if not needs.any:
        return NO_GRAD, "nothing needs gradients"
    if schedule != "auto":
        _refuse(schedule, needs)
        return schedule, "asked for"
    if needs.entropy:
        return "recompute", "entropies with gradients need a second look at the logits"
    if not needs.weight and not needs.bias:
        return "deferred", "the head is frozen"
    if needs.whole_loss:
        return "group", "the head is trained and the loss is called as one"
    if sizes.rows * sizes.stored_row_bytes + sizes.row_bytes <= budget:
        return "store", "one copy of the logits' gradients fits the budget"
    return "recompute", "a copy of the logits' gradients does not fit the budget"


def _refuse(schedule: str, needs: Needs) -> None:
    if needs.entropy and schedule != "recompute":
        validation.fail("schedule", "'recompute' or 'auto' for entropies with gradients", repr(schedule))
    if schedule == "deferred" and not needs.hidden:
        expected = "another than 'deferred', whose point is the gradient of the hidden states"
        validation.fail("schedule", expected, repr(schedule))
    if schedule == "group" and not needs.whole_loss:
        expected = "another than 'group', which needs a fused loss with reduction 'mean' or 'sum'"
        validation.fail("schedule", expected, repr(schedule))


def even(n: int, most: int) -> Iterator[slice]:
    """Cut n rows into the fewest chunks of at most `most` rows, of nearly one size."""
    count = -(-n // most)
    for i in range(count):
        yield slice(i * n // count, (i + 1) * n // count)


class GroupChunk(NamedTuple):
    """Whole groups that the schedule `group` takes at a time."""

    groups: slice
    parts: list[slice]  # of the rows with loss: one chunk, or several for a group that is too large for one


def group_chunks(
    counts: Sequence[int],  # (G,) rows with loss of every group
    most: int,
) -> list[GroupChunk]:
    """Fill chunks of at most `most` rows evenly with whole groups; a larger group is a unit by itself."""
    fitting = sum(c for c in counts if c <= most)
    target = max(1, -(-fitting // max(1, -(-fitting // most))))
    bounds, held = [0], 0
    for g, count in enumerate(counts):
        # a unit is closed when it is as full as the others, or when the next group would not fit
        if g > bounds[-1] and (held >= target or held + count > most):
            bounds.append(g)
            held = 0
        held += count
    found, first = [], 0
    for a, b in zip(bounds, [*bounds[1:], len(counts)], strict=True):
        n = sum(counts[a:b])
        found.append(GroupChunk(slice(a, b), [slice(first + p.start, first + p.stop) for p in even(n, most)]))
        first += n
    return found


def explain(
    schedule: str,
    reason: str,
    needs: Needs,
    sizes: Sizes,
    budget: int,
    counts: Sequence[int],  # (G,) rows with loss of every group
) -> Plan:
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
    if schedule == "deferred":  # kept until the gradient has been made of it
        extra = max(extra, sizes.rows * sizes.hidden * sizes.dtype.itemsize)
    return Plan(
        schedule, reason, sizes.rows, n, most, len(chunks), len(over),
        products * unit + recompute, products * unit, extra if n else 0,
    )  # fmt: skip
