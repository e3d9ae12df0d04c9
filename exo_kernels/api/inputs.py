"""Arguments of the functions on hidden states: checked once, then brought to the one form that the operators take.

Left out: what turns log-probs into a loss (../losses.py).
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from exo_kernels import dispatch, groups, validation, value_checks
from exo_kernels.schedules import plan, vocab_parallel
from exo_kernels.schedules.vocab_parallel import Shard


class Head(NamedTuple):
    """The arguments that all functions on hidden states share."""

    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    cu_seqlens: Tensor | None
    shift: bool | None
    ignore_index: int
    memory_budget: int | str
    schedule: str
    process_group: dist.ProcessGroup | None
    impl: str

    def curve(self) -> tuple[float, float | None, float]:
        softcap = None if self.softcap is None else float(self.softcap)
        return float(self.logit_scale), softcap, float(self.temperature)

    def reference_options(self) -> dict[str, Any]:
        names = ("bias", "logit_scale", "softcap", "temperature", "cu_seqlens", "shift", "ignore_index")
        return {name: getattr(self, name) for name in names}


class Inputs(NamedTuple):
    """Checked input in the one form the operators take; packed rows are one row of N = 1."""

    hidden: Tensor  # (N, T, D)
    weight: Tensor  # (V, D), same dtype
    bias: Tensor | None
    targets: Tensor  # (N, T) int64, aligned with the rows of hidden
    seq_offsets: Tensor  # (N+1,)
    ref_hidden: Tensor | None  # (N, T, D), to be scored by the same head
    shard: Shard
    budget: int
    impl: str

    def sizes(self) -> plan.Sizes:
        n, t, d = self.hidden.shape
        stacked = self.ref_hidden is not None
        return plan.Sizes(n * t, d, self.shard.largest, self.hidden.dtype, self.hidden.device, stacked)

    def needs(self, entropy: bool = False, whole_loss: bool = False) -> plan.Needs:
        hidden, weight, bias = (
            torch.is_grad_enabled() and x is not None and x.requires_grad for x in (self.hidden, self.weight, self.bias)
        )
        return plan.Needs(hidden, weight, bias, entropy and (hidden or weight or bias), whole_loss)


def prepare(
    hidden: Tensor, weight: Tensor, labels: Tensor, head: Head, *, sequences: bool, ref_hidden: Tensor | None = None,
    prefix: str = "",  # of the names in messages: "ref_" where these are the reference's
) -> Inputs:  # fmt: skip
    name, *names = (prefix + x for x in ("hidden", "weight", "bias"))
    validation.plain(name, hidden)
    shift = validation.rows(
        name, hidden, labels, head.cu_seqlens, head.shift, head.ignore_index, sequences=sequences, width="D"
    )
    validation.choice("impl", head.impl, dispatch.IMPLS)
    impl = dispatch.resolve(head.impl, hidden.device)
    group, bias = head.process_group, head.bias
    if impl == "reference":  # takes them as they are
        validation.plain(names[0], weight)
        validation.plain(names[1], bias)
        if group is not None:
            validation.fail("process_group", "None with impl='reference', which has the whole head", "a process group")
    weight, bias = validation.gathered(names[0], weight, group), validation.gathered(names[1], bias, group)
    validation.head(names[0], weight, names[1], bias, hidden)
    validation.positive("temperature", head.temperature)
    validation.positive("logit_scale", head.logit_scale)
    if head.softcap is not None:
        validation.positive("softcap", head.softcap)
    budget = plan.parse_budget(head.memory_budget)
    dtype = _matmul_dtype(hidden, weight)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    ref_hidden = None if ref_hidden is None else ref_hidden.detach().to(dtype)
    shard = vocab_parallel.whole(len(weight)) if group is None else vocab_parallel.join(weight, group)
    targets = groups.align_targets(labels, shift, head.ignore_index)
    if hidden.dim() == 2:
        hidden, targets = hidden[None], targets[None]
        ref_hidden = None if ref_hidden is None else ref_hidden[None]
    offsets = groups.sequence_offsets(targets, head.cu_seqlens)
    if validation.check_values(hidden.device) and not torch.compiler.is_compiling():
        if head.cu_seqlens is not None:
            value_checks.offset_values("cu_seqlens", offsets, targets.numel(), 0)
        if impl == "reference":  # the operators check for the others
            value_checks.label_values(targets, shard.vocab, head.ignore_index)
    return Inputs(hidden, weight, bias, targets, offsets, ref_hidden, shard, budget, impl)


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's, where it is on, as for any linear layer; otherwise the wider of the two."""
    dtype, device = torch.promote_types(hidden.dtype, weight.dtype), hidden.device.type
    if dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype
