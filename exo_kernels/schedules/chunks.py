"""Work on one chunk of rows: make logits, score them, turn them into gradients, add those up.

Which rows, and in which order: passes.py.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from exo_kernels.numerics import LogitTransform, accumulator
from exo_kernels.schedules import matmul, vocab_parallel
from exo_kernels.schedules.vocab_parallel import Shard

Rows = tuple[Tensor, Tensor]  # index into (N, T)


class HeadCall(NamedTuple):
    """The arguments of a call that all schedules share."""

    implementation: ModuleType
    hidden: Tensor  # (N, T, D)
    weight: Tensor  # (V, D), same dtype
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N, T) int64, in the vocabulary of all ranks
    ref_hidden: Tensor | None  # (N, T, D), scored by the same head
    transform: LogitTransform
    shard: Shard
    chunk_rows: int

    @property
    def acc(self) -> torch.dtype:
        return accumulator(self.hidden.dtype)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.acc, device=self.hidden.device)


class Score(NamedTuple):
    """Log-probs of a chunk's rows."""

    stats: Tensor  # (3, M) target's logit, top logit, log of the sum of exp(logit - top)
    logps: Tensor  # (M,)
    entropies: Tensor  # (M,) or (0,)


class Chunk(NamedTuple):
    """Rows whose gradients are in the workspace until it takes the next chunk."""

    rows: Rows
    hidden: Tensor  # (M, D), empty until d is computed
    stats: Tensor  # (3, M)
    d: Tensor  # (M, V)


class Workspace:
    """Buffers of a chunk: its logits, and its gradients if they have another dtype."""

    def __init__(self, call: HeadCall, rows: int) -> None:
        self.call = call
        vocab, device = len(call.weight), call.hidden.device
        width = matmul.padded(vocab)
        gradient_dtype = matmul.gradient_dtype(call.hidden.dtype, device)
        n_logits = rows if call.ref_hidden is None else 2 * rows
        # small pages, which a matmul touches while they are in cache: huge ones cost 8% of the call
        self.a: Tensor = torch.empty((n_logits, width), dtype=call.acc, device=device)[:, :vocab]
        self.d: Tensor | None = None
        if gradient_dtype != call.acc:
            self.d = torch.empty((rows, width), dtype=gradient_dtype, device=device)[:, :vocab]
        self.bias: Tensor | None = None
        if call.bias is not None:
            self.bias = torch.nn.functional.pad(call.bias.to(call.acc), (0, width - vocab))

    def logits(self, rows: Rows, with_ref: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states (M, D), targets (M,), h W^T (M, V); with_ref: (2M, V), the reference's rows last."""
        call = self.call
        hidden = both = call.hidden[rows]
        if with_ref and call.ref_hidden is not None:
            both = torch.cat([hidden, call.ref_hidden[rows]])
        a = self.a[: len(both)]
        matmul.logits(both, call.weight, a)
        return hidden, call.targets[rows], a

    def forward(self, rows: Rows, logps: Tensor, ref_logps: Tensor, gradient: bool) -> Chunk:
        """Fill in the log-probs of policy and reference; `gradient`: also turn the logits into d."""
        hidden, targets, a = self.logits(rows, with_ref=True)
        a, ref = a[: len(targets)], a[len(targets) :]
        d = self.gradient_buffer(a)
        score = self.score_and_gradient(d, a, hidden, targets) if gradient else self.score(a, hidden, targets)
        logps[rows] = score.logps
        self.score_ref(ref, rows, targets, ref_logps)
        return Chunk(rows, hidden if gradient else hidden.new_empty(0), score.stats, d)

    def score_ref(self, a: Tensor, rows: Rows, targets: Tensor, ref_logps: Tensor) -> None:
        """Fill in the reference's log-probs, if this head scores it too."""
        if self.call.ref_hidden is not None:
            ref_logps[rows] = self.score(a, self.call.ref_hidden[rows], targets).logps

    def recompute(self, chunk: Chunk) -> Chunk:
        """Make the logits once more and turn them into d."""
        hidden, targets, a = self.logits(chunk.rows)
        d = self.gradient_buffer(a)
        self.gradient(d, a, targets, chunk.stats)
        return Chunk(chunk.rows, hidden, chunk.stats, d)

    def gradient_buffer(self, a: Tensor) -> Tensor:
        return a if self.d is None else self.d[: len(a)]

    def score(self, a: Tensor, hidden: Tensor, targets: Tensor, entropy: bool = False) -> Score:
        call = self.call
        local = targets - call.shard.start
        stats, entropies = call.implementation.chunk_logps(a, self.bias, local, call.transform, entropy)
        rounding_error = self._rounding_error(stats, hidden, local)
        stats, rounding_error, entropies = vocab_parallel.combine(
            stats, rounding_error, entropies, targets, a.shape[1], call.shard
        )
        return Score(stats, _log_probs(stats, rounding_error), entropies)

    def score_and_gradient(self, out: Tensor, a: Tensor, hidden: Tensor, targets: Tensor) -> Score:
        """Score, and write d to `out`."""
        call = self.call
        local = targets - call.shard.start
        if not call.shard.parallel:
            stats = call.implementation.chunk_logps_and_gradient(out, a, self.bias, local, call.transform)
            return Score(stats, _log_probs(stats, self._rounding_error(stats, hidden, local)), stats[:0, 0])
        score = self.score(a, hidden, targets)
        self.gradient(out, a, targets, score.stats)
        return score

    def _rounding_error(self, stats: Tensor, hidden: Tensor, local: Tensor) -> Tensor:  # (M,) float64
        """Return the rounding error of the target logit; 0 if the target is on another rank."""
        call = self.call
        if call.acc == torch.float64:
            return torch.zeros_like(stats[0])
        x = matmul.exact_logits(hidden, call.weight, local)
        if call.bias is not None:
            x = x + call.bias.double()[local.clamp(0, len(call.bias) - 1)]
        transform = call.transform
        exact = transform.outer * (torch.tanh(transform.inner * x) if transform.capped else x)
        rounding_error = exact - stats[0]
        return torch.where(rounding_error.isfinite(), rounding_error, 0.0)

    def gradient(self, out: Tensor, a: Tensor, targets: Tensor, stats: Tensor, *weights: Tensor) -> None:
        """Write d to `out`; or, given entropies, g and h, the gradient of - g log p - h H."""
        call = self.call
        entropies, g, h = weights or (None, None, None)
        local = targets - call.shard.start
        call.implementation.chunk_gradient(out, a, self.bias, local, call.transform, stats, entropies, g, h)


def _log_probs(stats: Tensor, rounding_error: Tensor) -> Tensor:  # (3, M), (M,) -> (M,)
    """Return the targets' log p, corrected for rounding, which moves the logit by the error and the sum by p of it."""
    logps = stats[0] - stats[1] - stats[2]
    return (logps - torch.expm1(logps.double()) * rounding_error).to(logps.dtype)


class Gradients:
    """Sums over chunks that become the gradients of hidden, weight and bias, each if needed."""

    def __init__(self, call: HeadCall, needs: Sequence[bool], scale: Tensor | None = None) -> None:
        hidden, weight, bias = needs
        self.call = call
        self.scale = scale  # () of the coefficients, if fp16 cannot hold their products
        wide = call.shard.parallel or scale is not None  # ranks add up before they round
        self.dtype: torch.dtype = call.hidden.dtype if scale is None else call.acc
        self.hidden: Tensor | None = None
        if hidden:
            self.hidden = call.hidden.new_zeros(call.hidden.shape, dtype=call.acc if wide else call.hidden.dtype)
        self.weight: Tensor | None = call.weight.new_empty(call.weight.shape, dtype=call.acc) if weight else None
        self.bias: Tensor | None = call.zeros(len(call.weight), 1) if bias else None
        self.first: bool = True

    def add(self, rows: Rows, d: Tensor, hidden: Tensor, coefficient: Tensor, log_probs: Tensor) -> None:
        """Add a chunk's part. Rows with coefficient 0 add nothing, whatever they hold; rows without a log-prob, NaN."""
        none = coefficient == 0
        c = torch.where(none, 0.0, torch.where(log_probs.isnan(), torch.nan, coefficient))[:, None]  # (M, 1)
        if self.hidden is not None:
            product = matmul.hidden_gradient(d, self.call.weight).mul_(c)
            self.hidden[rows] = product.masked_fill_(none[:, None], 0.0).to(self.hidden.dtype)
        if self.scale is not None:
            c = c / self.scale
        if self.weight is not None:
            side = (hidden * c).masked_fill_(none[:, None], 0.0).to(d.dtype)
            matmul.add_weight_gradient_(self.weight, d, side, self.first)
        if self.bias is not None:
            matmul.add_weight_gradient_(self.bias, d, c.to(d.dtype), self.first)
        self.first = False

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients: hidden in its dtype (given a scale, in accumulators), the others in accumulators."""
        if self.weight is not None and self.first:
            self.weight.zero_()
        for total in (self.weight, self.bias):
            if total is not None and self.scale is not None:
                total.mul_(self.scale)
        if self.hidden is not None:
            vocab_parallel.sum_(self.hidden, self.call.shard)
        return (
            self.call.zeros(0) if self.hidden is None else self.hidden.to(self.dtype),
            self.call.zeros(0) if self.weight is None else self.weight,
            self.call.zeros(0) if self.bias is None else self.bias[:, 0],
        )
