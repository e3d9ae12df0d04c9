"""The two operators as torch sees them: torch.library custom ops with fake implementations and autograd.

`token_logps` turns logits into log-probabilities, `group_loss` turns those into losses; together they are the fused
losses, because the gradient of the second is one coefficient a row, and the first's backward pass takes just that.
Both run in torch.compile(fullgraph=True) and forbid double backward (their backward ops have no derivative).
The implementation is an argument, loaded on first use.
"""

from typing import Any

import torch
from torch import Tensor

from exo_kernels import groups, validation, value_checks
from exo_kernels.dispatch import group_implementation, implementation
from exo_kernels.numerics import accumulator


def checked_offsets(name: str, offsets: Tensor, end: int, minimum: int) -> Tensor:
    """Offsets, checked where values may be looked at and kept within bounds elsewhere."""
    if not validation.check_values(offsets.device):
        return groups.within(offsets, end)
    value_checks.offset_values(name, offsets, end, minimum)
    return offsets


def check_groups(
    seq_offsets: Tensor,
    group_offsets: Tensor,
    rewards: Tensor | None,
    ref_logps: Tensor | None,
    targets: Tensor,
    per_token_ref: bool,
    ignore_index: int,
) -> None:
    """Check the values that a loss depends on beside the labels. ValueError for the first that is wrong."""
    if rewards is not None:
        value_checks.reward_values(rewards)
    value_checks.offset_values("cu_seqlens", seq_offsets, targets.numel(), 0)
    value_checks.offset_values("group_size", group_offsets, seq_offsets.numel() - 1, 1)
    value_checks.reference_values(ref_logps, targets, seq_offsets, group_offsets, per_token_ref, ignore_index)


def checked_groups(
    seq_offsets: Tensor,
    group_offsets: Tensor,
    rewards: Tensor | None,
    ref_logps: Tensor | None,
    targets: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The offsets, checked with `check_groups` where values may be looked at and kept within bounds elsewhere."""
    if validation.check_values(targets.device):
        check_groups(seq_offsets, group_offsets, rewards, ref_logps, targets, *options)
        return seq_offsets, group_offsets
    n_sequences = seq_offsets.numel() - 1
    return groups.within(seq_offsets, targets.numel()), groups.within(group_offsets, n_sequences)


@torch.library.custom_op("exo_kernels::token_logps", mutates_args=())
def token_logps(
    logits: Tensor,  # (N, T, V)
    targets: Tensor,  # (N, T) int64
    temperature: float,
    ignore_index: int,
    entropy: bool,
    inplace_backward: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (N, T), entropies (N, T) or (0,), and what the implementation's backward pass wants again."""
    if validation.check_values(logits.device):
        value_checks.label_values(targets, logits.shape[-1], ignore_index)
    return implementation(impl).token_logps(logits, targets, temperature, ignore_index, entropy)


@token_logps.register_fake
def _(logits, targets, temperature, ignore_index, entropy, inplace_backward, impl):
    dtype = accumulator(logits.dtype)
    saved = (2, *targets.shape) if impl == "triton" else (0,)
    shapes = (targets.shape, targets.shape if entropy else (0,), saved)
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.custom_op("exo_kernels::token_logps_backward", mutates_args=())
def token_logps_backward(
    grad_logps: Tensor,
    grad_entropies: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    entropies: Tensor,
    saved: Tensor,
    temperature: float,
    ignore_index: int,
    impl: str,
) -> Tensor:
    module = implementation(impl)
    grad = module.new_gradient(logits)
    module.token_logps_backward(
        grad, grad_logps, grad_entropies, logits, targets, entropies, saved, temperature, ignore_index
    )
    return grad


@token_logps_backward.register_fake
def _(grad_logps, grad_entropies, logits, targets, entropies, saved, temperature, ignore_index, impl):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("exo_kernels::token_logps_backward_", mutates_args=("logits",))
def token_logps_backward_(
    grad_logps: Tensor,
    grad_entropies: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    entropies: Tensor,
    saved: Tensor,
    temperature: float,
    ignore_index: int,
    impl: str,
) -> None:
    """The gradient written over the logits; torch raises their version, so whoever else saved them is told."""
    implementation(impl).token_logps_backward(
        logits, grad_logps, grad_entropies, logits, targets, entropies, saved, temperature, ignore_index
    )


@token_logps_backward_.register_fake
def _(grad_logps, grad_entropies, logits, targets, entropies, saved, temperature, ignore_index, impl):
    return None


def _save_token_logps(ctx, inputs, output):
    logits, targets, ctx.temperature, ctx.ignore_index, ctx.entropy, ctx.inplace, ctx.impl = inputs
    ctx.save_for_backward(logits, targets, output[1], output[2])


def _backward_token_logps(ctx, grad_logps, grad_entropies, _):
    logits, targets, entropies, saved = ctx.saved_tensors
    grad_entropies = grad_entropies if ctx.entropy else None
    op = token_logps_backward_ if ctx.inplace else token_logps_backward
    arguments = (grad_logps, grad_entropies, logits, targets, entropies, saved)
    grad = op(*arguments, ctx.temperature, ctx.ignore_index, ctx.impl)
    return logits.detach() if ctx.inplace else grad, None, None, None, None, None, None


token_logps.register_autograd(_backward_token_logps, setup_context=_save_token_logps)


@torch.library.custom_op("exo_kernels::group_loss", mutates_args=())
def group_loss(
    logps: Tensor,  # (n,)
    targets: Tensor,  # (n,) int64
    ref_logps: Tensor,  # (N,) sums or (n,) per token
    rewards: Tensor | None,  # (N,), None for preferences
    seq_offsets: Tensor,  # (N+1,)
    group_offsets: Tensor,  # (G+1,)
    per_token_ref: bool,
    objective: str,
    beta_pi: float,
    beta_r: float,
    log_chosen: float,
    log_others: float,
    ignore_index: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (G,), dL/dS (N,), log-probs (N,), log-ratios S (N,), p (N,), q (N,), tokens (N,)."""
    seq_offsets, group_offsets = checked_groups(
        seq_offsets, group_offsets, rewards, ref_logps, targets, per_token_ref, ignore_index
    )
    arguments = (per_token_ref, objective, beta_pi, beta_r, (log_chosen, log_others), ignore_index)
    module = group_implementation(objective, impl)
    return module.group_loss(logps, targets, ref_logps, rewards, seq_offsets, group_offsets, *arguments)


@group_loss.register_fake
def _(logps, targets, ref_logps, rewards, seq_offsets, group_offsets, *options):
    n_sequences, n_groups = seq_offsets.numel() - 1, group_offsets.numel() - 1
    return tuple(logps.new_empty(n) for n in (n_groups,) + (n_sequences,) * 6)


def _save_group_loss(ctx, inputs, output):
    ctx.n = inputs[0].numel()
    ctx.save_for_backward(output[1], inputs[4], inputs[5])


@torch.library.custom_op("exo_kernels::group_loss_backward", mutates_args=())
def group_loss_backward(
    grad_loss: Tensor,  # (G,)
    slopes: Tensor,  # (N,)
    seq_offsets: Tensor,  # (N+1,)
    group_offsets: Tensor,  # (G+1,)
    n: int,
) -> Tensor:  # (n,)
    """One coefficient a row. An operator because slopes depend on what they multiply: double backward must not pass."""
    per_sequence = slopes * groups.spread(grad_loss, group_offsets, slopes.numel())
    return groups.spread(per_sequence, seq_offsets, n)


@group_loss_backward.register_fake
def _(grad_loss, slopes, seq_offsets, group_offsets, n):
    return slopes.new_empty(n)


def _backward_group_loss(ctx, grad_loss, *_):
    return (group_loss_backward(grad_loss, *ctx.saved_tensors, ctx.n),) + (None,) * 13


group_loss.register_autograd(_backward_group_loss, setup_context=_save_group_loss)


@torch.library.custom_op("exo_kernels::sum_sequences", mutates_args=())
def sum_sequences(
    logps: Tensor,  # (n,)
    seq_offsets: Tensor,  # (N+1,)
) -> Tensor:  # (N,)
    """The log-probs of every sequence, added up in fp64."""
    seq_offsets = checked_offsets("cu_seqlens", seq_offsets, logps.numel(), 0)
    return groups.segment_sum(logps.double(), seq_offsets).to(logps.dtype)


@sum_sequences.register_fake
def _(logps, seq_offsets):
    return logps.new_empty(seq_offsets.numel() - 1)


def _save_sum_sequences(ctx, inputs, output):
    ctx.n = inputs[0].numel()
    ctx.save_for_backward(inputs[1])


def _backward_sum_sequences(ctx, grad):
    return groups.spread(grad, ctx.saved_tensors[0], ctx.n), None


sum_sequences.register_autograd(_backward_sum_sequences, setup_context=_save_sum_sequences)
