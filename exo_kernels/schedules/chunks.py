"""Work on a chunk of rows, shared by all schedules: logits, log-probs, gradients and their sums.

Left out: which rows, when, and in what order (schedules.py).
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from exo_kernels.numerics import LogitTransform, accumulator
from exo_kernels.schedules import matmul, vocab_parallel
from exo_kernels.schedules.vocab_parallel import Shard

Rows = tuple[Tensor, Tensor]  # index into (N, T)


class HeadCall(NamedTuple):
    """The inputs of a schedule."""

    implementation: ModuleType
    hidden: Tensor  # (N, T, D)
    weight: Tensor  # (V, D), same dtype
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N, T) int64, in the whole vocabulary
    ref_hidden: Tensor | None  # (N, T, D), to be scored by the same head
    curve: LogitTransform
    shard: Shard
    chunk_rows: int

    @property
    def acc(self) -> torch.dtype:
        return accumulator(self.hidden.dtype)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.acc, device=self.hidden.device)


class Score(NamedTuple):
    """The log-probs of a chunk's rows."""

    stats: Tensor  # (3, M) logit of the target, top logit, log sum exp above it
    logps: Tensor  # (M,)
    entropies: Tensor  # (M,) or (0,)


class Chunk(NamedTuple):
    """Rows of which the workspace holds the gradients, until it takes the next."""

    rows: Rows
    hidden: Tensor  # (M, D), empty while d is not made
    stats: Tensor  # (3, M)
    d: Tensor  # (M, V)


class Workspace:
    """The chunk: its logits, and its gradients where they have another dtype."""

    def __init__(self, call: HeadCall, rows: int) -> None:
        self.call = call
        vocab = len(call.weight)
        self.dtype = matmul.gradient_dtype(call.hidden.dtype, call.hidden.device)
        sides = 1 if call.ref_hidden is None else 2
        new = call.implementation.new_buffer
        self.a = new((rows * sides, matmul.padded(vocab)), call.acc, call.hidden.device)[:, :vocab]
        self.d = None
        if self.dtype != call.acc:
            self.d = new((rows, matmul.padded(vocab)), self.dtype, call.hidden.device)[:, :vocab]
        acc_bias = None if call.bias is None else call.bias.to(call.acc)
        self.bias = None if acc_bias is None else torch.nn.functional.pad(acc_bias, (0, matmul.padded(vocab) - vocab))

    def logits(self, rows: Rows, with_ref: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (M, D), targets (M,), h W^T (M, V), with_ref: (2M, V), the reference's rows below."""
        call = self.call
        hidden = both = call.hidden[rows]
        if with_ref and call.ref_hidden is not None:
            both = torch.cat([hidden, call.ref_hidden[rows]])
        a = self.a[: len(both)]
        matmul.logits(both, call.weight, a)
        return hidden, call.targets[rows], a

    def forward(self, rows: Rows, logps: Tensor, ref_logps: Tensor, gradient: bool) -> "Chunk":
        """Fill in the rows' log-probs, those of the reference too; `gradient`: and make d of the logits."""
        hidden, targets, a = self.logits(rows, with_ref=True)
        a, ref = a[: len(targets)], a[len(targets) :]
        d = self.place_of_gradient(a)
        score = self.score_and_gradient(d, a, hidden, targets) if gradient else self.score(a, hidden, targets)
        logps[rows] = score.logps
        self.score_ref(ref, rows, targets, ref_logps)
        return Chunk(rows, hidden if gradient else hidden.new_empty(0), score.stats, d)

    def score_ref(self, a: Tensor, rows: Rows, targets: Tensor, ref_logps: Tensor) -> None:
        """Fill in the log-probs of the reference's rows, where they are below the policy's."""
        if self.call.ref_hidden is not None:
            ref_logps[rows] = self.score(a, self.call.ref_hidden[rows], targets).logps

    def recompute(self, chunk: "Chunk") -> "Chunk":
        """Make its logits once more, and d of them."""
        hidden, targets, a = self.logits(chunk.rows)
        d = self.place_of_gradient(a)
        self.gradient(d, a, targets, chunk.stats)
        return Chunk(chunk.rows, hidden, chunk.stats, d)

    def place_of_gradient(self, a: Tensor) -> Tensor:
        return a if self.d is None else self.d[: len(a)]

    def score(self, a: Tensor, hidden: Tensor, targets: Tensor, entropy: bool = False) -> "Score":
        call = self.call
        local = targets - call.shard.start
        stats, entropies = call.implementation.chunk_logps(a, self.bias, local, call.curve, entropy)
        rounding_error = self._rounding_error(stats, hidden, local)
        stats, rounding_error, entropies = vocab_parallel.combine(
            stats, rounding_error, entropies, targets, a.shape[1], call.shard
        )
        return Score(stats, _log_probs(stats, rounding_error), entropies)

    def score_and_gradient(self, out: Tensor, a: Tensor, hidden: Tensor, targets: Tensor) -> "Score":
        """`out` becomes d."""
        call = self.call
        local = targets - call.shard.start
        if not call.shard.parallel:
            stats = call.implementation.chunk_logps_and_gradient(out, a, self.bias, local, call.curve)
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
        exact = call.curve.outer * (torch.tanh(call.curve.inner * x) if call.curve.capped else x)
        rounding_error = exact - stats[0]
        return torch.where(rounding_error.isfinite(), rounding_error, 0.0)

    def gradient(self, out: Tensor, a: Tensor, targets: Tensor, stats: Tensor, *weights: Tensor) -> None:
        """`out` becomes d; or, given entropies, g and h, the gradient of - g log p - h H."""
        call = self.call
        entropies, g, h = weights or (None, None, None)
        local = targets - call.shard.start
        call.implementation.chunk_gradient(out, a, self.bias, local, call.curve, stats, entropies, g, h)


def _log_probs(stats: Tensor, rounding_error: Tensor) -> Tensor:  # (3, M), (M,) -> (M,)
    """log p of the targets, had their logits not been rounded: the logit moves by that, and the sum by p of it."""
    logps = stats[0] - stats[1] - stats[2]
    return (logps - torch.expm1(logps.double()) * rounding_error).to(logps.dtype)


class Gradients:
    """The sums over chunks that become the gradients of hidden, weight and bias, each where it is needed."""

    def __init__(self, call: HeadCall, hidden: bool, weight: bool, bias: bool, scale: Tensor | None = None) -> None:
        self.call = call
        self.scale = scale  # () of the coefficients, where fp16 could not hold their products
        device, vocab = call.hidden.device, len(call.weight)
        wide = call.shard.parallel or scale is not None  # ranks add up before they round
        dtype = call.acc if wide else call.hidden.dtype
        self.dtype = call.hidden.dtype if scale is None else call.acc
        self.hidden = torch.zeros(call.hidden.shape, dtype=dtype, device=device) if hidden else None
        self.weight = call.implementation.new_buffer(call.weight.shape, call.acc, device) if weight else None
        self.bias = call.zeros(vocab, 1) if bias else None
        self.first = True

    def add(self, rows: Rows, d: Tensor, hidden: Tensor, coefficient: Tensor, log_probs: Tensor) -> None:
        """A chunk's share. Rows whose coefficient is 0 give nothing, whatever they hold; without a log-prob, NaN."""
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
        """Of hidden in its dtype (given a scale, in accumulators), of weight and bias in accumulators; or (0,)."""
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
