"""Invariants of the functions on hidden states: equal results, exact zeros, no full logits in memory."""

import pytest
import torch
from cases import IGNORED, seeded
from conftest import INTERPRETED
from linear_cases import check_linear_loss, check_linear_tokens, linear_answer, make_linear_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import exo_kernels
from exo_kernels.schedules import matmul, passes

SCHEDULES = ["deferred", "group", "store", "recompute"]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def test_schedules_equal_each_other(impl, device):
    """Compare the schedules in fp64, in one chunk and in many."""
    case = make_linear_case(
        6, 5, 16, 61, torch.float64, group_size=torch.tensor([2, 1, 3]), rewards=True, softcap=9.0, temperature=0.8,
        reference_model="hidden",
    ).to(torch.float64, device)  # fmt: skip
    expected = linear_answer(case, impl, schedule="recompute")
    for schedule in SCHEDULES:
        for budget in (1500, 9000):
            result = linear_answer(case, impl, schedule=schedule, memory_budget=budget)
            for name, value in expected.items():
                torch.testing.assert_close(result[name], value, rtol=0, atol=1e-12)


@every_schedule
def test_results_are_deterministic(impl, device, schedule):
    """Check that twenty runs give the same bits; four in the interpreter, which has no threads."""
    case = make_linear_case(3, 4, 16, 129, rewards=True, reference_model="hidden", group_size=3)
    case = case.to(torch.float32, device)
    results = [
        linear_answer(case, impl, schedule=schedule, memory_budget=5000) for _ in range(4 if INTERPRETED else 20)
    ]
    assert all(torch.equal(r[name], value) for r in results[1:] for name, value in results[0].items())


@every_schedule
@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",), ("weight", "bias"), ("hidden", "bias")])
def test_gradients_only_where_required(impl, device, schedule, needs):
    """Check that only the required gradients are computed, with the same bits as if all were required."""
    case = make_linear_case(4, 5, 16, 37, reference_model="tokens").to(torch.float32, device)
    if schedule == "deferred" and "hidden" not in needs:
        with pytest.raises(ValueError, match="schedule: expected another than 'deferred'"):
            linear_answer(case, impl, needs=needs, schedule=schedule)
        return
    all_results = linear_answer(case, impl, schedule=schedule)
    result = linear_answer(case, impl, needs=needs, schedule=schedule)
    assert {k for k in result if k.startswith("d_")} == {f"d_{k}" for k in needs}
    assert all(torch.equal(value, all_results[name]) for name, value in result.items())


def test_no_gradients_no_graph(impl, device):
    case = make_linear_case(4, 5, 16, 37).to(torch.float32, device)
    with torch.no_grad():
        loss = linear_answer(case, impl)["loss"]
        assert exo_kernels.explain(case.hidden, case.weight.requires_grad_(), case.labels).schedule == "score"
    case.weight.requires_grad_(False)
    assert torch.equal(linear_answer(case, impl, needs=())["loss"], loss)


@every_schedule
def test_group_of_one_has_zero_loss(impl, device, schedule):
    case = make_linear_case(3, 4, 8, 37, group_size=1).to(torch.float32, device)
    result = linear_answer(case, impl, schedule=schedule)
    assert result["loss"] == 0 and not any(result[k].any() for k in ("d_hidden", "d_weight", "d_bias"))


@every_schedule
def test_nothing_to_score(impl, device, schedule):
    """Check input with all labels ignored, whose hidden states must not be read, and input without rows."""
    case = make_linear_case(4, 3, 8, 37).to(torch.float32, device)
    case = case._replace(labels=torch.full_like(case.labels, IGNORED), hidden=torch.full_like(case.hidden, torch.nan))
    case = case._replace(ref_logps=torch.zeros(4, device=device))
    result = linear_answer(case, impl, schedule=schedule)
    assert abs(result["loss"] - 2.76123) < 1e-5 and not any(result[k].any() for k in ("d_hidden", "d_weight", "d_bias"))
    empty = case._replace(hidden=case.hidden[:0], labels=case.labels[:0], ref_logps=case.ref_logps[:0])
    result = linear_answer(empty, impl, schedule=schedule)
    assert result["loss"] == 0 and result["d_hidden"].shape == (0, 3, 8) and not result["d_weight"].any()
    assert exo_kernels.linear_token_logps(empty.hidden, case.weight, empty.labels, impl=impl).shape == (0, 3)


@pytest.mark.parametrize("schedule", ["deferred", "store", "recompute"])
def test_zero_coefficients_give_zeros(impl, device, schedule):
    """Check that a row of NaN changes no gradient if its coefficient is 0; otherwise its row and the head are NaN."""
    case = make_linear_case(1, 5, 8, 37, shift=False, bias=False).to(torch.float32, device)
    labels = case.labels.clamp(min=0)
    hidden = case.hidden.nan_to_num(0.5)
    hidden[0, 2] = torch.nan
    for g, expected in ((torch.ones(1, 5), True), (torch.tensor([[1.0, 1, 0, 1, 1]]), False)):
        leaves = [hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()]
        logps = exo_kernels.linear_token_logps(*leaves, labels, shift=False, schedule=schedule, impl=impl)
        d_hidden, d_weight = torch.autograd.grad(logps, leaves, g.to(device))
        assert logps.isnan().tolist() == [[False, False, True, False, False]]
        assert d_hidden.isnan().any(-1).tolist() == [[False, False, expected, False, False]]
        assert d_weight.isnan().all() if expected else d_weight.isfinite().all()
        assert expected or not d_hidden[0, 2].any()


def test_minus_infinity_in_the_bias(impl, device):
    """Check columns of probability 0: a label there has a log-prob of -inf, not NaN."""
    case = make_linear_case(2, 4, 8, 37, reference_model="tokens")
    labels = case.labels.where(case.labels % 2 == 0, case.labels - 1).where(case.labels != IGNORED, IGNORED)
    bias = case.options["bias"].clone()
    bias[1::2] = -torch.inf
    check_linear_loss(case._replace(labels=labels).with_options(bias=bias), impl, device)
    labels = torch.tensor([[1, 2]], device=device)
    result = exo_kernels.linear_token_logps(
        torch.ones(1, 2, 8, device=device), case.weight.to(device), labels, bias=bias.to(device), shift=False, impl=impl
    )
    assert result[0, 0] == -torch.inf and result[0, 1].isfinite()
    dead = torch.full_like(bias, -torch.inf).to(device)
    logps, entropies = exo_kernels.linear_token_logps(
        torch.ones(1, 2, 8, device=device), case.weight.to(device), labels, bias=dead, shift=False, impl=impl,
        return_entropy=True,
    )  # fmt: skip
    assert (logps == -torch.inf).all() and (entropies == 0).all()


def test_strided_hidden_states(impl, device):
    """Check hidden states that are views of a larger tensor full of NaN, such as a slice without the last position."""
    case = make_linear_case(4, 5, 8, 37, shift=False, reference_model="tokens").to(torch.float32, device)
    expected = linear_answer(case, impl)
    n, t, d = case.hidden.shape
    for shape, view in (
        ((n, t + 1, d), lambda x: x[:, :-1]),
        ((n, t, 2 * d), lambda x: x[..., ::2]),
        ((t, n, d), lambda x: x.transpose(0, 1)),
    ):
        strided = view(torch.full(shape, torch.nan, device=device)).copy_(case.hidden)
        result = linear_answer(case._replace(hidden=strided), impl)
        assert all(torch.equal(result[name], value) for name, value in expected.items())
    wide = torch.full((37, 16), torch.nan, device=device)[:, ::2].copy_(case.weight)
    result = linear_answer(case._replace(weight=wide), impl)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value)


# Allocations and operations inside the operators.


class Watch(TorchDispatchMode):
    """Record every operation with its input and output tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        inputs, outputs = (
            [x for x in tree_leaves(t) if isinstance(x, torch.Tensor)] for t in ((args, kwargs or {}), results)
        )
        self.calls.append((function.overloadpacket.__name__, inputs, outputs))
        return results


@pytest.fixture
def watch(monkeypatch) -> Watch:
    """Record the operations inside the custom operators, which a dispatch mode around a call does not see."""
    mode = Watch()
    for name in ("forward", "backward", "group_pass"):
        inner = getattr(passes, name)

        def watched(*args, inner=inner):
            with mode:
                return inner(*args)

        monkeypatch.setattr(passes, name, watched)
    return mode


BUDGET = 4 * matmul.padded(997) * 8  # less than 8 rows of 40


@every_schedule
@pytest.mark.parametrize("needs", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
def test_full_logits_never_exist(impl, device, watch, schedule, needs):
    """Check that no tensor has n V elements, except the one that `store` keeps."""
    case = make_linear_case(10, 4, 16, 997, shift=False, reference_model="tokens", bias=False).to(torch.float32, device)
    case = case._replace(labels=case.labels.clamp(min=0), hidden=case.hidden.nan_to_num(0.1))
    linear_answer(case, impl, needs=needs, schedule=schedule, memory_budget=BUDGET)
    weight = case.weight.untyped_storage().data_ptr()  # views of the weight allocate nothing
    storages = [x.untyped_storage() for _, _, outputs in watch.calls for x in outputs]
    rows = sorted({x.nbytes() // 4 // 997 for x in storages if x.data_ptr() != weight}, reverse=True)
    assert any("mm" in name for name, _, _ in watch.calls)  # the operations inside were recorded
    assert rows[0] >= 40 if schedule == "store" else rows[0] <= max(7, 16 if "weight" in needs else 0)


def test_frozen_head_skips_its_gradient(impl, device, watch):
    """Check that a frozen head costs two matmuls (4 n D V operations) and no tensor (V, D)."""
    case = make_linear_case(4, 5, 16, 997, bias=False, reference_model="tokens").to(torch.float32, device)
    n = int((case.labels[:, 1:] != IGNORED).sum())
    for needs, schedule, products in ((("hidden",), "auto", 2), (("hidden", "weight"), "auto", 3), ((), "auto", 1)):
        watch.calls.clear()
        linear_answer(case, impl, needs=needs, schedule=schedule)
        flops = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in _matmuls(watch))
        assert flops == products * 2 * n * 16 * 997
        assert ("weight" in needs) == any(x.shape == (997, 16) for _, _, outputs in watch.calls for x in outputs)
        leaves = (x.requires_grad_(name in needs) for name, x in (("hidden", case.hidden), ("weight", case.weight)))
        assert exo_kernels.explain(*leaves, case.labels, impl=impl).flops == flops


def _matmuls(watch: Watch) -> list[tuple[Tensor, Tensor]]:
    return [tuple(inputs[-2:] if name == "addmm_" else inputs[:2]) for name, inputs, _ in watch.calls if "mm" in name]


VIEWS = {"slice", "select", "view", "t", "transpose", "as_strided", "detach", "alias", "expand", "_unsafe_view"}
# deterministic mode fills fresh memory with NaN by fill_, and triton's interpreter wraps tensors with set_
ALLOCATIONS = {"empty", "new_empty", "zeros", "new_zeros", "empty_strided", "fill_", "set_"}


@every_schedule
@pytest.mark.parametrize("vocab", [997, 1008], ids=["padded", "whole"])
def test_only_kernels_run_between_matmuls(impl, device, watch, schedule, vocab):
    """Check that with triton, torch only allocates and multiplies the tensors of shape (chunk, vocabulary)."""
    if impl != "triton":
        pytest.skip("the chunked implementation consists of torch operations")
    case = make_linear_case(
        10, 4, 16, vocab, softcap=9.0, temperature=0.7, reference_model="hidden", lengths=[4, 3, 0, 7, 2, 9]
    ).to(torch.float32, device)
    linear_answer(case, impl, schedule=schedule, memory_budget=8 * 4 * matmul.padded(vocab) * 2)
    operations = set()
    for name, inputs, outputs in watch.calls:
        for x in [*inputs, *outputs]:
            if x.dim() == 2 and x.shape[1] in (vocab, matmul.padded(vocab)) and x.shape[0] > 1:
                operations.add(name)
    assert any("mm" in name for name in operations)
    assert operations <= VIEWS | ALLOCATIONS | {"mm", "addmm_", "addmm"}, f"eager: {operations}"


# Mixed dtypes, autocast, tied weights.


def test_mixed_dtypes_use_the_wider_one(impl, device):
    case = make_linear_case(4, 5, 16, 37, reference_model="tokens").to(torch.float32, device)
    narrow = case.hidden.bfloat16()
    expected = linear_answer(case._replace(hidden=narrow.float()), impl)
    result = linear_answer(case._replace(hidden=narrow), impl)
    assert result["d_hidden"].dtype == torch.bfloat16 and result["d_weight"].dtype == torch.float32
    assert torch.equal(result["loss"], expected["loss"]) and torch.equal(result["d_weight"], expected["d_weight"])


def test_autocast_sets_the_dtype_of_operands(impl, device):
    case = make_linear_case(4, 5, 16, 37, bias=False, reference_model="tokens").to(torch.float32, device)
    expected = linear_answer(case.to(torch.bfloat16), impl)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        result = linear_answer(case, impl)
    assert torch.equal(result["policy_logps"], expected["policy_logps"])
    assert result["d_hidden"].dtype == result["d_weight"].dtype == torch.float32
    assert torch.equal(result["d_weight"], expected["d_weight"].float())


@every_schedule
def test_tied_embeddings(impl, device, schedule):
    """Check that the gradients of a weight that is both embedding and head are added."""
    weight = torch.randn(37, 8, generator=seeded(0), dtype=torch.float64).to(device)
    ids = torch.randint(37, (4, 5), generator=seeded(1)).to(device)
    ref = torch.zeros(4, device=device)
    grads = []
    for module, options in ((exo_kernels, {"impl": impl, "schedule": schedule}), (exo_kernels.reference, {})):
        tied = weight.clone().requires_grad_()
        hidden = torch.tanh(torch.nn.functional.embedding(ids, tied))
        module.fused_linear_exo_loss(hidden, tied, ids, ref, **options).backward()
        grads.append(tied.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_entropies_by_schedule(impl, device):
    """Check that a schedule without a gradient of entropies is refused, and allowed if no gradient is required."""
    case = make_linear_case(2, 3, 8, 37).to(torch.float32, device)
    for schedule in ("deferred", "store"):
        leaf = case.weight.clone().requires_grad_()
        with pytest.raises(ValueError, match="schedule: expected 'recompute' or 'auto' for entropies"):
            exo_kernels.linear_token_logps(
                case.hidden, leaf, case.labels, schedule=schedule, return_entropy=True, impl=impl
            )
        logps, entropies = exo_kernels.linear_token_logps(
            case.hidden, case.weight, case.labels, schedule=schedule, return_entropy=True, impl=impl
        )
        assert (entropies[logps != 0] > 0).all()


def test_confident_rows_in_a_large_vocabulary(impl, device):
    """Check rows with a peak and a long tail of 50257 columns, of which torch in fp32 loses 4e-5 nat."""
    case = make_linear_case(1, 7, 8, 50257, seed=9, shift=False, reference_model="tokens", group_size=1)
    check_linear_tokens(case, impl, device)


@pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "capped"])
def test_more_accurate_than_plain_fp32(impl, device, softcap):
    """Check that log-probs are more accurate than torch's fp32, because the target's logit is recomputed in fp64."""
    rng = seeded(0)
    weight = torch.randn(3000, 2000, generator=rng, dtype=torch.float64).float() / 45 * 3
    hidden = torch.randn(1, 40, 2000, generator=rng, dtype=torch.float64).float()
    labels = (hidden @ weight.T).softmax(-1)[0].multinomial(1, generator=rng).view(1, 40)
    options = {"shift": False, "softcap": softcap, "bias": torch.randn(3000, generator=rng)}
    exact = exo_kernels.reference.linear_token_logps(
        hidden.double(), weight.double(), labels, **options | {"bias": options["bias"].double()}
    )
    plain = exo_kernels.reference.linear_token_logps(hidden, weight, labels, **options)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    result = exo_kernels.linear_token_logps(
        hidden.to(device), weight.to(device), labels.to(device), impl=impl, **moved
    ).cpu()
    error, plain_error = ((x.double() - exact).square().mean().sqrt() for x in (result, plain))
    assert error < 0.8 * plain_error, (error, plain_error)
