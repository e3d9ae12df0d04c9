"""The linear suite: losses and their gradients from hidden states and the head, half of the rows prompt.

The bound is the matmuls of the rows with loss, into preallocated buffers; on a GPU also a copy of the bytes
that must move between them. All contenders get the same padded input; other libraries are in peers.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import BOUND, EAGER, MIB, OURS, Contender, Options, Prepared
from benchmarks.linear_problem import DPO, EXO, LOGPS, Problem, bound, errors, make
from benchmarks.logits import BETA_PI, BETA_R, COMPILED, EAGER_LOW, IGNORE, dtype_name, exo
from exo_kernels import fused_linear_dpo_loss, fused_linear_exo_loss, linear_token_logps

SUITE = "linear"
FROZEN, FROZEN_BOUND = "ours, frozen head", "bound, frozen head"
EAGER_ROWS = "eager, rows with loss"


@dataclass(frozen=True)
class Case:
    sequences: int
    length: int  # the first half of every sequence is prompt
    hidden: int
    vocab: int
    dtype: torch.dtype = torch.float32
    objective: str = EXO  # DPO: with its reference model, scored in the same call by the same head
    group_size: int = 4
    rounds: int = 7
    budget: int = 512 * MIB
    contenders: tuple[str, ...] | None = None  # the only ones, if given
    suite: str = SUITE
    unit: str = "GFLOP/s"

    def __str__(self) -> str:
        shape = f"D{self.hidden}-V{self.vocab}-n{self.rows_with_loss}-K{self.group_size}"
        return f"{self.objective}-{shape}-{dtype_name(self.dtype)}"

    @property
    def rows_with_loss(self) -> int:
        return self.sequences * self.length // 2

    @property
    def models(self) -> int:
        return 2 if self.objective == DPO else 1

    @property
    def work(self) -> float:
        """2 n D V operations a matmul: logits, dH, dW, and the reference's logits."""
        return (2 + self.models) * 2 * self.rows_with_loss * self.hidden * self.vocab

    @property
    def between_bytes(self) -> int:
        """Every fp32 logit of the n rows is read once per model, and the policy's gradient is written once."""
        return (4 * self.models + self.dtype.itemsize) * self.rows_with_loss * self.vocab

    @property
    def title(self) -> str:
        does = {EXO: "EXO loss", DPO: "DPO loss with its reference model", LOGPS: "mean log-prob of tokens"}
        return (
            f"{does[self.objective]} and gradients from hidden states, K={self.group_size}, D={self.hidden}, "
            f"V={self.vocab:,}, {dtype_name(self.dtype)}: {2 * self.rows_with_loss} rows, {self.rows_with_loss} with "
            f"loss, budget {self.budget // MIB} MiB"
        )

    @property
    def sizes(self) -> dict[str, Any]:
        return {
            "objective": self.objective, "n": self.rows_with_loss, "K": self.group_size, "D": self.hidden,
            "V": self.vocab, "dtype": dtype_name(self.dtype), "logits_bytes": self.rows_with_loss * self.vocab * 4,
        }  # fmt: skip

    def prepare(self, options: Options) -> Prepared:
        problem = make(self, options.device)
        low = self.dtype != torch.float32
        tolerance, wide = (1e-2, 0.25) if low else (1e-4, 1e-3)  # ours rounds gradients once; others may round more
        bare = bound(problem)
        contenders = [
            Contender(BOUND, partial(bare, frozen=False), None),
            contender(OURS, partial(_ours, budget=self.budget), problem, tolerance),
        ]
        if self.objective == EXO:
            contenders[:0] = [
                Contender(FROZEN_BOUND, partial(bare, frozen=True), None, bound=FROZEN_BOUND),
                contender(FROZEN, partial(_ours, budget=self.budget), problem.frozen(), tolerance, FROZEN_BOUND),
            ]
        absent: dict[str, str] = {}
        if not options.ours_only:
            contenders.append(contender(EAGER, _eager, problem, wide))
        if options.full:
            contenders.append(contender(EAGER_ROWS, from_token_logps(_eager_rows), problem, wide))
            if low:
                contenders.append(contender(EAGER_LOW, partial(_eager, upcast=False), problem, wide))
        if options.peers:
            compiled = torch.compile(_eager, fullgraph=True, dynamic=False)
            contenders.append(contender(COMPILED, compiled, problem, wide))
            for name, peer in peers.PEERS.items():
                reason = peer.cannot(self.objective, options.device)
                if reason:
                    absent[name] = reason
                else:
                    loss = peer.loss if peer.loss is not None else from_token_logps(peer.token_logps)
                    arranged = problem.halves() if peer.pairs else problem
                    contenders.append(contender(name, loss, arranged, wide))
        if self.contenders is not None:
            contenders = [c for c in contenders if c.name in self.contenders]
            absent = {}
        return Prepared(contenders, absent, partial(errors, problem))


def cases(device: str, full: bool) -> list[Case]:
    """Return cases of about a second on a CPU; on a GPU, heads of 0.5B to 8B models with 1k to 16k rows."""
    if device == "cuda":
        heads = [(896, 151936), (2048, 128256), (4096, 128256)]
        shapes = [(d, v, n) for d, v in heads for n in ((1024, 4096, 16384) if full else (4096,))]
        return [
            Case(
                n // 256, 512, d, v, torch.bfloat16, objective, 2 if objective == DPO else 4, rounds=20, unit="TFLOP/s"
            )
            for objective in (EXO, DPO, LOGPS)
            for d, v, n in shapes
        ]
    only_ours = (BOUND, OURS)
    found = [
        Case(8, 256, 512, 32000),
        Case(8, 256, 128, 32000, rounds=9, contenders=only_ours),  # matmuls so small that other work shows
        Case(8, 256, 512, 32000, objective=DPO, group_size=2, rounds=5, contenders=None if full else only_ours),
        Case(8, 256, 512, 32000, objective=LOGPS, rounds=5, contenders=None if full else only_ours),
    ]
    return found + _growth() if full else found


def _growth() -> list[Case]:
    """Return cases that grow in n, V and K, one that only ours can do in its memory, and one in bfloat16."""
    grown = (BOUND, OURS, EAGER, EAGER_ROWS, COMPILED, peers.TORCH_TUNED, peers.TRL)
    over_n = [Case(n // 64, 128, 256, 32000, rounds=3, contenders=grown) for n in (512, 1024, 2048, 4096)]
    over_v = [Case(16, 128, 256, v, rounds=3, contenders=grown) for v in (8192, 65536, 131072)]
    over_k = [Case(64, 32, 256, 32000, group_size=k, rounds=3, contenders=grown) for k in (2, 8, 32)]
    large = Case(128, 128, 256, 151936, rounds=1, budget=256 * MIB, contenders=(BOUND, OURS))
    return [*over_n, *over_v, *over_k, large, Case(8, 256, 512, 32000, torch.bfloat16, rounds=3)]


def contender(
    name: str, loss: Callable[[Problem], Tensor], problem: Problem, tolerance: float, bound: str = BOUND
) -> Contender:
    leaves = [x for x in (problem.hidden, problem.weight) if x.requires_grad]

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(problem), leaves)

    def outputs() -> tuple[Tensor, ...]:
        value = loss(problem)
        d_hidden, *rest = torch.autograd.grad(value, leaves)
        if problem.order is not None:
            d_hidden = d_hidden[problem.order.argsort()]
        return value.detach(), d_hidden, *rest

    return Contender(name, call, outputs, tolerance, bound)


def _ours(p: Problem, budget: int) -> Tensor:
    inputs, options = (p.hidden, p.weight, p.labels), {"shift": False, "memory_budget": budget}
    if p.case.objective == LOGPS:
        return linear_token_logps(*inputs, **options).sum() / p.case.rows_with_loss
    options |= {"group_size": p.case.group_size, "beta_pi": BETA_PI}
    if p.case.objective == DPO:
        return fused_linear_dpo_loss(*inputs, ref_hidden=p.ref_hidden, **options)
    return fused_linear_exo_loss(*inputs, p.ref_logps, rewards=p.rewards, beta_r=BETA_R, **options)


def objective(p: Problem, logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return the loss in plain torch, given log-probs (N, T) of the policy, and (N, T) or (N,) of the reference."""
    if p.case.objective == LOGPS:
        return logps.sum() / p.case.rows_with_loss
    ratios = logps.sum(-1) - (ref_logps if ref_logps.dim() == 1 else ref_logps.sum(-1))
    if p.case.objective == EXO:
        return exo(ratios, p.rewards, p.case.group_size)
    return -torch.nn.functional.logsigmoid(BETA_PI * ratios.view(-1, 2).diff(dim=1).neg()).mean()


def _eager(p: Problem, upcast: bool = True) -> Tensor:
    """Return the loss in plain torch: logits of all rows in the operands' dtype, log-softmax in fp32."""

    def logps(hidden: Tensor) -> Tensor:
        z = torch.nn.functional.linear(hidden, p.weight)
        log_p = (z.float() if upcast else z).log_softmax(-1)
        return (log_p.gather(-1, p.labels.clamp(min=0)[..., None])[..., 0] * (p.labels != IGNORE)).float()

    with torch.no_grad():
        ref_logps = p.ref_logps if p.ref_hidden is None else logps(p.ref_hidden)
    return objective(p, logps(p.hidden), ref_logps)


def _eager_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probs (n,) of rows (n, D)."""
    log_p = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0]


def from_token_logps(token_logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Problem], Tensor]:
    """Return the loss of a problem, given a function for the log-probs of rows (n, D).

    It gets the rows with loss alone, at the cost of a copy, as from a careful user.
    """

    def loss(p: Problem) -> Tensor:
        mask = p.labels != IGNORE

        def logps(hidden: Tensor) -> Tensor:
            values = token_logps(hidden[mask], p.weight, p.labels[mask]).float()
            return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)

        with torch.no_grad():
            ref_logps = p.ref_logps if p.ref_hidden is None else logps(p.ref_hidden)
        return objective(p, logps(p.hidden), ref_logps)

    return loss
