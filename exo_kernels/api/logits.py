"""The public functions: check once, bring every layout to one form, hand over to the operators.

A fused loss is `token_logps` (the expensive part) followed by `group_loss` (K scalars a prompt). impl="reference" runs
the oracle instead. The mathematics is in objectives.py, the layouts in groups.py, the checks in validation.py.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from exo_kernels import dispatch, groups, objectives, reference, validation, value_checks
from exo_kernels.api import options
from exo_kernels.api.options import LossOptions, Reduction
from exo_kernels.dispatch import Impl
from exo_kernels.ops import logits as logits_ops

Objective = Literal["exo", "dpo"]


class _Rows(NamedTuple):
    """Checked input in the one form the operators take; packed rows are one row of N = 1."""

    logits: Tensor  # (N, T, V) or (1, n, V)
    targets: Tensor  # (N, T) or (1, n) int64, aligned with the rows of logits
    seq_offsets: Tensor  # (N+1,)
    impl: str


def _prepare(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    shift: bool | None,
    ignore_index: int,
    temperature: float,
    impl: str,
    sequences: bool,
) -> _Rows:
    shift = validation.rows("logits", logits, labels, cu_seqlens, shift, ignore_index, sequences=sequences)
    validation.positive("temperature", temperature)
    validation.choice("impl", impl, dispatch.IMPLS)
    impl = dispatch.resolve(impl, logits.device)
    targets = groups.align_targets(labels, shift, ignore_index)
    if logits.dim() == 2:
        logits, targets = logits[None], targets[None]
    rows = _Rows(logits, targets, groups.sequence_offsets(targets, cu_seqlens), impl)
    if validation.check_values(logits.device) and not torch.compiler.is_compiling():
        if cu_seqlens is not None:
            value_checks.offset_values("cu_seqlens", rows.seq_offsets, targets.numel(), 0)
        if impl == "reference":  # the operators check for the others
            value_checks.label_values(targets, logits.shape[-1], ignore_index)
    return rows


def token_logps(
    logits: Tensor,  # (N, T, V), or packed (n, V)
    labels: Tensor,  # (N, T), or packed (n,)
    *,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    shift: bool | None = None,
    ignore_index: int = -100,
    impl: Impl = "auto",
    return_entropy: bool = False,
) -> Any:
    """Log-probability of every label, at the row that made it; differentiable.

    Args:
        logits: fp16, bf16, fp32 or fp64, any strides; read once, never written. Rows of ignored labels are not read.
        labels: int64 or int32 in [0, V), or `ignore_index`.
        temperature: divides the logits, > 0.
        cu_seqlens: (N+1,) int boundaries of packed sequences; not needed here, accepted for uniformity.
        shift: None means True for padded input (row t scores labels[:, t+1], as Hugging Face labels have it) and False
            for packed input, whose labels are aligned with their rows.
        impl: "auto", "triton" (GPU), "chunked" (plain torch) or "reference" (the oracle).
        return_entropy: also return the entropy of every row, in nats, differentiable too.

    Returns:
        (N, T) or (n,) fp32 (fp64 for fp64 logits): out[:, t] belongs to labels[:, t+1] when shifted (last column 0), to
        labels[:, t] when not; 0 where ignored. With `return_entropy` a pair of such tensors. A row of nothing but -inf
        has log-probability -inf and entropy 0.

    Raises:
        ValueError: a wrong shape, dtype, device or option; on a CPU, or with EXO_KERNELS_CHECK=1, a label out of range
            (which otherwise makes its own row NaN).
    """
    validation.flag("return_entropy", return_entropy)
    rows = _prepare(logits, labels, cu_seqlens, shift, ignore_index, temperature, impl, sequences=False)
    if rows.impl == "reference":
        return reference.token_logps(
            logits, labels, temperature=temperature, shift=shift, ignore_index=ignore_index,
            return_entropy=return_entropy,
        )  # fmt: skip
    logps, entropies, _ = logits_ops.token_logps(
        rows.logits, rows.targets, float(temperature), ignore_index, return_entropy, False, rows.impl
    )
    logps = logps.view(labels.shape)
    return (logps, entropies.view(labels.shape)) if return_entropy else logps


def sequence_logps(
    logits: Tensor,  # (N, T, V), or packed (n, V)
    labels: Tensor,  # (N, T), or packed (n,)
    *,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    shift: bool | None = None,
    ignore_index: int = -100,
    impl: Impl = "auto",
) -> Tensor:  # (N,)
    """Log-probability of every sequence: the sum of `token_logps` over its labels, added up in fp64.

    Arguments and errors are those of `token_logps`; packed input needs `cu_seqlens`. Returns (N,) fp32 (fp64 for fp64
    logits). An fp32 sum of 512 tokens at -10 nats is off by 2.5e-4 by its rounding alone: where a reference is to be
    kept, keep `token_logps`, or sums of them in fp64.
    """
    rows = _prepare(logits, labels, cu_seqlens, shift, ignore_index, temperature, impl, sequences=True)
    if rows.impl == "reference":
        return reference.sequence_logps(
            logits, labels, temperature=temperature, cu_seqlens=cu_seqlens, shift=shift, ignore_index=ignore_index
        )
    logps, _, _ = logits_ops.token_logps(
        rows.logits, rows.targets, float(temperature), ignore_index, False, False, rows.impl
    )
    return logits_ops.sum_sequences(logps.flatten(), rows.seq_offsets)


def preference_loss(
    policy_logps: Tensor,  # (N,)
    ref_logps: Tensor,  # (N,)
    *,
    objective: Objective = "exo",
    group_size: int | Tensor = 2,
    rewards: Tensor | None = None,
    beta_pi: float = 0.1,
    beta_r: float = 1.0,
    label_smoothing: float | None = None,
    reduction: Reduction = "mean",
    num_groups: int | float | Tensor | None = None,
    compat: Literal["official"] | None = None,
) -> Tensor:
    """EXO or DPO from sequence log-probabilities that the caller already has; differentiable in `policy_logps`.

    Args:
        policy_logps, ref_logps: (N,) fp32 or fp64 sums; N sequences, the completions of one prompt adjacent.
        objective: "exo" (reverse KL, eq. 15 and 18) or "dpo" (forward KL, eq. 19 and 7).
        label_smoothing: None means 1e-3 for "exo" and 0 for "dpo".

    The other arguments, the result and the errors are those of `fused_exo_loss`.
    """
    validation.tensor("policy_logps", policy_logps, validation.SUMS)
    if policy_logps.dim() != 1:
        validation.fail("policy_logps", "shape (N,)", validation.describe(policy_logps))
    n = policy_logps.numel()
    validation.tensor("ref_logps", ref_logps, validation.SUMS, ((n,),), policy_logps.device)
    validation.choice("objective", objective, tuple(objectives.OBJECTIVES))
    if label_smoothing is None:
        label_smoothing = objectives.LABEL_SMOOTHING.get(objective, 0.0)
    knobs = LossOptions(objective, group_size, rewards, beta_pi, beta_r, label_smoothing, reduction, num_groups, compat)
    knobs.check(n, policy_logps.device)
    # a sequence is one row that scores, so the sums over rows are the values themselves
    seq_offsets = torch.arange(n + 1, device=policy_logps.device)
    targets = torch.zeros(n, dtype=torch.long, device=policy_logps.device)
    impl = dispatch.resolve("auto", policy_logps.device)
    return options.group_loss(knobs, policy_logps, targets, ref_logps, seq_offsets, -100, impl, False)[0]


def fused_exo_loss(
    logits: Tensor,  # (N, T, V), or packed (n, V)
    labels: Tensor,  # (N, T), or packed (n,)
    ref_logps: Tensor,  # (N,) sums, or per token like labels
    *,
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
    inplace_backward: bool = False,
    impl: Impl = "auto",
    compat: Literal["official"] | None = None,
    return_stats: bool = False,
) -> Any:
    """EXO: reverse KL between the policy's and the target's distribution over each prompt's K completions.

    L = KL(softmax_k(beta_pi S_k) || q), S_k the summed log-ratio of policy to reference; q = softmax(rewards / beta_r),
    or 1 - eps on the chosen and eps / (K - 1) elsewhere. Arxiv 2402.00856, eq. 13-18. K = 1 gives 0.

    Args:
        logits: N sequences, the completions of one prompt adjacent; fp16, bf16, fp32 or fp64, any strides.
        labels: int64 or int32 in [0, V); `ignore_index` on prompt and padding.
        ref_logps: the reference's log-probs at the same temperature, fp32 or fp64, as sums (N,) or per token in the
            layout of `token_logps` (more exact in fp32). A constant: no gradient. (n,) counts as sums where n = N.
        group_size: K, or a (G,) int tensor of ragged sizes that sum to N.
        rewards: (N,) finite floats; None means preferences, the first completion of each group being the chosen one.
            If they saturate the target, so that the loss exceeds its dtype, the group's loss is inf and its gradient 0.
        beta_pi, beta_r: > 0 and within fp32's range, as all such options; beta_r counts only with rewards.
        label_smoothing: eps in (0, 1); counts only with preferences, as `compat` does.
        temperature, cu_seqlens, shift, ignore_index, impl: as in `token_logps`; packed input needs `cu_seqlens`.
        reduction: "mean" over `num_groups` (default: the groups of this call; pass the number in the whole optimizer
            step, over all micro-batches and ranks), "sum", or "none" for (G,). The mean of no groups is 0.
        inplace_backward: the backward pass writes the gradient over `logits` and saves their size in memory; autograd
            then refuses every other use of them.
        compat: "official" takes the published code's unnormalised log-targets (0, -10) on preferences with K = 2.
        return_stats: return (loss, LossStats).

    Returns:
        fp32 (fp64 for fp64 logits) scalar, or (G,). The gradient has the dtype of `logits`, and is exactly 0 in rows
        without loss whatever stands there. A second backward pass is exact; double backward is refused.

    Raises:
        ValueError: a wrong shape, dtype, device or option; on a CPU, or with EXO_KERNELS_CHECK=1, wrong values (labels
            out of range, rewards or references not finite, sizes that do not add up). Unchecked, a bad label makes its
            own group NaN, as completions do that are all impossible.

    Warns:
        UserWarning: where values are checked, a sequence without labels in a group whose others have some.
    """
    knobs = LossOptions("exo", group_size, rewards, beta_pi, beta_r, label_smoothing, reduction, num_groups, compat)
    return _fused_loss(
        knobs, logits, labels, ref_logps, temperature, cu_seqlens, shift, ignore_index, inplace_backward, impl,
        return_stats,
    )  # fmt: skip


def fused_dpo_loss(
    logits: Tensor,  # (N, T, V), or packed (n, V)
    labels: Tensor,  # (N, T), or packed (n,)
    ref_logps: Tensor,  # (N,) sums, or per token like labels
    *,
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
    inplace_backward: bool = False,
    impl: Impl = "auto",
    compat: Literal["official"] | None = None,
    return_stats: bool = False,
) -> Any:
    """DPO on K completions: forward KL, L = - sum_k q_k log softmax_k(beta_pi S_k). Eq. 19; K = 2, one-hot q: eq. 7.

    Everything else is as in `fused_exo_loss`, but that `label_smoothing` may be 0 and is.
    """
    knobs = LossOptions("dpo", group_size, rewards, beta_pi, beta_r, label_smoothing, reduction, num_groups, compat)
    return _fused_loss(
        knobs, logits, labels, ref_logps, temperature, cu_seqlens, shift, ignore_index, inplace_backward, impl,
        return_stats,
    )  # fmt: skip


def _fused_loss(
    knobs: LossOptions,
    logits: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    temperature: float,
    cu_seqlens: Tensor | None,
    shift: bool | None,
    ignore_index: int,
    inplace_backward: bool,
    impl: str,
    return_stats: bool,
) -> Any:
    validation.flag("inplace_backward", inplace_backward)
    validation.flag("return_stats", return_stats)
    rows = _prepare(logits, labels, cu_seqlens, shift, ignore_index, temperature, impl, sequences=True)
    if inplace_backward:
        validation.writable("logits", logits, rows.impl)
    n = rows.seq_offsets.numel() - 1
    shapes = ((n,), tuple(labels.shape))
    validation.tensor("ref_logps", ref_logps, validation.SUMS, shapes, logits.device)
    knobs.check(n, logits.device)
    if rows.impl == "reference":
        answer = options.run_reference(
            knobs, f"fused_{knobs.objective}_loss", (logits, labels, ref_logps), rows.targets, rows.seq_offsets,
            temperature=temperature, cu_seqlens=cu_seqlens, shift=shift, ignore_index=ignore_index,
        )  # fmt: skip
        return answer if return_stats else answer[0]
    logps, _, _ = logits_ops.token_logps(
        rows.logits, rows.targets, float(temperature), ignore_index, False, inplace_backward, rows.impl
    )
    per_token_ref = tuple(ref_logps.shape) != (n,)
    loss, stats = options.group_loss(
        knobs, logps, rows.targets, ref_logps, rows.seq_offsets, ignore_index, rows.impl, per_token_ref
    )
    return (loss, stats) if return_stats else loss
