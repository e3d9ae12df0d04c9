"""The schedule and the cost of a call on hidden states, without running it."""

import torch
import torch.distributed as dist
from torch import Tensor

from exo_kernels import groups, validation, value_checks
from exo_kernels.api.hidden import prepare_reference
from exo_kernels.api.inputs import Head, HeadInputs, Layout, prepare
from exo_kernels.api.types import Reduction, Schedule
from exo_kernels.dispatch import Impl
from exo_kernels.ops.logits import checked_groups
from exo_kernels.schedules import plan


def explain(
    hidden: Tensor,  # (N, T, D), or packed (n, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N, T), or packed (n,)
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    loss: bool = True,
    group_size: int | Tensor = 2,
    reduction: Reduction = "mean",
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    memory_budget: int | str = "512MiB",
    schedule: Schedule = "auto",
    cu_seqlens: Tensor | None = None,
    shift: bool | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    impl: Impl = "auto",
) -> plan.Plan:
    """Return the schedule that a call on these tensors would take, the reason, and its operations and bytes.

    Args:
        loss: True for `fused_linear_*_loss`; False for `linear_token_logps` and `linear_sequence_logps`.

    The other arguments are those of the call; `requires_grad` of the tensors decides which gradients are needed.

    Returns:
        Plan, a named tuple that prints as a sentence. Floating-point operations and bytes are those of forward and
        backward together, without those of a reference model that has another head, which is a call by itself. Reads
        the labels: on a GPU it synchronises.

    Raises:
        ValueError: as the call does; or for meta tensors, which have no labels to count.
    """
    validation.flag("loss", loss)
    validation.flag("return_entropy", return_entropy)
    validation.reduction(reduction, None, torch.device("cpu"))
    if loss and return_entropy:
        validation.fail("return_entropy", "False with loss=True: the losses return no entropies", "True")
    if loss and ref_hidden is not None:
        validation.reference_model(None, ref_hidden, ref_weight, ref_bias, hidden)
    else:
        expected = "None without ref_hidden" if loss else "None with loss=False: log-probs have no reference"
        validation.absent(expected, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias)
    layout = Layout(cu_seqlens, shift, ignore_index)
    head = Head(bias, logit_scale, softcap, temperature, memory_budget, schedule, process_group)
    stacked = ref_hidden if ref_weight is None and ref_bias is None else None  # scored by the policy's head
    inputs = prepare(hidden, weight, labels, head, layout, impl, sequences=loss, ref_hidden=stacked)
    if hidden.device.type == "meta":
        validation.fail("hidden", "a tensor with values, like labels, which are counted", validation.describe(hidden))
    if ref_hidden is not None and stacked is None:
        prepare_reference(ref_hidden, ref_weight, ref_bias, weight, labels, head, layout, impl)
    needs = inputs.needs(return_entropy, loss and reduction != "none")
    name, reason = plan.choose(schedule, needs, inputs.sizes(), inputs.budget)
    targets = inputs.rows.targets
    if validation.check_values(hidden.device):
        value_checks.label_values(targets, inputs.shard.vocab, ignore_index)
    counts = _rows_per_group(inputs, group_size) if loss else [int((targets != ignore_index).sum())]
    return plan.explain(name, reason, needs, inputs.sizes(), inputs.budget, counts)


def _rows_per_group(inputs: HeadInputs, group_size: int | Tensor) -> list[int]:
    """Count the rows with loss of every group."""
    targets, seq_offsets = inputs.rows.targets, inputs.rows.seq_offsets
    validation.group_size(group_size, inputs.rows.n_sequences, targets.device)
    offsets = groups.group_offsets(group_size, inputs.rows.n_sequences, targets.device)
    seq_offsets, offsets = checked_groups(seq_offsets, offsets, None, None, targets, inputs.ignore_index)
    n_scored = torch.nn.functional.pad((targets != inputs.ignore_index).flatten().cumsum(0), (1, 0))  # (n+1,)
    counts: list[int] = n_scored[seq_offsets[offsets]].diff().tolist()
    return counts
