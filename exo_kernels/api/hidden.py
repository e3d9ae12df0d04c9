"""The public functions on hidden states: check once, bring layouts to one form, choose a schedule, call an operator.

Shapes, labels and options follow the conventions of logits.py.
"""

from typing import Literal, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor

from exo_kernels import groups, objectives, reference, validation
from exo_kernels.api import options
from exo_kernels.api.inputs import Head, HeadInputs, Layout, prepare, reference_keywords
from exo_kernels.api.options import LossOptions
from exo_kernels.api.types import HeadKeywords, HiddenLoss, Reduction, Schedule
from exo_kernels.dispatch import Impl
from exo_kernels.objectives import LossResult, LossStats
from exo_kernels.ops import hidden as hidden_ops
from exo_kernels.ops.logits import sum_sequences
from exo_kernels.schedules import plan


def _token_logps(
    inputs: HeadInputs, *, entropy: bool = False, reduced_loss: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs, entropies and the reference's log-probs, (N, T) each, by any schedule but `group`."""
    needs = inputs.needs(entropy, reduced_loss)
    schedule, _ = plan.choose(inputs.schedule, needs, inputs.sizes(), inputs.budget)
    rows = inputs.rows
    tensors = (rows.scores, inputs.weight, inputs.bias, rows.targets, inputs.ref_hidden)
    settings = (inputs.transform, inputs.ignore_index, entropy, schedule, inputs.split(), inputs.shard.group, rows.impl)
    logps, entropies, ref_logps, _, _ = hidden_ops.linear_token_logps(*tensors, *settings)
    return logps, entropies, ref_logps


@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_entropy: Literal[False] = False,
    **options: Unpack[HeadKeywords],
) -> Tensor: ...
@overload
def linear_token_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, return_entropy: Literal[True], **options: Unpack[HeadKeywords]
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_token_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, return_entropy: bool, **options: Unpack[HeadKeywords]
) -> Tensor | tuple[Tensor, Tensor]: ...
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of every label from hidden states and the LM head, without the full logits.

    Differentiable. The logits are softcap(logit_scale * (hidden weight^T + bias)) / temperature, softcap(a) =
    c tanh(a / c). Rows of ignored labels are dropped before the first matmul; counting the others synchronises a GPU.

    Args:
        hidden: (N, T, D), or packed (n, D), the input of the head; fp16, bf16, fp32 or fp64, any strides.
        weight: (V, D). Hidden and weight are multiplied in autocast's dtype if it is on, else in the wider of both;
            logits, softmax and sums are fp32 (fp64 for fp64) for every dtype of the operands. A DTensor without
            gradients is gathered; one that requires them must be gathered by the caller.
        labels, temperature, cu_seqlens, shift, ignore_index: as in `token_logps`.
        bias: (V,) or None.
        logit_scale: multiplies the logits, above 0 (Cohere's logit_scale; 1 / Granite's logits_scaling).
        softcap: caps them, above 0 (Gemma 2's final_logit_softcapping).
        memory_budget: bytes, as an integer or as "512MiB", beyond inputs, gradients and one fp32 copy of the weight's;
            hidden and weight as converted for autocast or mixed dtypes count as inputs.
        schedule: "auto", or "deferred", "store" or "recompute" (see `explain`); used only if gradients are needed.
        process_group: the head's rows are sharded over these ranks in their order, and `weight` and `bias` are this
            rank's; every rank passes the same hidden states and labels, and gets the same results. Breaks the graph
            of torch.compile.
        impl: "auto", "triton" (GPU), "chunked" (plain torch) or "reference" (plain definitions, with all logits).
        return_entropy: also return the entropy of every row, in nats, differentiable too.

    Returns:
        As `token_logps`: (N, T) or (n,), fp32 (fp64 for fp64). Gradients go to hidden, weight and bias, each in its
        dtype and only if required; a frozen head costs no work. Double backward is refused.

    Raises:
        ValueError: a wrong shape, dtype, device or option, a weight that is sharded or empty; on a CPU, or with
            EXO_KERNELS_CHECK=1, a label out of range (unchecked, such a label makes its own row NaN).
    """
    validation.flag("return_entropy", return_entropy)
    layout = Layout(cu_seqlens, shift, ignore_index)
    head = Head(bias, logit_scale, softcap, temperature, memory_budget, schedule, process_group)
    inputs = prepare(hidden, weight, labels, head, layout, impl, sequences=False)
    if inputs.rows.impl == "reference":
        keywords = reference_keywords(head, layout)
        return reference.linear_token_logps(hidden, weight, labels, return_entropy=return_entropy, **keywords)
    logps, entropies, _ = _token_logps(inputs, entropy=return_entropy)
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
    """Return the log-probability of every sequence: the sum of `linear_token_logps` over its labels, added up in fp64.

    Arguments and errors are those of `linear_token_logps`; packed input needs `cu_seqlens`. Returns (N,) fp32 (fp64 for
    fp64). Rounded to fp32, a sum of 512 tokens at -10 nats is off by up to 2.5e-4: to store a reference, store tokens.
    """
    layout = Layout(cu_seqlens, shift, ignore_index)
    head = Head(bias, logit_scale, softcap, temperature, memory_budget, schedule, process_group)
    inputs = prepare(hidden, weight, labels, head, layout, impl, sequences=True)
    if inputs.rows.impl == "reference":
        return reference.linear_sequence_logps(hidden, weight, labels, **reference_keywords(head, layout))
    sums: Tensor = sum_sequences(_token_logps(inputs)[0].flatten(), inputs.rows.seq_offsets)
    return sums


def _fused_loss(objective: str) -> HiddenLoss:
    """Make the fused loss of an objective."""

    def loss(
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
        label_smoothing: float = objectives.OBJECTIVES[objective].label_smoothing,
        temperature: float = 1.0,
        cu_seqlens: Tensor | None = None,
        shift: bool | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        num_groups: int | float | Tensor | None = None,
        impl: Impl = "auto",
        compat: Literal["official"] | None = None,
        return_stats: bool = False,
    ) -> LossResult:
        """From hidden states and the LM head, without the full logits. Called as one function, the loss is known while
        a chunk's logits still exist: a trained head costs three matmuls (schedule "group"), a frozen one two
        ("deferred").

        Args:
            hidden, weight, labels, bias, logit_scale, softcap, temperature, cu_seqlens, shift, ignore_index: as in
                `linear_token_logps`, like memory_budget, process_group and impl; packed input needs `cu_seqlens`.
            ref_logps: as in `fused_exo_loss`; None scores the reference in the same call, from `ref_hidden`.
            ref_hidden: the reference model's hidden states, shaped like `hidden`, multiplied in its dtype. No gradient.
            ref_weight, ref_bias: its head; None means the policy's, whose matmul then takes both models' rows together.
            schedule: "auto", "deferred", "group", "store" or "recompute" (see `explain`). A group whose rows exceed the
                budget is recomputed alone.
            group_size, rewards, beta_pi, beta_r, label_smoothing, reduction, num_groups, compat, return_stats: as in
                `fused_exo_loss`. Under "group" the gradient is made for a loss whose own gradient is 1, as after
                loss.backward(); any other number costs a pass over the weight's gradient, so scale by `num_groups`.

        Returns:
            As `fused_exo_loss`. Gradients go to hidden, weight and bias, each in its dtype and only if required; the
            weight's is added up in fp32. A second backward pass is exact; double backward is refused.

        Raises:
            ValueError: as `fused_exo_loss`; or a weight that is sharded or empty.
        """
        validation.flag("return_stats", return_stats)
        validation.reference_model(ref_logps, ref_hidden, ref_weight, ref_bias, hidden)
        layout = Layout(cu_seqlens, shift, ignore_index)
        head = Head(bias, logit_scale, softcap, temperature, memory_budget, schedule, process_group)
        stacked = ref_hidden if ref_weight is None and ref_bias is None else None  # scored by the policy's head
        inputs = prepare(hidden, weight, labels, head, layout, impl, sequences=True, ref_hidden=stacked)
        rows, ref = inputs.rows, None
        if ref_logps is not None:
            ref = options.check_reference(ref_logps, labels, rows.targets, rows.n_sequences)
        settings = (objective, group_size, rewards, beta_pi, beta_r, label_smoothing, reduction, num_groups, compat)
        loss_options = LossOptions(*settings)
        loss_options.check(rows.n_sequences, hidden.device)
        if rows.impl == "reference":
            keywords = reference_keywords(head, layout)
            keywords |= {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
            tensors = (hidden, weight, labels, ref_logps)
            result = options.run_reference(
                loss_options, reference.LINEAR_LOSSES, tensors, ref, rows.targets, rows.seq_offsets, **keywords
            )
        else:
            if ref_hidden is not None and stacked is None:
                with torch.no_grad():
                    model = (ref_hidden, ref_weight, ref_bias)
                    ref = _token_logps(prepare_reference(*model, weight, labels, head, layout, impl))[0]
            result = _by_schedule(loss_options, inputs, ref)
        return result if return_stats else result[0]

    published: HiddenLoss = options.publish(loss, f"fused_linear_{objective}_loss", objective)
    return published


LOSSES: dict[str, HiddenLoss] = {objective: _fused_loss(objective) for objective in objectives.OBJECTIVES}
fused_linear_exo_loss: HiddenLoss = LOSSES["exo"]
fused_linear_dpo_loss: HiddenLoss = LOSSES["dpo"]


def prepare_reference(
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    weight: Tensor,  # the policy's, if ref_weight is None
    labels: Tensor,
    head: Head,
    layout: Layout,
    impl: str,
) -> HeadInputs:
    """Check and convert a reference model that has a head of its own."""
    matrix = weight if ref_weight is None else ref_weight
    head = head._replace(bias=ref_bias)
    return prepare(ref_hidden, matrix, labels, head, layout, impl, sequences=True, prefix="ref_")


def _by_schedule(
    loss_options: LossOptions,
    inputs: HeadInputs,
    ref_logps: Tensor | None,  # (N,) sums, or (N, T) per token; None: scored by the same head
) -> tuple[Tensor, LossStats]:
    reduced_loss = loss_options.reduction != "none"
    rows, needs = inputs.rows, inputs.needs(reduced_loss=reduced_loss)
    schedule, _ = plan.choose(inputs.schedule, needs, inputs.sizes(), inputs.budget)
    if schedule != "group":
        logps, _, scored_here = _token_logps(inputs, reduced_loss=reduced_loss)
        ref = scored_here if ref_logps is None else ref_logps
        return options.group_loss(
            loss_options, logps, rows.targets, ref.detach(), rows.seq_offsets, inputs.ignore_index, rows.impl
        )
    offsets = groups.group_offsets(loss_options.group_size, rows.n_sequences, rows.scores.device)
    denominator = _as_scalar(loss_options.denominator(offsets.numel() - 1), rows.scores.device)
    tensors = (rows.scores, inputs.weight, inputs.bias, rows.targets, inputs.ref_hidden, ref_logps)
    rewards, objective, betas = loss_options.constant_rewards, loss_options.objective, loss_options.betas
    grouping = (rewards, rows.seq_offsets, offsets, denominator, objective, betas)
    place = (list(needs[:3]), inputs.split(), inputs.shard.group, rows.impl)
    loss, losses, *results = hidden_ops.linear_group_loss(
        *tensors, *grouping, inputs.transform, inputs.ignore_index, *place
    )
    return loss, loss_options.stats(losses, *results[:5])


def _as_scalar(value: int | float | Tensor, device: torch.device) -> Tensor:
    """Return () float64, without waiting for the device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64)
    return torch.full((), float(value), dtype=torch.float64, device=device)
