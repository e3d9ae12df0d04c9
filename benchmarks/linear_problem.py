"""The data of a case of the linear suite, the matmuls that bound it, and its errors against the fp64 oracle."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.logits import BETA_PI, BETA_R, IGNORE
from exo_kernels import linear_sequence_logps, reference

if TYPE_CHECKING:
    from benchmarks.linear import Case

EXO, DPO, LOGPS = "EXO", "DPO", "log-probs"
SPREAD, LIKELY = 2.0, 4.0  # standard deviation of the logits; amount added to the label's logit


@dataclass(frozen=True)
class Problem:
    case: "Case"
    hidden: Tensor  # (N, T, D), a leaf that requires a gradient
    weight: Tensor  # (V, D), a leaf that requires a gradient unless the head is frozen
    labels: Tensor  # (N, T) int64, aligned with the rows
    ref_logps: Tensor  # (N,) fp32 sums
    ref_hidden: Tensor | None  # (N, T, D), for DPO
    rewards: Tensor  # (N,)
    order: Tensor | None = None  # (N,), index of each sequence in the original problem

    def frozen(self) -> "Problem":
        return replace(self, weight=self.weight.detach())

    def halves(self) -> "Problem":
        """Return the problem with chosen sequences before rejected ones, as Liger expects. Needs K = 2."""
        order = torch.arange(len(self.labels), device=self.labels.device).view(-1, 2).t().flatten()
        assert self.ref_hidden is not None
        hidden = self.hidden.detach()[order].requires_grad_()
        return replace(
            self, hidden=hidden, labels=self.labels[order], ref_hidden=self.ref_hidden[order], order=order
        )  # fmt: skip


def make(case: "Case", device: str, seed: int = 0) -> Problem:
    """Return a problem with likely labels, and a reference within a few nats of the policy."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    labels = torch.randint(case.vocab, (case.sequences, case.length), device=device, generator=generator)
    weight = (normal(case.vocab, case.hidden) * (SPREAD / case.hidden**0.5)).to(case.dtype)
    hidden = normal(case.sequences, case.length, case.hidden)
    hidden = hidden.add_(weight[labels], alpha=LIKELY / SPREAD).to(case.dtype)
    labels[:, : case.length // 2] = IGNORE
    ref_logps, ref_hidden = torch.zeros(case.sequences, device=device), None
    if case.objective == EXO:
        ref_logps = linear_sequence_logps(hidden, weight, labels, shift=False) + 4 * normal(case.sequences)
    elif case.objective == DPO:
        ref_hidden = (hidden + 0.05 * normal(*hidden.shape)).to(case.dtype)
    rewards = normal(case.sequences)
    return Problem(
        case, hidden.requires_grad_(), weight.requires_grad_(), labels, ref_logps.float(), ref_hidden, rewards
    )  # fmt: skip


def bound(p: Problem) -> Callable[..., None]:
    """Return the matmuls that every method needs: logits, dH and, unless frozen, dW. 16-bit operands, fp32 results."""
    case, device = p.case, p.hidden.device
    hidden, weight = p.hidden.detach()[p.labels != IGNORE], p.weight.detach()
    wide = {"out_dtype": torch.float32} if case.dtype != torch.float32 and device.type == "cuda" else {}
    if case.dtype != torch.float32 and not wide:  # a CPU has no such matmul
        hidden, weight = hidden.float(), weight.float()
    n = len(hidden)
    logits = torch.empty(n, case.vocab, device=device)
    d = torch.empty(n, case.vocab, dtype=hidden.dtype, device=device).normal_()  # zeros would draw less power
    d_hidden, d_weight = torch.empty(n, case.hidden, device=device), torch.empty(case.vocab, case.hidden, device=device)
    copied = torch.empty(case.between_bytes // 2 if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    target = torch.empty_like(copied)

    def matmuls(frozen: bool) -> None:
        for _ in range(case.models):
            torch.mm(hidden, weight.t(), out=logits, **wide)
        target.copy_(copied)
        torch.mm(d, weight, out=d_hidden, **wide)
        if not frozen:
            torch.mm(d.t(), hidden, out=d_weight, **wide)

    return matmuls


def errors(p: Problem, outputs: dict[str, tuple[Tensor, ...]]) -> dict[str, dict[str, float]]:
    """Return the relative errors of loss and gradients against the fp64 oracle, which runs group by group."""
    weight = p.weight.detach().double().requires_grad_()
    total = torch.zeros_like(weight)
    size, groups = p.case.group_size, len(p.labels) // p.case.group_size
    loss, norm, distances = 0.0, 0.0, dict.fromkeys(outputs, 0.0)
    for i in (slice(g * size, (g + 1) * size) for g in range(groups)):
        hidden = p.hidden[i].detach().double().requires_grad_()
        value = _oracle(p, i, hidden, weight, groups)
        truth, d_weight = torch.autograd.grad(value, (hidden, weight))
        total += d_weight
        loss += value.item()
        norm += truth.square().sum().item()
        for name, (_, d_hidden, *_rest) in outputs.items():
            distances[name] += (d_hidden[i] - truth).square().sum().item()
    by_name = {}
    for name, (value, _, *d_weights) in outputs.items():
        by_name[name] = {"loss": abs(value.item() - loss) / abs(loss), "hidden": (distances[name] / norm) ** 0.5}
        if d_weights:
            by_name[name]["weight"] = ((d_weights[0] - total).norm() / total.norm()).item()
    return by_name


def _oracle(p: Problem, i: slice, hidden: Tensor, weight: Tensor, groups: int) -> Tensor:
    inputs = (hidden, weight, p.labels[i])
    if p.case.objective == LOGPS:
        return reference.linear_token_logps(*inputs, shift=False).sum() / p.case.rows_with_loss
    options = {"group_size": p.case.group_size, "beta_pi": BETA_PI, "shift": False, "num_groups": groups}
    if p.case.objective == DPO:
        assert p.ref_hidden is not None
        return reference.fused_linear_dpo_loss(*inputs, ref_hidden=p.ref_hidden[i].double(), **options)
    return reference.fused_linear_exo_loss(
        *inputs, p.ref_logps[i], rewards=p.rewards[i], beta_r=BETA_R, **options
    )  # fmt: skip
