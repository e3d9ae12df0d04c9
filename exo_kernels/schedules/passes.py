"""The four schedules, as loops over chunks of rows with loss: matmul, what lies between, matmul, matmul.

deferred   forward leaves the gradient of every row's log-prob in the hidden state; backward multiplies by a scalar
group      whole groups at a time, so that the loss and its slopes are known while the chunk is there (group_pass)
store      forward leaves the gradients of all logits, backward multiplies them out
recompute  forward leaves three numbers a row, backward makes the logits again

In all of them a chunk's logits turn in place into d, the gradient of the rows' negative log-probs. The coefficient of a
row (its sequence's slope, the only thing that the loss decides) never touches d: it goes to the thin side of the
matmuls, dH = c (d W) and dW = d^T (c H). Left out: the choice (plan.py), autograd (ops.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exo_kernels import groups
from exo_kernels.schedules import matmul, plan, vocab_parallel
from exo_kernels.schedules.chunks import Gradients, HeadCall, Rows, Workspace


def _indices(mask: Tensor) -> Rows:
    n, t = mask.nonzero(as_tuple=True)
    return n, t


def _take(rows: Rows, part: slice) -> Rows:
    return rows[0][part], rows[1][part]


DEFERRED_CPU = 2**22  # bytes


class Scores(NamedTuple):
    """The results of a schedule's forward pass."""

    logps: Tensor  # (N, T)
    entropies: Tensor  # (N, T) or (0,)
    ref_logps: Tensor  # (N, T) or (0,)
    stats: Tensor  # (3, N, T), (3, 0, 0) for `score`
    kept: Tensor  # deferred: (N, T, D), dH of unit coefficients; store: (n, V padded), d of the rows with loss; or (0,)


def forward(call: HeadCall, schedule: str, ignore_index: int, entropy: bool) -> Scores:
    """Log-probs by any schedule but `group`; `score` leaves nothing for a backward pass."""
    shape = call.targets.shape
    rows = _indices(call.targets != ignore_index)
    n = len(rows[0])
    result = Scores(
        call.zeros(*shape),
        call.zeros(*(shape if entropy else (0,))),
        call.zeros(*(shape if call.ref_hidden is not None else (0,))),
        call.zeros(3, *(shape if schedule != plan.NO_GRAD else (0, 0))),
        _new_kept(call, schedule, n),
    )
    if not n:
        return result
    parts = list(plan.even(n, call.chunk_rows))
    work = Workspace(call, max(part.stop - part.start for part in parts))
    for part in parts:
        some = _take(rows, part)
        hidden, targets, a = work.logits(some, with_ref=True)
        a, ref = a[: len(targets)], a[len(targets) :]
        if schedule == "store":
            score = work.score_and_gradient(result.kept[part, : a.shape[1]], a, hidden, targets)
        elif schedule == "deferred":
            d = work.place_of_gradient(a)
            score = work.score_and_gradient(d, a, hidden, targets)
            unit = matmul.hidden_gradient(d, call.weight).mul_(-call.curve.factor)
            result.kept[some] = unit.to(result.kept.dtype)
        else:
            score = work.score(a, hidden, targets, entropy)
        result.logps[some] = score.logps
        if entropy:
            result.entropies[some] = score.entropies
        if result.stats.numel():
            result.stats[(slice(None), *some)] = score.stats
        work.score_ref(ref, some, targets, result.ref_logps)
    if schedule == "deferred":
        vocab_parallel.sum_(result.kept, call.shard)
    elif schedule == "store":
        result.kept[:, len(call.weight) :] = 0.0  # nobody reads the padding, but an operator's results are defined
    return result


def _new_kept(call: HeadCall, schedule: str, n: int) -> Tensor:
    if schedule == "deferred":
        dtype = call.acc if call.shard.parallel else call.hidden.dtype
        return torch.zeros(call.hidden.shape, dtype=dtype, device=call.hidden.device)
    if schedule == "store":
        dtype = matmul.gradient_dtype(call.hidden.dtype, call.hidden.device)
        return call.implementation.new_buffer((n, matmul.padded(len(call.weight))), dtype, call.hidden.device)
    return call.zeros(0)


def backward(
    call: HeadCall,
    schedule: str,
    scores: Scores,
    grad_logps: Tensor,  # (N, T)
    grad_entropies: Tensor | None,  # (N, T)
    ignore_index: int,
    needs: tuple[bool, bool, bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (its dtype), weight and bias (accumulators); (0,) where not needed.

    Under `deferred` those of the head alone, made as `recompute` makes them: see `multiply_deferred`.
    """
    scored = call.targets != ignore_index
    if schedule == "store":
        return _backward_store(call, scores, grad_logps, _indices(scored), needs)
    wanted = scored & (grad_logps != 0)
    if grad_entropies is not None:
        wanted |= scored & (grad_entropies != 0)
    return _backward_recompute(call, scores, grad_logps, grad_entropies, _indices(wanted), needs)


def multiply_deferred(
    kept: Tensor,  # (N, T, D), dH of unit coefficients
    logps: Tensor,  # (N, T)
    grad_logps: Tensor,  # (N, T)
    dtype: torch.dtype,
) -> Tensor:  # (N, T, D)
    """The gradient in the hidden states. Zero coefficients give zeros; rows without a log-prob, NaN."""
    g = torch.where(logps.isnan() & (grad_logps != 0), torch.nan, grad_logps).view(-1, 1)  # (NT, 1)
    result = torch.empty(kept.shape, dtype=dtype, device=kept.device)
    rows, out = kept.view(-1, kept.shape[-1]), result.view(-1, kept.shape[-1])
    step = max(1, DEFERRED_CPU // max(4 * rows.shape[1], 1)) if g.device.type == "cpu" else max(len(g), 1)
    for i in range(0, len(g), step):  # on a CPU torch would convert all of a 16-bit tensor at once
        part = slice(i, i + step)
        torch.mul(rows[part], g[part], out=out[part])
    return result.masked_fill_((g == 0).view(*kept.shape[:2], 1), 0.0)


def _backward_store(
    call: HeadCall, scores: Scores, grad_logps: Tensor, rows: Rows, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    sums = Gradients(call, *needs)
    for part in plan.even(len(rows[0]), call.chunk_rows):
        some = _take(rows, part)
        d = scores.kept[part, : len(call.weight)]
        coefficient = grad_logps[some].to(call.acc) * -call.curve.factor
        sums.add(some, d, call.hidden[some], coefficient, scores.logps[some])
    return sums.finish()


def _backward_recompute(
    call: HeadCall,
    scores: Scores,
    grad_logps: Tensor,
    grad_entropies: Tensor | None,
    rows: Rows,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    sums = Gradients(call, *needs)
    n = len(rows[0])
    parts = list(plan.even(n, call.chunk_rows))
    work = Workspace(call, max(part.stop - part.start for part in parts)) if n else None
    for part in parts:
        assert work is not None
        some = _take(rows, part)
        hidden, targets, a = work.logits(some)
        d = work.place_of_gradient(a)
        stats = scores.stats[(slice(None), *some)]
        g = grad_logps[some].to(call.acc)
        if grad_entropies is None:
            work.gradient(d, a, targets, stats)
            coefficient = g * -call.curve.factor
        else:
            work.gradient(d, a, targets, stats, scores.entropies[some], g, grad_entropies[some].to(call.acc))
            coefficient = torch.full_like(g, -call.curve.factor)
        sums.add(some, d, hidden, coefficient, scores.logps[some])
    return sums.finish()


class GroupLoss(NamedTuple):
    """The second half of a fused loss, for a run of groups."""

    function: Callable[..., tuple[Tensor, ...]]  # an implementation's group_loss
    ref_logps: Tensor | None  # (N,) sums or (N, T) per token; None: scored by the same head
    rewards: Tensor | None  # (N,)
    seq_offsets: Tensor  # (N+1,)
    group_offsets: Tensor  # (G+1,)
    per_token_ref: bool
    options: tuple[Any, ...]  # objective, beta_pi, beta_r, log_targets, ignore_index

    def __call__(
        self, logps: Tensor, targets: Tensor, ref_logps: Tensor, g: slice, s: slice, r: slice
    ) -> tuple[Tensor, ...]:
        """Groups g, which are the sequences s and the rows r, whose log-probs are known by now."""
        ref = ref_logps if self.ref_logps is None else self.ref_logps
        ref = ref.flatten()[r if self.per_token_ref else s]
        rewards = None if self.rewards is None else self.rewards[s]
        seq_offsets = self.seq_offsets[s.start : s.stop + 1] - r.start
        group_offsets = self.group_offsets[g.start : g.stop + 1] - s.start
        return self.function(
            logps.flatten()[r], targets.flatten()[r], ref, rewards, seq_offsets, group_offsets,
            self.per_token_ref, *self.options,
        )  # fmt: skip


def group_pass(
    call: HeadCall,
    loss: GroupLoss,
    denominator: Tensor,  # ()
    ignore_index: int,
    needs: tuple[bool, bool, bool],
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return the results of group_loss for all groups, and the gradients of the losses' sum over the denominator."""
    scored = call.targets != ignore_index
    rows = _indices(scored)
    seen = torch.nn.functional.pad(scored.flatten().cumsum(0), (1, 0))
    starts = loss.seq_offsets[loss.group_offsets]
    first_seq, first_row, first_kept = torch.stack([loss.group_offsets, starts, seen[starts]]).tolist()  # (G+1,) each
    units = plan.group_chunks([b - a for a, b in zip(first_kept, first_kept[1:], strict=False)], call.chunk_rows)

    logps = call.zeros(*call.targets.shape)
    ref_logps = call.zeros(*(call.targets.shape if call.ref_hidden is not None else (0,)))
    # fp16 ends at 6e-8, and the loss's gradient, which users of fp16 make large, is not known yet
    scale = loss.options[1] * call.curve.factor / denominator if call.hidden.dtype == torch.float16 else None
    sums = Gradients(call, *needs, scale=None if scale is None else scale.to(call.acc))
    longest = max((part.stop - part.start for unit in units for part in unit.parts), default=0)
    work = Workspace(call, longest)
    results = []
    for unit in units:
        s, r = (slice(first[unit.groups.start], first[unit.groups.stop]) for first in (first_seq, first_row))
        fits = len(unit.parts) == 1
        chunks = [work.forward(_take(rows, part), logps, ref_logps, gradient=fits) for part in unit.parts]
        results.append(loss(logps, call.targets, ref_logps, unit.groups, s, r))
        slopes = groups.spread(results[-1][1], loss.seq_offsets[s.start : s.stop + 1], r.stop - r.start)
        coefficients = (slopes / denominator * -call.curve.factor).to(call.acc)
        for chunk in chunks:
            if not fits:  # too large a group: its logits once more, now that its slopes are known
                chunk = work.recompute(chunk)
            at = chunk.rows[0] * call.targets.shape[1] + chunk.rows[1] - r.start
            sums.add(chunk.rows, chunk.d, chunk.hidden, coefficients[at], logps[chunk.rows])
    return [torch.cat(columns) for columns in zip(*results, strict=True)], sums.finish()
