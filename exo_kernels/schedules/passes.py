"""The four schedules, as loops over chunks of rows with loss: matmul, scoring, matmul, matmul.

deferred   forward stores the gradient of every row's log-prob in the hidden state; backward multiplies by a scalar
group      takes groups together, so that the loss and its slopes are known while the chunk exists (group_pass)
store      forward stores the gradients of all logits; backward multiplies them out
recompute  forward stores three numbers per row; backward recomputes the logits

In all of them a chunk's logits turn in place into d, the gradient of the rows' negative log-probs. The coefficient of a
row (its sequence's slope, all that the loss decides) never touches d: it goes to the thin side of the matmuls,
dH = c (d W) and dW = d^T (c H).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from exo_kernels import groups
from exo_kernels.objectives import Betas
from exo_kernels.schedules import matmul, plan, vocab_parallel
from exo_kernels.schedules.chunks import Gradients, HeadCall, Rows, Workspace

DEFERRED_CPU = 2**22  # bytes


def _indices(mask: Tensor) -> Rows:
    n, t = mask.nonzero(as_tuple=True)
    return n, t


def _take(rows: Rows, part: slice) -> Rows:
    return rows[0][part], rows[1][part]


def _longest(parts: list[slice]) -> int:
    return max((part.stop - part.start for part in parts), default=0)


class Scores(NamedTuple):
    """Results of a schedule's forward pass."""

    logps: Tensor  # (N, T)
    entropies: Tensor  # (N, T) or (0,)
    ref_logps: Tensor  # (N, T) or (0,)
    stats: Tensor  # (3, N, T), (3, 0, 0) for `score`
    saved: Tensor  # deferred: (N, T, D), dH of unit coefficients; store: (n, V padded), d of rows with loss; or (0,)


def forward(call: HeadCall, schedule: str, ignore_index: int, entropy: bool) -> Scores:
    """Return log-probs by any schedule except `group`; `score` saves nothing for a backward pass."""
    shape = call.targets.shape
    rows = _indices(call.targets != ignore_index)
    n = len(rows[0])
    result = Scores(
        call.zeros(*shape),
        call.zeros(*(shape if entropy else (0,))),
        call.zeros(*(shape if call.ref_hidden is not None else (0,))),
        call.zeros(3, *(shape if schedule != plan.NO_GRAD else (0, 0))),
        _new_saved(call, schedule, n),
    )
    if not n:  # no collectives either
        return result
    parts = plan.even(n, call.chunk_rows)
    work = Workspace(call, _longest(parts))
    for part in parts:
        chunk = _take(rows, part)
        hidden, targets, a = work.logits(chunk, with_ref=True)
        a, ref = a[: len(targets)], a[len(targets) :]
        if schedule == "store":
            score = work.score_and_gradient(result.saved[part, : a.shape[1]], a, hidden, targets)
        elif schedule == "deferred":
            d = work.gradient_buffer(a)
            score = work.score_and_gradient(d, a, hidden, targets)
            unit = matmul.hidden_gradient(d, call.weight).mul_(-call.transform.factor)
            result.saved[chunk] = unit.to(result.saved.dtype)
        else:
            score = work.score(a, hidden, targets, entropy)
        result.logps[chunk] = score.logps
        if entropy:
            result.entropies[chunk] = score.entropies
        if schedule != plan.NO_GRAD:
            result.stats[(slice(None), *chunk)] = score.stats
        work.score_ref(ref, chunk, targets, result.ref_logps)
    if schedule == "deferred":
        vocab_parallel.sum_(result.saved, call.shard)
    elif schedule == "store":
        result.saved[:, len(call.weight) :] = 0.0  # the padding is never read, but an operator's results are defined
    return result


def _new_saved(call: HeadCall, schedule: str, n: int) -> Tensor:
    if schedule == "deferred":
        return call.hidden.new_zeros(call.hidden.shape, dtype=call.acc if call.shard.parallel else call.hidden.dtype)
    if schedule == "store":
        dtype = matmul.gradient_dtype(call.hidden.dtype, call.hidden.device)
        return call.hidden.new_empty((n, matmul.padded(len(call.weight))), dtype=dtype)
    return call.zeros(0)


def backward(
    call: HeadCall,
    schedule: str,
    scores: Scores,
    grad_logps: Tensor,  # (N, T)
    grad_entropies: Tensor | None,  # (N, T)
    ignore_index: int,
    needs: Sequence[bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden (its dtype), weight and bias (accumulators); (0,) if not needed.

    `store` reads d; the others make it again, `deferred` for the gradients of the head (see `multiply_deferred`).
    """
    stored = schedule == "store"
    mask = call.targets != ignore_index
    if not stored:
        nonzero = grad_logps != 0
        mask = mask & (nonzero if grad_entropies is None else nonzero | (grad_entropies != 0))
    rows = _indices(mask)
    parts = plan.even(len(rows[0]), call.chunk_rows)
    work = None if stored else Workspace(call, _longest(parts))
    sums = Gradients(call, needs)
    for part in parts:
        chunk = _take(rows, part)
        g = grad_logps[chunk].to(call.acc)  # (M,)
        coefficient = g * -call.transform.factor
        if work is None:
            hidden, d = call.hidden[chunk], scores.saved[part, : len(call.weight)]
        else:
            hidden, targets, a = work.logits(chunk)
            d, stats = work.gradient_buffer(a), scores.stats[(slice(None), *chunk)]
            weights: tuple[Tensor, ...] = ()
            if grad_entropies is not None:  # d then holds the coefficients
                weights = (scores.entropies[chunk], g, grad_entropies[chunk].to(call.acc))
                coefficient = torch.full_like(g, -call.transform.factor)
            work.gradient(d, a, targets, stats, *weights)
        sums.add(chunk, d, hidden, coefficient, scores.logps[chunk])
    return sums.finish()


def multiply_deferred(
    saved: Tensor,  # (N, T, D), dH of unit coefficients
    logps: Tensor,  # (N, T)
    grad_logps: Tensor,  # (N, T)
    dtype: torch.dtype,
) -> Tensor:  # (N, T, D)
    """Return the gradient of the hidden states. Zero coefficients give zeros; rows without a log-prob, NaN."""
    g = torch.where(logps.isnan() & (grad_logps != 0), torch.nan, grad_logps).view(-1, 1)  # (NT, 1)
    result = torch.empty(saved.shape, dtype=dtype, device=saved.device)
    rows, out = saved.view(-1, saved.shape[-1]), result.view(-1, saved.shape[-1])
    step = max(1, DEFERRED_CPU // max(4 * rows.shape[1], 1)) if g.device.type == "cpu" else max(len(g), 1)
    for i in range(0, len(g), step):  # on a CPU torch would convert all of a 16-bit tensor at once
        part = slice(i, i + step)
        torch.mul(rows[part], g[part], out=out[part])
    return result.masked_fill_((g == 0).view(*saved.shape[:2], 1), 0.0)


class GroupLoss(NamedTuple):
    """The second half of a fused loss, for consecutive groups."""

    function: Callable[..., tuple[Tensor, ...]]  # an implementation's group_loss
    ref_logps: Tensor | None  # (N,) sums, or (N, T) per token; None: scored by the same head
    rewards: Tensor | None  # (N,)
    seq_offsets: Tensor  # (N+1,)
    group_offsets: Tensor  # (G+1,)
    objective: str
    betas: Betas
    ignore_index: int

    def __call__(
        self, logps: Tensor, targets: Tensor, ref_logps: Tensor, g: slice, s: slice, r: slice
    ) -> tuple[Tensor, ...]:
        """Compute the loss of groups g, which are the sequences s and the rows r."""
        ref = ref_logps if self.ref_logps is None else self.ref_logps
        per_token = ref.dim() == 2
        ref = ref.flatten()[r if per_token else s]
        rewards = None if self.rewards is None else self.rewards[s]
        seq_offsets = self.seq_offsets[s.start : s.stop + 1] - r.start
        group_offsets = self.group_offsets[g.start : g.stop + 1] - s.start
        rows = (logps.flatten()[r], targets.flatten()[r], ref, rewards, seq_offsets, group_offsets)
        return self.function(*rows, per_token, self.objective, self.betas, self.ignore_index)


def group_pass(
    call: HeadCall,
    loss: GroupLoss,
    denominator: Tensor,  # ()
    needs: Sequence[bool],  # gradients of hidden, weight, bias
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return the results of group_loss for all groups, and the gradients of the losses' sum over the denominator."""
    scored = call.targets != loss.ignore_index
    rows = _indices(scored)
    n_scored = torch.nn.functional.pad(scored.flatten().cumsum(0), (1, 0))  # (n+1,)
    starts = loss.seq_offsets[loss.group_offsets]  # (G+1,)
    first_seq, first_row, first_scored = torch.stack([loss.group_offsets, starts, n_scored[starts]]).tolist()
    counts = [b - a for a, b in itertools.pairwise(first_scored)]
    units = plan.group_chunks(counts, call.chunk_rows)

    logps = call.zeros(*call.targets.shape)
    ref_logps = call.zeros(*(call.targets.shape if call.ref_hidden is not None else (0,)))
    scale = None
    if call.hidden.dtype == torch.float16:  # it ends at 6e-8, and a user's loss scale is not known yet
        scale = (loss.betas.pi * call.transform.factor / denominator).to(call.acc)
    sums = Gradients(call, needs, scale)
    work = Workspace(call, _longest([part for unit in units for part in unit.parts]))
    results = []
    for unit in units:
        s, r = (slice(first[unit.groups.start], first[unit.groups.stop]) for first in (first_seq, first_row))
        fits = len(unit.parts) == 1
        chunks = [work.forward(_take(rows, part), logps, ref_logps, gradient=fits) for part in unit.parts]
        results.append(loss(logps, call.targets, ref_logps, unit.groups, s, r))
        slopes = groups.spread(results[-1][1], loss.seq_offsets[s.start : s.stop + 1], r.stop - r.start)
        coefficients = (slopes / denominator * -call.transform.factor).to(call.acc)
        for chunk in chunks:
            if not fits:  # a group larger than a chunk: now that its slopes are known, recompute its logits
                chunk = work.recompute(chunk)
            index = chunk.rows[0] * call.targets.shape[1] + chunk.rows[1] - r.start
            sums.add(chunk.rows, chunk.d, chunk.hidden, coefficients[index], logps[chunk.rows])
    return [torch.cat(columns) for columns in zip(*results, strict=True)], sums.finish()
