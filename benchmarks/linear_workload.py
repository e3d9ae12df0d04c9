"""What is computed from hidden states: a step of completions behind their prompts, and the work that no method avoids.

Left out: who computes it (linear_contenders.py) and how it is measured (measure.py).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.logits_workload import IGNORE, MIB
from exo_kernels import linear_sequence_logps

EXO, DPO, DPO_POLICY = "EXO", "DPO with its reference model", "DPO, policy alone"
SPREAD, LIKELY = 2.0, 4.0  # of the logits; how far a hidden state leans towards its label, in units of the same


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
        """One of the three: 2 n D V. The reference model's is a fourth."""
        return 2 * self.rows_with_loss * self.hidden * self.vocab

    @property
    def between_bytes(self) -> int:
        """What must move between the matmuls, whose own traffic counts as theirs: (4 m + s) n V, s bytes an element.

        Every fp32 logit of the n rows with loss is read once, by m models, and its gradient is written once, in the
        operands' dtype, for the policy alone.
        """
        models = 2 if self.objective == DPO else 1
        return (4 * models + self.dtype.itemsize) * self.rows_with_loss * self.vocab

    @property
    def fp32_logits_bytes(self) -> int:
        return self.rows * self.vocab * 4

    @property
    def weight_bytes(self) -> int:
        """One fp32 gradient of the weight, which a 16-bit one needs besides."""
        return self.vocab * self.hidden * 4


def workloads(device: str) -> list[Workload]:
    """CPU: the whole path in a second. GPU: heads of 0.5B, 1B to 3B and 8B models, at 1k, 4k and 16k rows with loss."""
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
    hidden: Tensor  # (N, T, D), a leaf that wants a gradient
    weight: Tensor  # (V, D), a leaf that wants a gradient
    labels: Tensor  # (N, T) int64, aligned with the rows
    ref_logps: Tensor  # (N,) fp32 sums; zeros where the policy is alone
    ref_hidden: Tensor | None  # (N, T, D), with its reference model: by the same head
    rewards: Tensor | None  # (N,), EXO
    order: Tensor | None = None  # (N,), which sequence of the original stands here

    @property
    def group_size(self) -> int:
        return self.work.group_size

    def halves(self) -> "Problem":
        """The same problem with all chosen sequences before all rejected ones, as Liger wants them. K = 2."""
        order = torch.arange(self.work.sequences, device=self.labels.device).view(-1, 2).t().flatten()
        hidden = self.hidden.detach()[order].requires_grad_()
        ref_hidden = None if self.ref_hidden is None else self.ref_hidden[order]
        labels, ref_logps = self.labels[order], self.ref_logps[order]
        return replace(
            self, hidden=hidden, ref_hidden=ref_hidden, labels=labels, ref_logps=ref_logps, order=order
        )  # fmt: skip


def make(work: Workload, device: str, seed: int = 0) -> Problem:
    """Logits of spread 2 whose labels are likely ones, and a reference within a few nats of the policy."""
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
