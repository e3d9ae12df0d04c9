"""The reference implementation: every public function, written to be obviously right and for nothing else.

It materialises everything, loops in Python over sequences and groups, and leaves the gradients to autograd. It computes
in the dtype of its input, at least fp32. Tests and benchmarks compare with it; `impl="reference"` runs it. It shares
with the other implementations only the equations and the names of the results (objectives.py). Arguments are those of
the public functions and are not checked here.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from exo_kernels import objectives

Result = TypeVar("Result")


def _rows(logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, shift: bool | None) -> list[tuple[Tensor, Tensor]]:
    """Return (logits (t, V), targets (t,)) of every sequence, without the last row and first label if shifted."""
    labels = labels.long()
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return [(logits[a:b], labels[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    if shift is None or shift:
        return [(x[:-1], y[1:]) for x, y in zip(logits, labels, strict=True)]
    return list(zip(logits, labels, strict=True))


def _sequence_token_logps(x: Tensor, y: Tensor, temperature: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies (t,) of one sequence; 0 where ignored."""
    keep = y != ignore_index
    x = x if x.dtype == torch.float64 else x.float()
    log_p = torch.log_softmax(x[keep] / temperature, dim=-1)  # (rows with loss, V)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * torch.where(p > 0, log_p, 0.0), 0.0).sum(-1)
    logp = log_p.gather(-1, y[keep, None]).squeeze(-1)
    logp = torch.where((x[keep] == -torch.inf).all(-1), -torch.inf, logp)  # a row of -inf
    zeros = torch.zeros(y.shape, dtype=x.dtype, device=x.device)
    return zeros.masked_scatter(keep, logp), zeros.masked_scatter(keep, entropy)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    shift: bool | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    if logits.dim() == 2:
        results = [_sequence_token_logps(logits, labels.long(), temperature, ignore_index)]
        logps, entropies = results[0]
    else:
        rows = _rows(logits, labels, None, shift)
        results = [_sequence_token_logps(x, y, temperature, ignore_index) for x, y in rows]
        pad = logits.shape[1] - (rows[0][1].numel() if rows else 0)  # the last row, when shifted
        empty = logits.to(torch.promote_types(logits.dtype, torch.float32)).sum(-1)  # attached to the graph
        logps, entropies = (
            torch.stack([torch.nn.functional.pad(r[i], (0, pad)) for r in results]) if results else empty
            for i in (0, 1)
        )
    return (logps, entropies) if return_entropy else logps


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    shift: bool | None = None,
    ignore_index: int = -100,
) -> Tensor:
    sums = [
        _sequence_token_logps(x, y, temperature, ignore_index)[0].double().sum()
        for x, y in _rows(logits, labels, cu_seqlens, shift)
    ]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.stack(sums).to(dtype) if sums else logits.to(dtype).sum()[None][:0]  # attached to the graph


def _group_losses(
    log_ratios: Tensor,  # (N,) float64
    objective: str,
    group_size: int | Tensor,
    rewards: Tensor | None,
    beta_pi: float,
    beta_r: float,
    label_smoothing: float,
    compat: str | None,
    dtype: torch.dtype,  # of the result
) -> tuple[Tensor, Tensor, Tensor]:  # losses (G,), p (N,), q (N,)
    n = log_ratios.numel()
    sizes = [group_size] * (n // group_size) if isinstance(group_size, int) else group_size.tolist()
    losses, ps, qs, first = [log_ratios[:0]], [log_ratios[:0]], [log_ratios[:0]], 0
    for size in sizes:
        group = slice(first, first + size)
        log_p = objectives.policy_log_probs(log_ratios[None, group], beta_pi)
        if rewards is None:
            log_targets = objectives.preference_log_targets(objective, label_smoothing, compat)
            log_q = objectives.preference_log_target(torch.ones_like(log_p).bool(), *log_targets)
        else:
            log_q = objectives.reward_log_target(rewards[None, group].double(), beta_r)
        losses.append(objectives.OBJECTIVES[objective].function(log_p, log_q, torch.finfo(dtype).max)[0])
        ps.append(log_p[0].exp())
        qs.append(log_q[0].exp())
        first += size
    return torch.cat(losses), torch.cat(ps), torch.cat(qs)


def _reduce(losses: Tensor, reduction: str, num_groups: int | float | Tensor | None) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (num_groups if num_groups is not None else max(losses.numel(), 1))


def preference_loss(
    policy_logps: Tensor,  # (N,)
    ref_logps: Tensor,  # (N,)
    *,
    objective: str = "exo",
    group_size: int | Tensor = 2,
    rewards: Tensor | None = None,
    beta_pi: float = 0.1,
    beta_r: float = 1.0,
    label_smoothing: float | None = None,
    reduction: str = "mean",
    num_groups: int | float | Tensor | None = None,
    compat: str | None = None,
) -> Tensor:
    if label_smoothing is None:
        label_smoothing = objectives.OBJECTIVES[objective].label_smoothing
    log_ratios = policy_logps.double() - ref_logps.detach().double()
    options = (objective, group_size, rewards, beta_pi, beta_r, label_smoothing, compat, policy_logps.dtype)
    losses = _group_losses(log_ratios, *options)[0]
    return _reduce(losses, reduction, num_groups).to(policy_logps.dtype)


def _fused_loss(
    objective: str,
    logits: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    *,
    group_size: int | Tensor = 2,
    rewards: Tensor | None = None,
    beta_pi: float = 0.1,
    beta_r: float = 1.0,
    label_smoothing: float | None = None,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    shift: bool | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_groups: int | float | Tensor | None = None,
    compat: str | None = None,
    return_stats: bool = False,
    per_token_ref: bool = False,  # ref_logps (n,) are not (N,) sums, even if n = N
) -> Any:
    if label_smoothing is None:
        label_smoothing = objectives.OBJECTIVES[objective].label_smoothing
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = _rows(logits, labels, cu_seqlens, shift)
    keeps = [y != ignore_index for _, y in rows]
    empty = logits.double().sum()[None][:0]  # (0,), attached to the graph
    policy = torch.cat(
        [empty] + [_sequence_token_logps(x, y, temperature, ignore_index)[0].double().sum()[None] for x, y in rows]
    )  # (N,)
    ref = ref_logps.detach().double()
    if per_token_ref or ref.shape != policy.shape:
        parts = torch.split(ref, cu_seqlens.diff().tolist()) if cu_seqlens is not None else ref.unbind()
        sums = [r[: k.numel()][k].sum()[None] for r, k in zip(parts, keeps, strict=True)]
        ref = torch.cat([empty.detach(), *sums])
    log_ratios = policy - ref
    options = (group_size, rewards, beta_pi, beta_r, label_smoothing, compat, dtype)
    losses, p, q = _group_losses(log_ratios, objective, *options)
    loss = _reduce(losses, reduction, num_groups).to(dtype)
    if not return_stats:
        return loss
    stats = [t.detach().to(dtype) for t in (policy, beta_pi * log_ratios, p, q, losses)]
    stats.append(torch.tensor([int(k.sum()) for k in keeps], dtype=torch.long, device=logits.device))
    return loss, objectives.LossStats(*stats)


Function = Callable[..., Any]
LOSSES: dict[str, Function] = {name: functools.partial(_fused_loss, name) for name in objectives.OBJECTIVES}
fused_exo_loss: Function = LOSSES["exo"]
fused_dpo_loss: Function = LOSSES["dpo"]


def _logits(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    shift: bool | None,
    ignore_index: int,
) -> Tensor:  # (..., V)
    """Return all logits, before the temperature; those of rows without loss are computed from zeros."""
    scored = labels != ignore_index
    if hidden.dim() == 3 and (shift is None or shift):
        scored = torch.nn.functional.pad(scored[:, 1:], (0, 1))
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    x = hidden.to(dtype).masked_fill(~scored[..., None], 0.0) @ weight.to(dtype).T
    if bias is not None:
        x = x + bias.to(dtype)
    x = logit_scale * x
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def _from_hidden(function: Callable[..., Result]) -> Callable[..., Result]:
    """Turn a function of logits into one of hidden states."""

    def linear(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *ref_logps: Tensor,
        bias: Tensor | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        shift: bool | None = None,
        ignore_index: int = -100,
        **options: Any,
    ) -> Result:
        logits = _logits(hidden, weight, labels, bias, logit_scale, softcap, shift, ignore_index)
        return function(logits, labels, *ref_logps, shift=shift, ignore_index=ignore_index, **options)

    return linear


linear_token_logps: Callable[..., Tensor | tuple[Tensor, Tensor]] = _from_hidden(token_logps)
linear_sequence_logps: Callable[..., Tensor] = _from_hidden(sequence_logps)
ROW_OPTIONS = {"bias", "logit_scale", "softcap", "temperature", "cu_seqlens", "shift", "ignore_index"}


def _fused_linear_loss(
    objective: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None = None,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **options: Any,
) -> Any:
    per_token_ref = ref_logps is None
    if ref_logps is None:
        scoring = {name: value for name, value in options.items() if name in ROW_OPTIONS}
        if ref_weight is not None or ref_bias is not None:  # another head
            scoring["bias"] = ref_bias
        with torch.no_grad():
            matrix = weight if ref_weight is None else ref_weight
            ref_logps, _ = linear_token_logps(ref_hidden, matrix, labels, return_entropy=True, **scoring)
    loss = _from_hidden(LOSSES[objective])
    return loss(hidden, weight, labels, ref_logps, per_token_ref=per_token_ref, **options)


LINEAR_LOSSES: dict[str, Function] = {
    name: functools.partial(_fused_linear_loss, name) for name in objectives.OBJECTIVES
}
fused_linear_exo_loss: Function = LINEAR_LOSSES["exo"]
fused_linear_dpo_loss: Function = LINEAR_LOSSES["dpo"]
