"""The accuracy of sequence log-ratios, against fp64 on the same operands: cases, implementations, rows, table.

The loss depends on S = sum over 512 tokens of log p_policy - log p_reference. The two models are nearly equal, so S is
tenths of a nat, a difference of sums of thousands. The table shows the error of S in nats. The gate of every benchmark
checks the gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import linear_peers as peers
from benchmarks import linear_workload, report
from benchmarks.harness import OURS
from benchmarks.linear_contenders import COMPILED, EAGER
from benchmarks.logits_contenders import BETA_PI, EAGER_LOW
from benchmarks.report import Target
from exo_kernels import fused_linear_exo_loss, linear_sequence_logps, linear_token_logps

SUITE = "accuracy"
TOKENS = 512
OURS_SUMS = "ours, fp32 sums as reference"
LOGIT_SPREAD, MOVED = 4.0, 0.002  # labels at -4 nats; policy and reference differ by a step or two of training
GOAL = {torch.float32: 1e-4, torch.bfloat16: 1e-3}  # nats


@dataclass(frozen=True)
class Case:
    sequences: int
    hidden: int
    vocab: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"accuracy-D{self.hidden}-V{self.vocab}-{str(self.dtype).removeprefix('torch.')}"


def cases(device: str) -> list[Case]:
    shapes = [(4, 768, 50257), (2, 512, 151936)]
    if device == "cuda":
        shapes = [(8, 896, 151936), (8, 2048, 128256), (8, 4096, 128256)]
    return [Case(*shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]


@dataclass(frozen=True)
class Operands:
    hidden: Tensor  # (N, T, D)
    ref_hidden: Tensor  # (N, T, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (N, T), aligned, all with loss


def make(case: Case, device: str, seed: int = 0) -> Operands:
    """Return operands with labels sampled from the reference, so that they have the probabilities of real text."""
    generator = torch.Generator(device).manual_seed(seed)
    options = {"device": device, "generator": generator}
    shape = (case.sequences, TOKENS, case.hidden)
    weight = torch.randn(case.vocab, case.hidden, **options) * (LOGIT_SPREAD / case.hidden**0.5)
    reference = torch.randn(shape, **options)
    policy = reference + MOVED * torch.randn(shape, **options)
    labels = torch.empty(shape[:2], dtype=torch.long, device=device)
    for x, y in zip(reference, labels, strict=True):  # by sequence, here and below, to avoid a tensor (N, T, V)
        y.copy_(torch.multinomial((x @ weight.t()).softmax(-1), 1, generator=generator)[:, 0])
    return Operands(policy.to(case.dtype), reference.to(case.dtype), weight.to(case.dtype), labels)


def truth(o: Operands) -> Tensor:  # (N,)
    weight = o.weight.double()

    def logps(x: Tensor, y: Tensor) -> Tensor:
        logits = x.double() @ weight.t()
        return logits.gather(1, y[:, None])[:, 0] - logits.logsumexp(-1)

    rows = zip(o.hidden, o.ref_hidden, o.labels, strict=True)
    return torch.stack([(logps(x, y) - logps(ref, y)).sum() for x, ref, y in rows])


LogRatios = Callable[[Operands], Tensor]  # (N,)


def implementations(case: Case) -> tuple[dict[str, LogRatios], dict[str, str]]:
    """Return the implementations by name, and the reason why others cannot run here. Ours requires gradients."""
    compiled = torch.compile(_token_logps, fullgraph=True, dynamic=False)
    functions: dict[str, LogRatios] = {
        OURS: partial(_ours, score=linear_token_logps),
        OURS_SUMS: partial(_ours, score=linear_sequence_logps, trains=False),
        EAGER: partial(_by_sums, _token_logps),
        COMPILED: partial(_by_sums, compiled),
    }
    absent = {}
    if case.dtype != torch.float32:
        functions[EAGER_LOW] = partial(_by_sums, partial(_token_logps, upcast=False))
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        functions[peers.TORCH] = partial(_by_sums, peers.torch_token_logps)
    else:
        absent[peers.TORCH] = f"torch {torch.__version__} has no LinearCrossEntropyOptions"
    missing = peers.missing("liger_kernel.chunked_loss")
    if missing:
        absent[peers.LIGER] = missing
    else:
        functions[peers.LIGER] = _liger
    return functions, absent


def _ours(o: Operands, score: Callable[..., Tensor], trains: bool = True) -> Tensor:
    ref_logps = score(o.ref_hidden, o.weight, o.labels, shift=False)
    hidden, weight = (x.detach().requires_grad_(trains) for x in (o.hidden, o.weight))
    _, stats = fused_linear_exo_loss(
        hidden, weight, o.labels, ref_logps, beta_pi=BETA_PI, shift=False, return_stats=True
    )  # fmt: skip
    return stats.implicit_rewards.double() / BETA_PI


def _token_logps(hidden: Tensor, weight: Tensor, labels: Tensor, upcast: bool = True) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight)
    log_p = (logits.float() if upcast else logits).log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0]


def _by_sums(token_logps: Callable[[Tensor, Tensor, Tensor], Tensor], o: Operands) -> Tensor:
    """Sum the log-probs of each model in their dtype, then subtract, as trainers do."""
    with torch.no_grad():
        policy, reference = (
            torch.stack([token_logps(x, o.weight, y).sum() for x, y in zip(hidden, o.labels, strict=True)])
            for hidden in (o.hidden, o.ref_hidden)
        )
    return (policy - reference).double()


def _liger(o: Operands) -> Tensor:
    n, length = o.labels.shape
    work = linear_workload.Workload(
        n, length, o.hidden.shape[-1], len(o.weight), o.hidden.dtype, linear_workload.DPO, 2
    )  # fmt: skip
    problem = linear_workload.Problem(
        work, o.hidden, o.weight, o.labels, torch.zeros(n, device=o.labels.device), o.ref_hidden, None
    )
    halves = problem.halves()
    with torch.no_grad():
        _, (*_, chosen, rejected) = peers.liger_dpo(halves)
    assert halves.order is not None
    return torch.cat([chosen, rejected])[halves.order.argsort()].double() / BETA_PI


def row(case: Case, name: str, true: Tensor, log_ratios: Tensor | None, reason: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {
        "suite": SUITE, "workload": str(case), "sequences": case.sequences, "length": TOKENS, "hidden": case.hidden,
        "vocab": case.vocab, "dtype": str(case.dtype).removeprefix("torch."), "contender": name, "not_run": reason,
        "true_log_ratios": true.tolist(),
    }  # fmt: skip
    if log_ratios is not None:
        error = (log_ratios - true).abs()
        result |= {"max_error": error.max().item(), "rms_error": error.square().mean().sqrt().item()}
    return result


def targets(case: Case, rows: list[dict[str, Any]], device: str) -> list[Target]:
    """Return the targets: none for fp32 operands on a GPU, whose matmuls may be less accurate."""
    if case.dtype == torch.float32 and device != "cpu":
        return []
    return [
        Target(f"{row['contender']}, max error", row["max_error"], GOAL[case.dtype], False)
        for row in rows
        if row["contender"] == OURS
    ]


def block(block: list[dict[str, Any]]) -> list[str]:
    """Return the table of one case."""
    first = block[0]
    true = first["true_log_ratios"]
    lines = [
        "",
        f"error of sequence log-ratios in nats, {first['sequences']} x {first['length']} tokens, D={first['hidden']} "
        f"V={first['vocab']} {first['dtype']} operands; true ones {min(true):.3g} to {max(true):.3g}",
        f"{'':33}{'max':>10}{'rms':>10}",
    ]
    for row in block:
        if row["not_run"]:
            lines.append(f"{row['contender']:33}  not run: {row['not_run']}")
        else:
            lines.append(f"{row['contender']:33}{row['max_error']:10.1e}{row['rms_error']:10.1e}")
    return lines + report.verdicts(block)
