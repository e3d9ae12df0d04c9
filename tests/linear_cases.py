"""Input for the tests of the losses from hidden states, and their error budget, which extends budget.py to matmuls.

The scale of a matmul's result is a product of absolute values: |h| |W|^T + |b| for the logits, |d| |W| and |d|^T |h|
for the gradients, where d is the error of the softmax that follows from the logits' errors. Two correct orders of
summation differ by ulps of these scales, not by ulps of the result.
"""

from typing import Any, NamedTuple

import torch
from budget import accumulator, allow_nondeterminism, compare, group_numbers, ulps_of
from cases import IGNORED, aligned, make_labels, seeded, sums_of
from torch import Tensor

import exo_kernels
from exo_kernels import reference

HEAD = ("bias", "logit_scale", "softcap")
LAYOUT = ("temperature", "cu_seqlens", "shift", "ignore_index")


class LinearCase(NamedTuple):
    """One call of a fused loss from hidden states."""

    hidden: Tensor  # (N, T, D), or packed (n, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (N, T), or packed (n,)
    ref_logps: Tensor | None
    objective: str = "exo"
    options: dict[str, Any] = {}  # keyword arguments of the loss
    weights: Tensor | None = None  # (G,): with reduction="none", gradient of the losses

    def with_options(self, **options: Any) -> "LinearCase":
        return self._replace(options=self.options | options)

    def selected(self, *names: str) -> dict[str, Any]:
        return {name: self.options[name] for name in names if name in self.options}

    def cu_seqlens(self) -> Tensor | None:
        return self.options.get("cu_seqlens")

    def to(self, dtype: torch.dtype, device: str | None = None) -> "LinearCase":
        """Convert the operands of matmuls to a dtype, and move all tensors to a device."""
        floats = ("bias", "ref_hidden", "ref_weight", "ref_bias")
        options = {k: v.to(dtype) if k in floats and v is not None else v for k, v in self.options.items()}
        case = self._replace(hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), options=options)
        if device is None:
            return case
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case._asdict().items()}
        moved["options"] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        return LinearCase(**moved)


def make_hidden(targets: Tensor, weight: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return one row per target: in turn nearly uniform, confident and right, confident and wrong; NaN if ignored."""
    vocab, width = weight.shape
    rng = seeded(seed + 1)
    hidden = torch.randn((*targets.shape, width), generator=rng, dtype=torch.float64) / width**0.5
    kinds = torch.arange(targets.numel()).view(targets.shape) % 3
    right = targets.clamp(0, vocab - 1)
    peak = weight.double()[torch.where(kinds == 1, right, (right + 1) % vocab)]
    height = 20 + 40 * torch.rand(targets.shape, generator=rng, dtype=torch.float64)
    hidden += peak / peak.square().sum(-1, keepdim=True) * (height * (kinds > 0))[..., None]
    return hidden.masked_fill((targets == IGNORED)[..., None], torch.nan).to(dtype)


def make_linear_case(
    n: int = 4,
    t: int = 5,
    width: int = 24,
    vocab: int = 129,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    lengths: list[int] | None = None,  # if given, the case is packed, and n and t are not used
    bias: bool = True,
    offset: float = 0.0,  # added to all logits, through the bias
    reference_model: str = "sums",  # or "tokens", "hidden" (with the policy's head), "own" (with a separate head)
    objective: str = "exo",
    weights: bool = False,
    rewards: bool = False,
    **options: Any,
) -> LinearCase:
    if lengths is not None:
        n = len(lengths)
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    labels = make_labels((n, t) if lengths is None else (sum(lengths),), vocab, seed)
    targets = aligned(labels, options.get("shift"))
    weight = torch.randn((vocab, width), generator=seeded(seed + 5), dtype=torch.float64).to(dtype)
    hidden = make_hidden(targets, weight, dtype, seed)
    if bias or offset:
        options["bias"] = (offset + torch.randn(vocab, generator=seeded(seed + 6), dtype=torch.float64)).to(dtype)
    if rewards:
        options["rewards"] = torch.randn(n, generator=seeded(seed + 3))
    case = LinearCase(hidden, weight, labels, None, objective, options)
    noise = torch.randn(hidden.shape, generator=seeded(seed + 2), dtype=torch.float64) / width**0.5
    near = (hidden.double() + 0.3 * noise).to(dtype)
    if reference_model in ("sums", "tokens"):
        exact = case.to(torch.float64)
        exact = reference.linear_token_logps(
            near.double(), exact.weight, labels, **exact.selected(*HEAD), **exact.selected(*LAYOUT)
        )
        case = case._replace(ref_logps=exact if reference_model == "tokens" else sums_of(exact, case.cu_seqlens()))
    else:
        case = case.with_options(ref_hidden=near)
        if reference_model == "own":
            other = torch.randn((vocab, width), generator=seeded(seed + 7), dtype=torch.float64)
            case = case.with_options(ref_weight=(weight.double() + 0.1 * other).to(dtype))
    if weights:
        sizes = options.get("group_size", 2)
        n_groups = n // sizes if isinstance(sizes, int) else sizes.numel()
        case = case._replace(weights=torch.randn(n_groups, generator=seeded(seed + 4), dtype=torch.float64))
    return case


def linear_answer(
    case: LinearCase, impl: str | None = None, needs: tuple[str, ...] = ("hidden", "weight", "bias"), **options: Any
) -> dict[str, Tensor]:
    """Return loss, statistics and gradients of one call, of the oracle if no implementation is given."""
    module, extra = (reference, options) if impl is None else (exo_kernels, options | {"impl": impl})
    leaves = {"hidden": case.hidden, "weight": case.weight, "bias": case.options.get("bias")}
    leaves = {k: None if x is None else x.detach().requires_grad_(k in needs) for k, x in leaves.items()}
    function = getattr(module, f"fused_linear_{case.objective}_loss")
    arguments = case.options | {"bias": leaves["bias"]} | extra
    loss, stats = function(
        leaves["hidden"], leaves["weight"], case.labels, case.ref_logps, return_stats=True, **arguments
    )
    if loss.requires_grad:
        loss.backward(None if case.weights is None else case.weights.to(loss))
    grads = {f"d_{k}": x.grad for k, x in leaves.items() if x is not None and k in needs}
    return {"loss": loss.detach(), **grads, **stats._asdict()}


def check_linear_loss(case: LinearCase, impl: str, device: str, **options: Any) -> dict[str, Tensor]:
    """Check a fused loss from hidden states, its statistics and its gradients; return them."""
    dtype = case.hidden.dtype
    oracle = linear_answer(case.to(torch.float64))
    with allow_nondeterminism():
        plain = linear_answer(case.to(accumulator(dtype), device))
    result = linear_answer(case.to(dtype, device), impl, **options)
    epsilons = Scales.of(case, device).epsilons(case, oracle)
    for name, epsilon in epsilons.items():
        if name.startswith("d_"):
            epsilon = epsilon + torch.finfo(accumulator(dtype)).tiny * (epsilon > 0)
            if dtype.itemsize == 2:  # a deferred gradient is rounded before and after its coefficient
                epsilon = epsilon + torch.finfo(dtype).eps * oracle[name].abs()
            plain[name] = plain[name].to(dtype)
        compare(name, result[name], plain[name], oracle[name], epsilon)
    assert result["tokens"].tolist() == oracle["tokens"].tolist()
    return result


def check_linear_tokens(case: LinearCase, impl: str, device: str, *, entropy: bool = False, **options: Any) -> None:
    """Check linear_token_logps and its gradients for random coefficients of log-probs and entropies."""
    dtype = case.hidden.dtype
    g, h = (torch.randn(case.labels.shape, generator=seeded(i), dtype=torch.float64) for i in (0, 1))
    h = h * entropy

    def answer(case: LinearCase, module: Any, **options: Any) -> dict[str, Tensor]:
        leaves = [case.hidden, case.weight, case.options.get("bias")]
        leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
        arguments = (
            case.selected("logit_scale", "softcap", *LAYOUT) | {"bias": leaves[2], "return_entropy": True} | options
        )
        if not entropy:
            del arguments["return_entropy"]
        results = module.linear_token_logps(leaves[0], leaves[1], case.labels, **arguments)
        logps, entropies = results if entropy else (results, torch.zeros_like(results))
        ((logps * g.to(logps)).sum() + (entropies * h.to(logps)).sum()).backward()
        grads = {f"d_{k}": x.grad for k, x in zip(("hidden", "weight", "bias"), leaves, strict=True) if x is not None}
        return {"logps": logps.detach(), "entropies": entropies.detach(), **grads}

    result = answer(case.to(dtype, device), exo_kernels, impl=impl, **options)
    oracle = answer(case.to(torch.float64), reference)
    with allow_nondeterminism():
        plain = answer(case.to(accumulator(dtype), device), reference)
    scales = Scales.of(case, device)
    compare("logps", result["logps"], plain["logps"], oracle["logps"], scales.logp_error)
    compare("entropies", result["entropies"], plain["entropies"], oracle["entropies"], scales.entropy_error())
    epsilons = scales.gradients(g[scales.scored], torch.zeros(1), h[scales.scored])
    for name, epsilon in epsilons.items():
        if name in oracle:
            epsilon = epsilon + torch.finfo(accumulator(dtype)).tiny * (epsilon > 0)
            if dtype.itemsize == 2:  # a deferred gradient is rounded before and after its coefficient
                epsilon = epsilon + torch.finfo(dtype).eps * oracle[name].abs()
            compare(name, result[name], plain[name].to(dtype), oracle[name], epsilon)


class Scales(NamedTuple):
    """The fp64 softmax of the n rows with loss, and first-order bounds of its rounding errors."""

    hidden: Tensor  # (n, D)
    weight: Tensor  # (V, D)
    p: Tensor  # (n, V)
    log_p: Tensor  # (n, V)
    onehot: Tensor  # (n, V)
    slope: Tensor  # (n, V) dz/da
    p_error: Tensor  # (n, V)
    slope_error: Tensor  # (n, V)
    logp_error: Tensor  # like labels, 0 where ignored
    scored: Tensor  # like labels, bool
    unit: float
    operands: float  # relative error of intermediate 16-bit operands; 0 if they are fp32

    @classmethod
    def of(cls, case: LinearCase, device: str = "cpu") -> "Scales":
        dtype, exact = case.hidden.dtype, case.to(torch.float64)
        vocab = len(exact.weight)
        unit = ulps_of(dtype, vocab)
        targets = aligned(case.labels, case.options.get("shift"))
        scored = targets != IGNORED
        h, y = exact.hidden[scored], targets[scored]
        bias = exact.options.get("bias")
        bias = torch.zeros(vocab, dtype=torch.float64) if bias is None else bias
        scale, cap = case.options.get("logit_scale", 1.0), case.options.get("softcap")
        temperature = case.options.get("temperature", 1.0)
        a = scale * (h @ exact.weight.T + bias)
        size = scale * (h.abs() @ exact.weight.abs().T + bias.abs().nan_to_num(posinf=0.0))
        t = torch.zeros_like(a) if cap is None else torch.tanh(a / cap)
        z = (a if cap is None else cap * t) / temperature
        slope = (1 - t * t) / temperature
        moved = unit * (slope * size + z.abs().nan_to_num(posinf=0.0))  # (n, V), error of the logits
        log_p = torch.log_softmax(z, -1)
        p = log_p.exp()
        log_p = torch.where(p > 0, log_p, 0.0)
        mean = (p * moved).sum(-1, keepdim=True)
        onehot = torch.zeros_like(p).scatter_(1, y[:, None], 1.0)
        at = y[:, None]
        logp_error = unit * log_p.gather(1, at).abs().clamp(min=1) + moved.gather(1, at) + mean
        slope_error = unit * slope
        if cap is not None:
            slope_error = unit * (1 + 2 * (1 - t * t) * size / cap) / temperature
        logp_error = torch.zeros(scored.shape, dtype=torch.float64).masked_scatter(scored, logp_error[:, 0])
        return cls(
            h, exact.weight, p, log_p, onehot, scale * slope, p * (unit * (1 + log_p.abs()) + moved + mean),
            scale * slope_error, logp_error,
            scored, unit, torch.finfo(dtype).eps if device == "cuda" and dtype.itemsize == 2 else 0.0,
        )  # fmt: skip

    def entropy_error(self) -> Tensor:  # like labels
        """Return the error of H = - sum p log p that follows from the errors of p and log p."""
        size = (self.p * (1 + self.log_p.abs()) ** 2).sum(-1) * self.unit
        error = (self.p_error * (1 + self.log_p.abs())).sum(-1) + size
        return torch.zeros(self.scored.shape, dtype=torch.float64).masked_scatter(self.scored, error)

    def gradients(self, g: Tensor, g_error: Tensor, h: Tensor | None = None) -> dict[str, Tensor]:
        """Return the epsilons of the three gradients, for gradients g (n,) of the rows' log-probs with errors g_error.

        h holds the gradients of the rows' entropies; an entropy adds - h p (log p + H) to the logits' gradient.
        """
        g, g_error = g.abs()[:, None], g_error.abs()[:, None]
        d = (self.onehot - self.p).abs()
        size = g * d
        error = g * (self.p_error + self.unit * self.onehot) + g_error * d
        if h is not None:
            bracket = 1 + self.log_p.abs() + (self.p * self.log_p.abs()).sum(-1, keepdim=True)
            moved = self.p_error.sum(-1, keepdim=True) * bracket + self.unit * bracket**2
            size = size + h.abs()[:, None] * self.p * bracket
            error = error + h.abs()[:, None] * (self.p_error * bracket + self.p * moved)
        error = self.slope * error + self.slope_error * size + (self.unit + self.operands) * self.slope * size
        d_hidden = torch.zeros((*self.scored.shape, self.hidden.shape[1]), dtype=torch.float64)
        d_hidden[self.scored] = error @ self.weight.abs()
        return {"d_hidden": d_hidden, "d_weight": error.T @ self.hidden.abs(), "d_bias": error.sum(0)}

    def epsilons(self, case: LinearCase, oracle: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the epsilons of the loss, its statistics and its gradients."""
        cu_seqlens, beta = case.cu_seqlens(), case.options.get("beta_pi", 0.1)
        drift = sums_of(self.logp_error, cu_seqlens)  # (N,)
        if case.ref_logps is None:
            drift = 2 * drift  # the reference's log-probs are computed in the same way and are of similar size
        policy = oracle["policy_logps"]
        ref = policy - oracle["implicit_rewards"] / beta
        loss, losses, slopes = group_numbers(case, policy, ref)
        moves = [torch.zeros_like(x) for x in (loss, losses, slopes)]
        for n, step in enumerate(torch.eye(policy.numel(), dtype=torch.float64) * 1e-6):
            moved = group_numbers(case, policy + step, ref)
            for move, a, b in zip(moves, moved, (loss, losses, slopes), strict=True):
                move += (a - b).abs() / 1e-6 * drift[n]
        weight = 1.0 if case.weights is None else case.weights.abs().max()
        group = beta * (1 + losses.abs().sum()) * ulps_of(torch.float64)  # the group pass computes in fp64
        slope_error = moves[2] + self.unit * slopes.abs() + weight * group
        g, g_error = (self.rows(x, cu_seqlens) for x in (slopes, slope_error))
        most = drift.max() if drift.numel() else 0.0
        epsilons = {
            "loss": moves[0] + self.unit * loss.abs().clamp(min=1),
            "losses": moves[1] + self.unit * losses.abs().clamp(min=1),
            "policy_logps": drift,
            "implicit_rewards": beta * (drift + self.unit * (policy - ref).abs()),
            "p": oracle["p"] * (self.unit + 2 * beta * most),
            "q": oracle["q"] * self.unit,
        }
        return epsilons | {k: v for k, v in self.gradients(g, g_error).items() if k in oracle}

    def rows(self, per_sequence: Tensor, cu_seqlens: Tensor | None) -> Tensor:  # (n,)
        if cu_seqlens is None:
            return per_sequence[:, None].expand(self.scored.shape)[self.scored]
        return per_sequence.repeat_interleave(cu_seqlens.diff())[self.scored]
