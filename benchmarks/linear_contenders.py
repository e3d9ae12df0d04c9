"""Contenders from hidden states: ours, the bare matmuls, and code that a user of PyTorch writes; and their errors.

All contenders get the same padded input. Ours and the bare matmuls use only the rows with loss; `from_token_logps`
selects these rows for a peer, at the cost of a copy, as a careful user would. Other libraries are in linear_peers.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import linear_workload as w
from benchmarks.harness import OURS
from benchmarks.linear_workload import Problem
from benchmarks.logits_contenders import BETA_PI, BETA_R, exo
from benchmarks.logits_workload import IGNORE, MIB
from exo_kernels import fused_linear_dpo_loss, fused_linear_exo_loss, reference

FROZEN, LARGE = "ours, frozen head", "ours, 4 GiB budget"
MATMULS, FROZEN_MATMULS = "bare matmuls", "bare matmuls, frozen"
EAGER, COMPILED = "eager", "compile"
EAGER_ROWS = "eager, rows with loss"
LARGE_BUDGET = 4096 * MIB

Loss = Callable[[Problem], Tensor]


@dataclass(frozen=True)
class Contender:
    name: str
    loss: Loss
    tolerance: float  # relative error allowed in the loss and in each gradient
    bound: str = MATMULS  # name of the bare matmuls to compare with
    frozen: bool = False
    halves: bool = False  # takes Problem.halves()

    def gradient(self, problem: Problem) -> tuple[Tensor, ...]:
        """Return the loss and the gradients of hidden and, unless frozen, weight."""
        leaves = (problem.hidden,) if self.frozen else (problem.hidden, problem.weight)
        loss = self.loss(problem)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def arrange(self, problem: Problem) -> Problem:
        return problem.halves() if self.halves else problem


def contenders(work: w.Workload) -> list[Contender]:
    """Return the contenders, ours first.

    In 16 bits, ours never rounds logits and rounds gradients once; others may round more, so their tolerance is wider.
    """
    low = work.dtype != torch.float32
    tolerance, peers = (1e-2, 0.25) if low else (1e-4, 1e-3)
    ours = [Contender(OURS, partial(_ours, budget=work.budget), tolerance)]
    if work.objective != w.EXO:
        return ours
    ours.append(Contender(FROZEN, partial(_ours, budget=work.budget, frozen=True), tolerance, FROZEN_MATMULS, True))
    if low and work.hidden == 4096:
        ours.append(Contender(LARGE, partial(_ours, budget=LARGE_BUDGET), tolerance))
    compiled = torch.compile(_eager, fullgraph=True, dynamic=False)
    return [
        *ours,
        Contender(EAGER, lambda p: _eager(*_arguments(p)), peers),
        Contender(EAGER_ROWS, from_token_logps(_eager_rows), peers),
        Contender(COMPILED, lambda p: compiled(*_arguments(p)), peers),
    ]


def _ours(problem: Problem, budget: int, frozen: bool = False) -> Tensor:
    weight = problem.weight.detach() if frozen else problem.weight
    options = {"group_size": problem.group_size, "beta_pi": BETA_PI, "shift": False, "memory_budget": budget}
    inputs = (problem.hidden, weight, problem.labels)
    if problem.rewards is not None:
        return fused_linear_exo_loss(*inputs, problem.ref_logps, rewards=problem.rewards, beta_r=BETA_R, **options)
    if problem.ref_hidden is None:
        return fused_linear_dpo_loss(*inputs, problem.ref_logps, **options)
    return fused_linear_dpo_loss(*inputs, ref_hidden=problem.ref_hidden, **options)


def _arguments(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, int]:
    p = problem
    return p.hidden, p.weight, p.labels, p.ref_logps, p.rewards, p.group_size


def _eager(
    hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, rewards: Tensor, group_size: int
) -> Tensor:
    """Return the EXO loss in plain torch: logits in the operands' dtype, log-softmax in fp32."""
    mask = labels != IGNORE
    log_p_tokens = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
    logps = log_p_tokens.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return exo((logps * mask).sum(-1) - ref_logps, rewards, group_size)


def _eager_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probs (n,) of rows (n, D)."""
    log_p = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0]


def from_token_logps(token_logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """Return the EXO loss of a problem as a function, given a function for the log-probs of rows (n, D)."""

    def loss(problem: Problem) -> Tensor:
        mask = problem.labels != IGNORE
        logps = token_logps(problem.hidden[mask], problem.weight, problem.labels[mask]).float()
        padded = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logps)
        return exo(padded.sum(-1) - problem.ref_logps, problem.rewards, problem.group_size)

    return loss


def bare_matmuls(problem: Problem) -> dict[str, Callable[[], None]]:
    """Return the matmuls that every method needs, into preallocated buffers: logits, dH and, unless frozen, dW.

    The reference model's logits are a fourth matmul with as many rows. Logits of 16-bit operands are fp32.
    """
    hidden, weight = problem.hidden.detach()[problem.labels != IGNORE], problem.weight.detach()
    n, work = len(hidden), problem.work
    device, wide = hidden.device, {"out_dtype": torch.float32} if hidden.dtype != torch.float32 else {}
    logits = torch.empty(n, work.vocab, device=device)
    d = logits if not wide else torch.empty(n, work.vocab, dtype=hidden.dtype, device=device)
    d.normal_()  # a GPU multiplies zeros faster, because they draw less power
    d_hidden, d_weight = torch.empty(n, work.hidden, device=device), torch.empty(work.vocab, work.hidden, device=device)
    scratch = torch.empty_like(logits) if d is logits else logits  # d is an input of the next matmuls
    models = 1 if problem.ref_hidden is None else 2

    def frozen() -> None:
        for _ in range(models):
            torch.mm(hidden, weight.t(), out=scratch, **wide)
        torch.mm(d, weight, out=d_hidden, **wide)

    def trained() -> None:
        frozen()
        torch.mm(d.t(), hidden, out=d_weight, **wide)

    return {MATMULS: trained} | ({FROZEN_MATMULS: frozen} if work.objective == w.EXO else {})


def errors(problem: Problem, results: dict[str, tuple[Tensor, ...]]) -> dict[str, dict[str, float]]:
    """Return the relative errors of loss and gradients of each result on the timed data, against the fp64 oracle.

    The oracle computes full logits, so it runs group by group; the loss is the mean over independent groups.
    """
    weight = problem.weight.detach().double().requires_grad_()
    total = torch.zeros_like(weight)
    groups, loss, norm = problem.work.groups, 0.0, 0.0
    distances = dict.fromkeys(results, 0.0)
    for g in range(groups):
        i = slice(g * problem.group_size, (g + 1) * problem.group_size)
        hidden = problem.hidden[i].detach().double().requires_grad_()
        loss_g = _oracle(problem, i, hidden, weight, groups)
        truth, d_weight = torch.autograd.grad(loss_g, (hidden, weight))
        total += d_weight
        loss += loss_g.item()
        norm += truth.square().sum().item()
        for name, (_, d_hidden, *_rest) in results.items():
            distances[name] += (d_hidden[i] - truth).square().sum().item()
    by_name = {}
    for name, (value, _, *d_weights) in results.items():
        by_name[name] = {"loss": abs(value.item() - loss) / abs(loss), "hidden": (distances[name] / norm) ** 0.5}
        if d_weights:
            by_name[name]["weight"] = ((d_weights[0] - total).norm() / total.norm()).item()
    return by_name


def _oracle(problem: Problem, i: slice, hidden: Tensor, weight: Tensor, groups: int) -> Tensor:
    options = {"group_size": problem.group_size, "beta_pi": BETA_PI, "shift": False, "num_groups": groups}
    inputs = (hidden, weight, problem.labels[i])
    if problem.rewards is not None:
        return reference.fused_linear_exo_loss(
            *inputs, problem.ref_logps[i], rewards=problem.rewards[i], beta_r=BETA_R, **options
        )
    if problem.ref_hidden is None:
        return reference.fused_linear_dpo_loss(*inputs, problem.ref_logps[i], **options)
    return reference.fused_linear_dpo_loss(*inputs, ref_hidden=problem.ref_hidden[i].double(), **options)
