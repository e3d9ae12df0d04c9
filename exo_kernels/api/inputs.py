"""Arguments of the public functions, checked once and brought to the one form that the operators take."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from exo_kernels import dispatch, groups, validation, value_checks
from exo_kernels.numerics import LogitTransform
from exo_kernels.schedules import plan, vocab_parallel
from exo_kernels.schedules.vocab_parallel import Shard


class Layout(NamedTuple):
    """The arguments that say which row scores which label."""

    cu_seqlens: Tensor | None
    shift: bool | None
    ignore_index: int


class Head(NamedTuple):
    """The arguments that all functions on hidden states share."""

    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    memory_budget: int | str
    schedule: str
    process_group: dist.ProcessGroup | None


class Rows(NamedTuple):
    """Checked rows; packed rows are one row of N = 1."""

    scores: Tensor  # (N, T, V) logits, or (N, T, D) hidden states
    targets: Tensor  # (N, T) int64, aligned with the rows of scores
    seq_offsets: Tensor  # (N+1,)
    impl: str

    @property
    def n_sequences(self) -> int:
        return self.seq_offsets.numel() - 1

    def check_values(self, layout: Layout, vocab: int) -> None:
        """Check the values that no operator checks."""
        if not validation.check_values(self.scores.device) or torch.compiler.is_compiling():
            return
        if layout.cu_seqlens is not None:
            value_checks.offset_values("cu_seqlens", self.seq_offsets, self.targets.numel(), 0)
        if self.impl == "reference":
            value_checks.label_values(self.targets, vocab, layout.ignore_index)


class HeadInputs(NamedTuple):
    """Checked input of a function on hidden states."""

    rows: Rows
    weight: Tensor  # (V, D), in the dtype of the hidden states
    bias: Tensor | None  # (V,)
    ref_hidden: Tensor | None  # (N, T, D), scored by the same head
    transform: LogitTransform
    ignore_index: int
    shard: Shard
    budget: int
    schedule: str  # as requested

    def sizes(self) -> plan.Sizes:
        hidden = self.rows.scores
        n, t, d = hidden.shape
        return plan.Sizes(n * t, d, self.shard.largest, hidden.dtype, hidden.device, self.ref_hidden is not None)

    def needs(self, entropy: bool = False, reduced_loss: bool = False) -> plan.Needs:
        hidden, weight, bias = (
            torch.is_grad_enabled() and x is not None and x.requires_grad
            for x in (self.rows.scores, self.weight, self.bias)
        )
        return plan.Needs(hidden, weight, bias, entropy and (hidden or weight or bias), reduced_loss)

    def split(self) -> list[int]:
        """Return the shard's start, vocabulary and largest part, and the rows of a chunk."""
        return [*self.shard[:3], self.sizes().chunk_rows(self.budget)]


def prepare_rows(
    name: str, scores: Tensor, labels: Tensor, layout: Layout, impl: str, *, sequences: bool, width: str = "V"
) -> Rows:
    """Check rows, labels and `impl`; `sequences`: the function needs the lengths of sequences."""
    shift = validation.rows(name, scores, labels, *layout, sequences=sequences, width=width)
    validation.choice("impl", impl, dispatch.IMPLS)
    impl = dispatch.resolve(impl, scores.device)
    targets = groups.align_targets(labels, shift, layout.ignore_index)
    if scores.dim() == 2:
        scores, targets = scores[None], targets[None]
    return Rows(scores, targets, groups.sequence_offsets(targets, layout.cu_seqlens), impl)


def prepare(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    head: Head,
    layout: Layout,
    impl: str,
    *,
    sequences: bool,
    ref_hidden: Tensor | None = None,
    prefix: str = "",  # of names in messages: "ref_" for a reference model
) -> HeadInputs:
    """Check hidden states and their head, and convert them to the dtype of the matmuls."""
    hidden_name, weight_name, bias_name = (prefix + x for x in ("hidden", "weight", "bias"))
    validation.plain(hidden_name, hidden)
    rows = prepare_rows(hidden_name, hidden, labels, layout, impl, sequences=sequences, width="D")
    group, bias = head.process_group, head.bias
    if rows.impl == "reference":  # computes with the tensors as they are
        validation.plain(weight_name, weight)
        validation.plain(bias_name, bias)
        if group is not None:
            validation.fail("process_group", "None with impl='reference', which has the whole head", "a process group")
    weight, bias = validation.gathered(weight_name, weight, group), validation.gathered(bias_name, bias, group)
    validation.head(weight_name, weight, bias_name, bias, hidden)
    validation.positive("temperature", head.temperature)
    validation.positive("logit_scale", head.logit_scale)
    if head.softcap is not None:
        validation.positive("softcap", head.softcap)
    budget = plan.parse_budget(head.memory_budget)
    dtype = _matmul_dtype(hidden, weight)
    rows, weight = rows._replace(scores=rows.scores.to(dtype)), weight.to(dtype)
    if ref_hidden is not None:
        ref_hidden = ref_hidden.detach().to(dtype).reshape(rows.scores.shape)
    shard = vocab_parallel.unsharded(len(weight)) if group is None else vocab_parallel.join(weight, group)
    rows.check_values(layout, shard.vocab)
    transform = LogitTransform.of(head.logit_scale, head.softcap, head.temperature)
    return HeadInputs(rows, weight, bias, ref_hidden, transform, layout.ignore_index, shard, budget, head.schedule)


def reference_keywords(head: Head, layout: Layout) -> dict[str, Any]:
    """Return the arguments that the functions of reference.py take as they are."""
    names = ("bias", "logit_scale", "softcap", "temperature")
    return {name: getattr(head, name) for name in names} | layout._asdict()


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return autocast's dtype if it is on, as any linear layer does; otherwise the wider of the two."""
    dtype, device = torch.promote_types(hidden.dtype, weight.dtype), hidden.device.type
    if dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype
