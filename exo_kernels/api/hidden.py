"""The public functions on hidden states: check once, bring every layout to one form, choose the schedule, hand over.

The counterpart of ../api.py, whose conventions for shapes, labels and options hold here too.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from exo_kernels import groups, reference, validation, value_checks
from exo_kernels.api import options
from exo_kernels.api.inputs import Head, Inputs, prepare
from exo_kernels.api.options import LossOptions, Reduction
from exo_kernels.dispatch import Impl
from exo_kernels.ops import hidden as hidden_ops
from exo_kernels.ops.logits import checked_groups, sum_sequences
from exo_kernels.schedules import plan

Schedule = Literal["auto", "deferred", "group", "store", "recompute"]


def _token_logps(rows: Inputs, head: Head, entropy: bool, whole_loss: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and the reference's log-probs, (N, T) each, by a schedule other than `group`."""
    sizes = rows.sizes()
    schedule, _ = plan.choose(head.schedule, rows.needs(entropy, whole_loss), sizes, rows.budget)
    logps, entropies, ref_logps, _, _ = hidden_ops.linear_token_logps(
        rows.hidden, rows.weight, rows.bias, rows.targets, rows.ref_hidden, *head.curve(), head.ignore_index, entropy,
        schedule, sizes.chunk_rows(rows.budget), list(rows.shard[:3]), rows.shard.group, rows.impl,
    )  # fmt: skip
    return logps, entropies, ref_logps


def linear_token_logps(
    hidden: Tensor,  # (N, T, D), or packed (n, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N, T), or packed (n,)
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    shift: bool | None = None,
    ignore_index: int = -100,
    memory_budget: int | str = "512MiB",
    schedule: Schedule = "auto",
    process_group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
    return_entropy: bool = False,
) -> Any:
    """Log-probability of every label from hidden states and the LM head; differentiable, the logits never exist whole.

    The logits are softcap(logit_scale * (hidden weight^T + bias)) / temperature, softcap(a) = c tanh(a / c). Rows of
    ignored labels are dropped before the first matmul; counting the others synchronises a GPU.

    Args:
        hidden: fp16, bf16, fp32 or fp64, any strides: what goes into the head.
        weight: (V, D). Hidden and weight are multiplied in autocast's dtype where it is on, else in the wider of both;
            logits, softmax and sums are fp32 (fp64 for fp64) whatever the operands are.
            A DTensor without gradients is gathered; one that wants them must be, by who knows what ranks share.
        labels, temperature, cu_seqlens, shift, ignore_index: as in `token_logps`.
        bias: (V,) or None.
        logit_scale: multiplies the logits, > 0 (Cohere's logit_scale; 1 / Granite's logits_scaling).
        softcap: caps them, > 0 (Gemma 2's final_logit_softcapping).
        memory_budget: bytes, as an integer or as "512MiB", beyond inputs, gradients and one fp32 copy of the weight's;
            what autocast or mixed dtypes make hidden and weight into counts as input.
        schedule: "auto", or "deferred", "store" or "recompute" (see `explain`); counts only where gradients are needed.
        process_group: the head's rows are sharded over these ranks in their order, and `weight` and `bias` are this
            rank's; every rank passes the same hidden states and labels, and gets the same results. Breaks the graph
            of torch.compile.
        impl: "auto", "triton" (GPU), "chunked" (plain torch) or "reference" (the oracle, which makes all logits).
        return_entropy: also return the entropy of every row, in nats, differentiable too.

    Returns:
        As `token_logps`: (N, T) or (n,), fp32 (fp64 for fp64). Gradients go to hidden, weight and bias, each in its
        dtype and only where it is required; a frozen head costs no work. Double backward is refused.

    Raises:
        ValueError: a wrong shape, dtype, device or option, a weight that is sharded or empty; on a CPU, or with
            EXO_KERNELS_CHECK=1, a label out of range (which otherwise makes its own row NaN).
    """
    validation.flag("return_entropy", return_entropy)
    head = Head(
        bias, logit_scale, softcap, temperature, cu_seqlens, shift, ignore_index, memory_budget, schedule,
        process_group, impl,
    )  # fmt: skip
    rows = prepare(hidden, weight, labels, head, sequences=False)
    if rows.impl == "reference":
        return reference.linear_token_logps(
            hidden, weight, labels, return_entropy=return_entropy, **head.reference_options()
        )
    logps, entropies, _ = _token_logps(rows, head, return_entropy)
    logps = logps.view(labels.shape)
    return (logps, entropies.view(labels.shape)) if return_entropy else logps


def linear_sequence_logps(
    hidden: Tensor,  # (N, T, D), or packed (n, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N, T), or packed (n,)
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    shift: bool | None = None,
    ignore_index: int = -100,
    memory_budget: int | str = "512MiB",
    schedule: Schedule = "auto",
    process_group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (N,)
    """Log-probability of every sequence: the sum of `linear_token_logps` over its labels, added up in fp64.

    Arguments and errors are those of `linear_token_logps`; packed input needs `cu_seqlens`. Returns (N,) fp32 (fp64 for
    fp64). Rounded to fp32, a sum of 512 tokens at -10 nats is off by up to 2.5e-4: as a reference, keep the tokens'.
    """
    head = Head(
        bias, logit_scale, softcap, temperature, cu_seqlens, shift, ignore_index, memory_budget, schedule,
        process_group, impl,
    )  # fmt: skip
    rows = prepare(hidden, weight, labels, head, sequences=True)
    if rows.impl == "reference":
        return reference.linear_sequence_logps(hidden, weight, labels, **head.reference_options())
    logps, _, _ = _token_logps(rows, head, False)
    return sum_sequences(logps.flatten(), rows.seq_offsets)


def fused_linear_exo_loss(
    hidden: Tensor,  # (N, T, D), or packed (n, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N, T), or packed (n,)
    ref_logps: Tensor | None = None,  # (N,) sums, or per token like labels
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    memory_budget: int | str = "512MiB",
    schedule: Schedule = "auto",
    group_size: int | Tensor = 2,
    rewards: Tensor | None = None,
    beta_pi: float = 0.1,
    beta_r: float = 1.0,
    label_smoothing: float = 1e-3,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    shift: bool | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_groups: int | float | Tensor | None = None,
    impl: Impl = "auto",
    compat: Literal["official"] | None = None,
    return_stats: bool = False,
) -> Any:
    """`fused_exo_loss` from hidden states and the LM head: reverse KL over each prompt's K completions.

    Arxiv 2402.00856, eq. 13-18. Called as one function, the loss is known while a chunk's logits are there, so that a
    trained head costs three matmuls and no second look (schedule "group"); a frozen one costs two ("deferred").

    Args:
        hidden, weight, labels, bias, logit_scale, softcap, temperature, cu_seqlens, shift, ignore_index: as in
            `linear_token_logps`, like memory_budget, process_group and impl; packed input needs `cu_seqlens`.
        ref_logps: as in `fused_exo_loss`; or None, and the reference is scored in the same call from
        ref_hidden: the reference model's hidden states, shaped like `hidden`, in whose dtype they are multiplied. No
            gradient.
        ref_weight, ref_bias: its head; None means the policy's, whose matmul then takes both models' rows together.
        schedule: "auto", "deferred", "group", "store" or "recompute" (see `explain`). A group whose rows do not fit the
            budget is recomputed alone.
        group_size, rewards, beta_pi, beta_r, label_smoothing, reduction, num_groups, compat, return_stats: as in
            `fused_exo_loss`. Under "group" the gradient is made for a loss whose own gradient is 1, as after
            loss.backward(); any other number costs a pass over the weight's gradient, so scale by `num_groups`.

    Returns:
        As `fused_exo_loss`. Gradients go to hidden, weight and bias, each in its dtype and only where it is required;
        that of the weight is added up in fp32. A second backward pass is exact; double backward is refused.

    Raises:
        ValueError: as `fused_exo_loss`; or a weight that is sharded or empty.
    """
    knobs = LossOptions("exo", group_size, rewards, beta_pi, beta_r, label_smoothing, reduction, num_groups, compat)
    head = Head(
        bias, logit_scale, softcap, temperature, cu_seqlens, shift, ignore_index, memory_budget, schedule,
        process_group, impl,
    )  # fmt: skip
    return _fused_loss(knobs, head, hidden, weight, labels, ref_logps, ref_hidden, ref_weight, ref_bias, return_stats)


def fused_linear_dpo_loss(
    hidden: Tensor,  # (N, T, D), or packed (n, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N, T), or packed (n,)
    ref_logps: Tensor | None = None,  # (N,) sums, or per token like labels
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    memory_budget: int | str = "512MiB",
    schedule: Schedule = "auto",
    group_size: int | Tensor = 2,
    rewards: Tensor | None = None,
    beta_pi: float = 0.1,
    beta_r: float = 1.0,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    shift: bool | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_groups: int | float | Tensor | None = None,
    impl: Impl = "auto",
    compat: Literal["official"] | None = None,
    return_stats: bool = False,
) -> Any:
    """`fused_dpo_loss` from hidden states and the LM head: forward KL over K completions. Eq. 19; K = 2: eq. 7.

    Everything else is as in `fused_linear_exo_loss`, but that `label_smoothing` may be 0 and is.
    """
    knobs = LossOptions("dpo", group_size, rewards, beta_pi, beta_r, label_smoothing, reduction, num_groups, compat)
    head = Head(
        bias, logit_scale, softcap, temperature, cu_seqlens, shift, ignore_index, memory_budget, schedule,
        process_group, impl,
    )  # fmt: skip
    return _fused_loss(knobs, head, hidden, weight, labels, ref_logps, ref_hidden, ref_weight, ref_bias, return_stats)


def _fused_loss(
    knobs: LossOptions,
    head: Head,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    return_stats: bool,
) -> Any:
    validation.flag("return_stats", return_stats)
    validation.reference_model(ref_logps, ref_hidden, ref_weight, ref_bias, hidden)
    shared = ref_weight is None and ref_bias is None
    rows = prepare(hidden, weight, labels, head, sequences=True, ref_hidden=ref_hidden if shared else None)
    n = rows.seq_offsets.numel() - 1
    if ref_logps is not None:
        shapes = ((n,), tuple(labels.shape))
        validation.tensor("ref_logps", ref_logps, validation.SUMS, shapes, hidden.device)
    knobs.check(n, hidden.device)
    if rows.impl == "reference":
        answer = options.run_reference(
            knobs,
            f"fused_linear_{knobs.objective}_loss",
            (hidden, weight, labels, ref_logps),
            rows.targets,
            rows.seq_offsets,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            **head.reference_options(),
        )
        return answer if return_stats else answer[0]
    if ref_hidden is not None and not shared:
        with torch.no_grad():
            ref_rows, ref_head = _prepare_reference(head, weight, labels, ref_hidden, ref_weight, ref_bias)
            ref_logps = _token_logps(ref_rows, ref_head, False)[0].view(labels.shape)
    per_token_ref = ref_hidden is not None or tuple(ref_logps.shape) != (n,)  # type: ignore[union-attr]
    loss, stats = _by_schedule(knobs, head, rows, ref_logps, per_token_ref)
    return (loss, stats) if return_stats else loss


def _prepare_reference(
    head: Head, weight: Tensor, labels: Tensor, ref_hidden: Tensor, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> tuple[Inputs, Head]:
    """Check a reference model that has a head of its own, and bring it to the operators' form."""
    ref_head = head._replace(bias=ref_bias)
    matrix = weight if ref_weight is None else ref_weight
    return prepare(ref_hidden, matrix, labels, ref_head, sequences=True, prefix="ref_"), ref_head


def _by_schedule(
    knobs: LossOptions, head: Head, rows: Inputs, ref_logps: Tensor | None, per_token_ref: bool
) -> tuple[Tensor, options.LossStats]:
    whole_loss = knobs.reduction != "none"
    sizes, needs = rows.sizes(), rows.needs(whole_loss=whole_loss)
    schedule, _ = plan.choose(head.schedule, needs, sizes, rows.budget)
    if schedule != "group":
        logps, _, scored_ref = _token_logps(rows, head, False, whole_loss)
        ref = scored_ref if ref_logps is None else ref_logps
        return options.group_loss(
            knobs, logps, rows.targets, ref, rows.seq_offsets, head.ignore_index, rows.impl, per_token_ref
        )
    n = rows.seq_offsets.numel() - 1
    offsets = groups.group_offsets(knobs.group_size, n, rows.hidden.device)
    denominator = _as_scalar(knobs.denominator(offsets.numel() - 1), rows.hidden.device)
    loss, group_losses, *rest = hidden_ops.linear_group_loss(
        rows.hidden, rows.weight, rows.bias, rows.targets, rows.ref_hidden,
        None if ref_logps is None else ref_logps.detach().flatten(), knobs.constant_rewards, rows.seq_offsets, offsets,
        denominator, per_token_ref, knobs.objective, float(knobs.beta_pi), float(knobs.beta_r), *knobs.log_targets,
        *head.curve(), head.ignore_index, needs.hidden, needs.weight, needs.bias, sizes.chunk_rows(rows.budget),
        list(rows.shard[:3]), rows.shard.group, rows.impl,
    )  # fmt: skip
    return loss, knobs.stats(group_losses, *rest[:5])


def _as_scalar(value: int | float | Tensor, device: torch.device) -> Tensor:
    """() float64, without waiting for the device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64)
    return torch.full((), float(value), dtype=torch.float64, device=device)


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
    """Return the schedule that a call on these tensors takes, why, and its floating-point operations and bytes.

    Args:
        loss: of `fused_linear_*_loss`; False: of `linear_token_logps` and `linear_sequence_logps`.

    The other arguments are those of the call; `requires_grad` of the tensors decides which gradients are needed.

    Returns:
        Plan, a named tuple that prints as a sentence. Operations and bytes are those of forward and backward together
        (those of a reference model with a head of its own apart, which is a call by itself). Looks at the labels: on a
        GPU it synchronises.

    Raises:
        ValueError: as the call in question; or meta tensors, which have no labels to count.
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
    head = Head(
        bias, logit_scale, softcap, temperature, cu_seqlens, shift, ignore_index, memory_budget, schedule,
        process_group, impl,
    )  # fmt: skip
    shared = ref_weight is None and ref_bias is None
    rows = prepare(hidden, weight, labels, head, sequences=loss, ref_hidden=ref_hidden if shared else None)
    if hidden.device.type == "meta":
        validation.fail("hidden", "a tensor with values, like labels, which are counted", validation.describe(hidden))
    if ref_hidden is not None and not shared:
        _prepare_reference(head, weight, labels, ref_hidden, ref_weight, ref_bias)
    needs = rows.needs(return_entropy, loss and reduction != "none")
    sizes = rows.sizes()
    name, reason = plan.choose(schedule, needs, sizes, rows.budget)
    if validation.check_values(hidden.device):
        value_checks.label_values(rows.targets, rows.shard.vocab, ignore_index)
    counts = _groups_rows(rows, group_size, ignore_index) if loss else [int((rows.targets != ignore_index).sum())]
    return plan.explain(name, reason, needs, sizes, rows.budget, counts)


def _groups_rows(rows: Inputs, group_size: int | Tensor, ignore_index: int) -> list[int]:
    """Count the rows with loss of every group."""
    n, device = rows.seq_offsets.numel() - 1, rows.hidden.device
    validation.group_size(group_size, n, device)
    offsets = groups.group_offsets(group_size, n, device)
    sequences, offsets = checked_groups(rows.seq_offsets, offsets, None, None, rows.targets, True, ignore_index)
    seen = (rows.targets != ignore_index).flatten().cumsum(0)
    return torch.nn.functional.pad(seen, (1, 0))[sequences[offsets]].diff().tolist()
