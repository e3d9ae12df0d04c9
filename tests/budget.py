"""The error budget of the kernels' tests: the largest allowed distance between a result and the fp64 reference.

Elementwise:  |result - oracle| <= 2 |plain - oracle| + epsilon

oracle   exo_kernels.reference on float64 inputs
plain    exo_kernels.reference on inputs upcast to float32, on the device under test, with the result rounded once to
         the expected dtype. The factor 2 leaves room for another order of summation. (On CPU, torch sums a row
         sequentially: with 50257 columns, one of them large, the sum loses 4e-5 nat)
epsilon  plain can be exact by luck, so a result may also be off by ULPS ulps of the accumulator (float32, or float64
         for float64 input), relative to the scale of the terms it is computed from. The scales are first-order error
         bounds:
           log p         max(1, |log p|)        bounds the terms x - max and log(sum); the sum is at least 1
           p             p (1 + |log p|)        p = exp(log p)
           entropy       sum p (1 + |log p|)^2  a sum of p log p
           S             the sum of the scales of its log-probs
         The epsilons of the loss and the slopes g = dL/dS follow from those of S by finite differences of the oracle.
Values that are not finite must be identical. Rows without loss have scale 0 and must be exact.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from cases import IGNORED, Case, aligned, sums_of
from torch import Tensor

import exo_kernels
from exo_kernels import reference

STEP = 1e-6  # change of S in finite differences
ULPS = 4  # for the roundings of scale, difference, exponential, sum, logarithm and product


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def ulps_of(dtype: torch.dtype, vocab: int = 1) -> float:
    """Return ULPS ulps (at 1) of the accumulator's dtype, plus the error of the oracle's float64 sum of V terms."""
    return ULPS * torch.finfo(accumulator(dtype)).eps + vocab * torch.finfo(torch.float64).eps / 2


def compare(name: str, result: Tensor, plain: Tensor, oracle: Tensor, epsilon: Tensor | float) -> None:
    """Check the inequality above elementwise; the failure message shows the worst element."""
    assert result.shape == oracle.shape, f"{name}: shape {tuple(result.shape)}, expected {tuple(oracle.shape)}"
    assert result.dtype == plain.dtype, f"{name}: {result.dtype}, expected {plain.dtype}"
    result, plain, oracle = (x.detach().cpu().double() for x in (result, plain, oracle))
    finite = plain.isfinite() & oracle.isfinite()
    expected = torch.where(oracle.isfinite(), plain, oracle)[~finite]  # plain overflows where the oracle does not
    torch.testing.assert_close(result[~finite], expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")
    error = (result - oracle).abs()
    allowed = 2 * (plain - oracle).abs() + epsilon
    over = torch.where(finite, (error - allowed).nan_to_num(torch.inf), -torch.inf)
    if over.numel() and over.max() > 0:
        at = tuple(i.item() for i in torch.unravel_index(over.argmax(), over.shape))
        raise AssertionError(
            f"{name}{list(at)}: {result[at]:.9g}, oracle {oracle[at]:.9g}; error {error[at]:.2e}, allowed"
            f" {allowed[at]:.2e}, plain torch {abs(plain[at] - oracle[at]):.2e}; {int((over > 0).sum())} such elements"
        )


def assert_same(name: str, result: Tensor, expected: Tensor, scale: Tensor | float = 1.0) -> None:
    """Check that two results, neither of them the oracle's, differ by at most ULPS ulps of the accumulator."""
    epsilon = ulps_of(result.dtype) * torch.as_tensor(scale, dtype=torch.float64)
    compare(name, result, expected.to(result.dtype), expected, epsilon)


def truncation(oracle: Tensor, dtype: torch.dtype) -> Tensor | float:
    """Return one ulp of bf16 under triton's interpreter, which truncates float32 where a GPU rounds; otherwise 0."""
    if dtype != torch.bfloat16 or not exo_kernels.dispatch.INTERPRETED:
        return 0.0
    return torch.finfo(dtype).eps * torch.exp2(oracle.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor())


class Softmax(NamedTuple):
    """The fp64 softmax of every row with loss; zeros in the other rows."""

    p: Tensor  # (..., V)
    log_p: Tensor  # (..., V), 0 where p is 0
    onehot: Tensor  # (..., V)
    scored: Tensor  # (...)

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, temperature: float) -> "Softmax":
        scored = targets != IGNORED
        log_p = torch.log_softmax(logits.double() / temperature, -1)
        log_p = torch.where(scored[..., None], log_p, -torch.inf).nan_to_num(-torch.inf, neginf=-torch.inf)
        inside = targets.clamp(0, logits.shape[-1] - 1)
        onehot = torch.zeros_like(log_p).scatter_(-1, inside[..., None], scored[..., None].double())
        return cls(log_p.exp(), torch.where(log_p.isfinite(), log_p, 0.0), onehot, scored)

    @property
    def p_scale(self) -> Tensor:
        return self.p * (1 + self.log_p.abs())

    def logp_scale(self) -> Tensor:  # (...)
        return torch.where(self.scored, (self.onehot * self.log_p).sum(-1).abs().clamp(min=1), 0.0)


def token_answer(logits: Tensor, labels: Tensor, g: Tensor, h: Tensor | None, layout: dict, **impl: str) -> dict:
    """Return log-probs, entropies if h is given, and the gradient of their sums weighted with g and h."""
    function = exo_kernels.token_logps if impl else reference.token_logps
    x = logits.detach().requires_grad_()
    results = function(x, labels, return_entropy=h is not None, **layout, **impl)
    answer = {"logps": results} if h is None else {"logps": results[0], "entropies": results[1]}
    weighted = [(value * weight.to(value)).sum() for value, weight in zip(answer.values(), (g, h), strict=False)]
    torch.stack(weighted).sum().backward()
    return {name: value.detach() for name, value in answer.items()} | {"grad": x.grad}


def check_tokens(
    logits: Tensor,
    labels: Tensor,
    impl: str,
    device: str,
    view: Callable[[Tensor], Tensor] = lambda x: x,
    *,
    entropy: bool = False,
    **layout: Any,
) -> None:
    """Check token_logps and its gradient for random coefficients. `view` changes the strides of the logits."""
    rng = torch.Generator().manual_seed(0)
    g = torch.randn(labels.shape, generator=rng, dtype=torch.float64)
    h = torch.randn(labels.shape, generator=rng, dtype=torch.float64) if entropy else None
    result = token_answer(view(logits.to(device)), labels.to(device), g, h, layout, impl=impl)
    oracle = token_answer(logits.double(), labels, g, h, layout)
    with allow_nondeterminism():
        plain = token_answer(logits.to(device, accumulator(logits.dtype)), labels.to(device), g, h, layout)

    temperature = layout.get("temperature", 1.0)
    z = Softmax.of(logits, aligned(labels, layout.get("shift")), temperature)
    unit = ulps_of(logits.dtype, logits.shape[-1])
    coefficient = g.abs()[..., None] * (z.onehot + z.p_scale)
    if entropy:
        entropy_scale = (z.p * (1 + z.log_p.abs()) ** 2).sum(-1)
        compare("entropies", result["entropies"], plain["entropies"], oracle["entropies"], unit * entropy_scale)
        bracket = 1 + z.log_p.abs() + entropy_scale[..., None]  # bounds log p + H and, as checked above, the error of H
        coefficient = coefficient + h.abs()[..., None] * z.p_scale * bracket
    compare("logps", result["logps"], plain["logps"], oracle["logps"], unit * z.logp_scale())
    _compare_gradient(result, plain, oracle, unit * coefficient / temperature, logits.dtype)


@contextlib.contextmanager
def allow_nondeterminism() -> Iterator[None]:
    """Allow nondeterministic algorithms in the oracle; only the code under test must be deterministic."""
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(enabled)


def _compare_gradient(result: dict, plain: dict, oracle: dict, epsilon: Tensor, dtype: torch.dtype) -> None:
    epsilon = epsilon + truncation(oracle["grad"], dtype)
    epsilon = epsilon + torch.finfo(accumulator(dtype)).tiny * (epsilon > 0)  # smaller exponentials flush to zero
    compare("grad", result["grad"], plain["grad"].to(dtype), oracle["grad"], epsilon)


def loss_answer(case: Case, logits: Tensor, impl: str | None = None, **options: Any) -> dict[str, Tensor]:
    """Return loss, statistics and gradient of one call."""
    module, options = (reference, options) if impl is None else (exo_kernels, options | {"impl": impl})
    x = logits.detach().requires_grad_()
    function = getattr(module, f"fused_{case.objective}_loss")
    loss, stats = function(x, case.labels, case.ref_logps, return_stats=True, **case.options, **options)
    loss.backward(None if case.weights is None else case.weights.to(loss))
    return {"loss": loss.detach(), "grad": x.grad, **stats._asdict()}


def check_loss(
    case: Case, impl: str, device: str, view: Callable[[Tensor], Tensor] = lambda x: x, **options: Any
) -> dict[str, Tensor]:
    """Check a fused loss, its statistics and its gradient; return them. `view` changes the strides of the logits."""
    dtype = case.logits.dtype
    moved = case.on(device)
    oracle = loss_answer(case, case.logits.double())
    with allow_nondeterminism():
        plain = loss_answer(moved, moved.logits.to(accumulator(dtype)))
    epsilons = _loss_epsilons(case, oracle)
    result = loss_answer(moved, view(moved.logits), impl, **options)  # last, because it may overwrite the logits
    for name in ("loss", "policy_logps", "implicit_rewards", "p", "q", "losses"):
        compare(name, result[name], plain[name], oracle[name], epsilons[name])
    _compare_gradient(result, plain, oracle, epsilons["grad"], dtype)
    assert result["tokens"].tolist() == oracle["tokens"].tolist()
    return result


def _loss_epsilons(case: Case, oracle: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the epsilons of the loss, its statistics and its gradient."""
    unit = ulps_of(case.logits.dtype, case.logits.shape[-1])
    temperature, cu_seqlens = case.options.get("temperature", 1.0), case.options.get("cu_seqlens")
    beta = case.options.get("beta_pi", 0.1)
    z = Softmax.of(case.logits, aligned(case.labels, case.options.get("shift")), temperature)
    logps = reference.token_logps(case.logits.double(), case.labels, **case.layout())
    policy, ref = sums_of(logps, cu_seqlens), case.ref_logps.double()
    if ref.shape != policy.shape:
        ref = sums_of(torch.where(z.scored, ref, 0.0), cu_seqlens)

    drift = unit * sums_of(z.logp_scale(), cu_seqlens)  # (N,)
    most = drift.max() if drift.numel() else 0.0
    loss, losses, slopes = group_numbers(case, policy, ref)
    moves = [torch.zeros_like(loss), torch.zeros_like(losses), torch.zeros_like(slopes)]
    for n, step in enumerate(torch.eye(policy.numel(), dtype=torch.float64) * STEP):
        moved = group_numbers(case, policy + step, ref)
        for move, a, b in zip(moves, moved, (loss, losses, slopes), strict=True):
            move += (a - b).abs() / STEP * drift[n]
    # the group pass computes in float64 for every dtype: p (log p - log q - L) and p - q are differences in float64
    difference = beta * (1 + losses.nan_to_num(0, 0, 0).abs().sum()) * ulps_of(torch.float64)
    weight = 1.0 if case.weights is None else case.weights.abs().max()
    slope_epsilon = moves[2] + unit * slopes.abs() + weight * difference

    def rows(per_sequence: Tensor) -> Tensor:
        if cu_seqlens is None:
            return per_sequence[:, None, None]
        return per_sequence.repeat_interleave(cu_seqlens.diff())[:, None]

    gradient = rows(unit * slopes.abs()) * (z.onehot + z.p_scale) + rows(slope_epsilon) * (z.onehot - z.p).abs()
    return {
        "loss": moves[0] + unit * loss.abs().clamp(min=1),
        "losses": moves[1] + unit * losses.abs().clamp(min=1),
        "policy_logps": drift,
        "implicit_rewards": beta * (drift + unit * (policy - ref).abs()),
        "p": oracle["p"] * (unit + 2 * beta * most),
        "q": oracle["q"] * unit,
        "grad": gradient / temperature,
    }


def group_numbers(case: Case, policy: Tensor, ref: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the oracle's loss, losses (G,) and slopes dL/dS (N,) for sums of log-probs (N,)."""
    names = ("group_size", "rewards", "beta_pi", "beta_r", "label_smoothing", "compat")
    options = {name: case.options[name] for name in names if name in case.options}
    options["objective"] = case.objective
    policy = policy.detach().requires_grad_()
    losses = reference.preference_loss(policy, ref, **options, reduction="none")
    reduction = {name: case.options[name] for name in ("reduction", "num_groups") if name in case.options}
    loss = reference.preference_loss(policy, ref, **options, **reduction)
    loss.backward(case.weights)
    return loss.detach(), losses.detach(), policy.grad
