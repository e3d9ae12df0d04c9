"""Workloads from hidden states: a step of completions after their prompts, and the work that every method must do."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.logits_workload import IGNORE, MIB
from exo_kernels import linear_sequence_logps

EXO, DPO, DPO_POLICY = "EXO", "DPO with its reference model", "DPO, policy alone"
SPREAD, LIKELY = 2.0, 4.0  # standard deviation of the logits; amount added to the label's logit


@dataclass(frozen=True)
class Workload:
    sequences: int
    length: int  # the first half of every sequence is prompt
    hidden: int
    vocab: int
    dtype: torch.dtype
    objective: str = EXO
    group_size: int = 4
    budget: int = 512 * MIB

    def __str__(self) -> str:
        name = self.objective.replace(", ", "-").replace(" ", "-")
        return f"{name}-D{self.hidden}-V{self.vocab}-n{self.rows_with_loss}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def rows(self) -> int:
        return self.sequences * self.length

    @property
    def rows_with_loss(self) -> int:
        return self.rows // 2

    @property
    def groups(self) -> int:
        return self.sequences // self.group_size

    @property
    def matmul_flops(self) -> int:
        """Operations of one of the three matmuls: 2 n D V. A reference model needs a fourth."""
        return 2 * self.rows_with_loss * self.hidden * self.vocab

    @property
    def between_bytes(self) -> int:
        """Bytes that must move between the matmuls: (4 m + s) n V, for m models and s bytes per operand.

        Every fp32 logit of the n rows with loss is read once per model, and the policy's gradient is written once in
        the operands' dtype.
        """
        models = 2 if self.objective == DPO else 1
        return (4 * models + self.dtype.itemsize) * self.rows_with_loss * self.vocab

    @property
    def fp32_logits_bytes(self) -> int:
        return self.rows * self.vocab * 4

    @property
    def weight_bytes(self) -> int:
        """Bytes of an fp32 gradient of the weight, which a 16-bit weight needs in addition."""
        return self.vocab * self.hidden * 4


def workloads(device: str) -> list[Workload]:
    """Return workloads of about a second on a CPU; on a GPU, heads of 0.5B to 8B models with 1k to 16k rows."""
    if device == "cpu":
        shapes = [(8, 256, 512, 32000, torch.float32)]
    else:
        heads = [(896, 151936), (2048, 128256), (4096, 128256)]
        shapes = [(n // 256, 512, d, v, torch.bfloat16) for d, v in heads for n in (1024, 4096, 16384)]
    kinds = [(EXO, 4), (DPO, 2), (DPO_POLICY, 2)]
    return [Workload(*shape, objective, k) for objective, k in kinds for shape in shapes]


@dataclass(frozen=True)
class Problem:
    work: Workload
    hidden: Tensor  # (N, T, D), a leaf that requires a gradient
    weight: Tensor  # (V, D), a leaf that requires a gradient
    labels: Tensor  # (N, T) int64, aligned with the rows
    ref_logps: Tensor  # (N,) fp32 sums; zeros without a reference
    ref_hidden: Tensor | None  # (N, T, D), for DPO with a reference model, which has the same head
    rewards: Tensor | None  # (N,), for EXO
    order: Tensor | None = None  # (N,), index of each sequence in the original problem

    @property
    def group_size(self) -> int:
        return self.work.group_size

    def halves(self) -> "Problem":
        """Return the same problem with chosen sequences before rejected ones, as Liger expects. Needs K = 2."""
        order = torch.arange(self.work.sequences, device=self.labels.device).view(-1, 2).t().flatten()
        hidden = self.hidden.detach()[order].requires_grad_()
        ref_hidden = None if self.ref_hidden is None else self.ref_hidden[order]
        labels, ref_logps = self.labels[order], self.ref_logps[order]
        return replace(
            self, hidden=hidden, ref_hidden=ref_hidden, labels=labels, ref_logps=ref_logps, order=order
        )  # fmt: skip


def make(work: Workload, device: str, seed: int = 0) -> Problem:
    """Return a problem with likely labels, and a reference within a few nats of the policy."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    labels = torch.randint(work.vocab, (work.sequences, work.length), device=device, generator=generator)
    weight = (normal(work.vocab, work.hidden) * (SPREAD / work.hidden**0.5)).to(work.dtype)
    hidden = normal(work.sequences, work.length, work.hidden)
    hidden = hidden.add_(weight[labels], alpha=LIKELY / SPREAD).to(work.dtype)
    labels[:, : work.length // 2] = IGNORE
    ref_logps, ref_hidden, rewards = torch.zeros(work.sequences, device=device), None, None
    if work.objective == EXO:
        ref_logps = linear_sequence_logps(hidden, weight, labels, shift=False) + 4 * normal(work.sequences)
        rewards = normal(work.sequences)
    elif work.objective == DPO:
        ref_hidden = (hidden + 0.05 * normal(*hidden.shape)).to(work.dtype)
    return Problem(
        work, hidden.requires_grad_(), weight.requires_grad_(), labels, ref_logps.float(), ref_hidden, rewards
    )  # fmt: skip
