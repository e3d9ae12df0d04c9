"""The public functions on logits: check once, bring every layout to one form, call the operators.

A fused loss is `token_logps` (the expensive part) followed by `group_loss` (K scalars per prompt). impl="reference"
runs reference.py instead.
"""

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from exo_kernels import dispatch, objectives, reference, validation
from exo_kernels.api import options
from exo_kernels.api.inputs import Layout, Rows, prepare_rows
from exo_kernels.api.options import LossOptions
from exo_kernels.api.types import LogitsLoss, Reduction, RowKeywords
from exo_kernels.dispatch import Impl
from exo_kernels.objectives import LossResult, ObjectiveName
from exo_kernels.ops import logits as logits_ops


def _prepare(logits: Tensor, labels: Tensor, layout: Layout, temperature: float, impl: str, *, sequences: bool) -> Rows:
    rows = prepare_rows("logits", logits, labels, layout, impl, sequences=sequences)
    validation.positive("temperature", temperature)
    rows.check_values(layout, logits.shape[-1])
    return rows


@overload
def token_logps(
    logits: Tensor, labels: Tensor, *, return_entropy: Literal[False] = False, **options: Unpack[RowKeywords]
) -> Tensor: ...
@overload
def token_logps(
    logits: Tensor, labels: Tensor, *, return_entropy: Literal[True], **options: Unpack[RowKeywords]
) -> tuple[Tensor, Tensor]: ...
@overload
def token_logps(
    logits: Tensor, labels: Tensor, *, return_entropy: bool, **options: Unpack[RowKeywords]
) -> Tensor | tuple[Tensor, Tensor]: ...
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    shift: bool | None = None,
    ignore_index: int = -100,
    impl: Impl = "auto",
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of every label, at the row that predicts it; differentiable.

    Args:
        logits: (N, T, V), or packed (n, V); fp16, bf16, fp32 or fp64, any strides. Read once, never written; rows of
            ignored labels are not read.
        labels: (N, T), or packed (n,); int64 or int32 in [0, V), or `ignore_index`.
        temperature: divides the logits, above 0.
        cu_seqlens: (N+1,) int boundaries of packed sequences; accepted for uniformity, not needed here.
        shift: None means True for padded input (row t scores labels[:, t+1], as Hugging Face labels have it) and False
            for packed input, whose labels are aligned with their rows.
        impl: "auto", "triton" (GPU), "chunked" (plain torch) or "reference" (plain definitions).
        return_entropy: also return the entropy of every row, in nats, differentiable too.

    Returns:
        (N, T) or (n,) fp32 (fp64 for fp64 logits): out[:, t] belongs to labels[:, t+1] if shifted (last column 0), to
        labels[:, t] otherwise; 0 where ignored. With `return_entropy` a pair of such tensors. A row of nothing but -inf
        has log-probability -inf and entropy 0.

    Raises:
        ValueError: a wrong shape, dtype, device or option; on a CPU, or with EXO_KERNELS_CHECK=1, a label out of range
            (unchecked, such a label makes its own row NaN).
    """
    validation.flag("return_entropy", return_entropy)
    layout = Layout(cu_seqlens, shift, ignore_index)
    rows = _prepare(logits, labels, layout, temperature, impl, sequences=False)
    if rows.impl == "reference":
        keywords = layout._asdict() | {"temperature": temperature, "return_entropy": return_entropy}
        return reference.token_logps(logits, labels, **keywords)
    logps, entropies, _ = logits_ops.token_logps(
        rows.scores, rows.targets, float(temperature), ignore_index, return_entropy, False, rows.impl
    )
    logps = logps.view(labels.shape)
    return (logps, entropies.view(labels.shape)) if return_entropy else logps


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    shift: bool | None = None,
    ignore_index: int = -100,
    impl: Impl = "auto",
) -> Tensor:  # (N,)
    """Return the log-probability of every sequence: the sum of `token_logps` over its labels, added up in fp64.

    Arguments and errors are those of `token_logps`; packed input needs `cu_seqlens`. Returns (N,) fp32 (fp64 for fp64
    logits). Rounding alone puts an fp32 sum of 512 tokens at -10 nats off by 2.5e-4: to store a reference, store
    `token_logps`, or their sums in fp64.
    """
    layout = Layout(cu_seqlens, shift, ignore_index)
    rows = _prepare(logits, labels, layout, temperature, impl, sequences=True)
    if rows.impl == "reference":
        return reference.sequence_logps(logits, labels, temperature=temperature, **layout._asdict())
    logps, _, _ = logits_ops.token_logps(
        rows.scores, rows.targets, float(temperature), ignore_index, False, False, rows.impl
    )
    sums: Tensor = logits_ops.sum_sequences(logps.flatten(), rows.seq_offsets)
    return sums


def preference_loss(
    policy_logps: Tensor,  # (N,)
    ref_logps: Tensor,  # (N,)
    *,
    objective: ObjectiveName = "exo",
    group_size: int | Tensor = 2,
    rewards: Tensor | None = None,
    beta_pi: float = 0.1,
    beta_r: float = 1.0,
    label_smoothing: float | None = None,
    reduction: Reduction = "mean",
    num_groups: int | float | Tensor | None = None,
    compat: Literal["official"] | None = None,
) -> Tensor:
    """Return EXO or DPO from sequence log-probabilities that you already have; differentiable in `policy_logps`.

    Args:
        policy_logps, ref_logps: (N,) fp32 or fp64 sums; N sequences, the completions of one prompt adjacent.
        objective: "exo" (reverse KL, eq. 15 and 18) or "dpo" (forward KL, eq. 19 and 7).
        label_smoothing: None means 1e-3 for "exo" and 0 for "dpo".

    The other arguments, the result and the errors are those of `fused_exo_loss`.
    """
    validation.tensor("policy_logps", policy_logps, validation.SUMS)
    if policy_logps.dim() != 1:
        validation.fail("policy_logps", "shape (N,)", validation.describe(policy_logps))
    n, device = policy_logps.numel(), policy_logps.device
    validation.tensor("ref_logps", ref_logps, validation.SUMS, ((n,),), device)
    validation.choice("objective", objective, tuple(objectives.OBJECTIVES))
    if label_smoothing is None:
        label_smoothing = objectives.OBJECTIVES[objective].label_smoothing
    settings = (objective, group_size, rewards, beta_pi, beta_r, label_smoothing, reduction, num_groups, compat)
    loss_options = LossOptions(*settings)
    loss_options.check(n, device)
    # a sequence is one row that scores, so the sums over rows are the values themselves
    seq_offsets = torch.arange(n + 1, device=device)
    targets = torch.zeros(n, dtype=torch.long, device=device)
    impl = dispatch.resolve("auto", device)
    return options.group_loss(loss_options, policy_logps, targets, ref_logps.detach(), seq_offsets, -100, impl)[0]


def _fused_loss(objective: str) -> LogitsLoss:
    """Make the fused loss of an objective."""

    def loss(
        logits: Tensor,  # (N, T, V), or packed (n, V)
        labels: Tensor,  # (N, T), or packed (n,)
        ref_logps: Tensor,  # (N,) sums, or per token like labels
        *,
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
        inplace_backward: bool = False,
        impl: Impl = "auto",
        compat: Literal["official"] | None = None,
        return_stats: bool = False,
    ) -> LossResult:
        """The policy's distribution is p = softmax_k(beta_pi S_k), S_k the summed log-ratio of policy to reference. The
        target's is q = softmax(rewards / beta_r), or 1 - eps on the chosen completion and eps / (K - 1) on the others.
        Arxiv 2402.00856, eq. 13-19. EXO of a single completion is 0.

        Args:
            logits: (N, T, V), or packed (n, V); fp16, bf16, fp32 or fp64, any strides. N sequences, the completions of
                one prompt adjacent.
            labels: (N, T), or packed (n,); int64 or int32 in [0, V), or `ignore_index` on prompt and padding.
            ref_logps: the reference's log-probs at the same temperature, fp32 or fp64: sums (N,), or per token in the
                shape of `labels` (more exact in fp32). No gradient. (n,) counts as sums if n = N.
            group_size: K, or a (G,) int tensor of ragged sizes that sum to N.
            rewards: (N,) finite floats; None means preferences, the first completion of each group being the chosen
                one. If they saturate EXO's target, so that the loss exceeds its dtype, the group's loss is inf and its
                gradient 0.
            beta_pi, beta_r: above 0 and within fp32's range, like all such options; beta_r is used only with rewards.
            label_smoothing: eps in [0, 1), for EXO > 0; used only with preferences, as is `compat`.
            temperature, cu_seqlens, shift, ignore_index, impl: as in `token_logps`; packed input needs `cu_seqlens`.
            reduction: "mean" over `num_groups` (default: the groups of this call; pass the number in the whole
                optimizer step, over micro-batches and ranks), "sum", or "none" for (G,). The mean of no groups is 0.
            inplace_backward: the backward pass writes the gradient over `logits` and saves their size in memory;
                autograd then refuses every other use of them.
            compat: "official" takes the published code's log-targets on preferences with K = 2 (EXO's are (0, -10),
                not normalised).
            return_stats: return (loss, LossStats).

        Returns:
            fp32 (fp64 for fp64 logits) scalar, or (G,). The gradient has the dtype of `logits`, and is exactly 0 in
            rows without loss. A second backward pass is exact; double backward is refused.

        Raises:
            ValueError: a wrong shape, dtype, device or option; on a CPU, or with EXO_KERNELS_CHECK=1, wrong values
                (labels out of range, rewards or references not finite, sizes that do not add up). Unchecked, a bad
                label makes its own group NaN, as completions do that are all impossible.

        Warns:
            UserWarning: if values are checked, a sequence without labels in a group whose others have some.
        """
        validation.flag("inplace_backward", inplace_backward)
        validation.flag("return_stats", return_stats)
        layout = Layout(cu_seqlens, shift, ignore_index)
        rows = _prepare(logits, labels, layout, temperature, impl, sequences=True)
        if inplace_backward:
            validation.writable("logits", logits, rows.impl)
        ref = options.check_reference(ref_logps, labels, rows.targets, rows.n_sequences)
        settings = (objective, group_size, rewards, beta_pi, beta_r, label_smoothing, reduction, num_groups, compat)
        loss_options = LossOptions(*settings)
        loss_options.check(rows.n_sequences, logits.device)
        if rows.impl == "reference":
            keywords = layout._asdict() | {"temperature": temperature}
            tensors = (logits, labels, ref_logps)
            result = options.run_reference(
                loss_options, reference.LOSSES, tensors, ref, rows.targets, rows.seq_offsets, **keywords
            )
        else:
            logps, _, _ = logits_ops.token_logps(
                rows.scores, rows.targets, float(temperature), ignore_index, False, inplace_backward, rows.impl
            )
            result = options.group_loss(
                loss_options, logps, rows.targets, ref, rows.seq_offsets, ignore_index, rows.impl
            )
        return result if return_stats else result[0]

    published: LogitsLoss = options.publish(loss, f"fused_{objective}_loss", objective)
    return published


LOSSES: dict[str, LogitsLoss] = {objective: _fused_loss(objective) for objective in objectives.OBJECTIVES}
fused_exo_loss: LogitsLoss = LOSSES["exo"]
fused_dpo_loss: LogitsLoss = LOSSES["dpo"]
