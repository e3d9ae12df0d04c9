"""Contenders from logits: ours, and code that a user of PyTorch writes; and their errors for the gate."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import OURS
from benchmarks.logits_workload import IGNORE, Problem
from exo_kernels import fused_exo_loss, reference

BETA_PI, BETA_R = 0.1, 1.0
EAGER, COMPILED, EAGER_LOW = "eager", "compile", "eager, own dtype"


@dataclass(frozen=True)
class Contender:
    name: str
    loss: Callable[[Problem], Tensor]
    tolerance: float  # relative error allowed in loss and gradient

    def gradient(self, problem: Problem) -> tuple[Tensor, Tensor]:
        loss = self.loss(problem)
        return loss.detach(), torch.autograd.grad(loss, problem.logits)[0]


def contenders(dtype: torch.dtype) -> list[Contender]:
    """Return the contenders, ours first.

    In 16 bits they round only the gradient, except EAGER_LOW, which computes in 16 bits and has a wider tolerance.
    """
    compiled = torch.compile(_eager, fullgraph=True, dynamic=False)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    result = [
        Contender(OURS, _ours, tolerance),
        Contender(EAGER, lambda p: _eager(*_arguments(p)), tolerance),
        Contender(COMPILED, lambda p: compiled(*_arguments(p)), tolerance),
    ]
    if dtype != torch.float32:
        result.append(Contender(EAGER_LOW, lambda p: _eager(*_arguments(p), upcast=False), 0.25))
    return result


def _arguments(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    return problem.logits, problem.labels, problem.ref_logps, problem.rewards, problem.group_size


def _ours(problem: Problem) -> Tensor:
    return fused_exo_loss(
        problem.logits, problem.labels, problem.ref_logps, group_size=problem.group_size, rewards=problem.rewards,
        beta_pi=BETA_PI, beta_r=BETA_R, shift=False,
    )  # fmt: skip


def _eager(
    logits: Tensor, labels: Tensor, ref_logps: Tensor, rewards: Tensor, group_size: int, upcast: bool = True
) -> Tensor:
    """Return the EXO loss in plain torch. Eager moves about 8 V s bytes per row, with or without loss."""
    mask = labels != IGNORE
    log_p_tokens = (logits.float() if upcast else logits).log_softmax(-1)
    logps = log_p_tokens.gather(-1, labels.clamp(min=0)[..., None])[..., 0].float()
    return exo((logps * mask).sum(-1) - ref_logps, rewards, group_size)


def exo(log_ratios: Tensor, rewards: Tensor, group_size: int) -> Tensor:
    """Return the EXO loss of sequence log-ratios (N,)."""
    log_p = (BETA_PI * log_ratios.view(-1, group_size)).log_softmax(-1)
    log_q = (rewards.view(-1, group_size) / BETA_R).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def errors(problem: Problem, results: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """Return the relative errors of loss and gradient of each result on the timed data, against the fp64 oracle.

    The oracle needs much memory, so it runs group by group; the loss is the mean over independent groups.
    """
    groups = problem.labels.shape[0] // problem.group_size
    loss, norm = 0.0, 0.0
    distances = dict.fromkeys(results, 0.0)
    for g in range(groups):
        i = slice(g * problem.group_size, (g + 1) * problem.group_size)
        x = problem.logits[i].detach().double().requires_grad_()
        loss_g = reference.fused_exo_loss(
            x, problem.labels[i], problem.ref_logps[i], group_size=problem.group_size, rewards=problem.rewards[i],
            beta_pi=BETA_PI, beta_r=BETA_R, shift=False, num_groups=groups,
        )  # fmt: skip
        (truth,) = torch.autograd.grad(loss_g, x)
        loss += loss_g.item()
        norm += truth.square().sum().item()
        for name, (_, gradient) in results.items():
            distances[name] += (gradient[i] - truth).square().sum().item()
    return {
        name: {"loss": abs(result[0].item() - loss) / abs(loss), "gradient": (distances[name] / norm) ** 0.5}
        for name, result in results.items()
    }
