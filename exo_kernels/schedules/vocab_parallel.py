"""A head whose rows (the vocabulary) are sharded over several ranks.

Every rank has the same hidden states and labels, and the rows [start, start + V_local) of the weight, in the order of
ranks. Scoring a chunk costs two all-reduces of a few numbers per row (maximum; sum of exponentials and target), a call
one more of the hidden states' gradient. All ranks must choose the same chunks, so the choice depends only on the labels
and on the largest part.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from exo_kernels import validation

_GROUPS: dict[str, dist.ProcessGroup] = {}  # operators take names


class Shard(NamedTuple):
    """This rank's part of the vocabulary."""

    start: int
    vocab: int  # of all ranks together
    largest: int  # part of any rank, from which all ranks plan the same chunks
    group: str

    @property
    def parallel(self) -> bool:
        return bool(self.group)


def unsharded(vocab: int) -> Shard:
    return Shard(0, vocab, vocab, "")


def join(weight: Tensor, process_group: dist.ProcessGroup) -> Shard:
    """Gather the sizes of all parts: one small collective and one synchronisation."""
    if not isinstance(process_group, dist.ProcessGroup):  # new_group returns an integer on ranks outside the group
        expected = "a torch.distributed.ProcessGroup that this process is in, or None"
        validation.fail("process_group", expected, validation.describe(process_group))
    if torch.compiler.is_compiling():  # the sizes decide the number of chunks, so no graph can hold this
        torch._dynamo.graph_break(msg="process_group: ranks gather the sizes of their parts first")
    sizes = torch.zeros(dist.get_world_size(process_group), 1, dtype=torch.long, device=weight.device)
    dist.all_gather(list(sizes), sizes.new_tensor([len(weight)]), group=process_group)
    parts, rank, name = sizes[:, 0].tolist(), dist.get_rank(process_group), process_group.group_name
    _GROUPS[name] = process_group
    return Shard(sum(parts[:rank]), sum(parts), max(parts), name)


def sum_(x: Tensor, shard: Shard) -> None:
    """Add up over the ranks, in place."""
    if shard.parallel:
        dist.all_reduce(x, group=_GROUPS[shard.group])


def combine(
    stats: Tensor,  # (3, M) of this rank's columns: target's logit, top logit (may be -inf), log sum above it
    rounding_error: Tensor,  # (M,) of the target's logit
    entropies: Tensor,  # (M,) of this rank's columns, or (0,)
    targets: Tensor,  # (M,) in the vocabulary of all ranks
    vocab: int,  # columns of this rank
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same over all columns. A row of -inf has top 0; a label outside the vocabulary stays NaN."""
    target, top, log_total = stats
    if not shard.parallel:
        return torch.stack([target, top.masked_fill(top == -torch.inf, 0.0), log_total]), rounding_error, entropies
    highest = top.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=_GROUPS[shard.group])
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    log_share = (top - highest) + log_total  # in this order a large common offset costs no digits
    share = log_share.exp()
    elsewhere = (targets < shard.start) | (targets >= shard.start + vocab)
    sums = torch.zeros(4 if entropies.numel() else 3, len(targets), dtype=stats.dtype, device=stats.device)
    sums[0] = share
    sums[1] = target.masked_fill(elsewhere, 0.0)
    sums[2] = rounding_error.masked_fill(elsewhere, 0.0)
    if entropies.numel():
        sums[3] = torch.where(share > 0, share * (entropies - log_share), 0.0)
    sum_(sums, shard)
    log_total = torch.where(sums[0] > 0, sums[0].log(), sums[0])
    inside = (targets >= 0) & (targets < shard.vocab)
    combined = torch.stack([sums[1].masked_fill(~inside, torch.nan), highest, log_total])
    if entropies.numel():
        entropies = torch.where(sums[0] == 0, 0.0, sums[3] / sums[0] + log_total)
    return combined, sums[2], entropies
