"""Layouts as offsets: every layout of rows, sequences and groups becomes two offset vectors.

`seq_offsets` (N+1,) over rows and `group_offsets` (G+1,) over sequences, both int64 on the device of the data, describe
padded and packed rows, uniform and ragged groups. Values are not checked here.
"""

import torch
from torch import Tensor


def align_targets(
    labels: Tensor,  # (N, T) or (n,)
    shift: bool,
    ignore_index: int,
) -> Tensor:  # like labels, int64
    """Return each row's target: labels[:, t+1] if shifted (the last column has none), labels[:, t] otherwise."""
    labels = labels.long()
    if not shift:
        return labels
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], ignore_index)], dim=1)  # T may be 0


def sequence_offsets(targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:  # (N+1,)
    """Return the first row of every sequence, counted over all rows of the input."""
    if cu_seqlens is not None:
        return cu_seqlens.long()
    n_sequences, length = targets.shape
    return torch.arange(n_sequences + 1, device=targets.device) * length


def group_offsets(group_size: int | Tensor, n_sequences: int, device: torch.device) -> Tensor:  # (G+1,)
    """Return the first sequence of every group."""
    if isinstance(group_size, int):
        return torch.arange(n_sequences // group_size + 1, device=device) * group_size
    return torch.nn.functional.pad(group_size.long().cumsum(0), (1, 0))


def within(
    offsets: Tensor,  # (M+1,)
    end: int,
) -> Tensor:  # (M+1,)
    """Clamp unvalidated offsets so that no read is out of bounds."""
    return offsets.clamp(0, end).cummax(0).values


def spread(
    values: Tensor,  # (M,) one value a segment
    offsets: Tensor,  # (M+1,)
    n: int,
) -> Tensor:  # (n,)
    """Repeat each segment's value over its members. Deterministic; passing `n` avoids a synchronisation."""
    if not values.numel():
        return values.new_zeros(n)
    members = torch.arange(n, device=offsets.device) + offsets[0]
    segment = torch.searchsorted(offsets[1:].contiguous(), members, right=True)
    return values[segment.clamp(max=values.numel() - 1)]


def segment_sum(
    values: Tensor,  # (n,)
    offsets: Tensor,  # (M+1,)
) -> Tensor:  # (M,)
    """Sum each segment in a fixed order; differentiable."""
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0, unsafe=True)


def to_matrix(
    values: Tensor,  # (N,)
    offsets: Tensor,  # (G+1,)
    width: int,
) -> Tensor:  # (G, width), -inf past the end of a group
    """Lay out ragged groups as one row per group."""
    index = offsets[:-1, None] + torch.arange(width, device=values.device)
    matrix = values[index.clamp(max=max(values.numel() - 1, 0))]
    return matrix.masked_fill(index >= offsets[1:, None], -torch.inf)


def group_mask(offsets: Tensor, width: int) -> Tensor:  # (G, width) bool
    """Return True where a group has a k-th completion; `matrix[mask]` inverts `to_matrix`."""
    return torch.arange(width, device=offsets.device) < offsets.diff()[:, None]
