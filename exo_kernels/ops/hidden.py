"""The operators on hidden states as torch sees them: custom ops with fakes and autograd, as in ../ops.py.

`linear_token_logps` stands behind the log-prob functions and the losses of every schedule but `group`;
`linear_group_loss` makes loss and gradients in one go, and its backward pass only multiplies by the loss's gradient.
Needs are arguments, because an operator's forward pass cannot ask autograd.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from exo_kernels import dispatch, validation, value_checks
from exo_kernels.numerics import LogitTransform, accumulator
from exo_kernels.ops import logits as logits_ops
from exo_kernels.schedules import matmul, passes, plan
from exo_kernels.schedules.chunks import HeadCall
from exo_kernels.schedules.vocab_parallel import Shard

Parts = Sequence[int]  # start, vocabulary and largest part of a Shard


def _call(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_hidden: Tensor | None,
    curve: LogitTransform,
    parts: Parts,
    group: str,
    chunk_rows: int,
    impl: str,
) -> HeadCall:
    shard = Shard(parts[0], parts[1], parts[2], group)
    return HeadCall(dispatch.implementation(impl), hidden, weight, bias, targets, ref_hidden, curve, shard, chunk_rows)


@contextlib.contextmanager
def _as_given(device: torch.device) -> Iterator[None]:
    """The matmuls take the dtypes they are given: the choice that autocast makes was made at the door."""
    with torch.autocast(device.type, enabled=False):
        yield


@torch.library.custom_op("exo_kernels::linear_token_logps", mutates_args=())
def linear_token_logps(
    hidden: Tensor,  # (N, T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N, T) int64
    ref_hidden: Tensor | None,  # (N, T, D)
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    entropy: bool,
    schedule: str,
    chunk_rows: int,
    parts: Parts,
    group: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs (N, T), entropies (N, T) or (0,), the reference's log-probs likewise; then what backward wants."""
    if validation.check_values(hidden.device):
        value_checks.label_values(targets, parts[1], ignore_index)
    curve = LogitTransform.of(logit_scale, softcap, temperature)
    call = _call(hidden, weight, bias, targets, ref_hidden, curve, parts, group, chunk_rows, impl)
    with _as_given(hidden.device):
        logps, entropies, ref_logps, stats, kept = passes.forward(call, schedule, ignore_index, entropy)
    return logps, entropies, ref_logps, stats, kept


@linear_token_logps.register_fake
def _(hidden, weight, bias, targets, ref_hidden, logit_scale, softcap, temperature, ignore_index, entropy, schedule,
      chunk_rows, parts, group, impl):  # fmt: skip
    acc, shape = accumulator(hidden.dtype), targets.shape

    def new(*size, dtype=acc):
        return hidden.new_empty(size, dtype=dtype)

    kept = new(0)
    if schedule == "deferred":
        kept = new(*hidden.shape, dtype=acc if group else hidden.dtype)
    elif schedule == "store":
        rows = torch.library.get_ctx().new_dynamic_size()
        kept = new(rows, matmul.padded(weight.shape[0]), dtype=matmul.gradient_dtype(hidden.dtype, hidden.device))
    return (
        new(*shape), new(*(shape if entropy else (0,))), new(*(shape if ref_hidden is not None else (0,))),
        new(3, *(shape if schedule != plan.NO_GRAD else (0, 0))), kept,
    )  # fmt: skip


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
    kept: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    schedule: str,
    chunk_rows: int,
    parts: Parts,
    group: str,
    impl: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, each (0,) unless needed."""
    curve = LogitTransform.of(logit_scale, softcap, temperature)
    call = _call(hidden, weight, bias, targets, None, curve, parts, group, chunk_rows, impl)
    scores = passes.Scores(logps, entropies, logps.new_empty(0), stats, kept)
    needs = (needs_hidden, needs_weight, needs_bias)
    with _as_given(hidden.device):
        d_hidden, d_weight, d_bias = passes.backward(
            call, schedule, scores, grad_logps, grad_entropies, ignore_index, needs
        )
    return d_hidden, d_weight.to(weight.dtype), d_bias if bias is None else d_bias.to(bias.dtype)


@linear_token_logps_backward.register_fake
def _(grad_logps, grad_entropies, hidden, weight, bias, targets, logps, entropies, stats, kept, logit_scale, softcap,
      temperature, ignore_index, schedule, chunk_rows, parts, group, impl, needs_hidden, needs_weight,
      needs_bias):  # fmt: skip
    return _fake_gradients(hidden, weight, bias, needs_hidden, needs_weight, needs_bias)


def _fake_gradients(hidden, weight, bias, needs_hidden, needs_weight, needs_bias):
    acc = accumulator(hidden.dtype)
    return (
        hidden.new_empty(hidden.shape) if needs_hidden else hidden.new_empty(0, dtype=acc),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        bias.new_empty(bias.shape if needs_bias else (0,)) if bias is not None else hidden.new_empty(0, dtype=acc),
    )


@torch.library.custom_op("exo_kernels::linear_deferred_backward", mutates_args=())
def linear_deferred_backward(kept: Tensor, logps: Tensor, grad_logps: Tensor, dtype: torch.dtype) -> Tensor:
    """The hidden states' gradient under `deferred`."""
    return passes.multiply_deferred(kept, logps, grad_logps, dtype)


@linear_deferred_backward.register_fake
def _(kept, logps, grad_logps, dtype):
    return torch.empty_like(kept, dtype=dtype)


def _save_token_logps(ctx, inputs, output):
    hidden, weight, bias, targets = inputs[:4]
    ctx.dtype, ctx.deferred = hidden.dtype, inputs[10] == "deferred"
    if ctx.deferred and not any(ctx.needs_input_grad[1:3]):
        hidden = weight = bias = None  # all that is needed of them is in `kept`
    ctx.options = (*inputs[5:9], *inputs[10:])  # all but ref_hidden and entropy
    ctx.entropy = inputs[9]
    logps, entropies, ref_logps, stats, kept = output
    ctx.mark_non_differentiable(ref_logps, stats, kept)
    ctx.set_materialize_grads(False)  # zeros for every output that nobody asked about would be most of the bytes
    ctx.save_for_backward(hidden, weight, bias, targets, logps, entropies, stats, kept)


def _backward_token_logps(ctx, grad_logps, grad_entropies, *_):
    needs = ctx.needs_input_grad[:3]
    grad_entropies = grad_entropies if ctx.entropy else None
    saved = ctx.saved_tensors
    if grad_logps is None:
        grad_logps = torch.zeros_like(saved[4])
    deferred = None
    if ctx.deferred:
        deferred = linear_deferred_backward(saved[-1], saved[4], grad_logps, ctx.dtype)
        needs = (False, *needs[1:])
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs):
        grads = linear_token_logps_backward(grad_logps, grad_entropies, *saved, *ctx.options, *needs)
    if ctx.deferred:
        grads, needs = (deferred, *grads[1:]), (True, *needs[1:])
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 12


linear_token_logps.register_autograd(_backward_token_logps, setup_context=_save_token_logps)


@torch.library.custom_op("exo_kernels::linear_group_loss", mutates_args=())
def linear_group_loss(
    hidden: Tensor,  # (N, T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N, T) int64
    ref_hidden: Tensor | None,  # (N, T, D)
    ref_logps: Tensor | None,  # (N,) sums or (N, T) per token
    rewards: Tensor | None,  # (N,)
    seq_offsets: Tensor,  # (N+1,)
    group_offsets: Tensor,  # (G+1,)
    denominator: Tensor,  # ()
    per_token_ref: bool,
    objective: str,
    beta_pi: float,
    beta_r: float,
    log_chosen: float,
    log_others: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    chunk_rows: int,
    parts: Parts,
    group: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (): the sum over the denominator. What `group_loss` gives but the slopes. The loss's three gradients."""
    if validation.check_values(hidden.device):
        value_checks.label_values(targets, parts[1], ignore_index)
    seq_offsets, group_offsets = logits_ops.checked_groups(
        seq_offsets, group_offsets, rewards, ref_logps, targets, per_token_ref, ignore_index
    )
    curve = LogitTransform.of(logit_scale, softcap, temperature)
    call = _call(hidden, weight, bias, targets, ref_hidden, curve, parts, group, chunk_rows, impl)
    options = (objective, beta_pi, beta_r, (log_chosen, log_others), ignore_index)
    function = dispatch.group_implementation(objective, impl).group_loss
    loss = passes.GroupLoss(function, ref_logps, rewards, seq_offsets, group_offsets, per_token_ref, options)
    needs = (needs_hidden, needs_weight, needs_bias)
    with _as_given(hidden.device):
        results, gradients = passes.group_pass(call, loss, denominator, ignore_index, needs)
    losses, _, policy, ratios, p, q, tokens = results
    total = (losses.sum() / denominator).to(losses.dtype)
    return total, losses, policy, ratios, p, q, tokens, *gradients


@linear_group_loss.register_fake
def _(hidden, weight, bias, targets, ref_hidden, ref_logps, rewards, seq_offsets, group_offsets, denominator,
      per_token_ref, objective, beta_pi, beta_r, log_chosen, log_others, logit_scale, softcap, temperature,
      ignore_index, needs_hidden, needs_weight, needs_bias, chunk_rows, parts, group, impl):  # fmt: skip
    acc = accumulator(hidden.dtype)
    n_sequences, n_groups = seq_offsets.numel() - 1, group_offsets.numel() - 1

    def new(*size):
        return hidden.new_empty(size, dtype=acc)

    d_hidden = hidden.new_empty(hidden.shape, dtype=_early(hidden.dtype)) if needs_hidden else new(0)
    d_weight, d_bias = new(*(weight.shape if needs_weight else (0,))), new(weight.shape[0] if needs_bias else 0)
    return new(), new(n_groups), *(new(n_sequences) for _ in range(5)), d_hidden, d_weight, d_bias


def _early(dtype: torch.dtype) -> torch.dtype:
    """Of the hidden states' gradient before it is multiplied by the loss's: fp16 could not hold it."""
    return torch.float32 if dtype == torch.float16 else dtype


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
    """Each times the loss's gradient, rounded once. An operator, because double backward must not pass."""

    def times(x: Tensor, dtype: torch.dtype) -> Tensor:
        # one-dimensional: a 0-dimensional factor would be rounded to the dtype of what it multiplies
        return torch.mul(x, grad_loss.reshape(1), out=torch.empty_like(x, dtype=dtype))

    return times(d_hidden, hidden_dtype), times(d_weight, weight_dtype), times(d_bias, bias_dtype)


@linear_group_loss_backward.register_fake
def _(grad_loss, d_hidden, d_weight, d_bias, hidden_dtype, weight_dtype, bias_dtype):
    return (
        torch.empty_like(d_hidden, dtype=hidden_dtype), torch.empty_like(d_weight, dtype=weight_dtype),
        torch.empty_like(d_bias, dtype=bias_dtype),
    )  # fmt: skip


def _save_group_loss(ctx, inputs, output):
    hidden, weight, bias = inputs[:3]
    ctx.dtypes = hidden.dtype, weight.dtype, accumulator(hidden.dtype) if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for every output that nobody asked about would be most of the bytes
    ctx.save_for_backward(*output[7:])


def _backward_group_loss(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 27
    gradients = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not grad_loss.requires_grad:
        grad_loss = grad_loss.clone().requires_grad_()  # double backward must meet the operator, which refuses it
    if _is_one(grad_loss):  # as after loss.backward(): nothing to multiply, and nothing to copy
        grads = tuple(x.to(dtype) for x, dtype in zip(gradients, ctx.dtypes, strict=True))
    else:
        grads = linear_group_loss_backward(grad_loss, *gradients, *ctx.dtypes)
    needs = ctx.needs_input_grad[:3]
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 24


def _is_one(grad: Tensor) -> bool:
    """Asked where it costs nothing, on a CPU; and where nobody else can see the gradients that are handed out."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(grad) is not Tensor or _graph_is_kept():
        return False
    return grad.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(grad) and grad.item() == 1


def _graph_is_kept() -> bool:
    """Return whether this backward pass may run again; True if torch does not say."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


linear_group_loss.register_autograd(_backward_group_loss, setup_context=_save_group_loss)
