"""The operators on hidden states under autograd, torch.library and torch.compile."""

import pytest
import torch
from cases import IGNORED, make_labels, seeded
from conftest import INTERPRETED
from linear_cases import make_linear_case
from torch.autograd import gradcheck

import exo_kernels
from exo_kernels.numerics import LogitTransform
from exo_kernels.ops import hidden as hidden_ops

SCHEDULES = ["deferred", "group", "store", "recompute"]
OTHERS = ["auto", "deferred", "recompute"]  # compiled in slow tests only
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def random_leaves(*shapes: tuple[int, ...], device: str, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    values = (torch.randn(shape, generator=seeded(i), dtype=torch.float64) for i, shape in enumerate(shapes))
    return [x.to(device, dtype).requires_grad_() for x in values]


# Gradients, by finite differences. nondet_tol=0: the backward pass must give the same bits twice.


GRADCHECKED = [("exo", "group"), ("dpo", "deferred"), ("exo", "store"), ("dpo", "recompute")]


@pytest.mark.parametrize(("objective", "schedule"), GRADCHECKED[: 2 if INTERPRETED else 4])
def test_gradcheck_of_the_loss(impl, device, objective, schedule):
    function = getattr(exo_kernels, f"fused_linear_{objective}_loss")
    hidden, weight, bias = random_leaves((2, 2, 2), (3, 2), (3,), device=device)
    labels = torch.tensor([[0, 2], [0, 1]], device=device)
    ref, rewards = torch.zeros(2, device=device), torch.tensor([0.3, -1.0], device=device)
    options = {"rewards": rewards, "beta_pi": 0.8, "temperature": 0.7, "softcap": 2.0}

    def loss(hidden, weight, bias):
        return function(hidden, weight, labels, ref, bias=bias, schedule=schedule, impl=impl, **options)

    assert gradcheck(loss, (hidden, weight, bias), nondet_tol=0.0)


@pytest.mark.parametrize("schedule", ["deferred", "store", "recompute"])
def test_gradcheck_of_log_probs(impl, device, schedule):
    leaves = random_leaves((1, 3, 2), (3, 2), (3,), device=device)
    labels = torch.tensor([[0, IGNORED, 2]], device=device)
    options = {"impl": impl, "shift": False, "softcap": 3.0, "logit_scale": 0.7}

    def logps(h, w, b):
        return exo_kernels.linear_token_logps(h, w, labels, bias=b, schedule=schedule, **options)

    assert gradcheck(logps, leaves, nondet_tol=0.0)


def test_gradcheck_of_entropies(impl, device):
    leaves = random_leaves((1, 3, 2), (3, 2), (3,), device=device)
    labels = torch.tensor([[0, IGNORED, 2]], device=device)

    def both(h, w, b):
        return exo_kernels.linear_token_logps(h, w, labels, bias=b, shift=False, return_entropy=True, impl=impl)

    assert gradcheck(both, leaves, nondet_tol=0.0)


# Backward passes.


@every_schedule
def test_second_backward_is_exact(impl, device, schedule):
    """Check retain_graph with another grad_output: no saved tensor is scaled in place."""
    case = make_linear_case(6, 3, 8, 33).to(torch.float32, device)
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    loss = exo_kernels.fused_linear_exo_loss(*leaves, case.labels, case.ref_logps, impl=impl, schedule=schedule)
    g = torch.tensor(0.625, device=device)
    first, one, again, double = (
        torch.autograd.grad(loss, leaves, scale, retain_graph=True) for scale in (g, g / g, g, 2 * g)
    )
    for a, b, c, d in zip(first, one, again, double, strict=True):
        assert torch.equal(a, c) and torch.equal(d, 2 * a) and not torch.equal(a, b)
        torch.testing.assert_close(a, 0.625 * b)


@pytest.mark.parametrize("view", ["leaf", "packed", "reshaped"])
def test_many_backward_passes_into_grad(impl, device, view):
    """Check repeated backward passes: a saved gradient may be returned without a copy only if the graph is freed."""
    case = make_linear_case(6, 3, 8, 33, lengths=[3, 1, 0, 4] if view == "packed" else None).to(torch.float32, device)
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    inputs = [x.reshape(-1).view(x.shape) for x in leaves] if view == "reshaped" else leaves
    options = case.options | {"impl": impl, "schedule": "group"}
    loss = exo_kernels.fused_linear_exo_loss(*inputs, case.labels, case.ref_logps, **options)
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in leaves]
    for _ in range(2):
        for x in leaves:
            x.grad.data.zero_()  # as an optimizer does; autograd does not see it
        loss.backward(retain_graph=True)
        assert all(torch.equal(x.grad, a) for x, a in zip(leaves, once, strict=True))
    loss.backward()
    assert all(torch.equal(x.grad, 2 * a) for x, a in zip(leaves, once, strict=True))


@every_schedule
def test_batched_gradients(impl, device, schedule):
    """Check is_grads_batched: several gradients of the loss in one backward pass."""
    case = make_linear_case(4, 3, 8, 33).to(torch.float32, device)
    hidden = case.hidden.requires_grad_()
    weight = case.weight.requires_grad_()
    loss = exo_kernels.fused_linear_exo_loss(hidden, weight, case.labels, case.ref_logps, impl=impl, schedule=schedule)
    g = torch.tensor([1.0, 1.0, -2.0], device=device)
    batched = torch.autograd.grad(loss, (hidden, weight), g, is_grads_batched=True, retain_graph=True)
    single = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(batched, single, strict=True):
        torch.testing.assert_close(a, torch.stack([b, b, -2 * b]))


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_gradient_scaler_prevents_underflow(impl, device, schedule, dtype):
    """Check that with a loss scaled by 2^16, gradients that underflow in 16 bits without the scale are not lost."""
    case = make_linear_case(4, 5, 16, 129, dtype, reference_model="tokens", num_groups=10**6).to(dtype, device)
    scaled = []
    for scale, numbers in ((2.0**16, case), (2.0**16, case.to(torch.float32))):
        leaves = [numbers.hidden.detach().requires_grad_(), numbers.weight.detach().requires_grad_()]
        options = numbers.options | {"impl": impl, "schedule": schedule}
        loss = exo_kernels.fused_linear_exo_loss(*leaves, numbers.labels, numbers.ref_logps, **options)
        scaled.append(torch.autograd.grad(loss * scale, leaves))
    for a, b in zip(*scaled, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=1e-6)


@every_schedule
def test_double_backward_is_refused(impl, device, schedule):
    case = make_linear_case(4, 3, 8, 33).to(torch.float32, device)
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    loss = exo_kernels.fused_linear_exo_loss(*leaves, case.labels, case.ref_logps, impl=impl, schedule=schedule)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    penalty = sum(g.square().sum() for g in grads)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        (loss + penalty).backward()  # otherwise the penalty would silently be a constant


def test_stats_and_reference_have_no_graph(impl, device):
    case = make_linear_case(4, 3, 8, 33, reference_model="hidden").to(torch.float32, device)
    ref = case.options["ref_hidden"].requires_grad_()
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    for schedule in SCHEDULES:
        loss, stats = exo_kernels.fused_linear_exo_loss(
            hidden, weight, case.labels, ref_hidden=ref, impl=impl, schedule=schedule, return_stats=True
        )
        assert not any(x.requires_grad for x in stats)
        loss.backward()
    assert ref.grad is None


# torch.library and torch.compile.


@pytest.mark.parametrize("schedule", ["score", "deferred", "store", "recompute"])
def test_opcheck_of_the_log_probs(impl, device, schedule):
    entropy = schedule in ("score", "recompute")
    hidden, weight, bias = random_leaves((2, 3, 4), (5, 4), (5,), device=device, dtype=torch.float32)
    ref = torch.randn(2, 3, 4, device=device)
    targets = make_labels((2, 3), 5).to(device)
    transform, place = list(LogitTransform.of(0.9, 3.0, 0.8)), ([0, 5, 5, 2], "", impl)
    if schedule == "score":
        hidden, weight, bias = hidden.detach(), weight.detach(), bias.detach()
    arguments = (hidden, weight, bias, targets, ref, transform, IGNORED, entropy, schedule, *place)
    torch.library.opcheck(hidden_ops.linear_token_logps, arguments)
    if schedule == "score":
        return
    logps, entropies, _, stats, saved = (x.detach() for x in hidden_ops.linear_token_logps(*arguments))
    detached = (x.detach() for x in (hidden, weight, bias))
    g = torch.rand(2, 3, device=device)
    backward = (g, g if entropy else None, *detached, targets, logps, entropies, stats, saved)
    for needs in ([True, True, True], [True, False, False]):
        arguments = (*backward, transform, IGNORED, schedule, *place, needs)
        torch.library.opcheck(hidden_ops.linear_token_logps_backward, arguments)


def test_opcheck_of_the_group_loss(impl, device):
    hidden, weight, bias = random_leaves((4, 3, 4), (5, 4), (5,), device=device, dtype=torch.float32)
    targets = make_labels((4, 3), 5).to(device)
    offsets = torch.arange(5, device=device) * 3, torch.tensor([0, 1, 4], device=device)
    loss = (torch.tensor(2.0, dtype=torch.float64, device=device), "exo", [0.5, 1.0, -0.1, -2.0])
    options = (list(LogitTransform.of(0.9, 3.0, 0.8)), IGNORED)
    for needs in ([True, True, True], [True, False, False], [False, True, False]):
        leaves = [x.detach().requires_grad_(need) for x, need in zip((hidden, weight, bias), needs, strict=True)]
        arguments = (*leaves, targets, None, torch.zeros(4, device=device), None, *offsets, *loss)
        torch.library.opcheck(hidden_ops.linear_group_loss, (*arguments, *options, needs, [0, 5, 5, 4], "", impl))
    gradients = (torch.randn(shape, device=device) for shape in ((4, 3, 4), (5, 4), (5,)))
    g = torch.tensor(0.5, device=device)
    torch.library.opcheck(
        hidden_ops.linear_group_loss_backward, (g, *gradients, torch.float16, torch.bfloat16, torch.float32)
    )


# True: shapes and numbers are symbolic from the start. None, the default: from the second shape on.
@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.slow), True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "schedule",
    ["auto"] if INTERPRETED else ["store", "group", *(pytest.param(s, marks=pytest.mark.slow) for s in OTHERS)],
)
def test_compiled_equals_eager(impl, device, backend, dynamic, schedule):
    """Check every schedule in one graph, also `store`, whose buffer depends on the number of rows with loss."""
    torch._dynamo.reset()

    def all_outputs(hidden, weight, labels, ref):
        options = {"impl": impl, "schedule": schedule, "temperature": 0.9}
        loss, stats = exo_kernels.fused_linear_exo_loss(2 * hidden, weight, labels, ref, return_stats=True, **options)
        options["schedule"] = "recompute" if schedule == "group" else schedule
        logps = exo_kernels.linear_token_logps(2 * hidden, weight, labels, **options)
        return [loss, logps, exo_kernels.linear_sequence_logps(hidden, weight, labels, **options), *stats]

    compiled = torch.compile(all_outputs, fullgraph=True, dynamic=dynamic, backend=backend)
    for n, t in ((2, 4), (4, 3)):
        case = make_linear_case(n, t, 8, 33, bias=False, seed=n).to(torch.float32, device)
        results = []
        for function in (all_outputs, compiled):
            leaves = [case.hidden.nan_to_num(0.3).requires_grad_(), case.weight.clone().requires_grad_()]
            outputs = function(*leaves, case.labels, case.ref_logps)
            weights = [torch.rand(out.shape, generator=seeded(i)).to(out) for i, out in enumerate(outputs[:3])]
            results.append([*outputs, *torch.autograd.grad(outputs[:3], leaves, weights)])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride()
            torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if backend == "aot_eager" else {}))


def test_compiled_code_checks_input(impl, device):
    torch._dynamo.reset()
    compiled = torch.compile(exo_kernels.linear_token_logps, backend="aot_eager")
    hidden, weight = torch.randn(2, 3, 4, device=device), torch.randn(5, 4, device=device)
    labels = torch.full((2, 3), 5, device=device)
    if device == "cuda":  # values are not validated on a GPU
        assert compiled(hidden, weight, labels, impl=impl, shift=False).isnan().all()
    else:
        with pytest.raises(ValueError, match="labels: expected values in"):
            compiled(hidden, weight, labels, impl=impl, shift=False)
    with pytest.raises(ValueError, match="softcap: expected"):
        compiled(hidden, weight, labels, impl=impl, softcap=0.0)


def test_meta_tensors_have_the_right_shapes():
    hidden = torch.empty(6, 4, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(50257, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    labels, ref = torch.empty(6, 4, dtype=torch.long, device="meta"), torch.empty(6, device="meta")
    loss, stats = exo_kernels.fused_linear_exo_loss(hidden, weight, labels, ref, group_size=3, return_stats=True)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.shape == () and stats.losses.shape == (2,) and stats.tokens.shape == (6,)
    assert all(g.shape == x.shape and g.dtype == torch.bfloat16 for g, x in zip(grads, (hidden, weight), strict=True))
    logps, entropies = exo_kernels.linear_token_logps(hidden, weight, labels, return_entropy=True)
    assert logps.shape == entropies.shape == (6, 4) and logps.dtype == torch.float32
