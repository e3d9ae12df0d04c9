"""The logits suite: the EXO loss and its gradient from given logits.

The bound is a copy of as many bytes as every method must move, into preallocated memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.harness import BOUND, EAGER, IN_CACHE, MIB, OURS, Contender, Options, Prepared
from exo_kernels import fused_exo_loss, reference

SUITE = "logits"
IGNORE = -100
BETA_PI, BETA_R = 0.1, 1.0
COMPILED, EAGER_LOW, PUBLISHED = "torch.compile", "eager, own dtype", "published EXO code"


@dataclass(frozen=True)
class Case:
    vocab: int
    sequences: int
    length: int
    dtype: torch.dtype
    masked: bool = True  # the first half of every sequence is prompt
    group_size: int = 4
    rounds: int = 15
    suite: str = SUITE
    unit: str = "GB/s"

    def __str__(self) -> str:
        return f"V{self.vocab}-n{self.rows_with_loss}-{dtype_name(self.dtype)}-{'half' if self.masked else 'all'}"

    @property
    def rows(self) -> int:
        return self.sequences * self.length

    @property
    def rows_with_loss(self) -> int:
        return self.rows // 2 if self.masked else self.rows

    @property
    def work(self) -> float:
        """(2n + R) V s bytes: the n rows with loss are read forward and backward, all R rows of dlogits are written."""
        return (2 * self.rows_with_loss + self.rows) * self.vocab * self.dtype.itemsize

    @property
    def title(self) -> str:
        return (
            f"EXO loss and gradient from logits, K={self.group_size}, V={self.vocab:,}, {dtype_name(self.dtype)}: "
            f"{self.rows} rows, {self.rows_with_loss} with loss"
        )

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "V": self.vocab, "rows": self.rows, "n": self.rows_with_loss, "K": self.group_size,
            "dtype": dtype_name(self.dtype), "logits_bytes": self.rows * self.vocab * 4,
        }  # fmt: skip

    def prepare(self, options: Options) -> Prepared:
        problem = make(self, options.device)
        low = self.dtype != torch.float32
        tolerance = 1e-4 if not low else 1e-2  # in 16 bits, only the gradient is rounded
        elements = int(self.work / 2 / self.dtype.itemsize)
        source, target = (measure.huge_empty(elements, dtype=self.dtype, device=options.device) for _ in range(2))
        source.fill_(1.0)
        contenders = [
            Contender(BOUND, lambda: target.copy_(source), None),
            _contender(OURS, _ours, problem, tolerance),
        ]
        if options.device == "cpu":
            contenders[:0] = [Contender(IN_CACHE, _softmax_in_cache(self), None)]
        if not options.ours_only:
            contenders.append(_contender(EAGER, _eager, problem, tolerance))
        if options.full:
            contenders.append(_contender(PUBLISHED, _published, problem, 0.25 if low else 1e-3))
        if options.full and low:
            contenders.append(_contender(EAGER_LOW, partial(_eager, upcast=False), problem, 0.25))
        if options.peers:
            compiled = torch.compile(_eager, fullgraph=True, dynamic=False)
            contenders.append(_contender(COMPILED, compiled, problem, tolerance))
        return Prepared(contenders, {}, partial(_errors, problem))


def cases(device: str, full: bool) -> list[Case]:
    """Return cases larger than the caches: at least 8 times an L3 of 32 MiB, 10 times the L2 of an H200."""
    if device == "cuda":
        all_rows = (True, False) if full else (True,)
        return [Case(v, 16, 512, torch.bfloat16, half, rounds=30) for v in (32000, 128256, 151936) for half in all_rows]
    found = [Case(32000, 8, 128, torch.float32), Case(151936, 8, 64, torch.float32, rounds=9)]
    return [*found, Case(32000, 8, 128, torch.bfloat16)] if full else found


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Problem(NamedTuple):
    logits: Tensor  # (N, T, V), a leaf that requires a gradient
    labels: Tensor  # (N, T) int64, aligned with the rows (shift=False, because a shift would cost eager a copy)
    ref_logits: Tensor  # (N, T, V); only the published code takes them
    ref_logps: Tensor  # (N,) fp32 sums of their log-probs
    rewards: Tensor  # (N,)
    group_size: int


def make(case: Case, device: str, seed: int = 0) -> Problem:
    """Return logits with standard deviation 2 and likely labels; the reference's are slightly smaller."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.sequences, case.length)
    labels = torch.randint(case.vocab, shape, device=device, generator=generator)
    logits = torch.empty(*shape, case.vocab, dtype=case.dtype, device=device)
    for x, y in zip(logits, labels, strict=True):  # by sequence, to avoid an fp32 copy of all logits
        x.normal_(0, 2, generator=generator)
        x.scatter_(1, y[:, None], 8.0)
    if case.masked:
        labels[:, : case.length // 2] = IGNORE
    factors = 0.98 + 0.02 * torch.rand(case.sequences, 1, 1, device=device, generator=generator)
    ref_logits = logits * factors.to(case.dtype)
    sums = [reference.sequence_logps(x[None], y[None], shift=False)[0] for x, y in zip(ref_logits, labels, strict=True)]
    rewards = torch.randn(case.sequences, device=device, generator=generator)
    return Problem(
        logits.requires_grad_(), labels, ref_logits, torch.stack(sums).float(), rewards, case.group_size
    )  # fmt: skip


def _softmax_in_cache(case: Case) -> Callable[[], None]:
    """Return the softmax of all rows with loss, forward and backward, on a tile that stays in cache."""
    tile = torch.randn(max(1, 4 * MIB // (4 * case.vocab)), case.vocab)
    result = torch.empty_like(tile)

    def run() -> None:
        for _ in range(2 * case.rows_with_loss // len(tile)):
            torch.softmax(tile, -1, out=result)

    return run


def _contender(name: str, loss: Callable[[Problem], Tensor], problem: Problem, tolerance: float) -> Contender:
    def outputs() -> tuple[Tensor, Tensor]:
        value = loss(problem)
        return value.detach(), torch.autograd.grad(value, problem.logits)[0]

    return Contender(name, lambda: outputs()[1], outputs, tolerance)


def _ours(p: Problem) -> Tensor:
    return fused_exo_loss(
        p.logits, p.labels, p.ref_logps, group_size=p.group_size, rewards=p.rewards, beta_pi=BETA_PI, beta_r=BETA_R,
        shift=False,
    )  # fmt: skip


def _eager(p: Problem, upcast: bool = True) -> Tensor:
    """Return the EXO loss in plain torch, with the log-softmax in fp32."""
    mask = p.labels != IGNORE
    log_p = (p.logits.float() if upcast else p.logits).log_softmax(-1)
    logps = log_p.gather(-1, p.labels.clamp(min=0)[..., None])[..., 0].float()
    return exo((logps * mask).sum(-1) - p.ref_logps, p.rewards, p.group_size)


def exo(log_ratios: Tensor, rewards: Tensor, group_size: int) -> Tensor:
    """Return the EXO loss of sequence log-ratios (N,), paper equation 14."""
    log_p = (BETA_PI * log_ratios.view(-1, group_size)).log_softmax(-1)
    log_q = (rewards.view(-1, group_size) / BETA_R).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _published(p: Problem) -> Tensor:
    """Return the loss as the paper's repository computes it: both models' logits at every step, group after group."""
    mask = p.labels != IGNORE

    def token_logps(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, p.labels.clamp(min=0)[..., None])[..., 0] * mask

    log_ratios = (token_logps(p.logits) - token_logps(p.ref_logits)).sum(-1)
    losses = [
        exo(s, r, p.group_size)
        for s, r in zip(log_ratios.split(p.group_size), p.rewards.split(p.group_size), strict=True)
    ]
    return torch.stack(losses).mean()


def _errors(problem: Problem, outputs: dict[str, tuple[Tensor, ...]]) -> dict[str, dict[str, float]]:
    """Return the relative errors of loss and gradient against the fp64 oracle.

    The oracle needs much memory, so it runs group by group; the loss is the mean over independent groups.
    """
    groups = len(problem.labels) // problem.group_size
    loss, norm, distances = 0.0, 0.0, dict.fromkeys(outputs, 0.0)
    for i in (slice(g * problem.group_size, (g + 1) * problem.group_size) for g in range(groups)):
        x = problem.logits[i].detach().double().requires_grad_()
        value = reference.fused_exo_loss(
            x, problem.labels[i], problem.ref_logps[i], group_size=problem.group_size, rewards=problem.rewards[i],
            beta_pi=BETA_PI, beta_r=BETA_R, shift=False, num_groups=groups,
        )  # fmt: skip
        (truth,) = torch.autograd.grad(value, x)
        loss += value.item()
        norm += truth.square().sum().item()
        for name, (_, gradient) in outputs.items():
            distances[name] += (gradient[i] - truth).square().sum().item()
    return {
        name: {"loss": abs(value.item() - loss) / abs(loss), "gradient": (distances[name] / norm) ** 0.5}
        for name, (value, _) in outputs.items()
    }
