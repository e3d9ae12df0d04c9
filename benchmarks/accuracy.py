"""The accuracy suite: errors of sequence log-ratios against fp64 on the same operands, in nats.

The loss depends on S = sum over 512 tokens of log p_policy - log p_reference. The two models are nearly equal, so S is
tenths of a nat, a difference of sums of thousands. Nothing is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import linear, linear_problem, peers
from benchmarks.harness import EAGER, OURS, Contender, Options, Prepared
from benchmarks.logits import BETA_PI, COMPILED, EAGER_LOW, dtype_name
from exo_kernels import fused_linear_exo_loss, linear_sequence_logps, linear_token_logps

SUITE = "accuracy"
TOKENS = 512
OURS_SUMS = "ours, fp32 sums as reference"
LOGIT_SPREAD, MOVED = 4.0, 0.002  # labels at -4 nats; policy and reference differ by a step or two of training


@dataclass(frozen=True)
class Case:
    sequences: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    rounds: int = 0
    work: float = 0.0
    suite: str = SUITE
    unit: str = ""

    def __str__(self) -> str:
        return f"D{self.hidden}-V{self.vocab}-{dtype_name(self.dtype)}"

    @property
    def title(self) -> str:
        return (
            f"error of log-ratios in nats, {self.sequences} sequences of {TOKENS} tokens, D={self.hidden}, "
            f"V={self.vocab:,}, {dtype_name(self.dtype)} operands"
        )

    @property
    def sizes(self) -> dict[str, Any]:
        return {"D": self.hidden, "V": self.vocab, "dtype": dtype_name(self.dtype), "sequences": self.sequences}

    def prepare(self, options: Options) -> Prepared:
        o = make(self, options.device)
        functions: dict[str, Callable[[], Tensor]] = {
            OURS: partial(_ours, o, linear_token_logps),
            OURS_SUMS: partial(_ours, o, linear_sequence_logps),
        }
        absent: dict[str, str] = {}
        if not options.ours_only:
            functions[EAGER] = partial(_by_sums, o, _eager)
            if self.dtype != torch.float32:
                functions[EAGER_LOW] = partial(_by_sums, o, partial(_eager, upcast=False))
        if options.peers:
            functions[COMPILED] = partial(_by_sums, o, torch.compile(_eager, fullgraph=True, dynamic=False))
            for name, peer in peers.PEERS.items():
                if name in (peers.TORCH_TUNED, peers.TRL_METRICS):  # the same numbers
                    continue
                token_logps = peers.torch_token_logps if name == peers.TORCH else peer.token_logps
                reason = peer.cannot("DPO", options.device)
                if reason:
                    absent[name] = reason
                else:
                    functions[name] = partial(_by_sums, o, token_logps) if token_logps else partial(_liger, o)
        true = truth(o)
        contenders = [Contender(name, f, lambda f=f: (f(),)) for name, f in functions.items()]
        return Prepared(contenders, absent, lambda outputs: {n: _errors(x, true) for n, (x,) in outputs.items()})


def cases(device: str, full: bool) -> list[Case]:
    shapes = [(4, 768, 50257), (2, 512, 151936)] if full else [(2, 512, 50257)]
    if device == "cuda":
        shapes = [(8, 896, 151936), (8, 2048, 128256), (8, 4096, 128256)]
    return [Case(*shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]


class Operands(NamedTuple):
    hidden: Tensor  # (N, T, D)
    ref_hidden: Tensor  # (N, T, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (N, T), aligned, all with loss


def make(case: Case, device: str, seed: int = 0) -> Operands:
    """Return operands with labels sampled from the reference, so that they have the probabilities of real text."""
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"device": device, "generator": generator}
    shape = (case.sequences, TOKENS, case.hidden)
    weight = torch.randn(case.vocab, case.hidden, **options) * (LOGIT_SPREAD / case.hidden**0.5)
    ref_hidden = torch.randn(shape, **options)
    hidden = ref_hidden + MOVED * torch.randn(shape, **options)
    labels = torch.empty(shape[:2], dtype=torch.long, device=device)
    for x, y in zip(ref_hidden, labels, strict=True):  # by sequence, here and below, to avoid a tensor (N, T, V)
        y.copy_(torch.multinomial((x @ weight.t()).softmax(-1), 1, generator=generator)[:, 0])
    return Operands(hidden.to(case.dtype), ref_hidden.to(case.dtype), weight.to(case.dtype), labels)


def truth(o: Operands) -> Tensor:  # (N,) float64
    weight = o.weight.double()

    def logps(x: Tensor, y: Tensor) -> Tensor:
        logits = x.double() @ weight.t()
        return logits.gather(1, y[:, None])[:, 0] - logits.logsumexp(-1)

    rows = zip(o.hidden, o.ref_hidden, o.labels, strict=True)
    return torch.stack([(logps(x, y) - logps(ref, y)).sum() for x, ref, y in rows])


def _errors(log_ratios: Tensor, true: Tensor) -> dict[str, float]:
    error = (log_ratios - true).abs()
    return {"max": error.max().item(), "rms": error.square().mean().sqrt().item()}


def _ours(o: Operands, score: Callable[..., Tensor]) -> Tensor:
    ref_logps = score(o.ref_hidden, o.weight, o.labels, shift=False)
    hidden, weight = (x.detach().requires_grad_() for x in (o.hidden, o.weight))
    options = {"beta_pi": BETA_PI, "shift": False, "return_stats": True}
    _, stats = fused_linear_exo_loss(hidden, weight, o.labels, ref_logps, **options)
    return stats.implicit_rewards.double() / BETA_PI


def _eager(hidden: Tensor, weight: Tensor, labels: Tensor, upcast: bool = True) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight)
    log_p = (logits.float() if upcast else logits).log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0]


def _by_sums(o: Operands, token_logps: peers.TokenLogps) -> Tensor:
    """Sum the log-probs of each model in their dtype, then subtract, as trainers do."""
    with torch.no_grad():
        policy, ref = (
            torch.stack([token_logps(x, o.weight, y).sum() for x, y in zip(hidden, o.labels, strict=True)])
            for hidden in (o.hidden, o.ref_hidden)
        )
    return (policy - ref).double()


def _liger(o: Operands) -> Tensor:
    n, d = len(o.labels), o.hidden.shape[-1]
    case = linear.Case(n, TOKENS, d, len(o.weight), o.hidden.dtype, linear_problem.DPO, 2)
    problem = linear_problem.Problem(
        case, o.hidden, o.weight, o.labels, torch.zeros(n), o.ref_hidden, torch.zeros(n)
    ).halves()
    assert problem.order is not None
    with torch.no_grad():
        _, (*_, chosen, rejected) = peers.liger_dpo(problem)
    return torch.cat([chosen, rejected])[problem.order.argsort()].double() / BETA_PI
