"""The operators on hidden states: torch.library custom ops with fake implementations and autograd, as in logits.py.

`linear_token_logps` is behind the log-prob functions and the losses of every schedule except `group`;
`linear_group_loss` computes loss and gradients together, and its backward pass only multiplies by the loss's gradient.
The needs are arguments, because an operator's forward pass cannot ask autograd.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from exo_kernels import dispatch, validation, value_checks
from exo_kernels.numerics import LogitTransform, accumulator
from exo_kernels.objectives import Betas
from exo_kernels.ops.logits import checked_groups, group_function
from exo_kernels.schedules import matmul, passes, plan
from exo_kernels.schedules.chunks import HeadCall
from exo_kernels.schedules.vocab_parallel import Shard

Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]  # the tensors of a HeadCall
Gradients = tuple[Tensor, Tensor, Tensor]  # of hidden, weight and bias, each (0,) unless needed


def _call(tensors: Tensors, transform: Sequence[float], split: Sequence[int], group: str, impl: str) -> HeadCall:
    start, vocab, largest, chunk_rows = split
    shard = Shard(start, vocab, largest, group)
    return HeadCall(dispatch.implementation(impl), *tensors, LogitTransform(*transform), shard, chunk_rows)


@contextlib.contextmanager
def _no_autocast(device: torch.device) -> Iterator[None]:
    """Let the matmuls take the dtypes they get: the public functions have already converted for autocast."""
    with torch.autocast(device.type, enabled=False):
        yield


@torch.library.custom_op("exo_kernels::linear_token_logps", mutates_args=())
def linear_token_logps(
    hidden: Tensor,  # (N, T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N, T) int64
    ref_hidden: Tensor | None,  # (N, T, D)
    transform: Sequence[float],  # a LogitTransform
    ignore_index: int,
    entropy: bool,
    schedule: str,
    split: Sequence[int],  # start, vocabulary and largest part of a Shard; rows of a chunk
    group: str,  # of the Shard
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return log-probs (N, T), entropies and the reference's log-probs, (N, T) or (0,); then what backward needs."""
    if validation.check_values(hidden.device):
        value_checks.label_values(targets, split[1], ignore_index)
    call = _call((hidden, weight, bias, targets, ref_hidden), transform, split, group, impl)
    with _no_autocast(hidden.device):
        logps, entropies, ref_logps, stats, saved = passes.forward(call, schedule, ignore_index, entropy)
    return logps, entropies, ref_logps, stats, saved


@linear_token_logps.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ref_hidden: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    _, _, entropy, schedule, _, group, _ = options
    acc, shape = accumulator(hidden.dtype), targets.shape
    saved = hidden.new_empty(0, dtype=acc)
    if schedule == "deferred":
        saved = hidden.new_empty(hidden.shape, dtype=acc if group else hidden.dtype)
    elif schedule == "store":
        size = (torch.library.get_ctx().new_dynamic_size(), matmul.padded(weight.shape[0]))
        saved = hidden.new_empty(size, dtype=matmul.gradient_dtype(hidden.dtype, hidden.device))
    stats = (3, *(shape if schedule != plan.NO_GRAD else (0, 0)))
    sizes = (shape, shape if entropy else (0,), shape if ref_hidden is not None else (0,), stats)
    return *(hidden.new_empty(size, dtype=acc) for size in sizes), saved


@torch.library.custom_op("exo_kernels::linear_token_logps_backward", mutates_args=())
def linear_token_logps_backward(
    grad_logps: Tensor,
    grad_entropies: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logps: Tensor,
    entropies: Tensor,
    stats: Tensor,
    saved: Tensor,
    transform: Sequence[float],
    ignore_index: int,
    schedule: str,
    split: Sequence[int],
    group: str,
    impl: str,
    needs: Sequence[bool],  # gradients of hidden, weight, bias
) -> Gradients:
    call = _call((hidden, weight, bias, targets, None), transform, split, group, impl)
    scores = passes.Scores(logps, entropies, logps.new_empty(0), stats, saved)
    with _no_autocast(hidden.device):
        gradients = passes.backward(call, schedule, scores, grad_logps, grad_entropies, ignore_index, needs)
    d_hidden, d_weight, d_bias = gradients
    return d_hidden, d_weight.to(weight.dtype), d_bias if bias is None else d_bias.to(bias.dtype)


@linear_token_logps_backward.register_fake
def _(
    grad_logps: Tensor, grad_entropies: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> Gradients:
    needs, acc = rest[-1], accumulator(hidden.dtype)
    return (
        hidden.new_empty(hidden.shape) if needs[0] else hidden.new_empty(0, dtype=acc),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        hidden.new_empty(0, dtype=acc) if bias is None else bias.new_empty(bias.shape if needs[2] else (0,)),
    )


@torch.library.custom_op("exo_kernels::linear_deferred_backward", mutates_args=())
def linear_deferred_backward(saved: Tensor, logps: Tensor, grad_logps: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the hidden states' gradient under `deferred`."""
    return passes.multiply_deferred(saved, logps, grad_logps, dtype)


@linear_deferred_backward.register_fake
def _(saved: Tensor, logps: Tensor, grad_logps: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(saved, dtype=dtype)


def _save_token_logps(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, bias, targets, _, transform, ignore_index, ctx.entropy, schedule, *place = inputs
    ctx.dtype, ctx.deferred = hidden.dtype, schedule == "deferred"
    if ctx.deferred and not any(ctx.needs_input_grad[1:3]):
        hidden = weight = bias = None  # `saved` replaces them
    ctx.options = (transform, ignore_index, schedule, *place)
    logps, entropies, ref_logps, stats, saved = output
    ctx.mark_non_differentiable(ref_logps, stats, saved)
    ctx.set_materialize_grads(False)  # zeros for unused outputs would be most of the bytes
    ctx.save_for_backward(hidden, weight, bias, targets, logps, entropies, stats, saved)


def _backward_token_logps(
    ctx: Any, grad_logps: Tensor | None, grad_entropies: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    tensors = ctx.saved_tensors
    logps, saved = tensors[4], tensors[-1]
    if grad_logps is None:
        grad_logps = torch.zeros_like(logps)
    d_hidden = None
    if ctx.deferred:
        d_hidden, needs[0] = linear_deferred_backward(saved, logps, grad_logps, ctx.dtype), False
    grads: list[Tensor | None] = [None, None, None]
    if any(needs):
        entropy_grads = grad_entropies if ctx.entropy else None
        results = linear_token_logps_backward(grad_logps, entropy_grads, *tensors, *ctx.options, needs)
        grads = [grad if need else None for grad, need in zip(results, needs, strict=True)]
    return (d_hidden if ctx.deferred else grads[0]), *grads[1:], *(None,) * 9


linear_token_logps.register_autograd(_backward_token_logps, setup_context=_save_token_logps)


@torch.library.custom_op("exo_kernels::linear_group_loss", mutates_args=())
def linear_group_loss(
    hidden: Tensor,  # (N, T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N, T) int64
    ref_hidden: Tensor | None,  # (N, T, D)
    ref_logps: Tensor | None,  # (N,) sums, or (N, T) per token
    rewards: Tensor | None,  # (N,)
    seq_offsets: Tensor,  # (N+1,)
    group_offsets: Tensor,  # (G+1,)
    denominator: Tensor,  # ()
    objective: str,
    betas: Sequence[float],
    transform: Sequence[float],
    ignore_index: int,
    needs: Sequence[bool],  # gradients of hidden, weight, bias
    split: Sequence[int],
    group: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the losses' sum over the denominator (), the results of `group_loss` but the slopes, and its gradients."""
    if validation.check_values(hidden.device):
        value_checks.label_values(targets, split[1], ignore_index)
    offsets = checked_groups(seq_offsets, group_offsets, rewards, ref_logps, targets, ignore_index)
    call = _call((hidden, weight, bias, targets, ref_hidden), transform, split, group, impl)
    function = group_function(objective, impl)
    loss = passes.GroupLoss(function, ref_logps, rewards, *offsets, objective, Betas(*betas), ignore_index)
    with _no_autocast(hidden.device):
        results, gradients = passes.group_pass(call, loss, denominator, needs)
    losses, _, policy, ratios, p, q, tokens = results
    total = (losses.sum() / denominator).to(losses.dtype)
    return total, losses, policy, ratios, p, q, tokens, *gradients


@linear_group_loss.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    seq_offsets, group_offsets, needs = rest[5], rest[6], rest[12]
    acc, n_sequences = accumulator(hidden.dtype), seq_offsets.numel() - 1
    # fp16 could not hold the hidden states' gradient before it is multiplied by the loss's
    early = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    shapes = [(), (group_offsets.numel() - 1,), *[(n_sequences,)] * 5]
    return (
        *(hidden.new_empty(shape, dtype=acc) for shape in shapes),
        hidden.new_empty(hidden.shape, dtype=early) if needs[0] else hidden.new_empty(0, dtype=acc),
        hidden.new_empty(weight.shape if needs[1] else (0,), dtype=acc),
        hidden.new_empty(weight.shape[0] if needs[2] else 0, dtype=acc),
    )


@torch.library.custom_op("exo_kernels::linear_group_loss_backward", mutates_args=())
def linear_group_loss_backward(
    grad_loss: Tensor,  # ()
    d_hidden: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply each by the loss's gradient and round once. An operator, so that double backward is refused."""

    def times(x: Tensor, dtype: torch.dtype) -> Tensor:
        # one-dimensional: a 0-dimensional factor would be rounded to the dtype of what it multiplies
        return torch.mul(x, grad_loss.reshape(1), out=torch.empty_like(x, dtype=dtype))

    return times(d_hidden, hidden_dtype), times(d_weight, weight_dtype), times(d_bias, bias_dtype)


@linear_group_loss_backward.register_fake
def _(grad_loss: Tensor, *gradients_and_dtypes: Any) -> tuple[Tensor, ...]:
    gradients, dtypes = gradients_and_dtypes[:3], gradients_and_dtypes[3:]
    return tuple(torch.empty_like(x, dtype=dtype) for x, dtype in zip(gradients, dtypes, strict=True))


def _save_group_loss(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, bias = inputs[:3]
    ctx.dtypes = hidden.dtype, weight.dtype, accumulator(hidden.dtype) if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for unused outputs would be most of the bytes
    ctx.save_for_backward(*output[7:])


def _backward_group_loss(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 18
    gradients = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not grad_loss.requires_grad:
        grad_loss = grad_loss.clone().requires_grad_()  # so that double backward meets the operator, which refuses it
    if _is_one(grad_loss):  # as after loss.backward(): nothing to multiply or copy
        grads = tuple(x.to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True))
    else:
        grads = linear_group_loss_backward(grad_loss, *gradients, *ctx.dtypes)
    needs = ctx.needs_input_grad[:3]
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 15


def _is_one(grad: Tensor) -> bool:
    """Return True if it is known to be 1 at no cost (on a CPU), and the gradients may be handed out without a copy."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(grad) is not Tensor:
        return False
    if getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)():  # may run again
        return False
    return grad.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(grad) and grad.item() == 1


linear_group_loss.register_autograd(_backward_group_loss, setup_context=_save_group_loss)
