"""Workloads from logits: the logits of an optimizer step, half of them prompt, and the bytes that must be moved."""

from dataclasses import dataclass

import torch
from torch import Tensor

from exo_kernels import reference

IGNORE = -100
MIB = 2**20


@dataclass(frozen=True)
class Workload:
    vocab: int
    sequences: int
    length: int
    dtype: torch.dtype
    masked: bool = True  # the first half of every sequence is prompt
    group_size: int = 4

    def __str__(self) -> str:
        return f"V{self.vocab}-{str(self.dtype).removeprefix('torch.')}-{'half' if self.masked else 'all'}"

    @property
    def rows(self) -> int:
        return self.sequences * self.length

    @property
    def rows_with_loss(self) -> int:
        return self.rows // 2 if self.masked else self.rows

    @property
    def groups(self) -> int:
        return self.sequences // self.group_size

    @property
    def bound_bytes(self) -> int:
        """(2n + R) V s: the n rows with loss are read forward and backward, all R rows of the gradient are written."""
        return (2 * self.rows_with_loss + self.rows) * self.vocab * self.dtype.itemsize

    @property
    def fp32_logits_bytes(self) -> int:
        return self.rows * self.vocab * 4


def workloads(device: str) -> list[Workload]:
    """Return workloads larger than the caches: at least 8 times an L3 of 32 MiB, 10 times the L2 of an H200."""
    if device == "cpu":
        return [Workload(32000, 8, 128, torch.float32), Workload(151936, 8, 64, torch.float32)]
    return [Workload(v, 16, 512, torch.bfloat16, half) for v in (32000, 128256, 151936) for half in (True, False)]


@dataclass(frozen=True)
class Problem:
    logits: Tensor  # (N, T, V), a leaf that requires a gradient
    labels: Tensor  # (N, T) int64, aligned with the rows (shift=False, because a shift would cost eager a copy)
    ref_logps: Tensor  # (N,) fp32 sums
    rewards: Tensor  # (N,)
    group_size: int


def make(workload: Workload, device: str, seed: int = 0) -> Problem:
    """Return logits with standard deviation 2 and likely labels, and a reference within a few nats of the policy."""
    generator = torch.Generator(device).manual_seed(seed)
    options = {"device": device, "generator": generator}
    shape = (workload.sequences, workload.length)
    labels = torch.randint(workload.vocab, shape, **options)
    logits = torch.empty(*shape, workload.vocab, dtype=workload.dtype, device=device)
    sums = []
    for x, y in zip(logits, labels, strict=True):  # by sequence, to avoid an fp32 copy of all logits
        x.normal_(0, 2, generator=generator)
        x.scatter_(1, y[:, None], 8.0)
    if workload.masked:
        labels[:, : workload.length // 2] = IGNORE
    for x, y in zip(logits, labels, strict=True):
        sums.append(reference.sequence_logps(x[None], y[None], shift=False)[0])
    ref_logps = torch.stack(sums) + 4 * torch.randn(workload.sequences, **options)
    rewards = torch.randn(workload.sequences, **options)
    return Problem(logits.requires_grad_(), labels, ref_logps.float(), rewards, workload.group_size)
