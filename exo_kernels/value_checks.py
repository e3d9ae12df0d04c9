"""Checks of values: labels in range, finite rewards and references, sizes that add up.

They run inside the operators, so that compiled code has them too: always on a CPU, and on a GPU only with
EXO_KERNELS_CHECK=1, because there they cost a synchronisation (validation.check_values).
"""

import itertools
import warnings

import torch
from torch import Tensor

from exo_kernels.validation import fail


def label_values(targets: Tensor, vocab: int, ignore_index: int) -> None:
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        expected = f"values in [0, {vocab}) or ignore_index {ignore_index}"
        fail("labels", expected, f"{int(targets[where])} for the row at {where}")


def offset_values(name: str, offsets: Tensor, end: int, minimum: int) -> None:
    """Check that offsets start at 0, end at `end`, and that no segment is shorter than `minimum`."""
    lengths = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != end or (lengths < minimum).any():
        if name == "group_size":
            fail(name, f"sizes >= {minimum} that sum to {end}", lengths.tolist())
        fail(name, f"0 = c_0 <= c_1 <= ... <= c_N = {end}", offsets.tolist())


def group_values(
    seq_offsets: Tensor,  # (N+1,)
    group_offsets: Tensor,  # (G+1,)
    rewards: Tensor | None,  # (N,)
    ref_logps: Tensor | None,
    targets: Tensor,
    ignore_index: int,
) -> None:
    """Check everything that a loss depends on beside the labels (the last three as in `reference_values`)."""
    if rewards is not None and not rewards.isfinite().all():
        where = int((~rewards.isfinite()).nonzero()[0])
        fail("rewards", "finite numbers", f"{float(rewards[where])} for sequence {where}")
    offset_values("cu_seqlens", seq_offsets, targets.numel(), 0)
    offset_values("group_size", group_offsets, seq_offsets.numel() - 1, 1)
    reference_values(ref_logps, targets, seq_offsets, group_offsets, ignore_index)


def reference_values(
    ref_logps: Tensor | None,  # (N,) sums, or (N, T) per token; None if they are computed in the same call
    targets: Tensor,  # one per row
    seq_offsets: Tensor,  # (N+1,)
    group_offsets: Tensor,  # (G+1,)
    ignore_index: int,
) -> None:
    """Check that reference log-probs are finite where they count, and warn about sequences without labels.

    A sequence without labels has a log-ratio of 0 for every model, so its group compares the other completions with
    nothing: most often a wrong mask. A group in which no sequence has labels has a gradient of 0; ranks use such groups
    to stay in step, so there is no warning.
    """
    scored = targets.flatten() != ignore_index
    per_token_ref = ref_logps is None or ref_logps.dim() == 2
    ref = scored.new_zeros(scored.shape, dtype=torch.float32) if ref_logps is None else ref_logps.flatten()
    used = ref.masked_fill(~scored, 0.0) if per_token_ref else ref
    if not used.isfinite().all():
        where, what = int((~used.isfinite()).nonzero()[0]), "row" if per_token_ref else "sequence"
        fail("ref_logps", "finite numbers", f"{float(used[where])} for {what} {where}")
    tokens = torch.nn.functional.pad(scored.cumsum(0), (1, 0))[seq_offsets].diff()
    if not tokens.numel() or tokens.min() > 0:
        return
    if not per_token_ref and (tokens == 0).logical_and(ref != 0).any():
        where = int((tokens == 0).logical_and(ref != 0).nonzero()[0])
        fail("ref_logps", "0 for a sequence without labels", f"{float(ref[where])} for sequence {where}")
    for first, last in itertools.pairwise(group_offsets.tolist()):
        empty = tokens[first:last] == 0
        if empty.any() and not empty.all():
            where = first + int(empty.nonzero()[0])
            warnings.warn(f"labels: sequence {where} has none, unlike others of its group", stacklevel=2)
            return
