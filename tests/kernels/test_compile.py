"""The operators under torch.library and torch.compile: opcheck, one graph without breaks, the results of eager."""

import pytest
import torch
from budget import assert_same
from cases import IGNORED, Case, make_case, make_labels, seeded

import exo_kernels
from exo_kernels.ops import logits as logits_ops

backends = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


@pytest.mark.parametrize(
    ("entropy", "dtype"), [(False, torch.float16), (True, torch.float64)], ids=["logps-float16", "entropy-float64"]
)
def test_opcheck_of_the_token_pass(impl, device, entropy, dtype):
    x = torch.randn(2, 3, 5, device=device, dtype=dtype).requires_grad_()
    targets = make_labels((2, 3), 5).to(device)
    torch.library.opcheck(logits_ops.token_logps, (x, targets, 0.8, IGNORED, entropy, False, impl))
    results = logits_ops.token_logps(x.detach(), targets, 0.8, IGNORED, entropy, False, impl)
    g = torch.rand(2, 3, device=device, dtype=results[0].dtype)
    backward = (g, g if entropy else None, x.detach(), targets, results[1], results[2], 0.8, IGNORED, impl)
    torch.library.opcheck(logits_ops.token_logps_backward, backward)
    torch.library.opcheck(logits_ops.token_logps_backward_, backward)


@pytest.mark.parametrize("objective", ["exo", "dpo"])
@pytest.mark.parametrize("rewards", [False, True], ids=["preferences", "rewards"])
def test_opcheck_of_the_group_pass(impl, device, objective, rewards):
    logps = torch.randn(6, device=device).requires_grad_()
    r = torch.randn(3, device=device) if rewards else None
    ref, targets = torch.zeros(3, device=device), torch.zeros(6, dtype=torch.long, device=device)
    bounds = torch.tensor([0, 2, 3, 6], device=device), torch.tensor([0, 1, 3], device=device)
    arguments = (logps, targets, ref, r, *bounds, objective, [0.5, 1.0, -0.1, -2.0], IGNORED, impl)
    torch.library.opcheck(logits_ops.group_loss, arguments)
    slopes, grad = torch.randn(3, device=device), torch.randn(2, device=device)
    torch.library.opcheck(logits_ops.group_loss_backward, (grad, slopes, *bounds, 6))


def all_outputs(x: torch.Tensor, labels: torch.Tensor, ref: torch.Tensor, impl: str) -> list[torch.Tensor]:
    """Return all outputs of the public functions on padded input, in one graph."""
    loss, stats = exo_kernels.fused_exo_loss(x, labels, ref, impl=impl, return_stats=True, temperature=0.9)
    logps = exo_kernels.token_logps(x, labels, impl=impl, return_entropy=True)
    return [loss, *logps, exo_kernels.sequence_logps(x, labels, impl=impl), *stats]


def assert_equal(backend: str, results: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Check that results are bitwise equal; with inductor, which may change the order of sums, nearly equal."""
    for a, b in zip(results, expected, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        if backend == "inductor" and a.is_floating_point():
            assert_same("result", a.detach(), b.detach().cpu(), b.detach().cpu().abs().clamp(min=1))
        else:
            assert torch.equal(a, b)


# True: shapes and numbers are symbolic from the start. None, the default: from the second shape on.
@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.slow), True], ids=["automatic", "dynamic"])
@backends
def test_compiled_equals_eager(impl, device, backend, dynamic):
    """Check input with ignored rows, whose values a compiler could leave undefined."""
    torch._dynamo.reset()
    compiled = torch.compile(all_outputs, fullgraph=True, dynamic=dynamic, backend=backend)
    for n, t, vocab in ((2, 3, 33), (4, 2, 40)):
        # inductor sums float16 gradients in float32, which is more accurate but not equal
        case = make_case(n, t, vocab, torch.float32 if backend == "inductor" else torch.float16, seed=n).on(device)
        results = []
        for function in (all_outputs, compiled):
            x = case.logits.clone().requires_grad_()
            outputs = function(x, case.labels, case.ref_logps, impl)
            weights = [torch.rand(out.shape, generator=seeded(i)).to(out) for i, out in enumerate(outputs[:4])]
            results.append([*outputs, *torch.autograd.grad(outputs[:4], x, weights)])
        assert_equal(backend, results[1], results[0])


@backends
def test_compiled_variants(impl, device, backend):
    """Check packed ragged groups with rewards and a per-token reference; and in-place DPO, with log-targets of -inf."""
    torch._dynamo.reset()
    sizes = torch.tensor([1, 2])
    packed = make_case(vocab=21, lengths=[3, 0, 4], per_token_ref=True, group_size=sizes, rewards=True).on(device)
    pairs = make_case(4, 3, 21).on(device).with_options(inplace_backward=True)

    def exo(x: torch.Tensor, case: Case) -> torch.Tensor:
        return exo_kernels.fused_exo_loss(x, case.labels, case.ref_logps, impl=impl, **case.options)

    def dpo(x: torch.Tensor, case: Case) -> torch.Tensor:
        return exo_kernels.fused_dpo_loss(x * 1, case.labels, case.ref_logps, impl=impl, **case.options)

    for function, case in ((exo, packed), (dpo, pairs)):
        results = []
        for f in (function, torch.compile(function, fullgraph=True, backend=backend)):
            x = case.logits.clone().requires_grad_()
            loss = f(x, case)
            results.append([loss, *torch.autograd.grad(loss, x)])
        assert_equal(backend, results[1], results[0])


@pytest.mark.parametrize("objective", ["exo", "dpo"])
def test_compiled_preference_loss(objective):
    torch._dynamo.reset()
    compiled = torch.compile(exo_kernels.preference_loss, fullgraph=True, backend="aot_eager")
    for n in (4, 6):
        policy = torch.randn(n, dtype=torch.float64).requires_grad_()
        results = [f(policy, torch.zeros(n), objective=objective) for f in (exo_kernels.preference_loss, compiled)]
        grads = [torch.autograd.grad(loss, policy)[0] for loss in results]
        assert torch.equal(*results) and torch.equal(*grads)


def test_compiled_code_checks_input(impl, device):
    torch._dynamo.reset()
    compiled = torch.compile(exo_kernels.token_logps, backend="aot_eager")
    x, labels = torch.randn(2, 3, 5, device=device), torch.full((2, 3), 5, device=device)
    if device == "cuda":  # values are not validated on a GPU
        assert compiled(x, labels, impl=impl, shift=False).isnan().all()
    else:
        with pytest.raises(ValueError, match="labels: expected values in"):
            compiled(x, labels, impl=impl, shift=False)
    with pytest.raises(ValueError, match="temperature: expected"):
        compiled(x, labels, impl=impl, temperature=0.0)


def test_meta_tensors_have_the_right_shapes():
    """Check shapes and dtypes on the meta device, which also shows that no code reads values."""
    logits = torch.empty(6, 4, 50257, dtype=torch.bfloat16, device="meta", requires_grad=True)
    labels = torch.empty(6, 4, dtype=torch.long, device="meta")
    sizes, ref = torch.empty(3, dtype=torch.int32, device="meta"), torch.empty(6, device="meta")
    losses, stats = exo_kernels.fused_exo_loss(
        logits, labels, ref, group_size=sizes, reduction="none", return_stats=True
    )
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.shape == stats.losses.shape == (3,) and stats.p.shape == stats.tokens.shape == (6,)
    assert grad.shape == logits.shape and grad.dtype == torch.bfloat16
    logps, entropies = exo_kernels.token_logps(logits, labels, return_entropy=True)
    assert logps.shape == entropies.shape == (6, 4) and logps.dtype == torch.float32
    assert exo_kernels.sequence_logps(logits, labels).shape == (6,)


def test_compiled_sequence_logps_checks_boundaries():
    """Check that boundaries that do not fit the rows raise a ValueError on CPU, compiled or not."""
    torch._dynamo.reset()
    x, labels = torch.randn(6, 5), torch.ones(6, dtype=torch.long)
    for bad in ([0, 9], [0, 4, 2, 6], [1, 6], [0, 5]):
        for function in (exo_kernels.sequence_logps, torch.compile(exo_kernels.sequence_logps, backend="aot_eager")):
            with pytest.raises(ValueError, match="cu_seqlens: expected 0 = c_0"):
                function(x, labels, cu_seqlens=torch.tensor(bad))
