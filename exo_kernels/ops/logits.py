"""The operators on logits: torch.library custom ops with fake implementations and autograd.

`token_logps` turns logits into log-probabilities, `group_loss` turns those into losses. Together they are the fused
losses, because the gradient of the second is one coefficient per row, which is all that the first's backward pass
takes. Both run in torch.compile(fullgraph=True) and refuse double backward: their backward ops have no derivative. The
implementation is an argument, imported on first use.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from exo_kernels import groups, validation, value_checks
from exo_kernels.dispatch import implementation
from exo_kernels.numerics import accumulator
from exo_kernels.objectives import OBJECTIVES, Betas


def checked_groups(
    seq_offsets: Tensor,
    group_offsets: Tensor,
    rewards: Tensor | None,
    ref_logps: Tensor | None,
    targets: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Check offsets, rewards and reference if values may be read; otherwise clamp the offsets."""
    if validation.check_values(targets.device):
        value_checks.group_values(seq_offsets, group_offsets, rewards, ref_logps, targets, ignore_index)
        return seq_offsets, group_offsets
    n_sequences = seq_offsets.numel() - 1
    return groups.within(seq_offsets, targets.numel()), groups.within(group_offsets, n_sequences)


def group_function(objective: str, impl: str) -> Callable[..., tuple[Tensor, ...]]:
    """Return the implementation's group pass; an objective without a kernel runs in torch."""
    function: Callable[..., tuple[Tensor, ...]] = implementation(
        impl if OBJECTIVES[objective].kernel else "chunked"
    ).group_loss
    return function


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
    """Return log-probs (N, T), entropies (N, T) or (0,), and what the implementation's backward pass needs."""
    if validation.check_values(logits.device):
        value_checks.label_values(targets, logits.shape[-1], ignore_index)
    logps, entropies, saved = implementation(impl).token_logps(logits, targets, temperature, ignore_index, entropy)
    return logps, entropies, saved


@token_logps.register_fake
def _(
    logits: Tensor, targets: Tensor, temperature: float, ignore_index: int, entropy: bool, inplace: bool, impl: str
) -> tuple[Tensor, ...]:
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
    """Return the gradient of the logits."""
    module = implementation(impl)
    grad: Tensor = module.new_gradient(logits)
    module.token_logps_backward(
        grad, grad_logps, grad_entropies, logits, targets, entropies, saved, temperature, ignore_index
    )
    return grad


@token_logps_backward.register_fake
def _(grad_logps: Tensor, grad_entropies: Tensor | None, logits: Tensor, *_: Any) -> Tensor:
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
    """Write the gradient over the logits. torch raises their version, so other uses of them are refused."""
    implementation(impl).token_logps_backward(
        logits, grad_logps, grad_entropies, logits, targets, entropies, saved, temperature, ignore_index
    )


@token_logps_backward_.register_fake
def _(*_: Any) -> None:
    return None


def _save_token_logps(ctx: Any, inputs: Any, output: Any) -> None:
    logits, targets, ctx.temperature, ctx.ignore_index, ctx.entropy, ctx.inplace, ctx.impl = inputs
    ctx.save_for_backward(logits, targets, output[1], output[2])


def _backward_token_logps(
    ctx: Any, grad_logps: Tensor, grad_entropies: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    logits, targets, entropies, saved = ctx.saved_tensors
    grad_entropies = grad_entropies if ctx.entropy else None
    op = token_logps_backward_ if ctx.inplace else token_logps_backward
    tensors = (grad_logps, grad_entropies, logits, targets, entropies, saved)
    grad = op(*tensors, ctx.temperature, ctx.ignore_index, ctx.impl)
    return logits.detach() if ctx.inplace else grad, *(None,) * 6


token_logps.register_autograd(_backward_token_logps, setup_context=_save_token_logps)


@torch.library.custom_op("exo_kernels::group_loss", mutates_args=())
def group_loss(
    logps: Tensor,  # (n,)
    targets: Tensor,  # (n,) int64
    ref_logps: Tensor,  # (N,) sums, or (N, T) per token
    rewards: Tensor | None,  # (N,), None for preferences
    seq_offsets: Tensor,  # (N+1,)
    group_offsets: Tensor,  # (G+1,)
    objective: str,
    betas: Sequence[float],
    ignore_index: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss (G,), dL/dS (N,), log-probs (N,), log-ratios S (N,), p (N,), q (N,), tokens (N,)."""
    offsets = checked_groups(seq_offsets, group_offsets, rewards, ref_logps, targets, ignore_index)
    settings = (ref_logps.dim() == 2, objective, Betas(*betas), ignore_index)
    function = group_function(objective, impl)
    loss, slopes, policy, ratios, p, q, tokens = function(
        logps, targets, ref_logps.flatten(), rewards, *offsets, *settings
    )
    return loss, slopes, policy, ratios, p, q, tokens


@group_loss.register_fake
def _(logps: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    n_sequences, n_groups = (offsets.numel() - 1 for offsets in inputs[3:5])
    return tuple(logps.new_empty(n) for n in (n_groups,) + (n_sequences,) * 6)


def _save_group_loss(ctx: Any, inputs: Any, output: Any) -> None:
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
    """Return one coefficient per row. An operator, so that double backward (which would be wrong) is refused."""
    per_sequence = slopes * groups.spread(grad_loss, group_offsets, slopes.numel())
    return groups.spread(per_sequence, seq_offsets, n)


@group_loss_backward.register_fake
def _(grad_loss: Tensor, slopes: Tensor, seq_offsets: Tensor, group_offsets: Tensor, n: int) -> Tensor:
    return slopes.new_empty(n)


def _backward_group_loss(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return group_loss_backward(grad_loss, *ctx.saved_tensors, ctx.n), *(None,) * 9


group_loss.register_autograd(_backward_group_loss, setup_context=_save_group_loss)


@torch.library.custom_op("exo_kernels::sum_sequences", mutates_args=())
def sum_sequences(
    logps: Tensor,  # (n,)
    seq_offsets: Tensor,  # (N+1,)
) -> Tensor:  # (N,)
    """Sum the log-probs of every sequence in fp64."""
    if validation.check_values(seq_offsets.device):
        value_checks.offset_values("cu_seqlens", seq_offsets, logps.numel(), 0)
    else:
        seq_offsets = groups.within(seq_offsets, logps.numel())
    return groups.segment_sum(logps.double(), seq_offsets).to(logps.dtype)


@sum_sequences.register_fake
def _(logps: Tensor, seq_offsets: Tensor) -> Tensor:
    return logps.new_empty(seq_offsets.numel() - 1)


def _save_sum_sequences(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.n = inputs[0].numel()
    ctx.save_for_backward(inputs[1])


def _backward_sum_sequences(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return groups.spread(grad, ctx.saved_tensors[0], ctx.n), None


sum_sequences.register_autograd(_backward_sum_sequences, setup_context=_save_sum_sequences)
