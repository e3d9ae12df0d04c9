"""Edge cases of the path from hidden states that random cases do not reach; mutation testing found each of them."""

import importlib

import pytest
import torch
from linear_cases import check_linear_loss, make_linear_case

import exo_kernels
from exo_kernels import dispatch
from exo_kernels.numerics import LogitTransform
from exo_kernels.schedules import matmul, plan

SCHEDULES = ["deferred", "group", "store", "recompute"]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
without_group = pytest.mark.parametrize("schedule", ["deferred", "store", "recompute"])


@every_schedule
def test_16_bits_in_chunks(impl, device, schedule):
    """Check that the weight's gradient is accumulated in fp32 over ten chunks."""
    case = make_linear_case(16, 9, 16, 37, torch.bfloat16, seed=4)
    check_linear_loss(case, impl, device, schedule=schedule, memory_budget=37 * 16 * 4 + 8 * 600)


@every_schedule
def test_blocks_of_a_16_bit_weight(impl, device, schedule, monkeypatch):
    """Check blocks of ten rows with a vocabulary of 129, which is no multiple of ten."""
    monkeypatch.setattr(matmul, "BLOCK_BYTES", 10 * 16 * 4)
    case = make_linear_case(width=16, dtype=torch.bfloat16, rewards=True, seed=1)
    check_linear_loss(case, impl, device, schedule=schedule)


@pytest.mark.parametrize("names", [("ref_bias",), ("ref_weight",), ("ref_weight", "ref_bias")], ids="-".join)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
def test_parts_of_a_separate_reference_head(impl, device, names, bias):
    case = make_linear_case(4, 4, 16, 37, reference_model="hidden", seed=3, bias=bias)
    rng = torch.Generator().manual_seed(9)
    parts = {"ref_weight": torch.randn(37, 16, generator=rng), "ref_bias": torch.randn(37, generator=rng)}
    check_linear_loss(case.with_options(**{name: parts[name] for name in names}), impl, device)


def leaves(device: str, vocab: int = 7) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.ones(1, 2, 4, device=device).requires_grad_(), torch.randn(vocab, 4, generator=rng).to(device)]


@without_group
def test_rows_of_minus_infinity(impl, device, schedule):
    hidden, weight = leaves(device)
    bias, labels = torch.full((7,), -torch.inf, device=device), torch.tensor([[1, 2]], device=device)
    logps = exo_kernels.linear_token_logps(
        hidden, weight.requires_grad_(), labels, bias=bias, shift=False, impl=impl, schedule=schedule
    )
    assert (logps == -torch.inf).all()


def test_entropy_of_columns_at_minus_infinity(impl, device):
    """Check that they add nothing to the entropy and get no gradient, although p log p is 0 times infinity."""
    hidden, weight = leaves(device)
    weight.requires_grad_()
    bias, labels = torch.zeros(7, device=device), torch.tensor([[1, 2]], device=device)
    bias[3] = -torch.inf
    _, entropies = exo_kernels.linear_token_logps(
        hidden, weight, labels, bias=bias, shift=False, return_entropy=True, impl=impl
    )
    d_hidden, d_weight = torch.autograd.grad(entropies.sum(), (hidden, weight))
    assert d_hidden.isfinite().all() and d_weight.isfinite().all() and not d_weight[3].any() and d_weight[0].any()


@without_group
def test_a_flat_tail_below_a_peak(impl, device, schedule):
    """Check a peak above 151936 equal columns: torch's fp32 softmax loses the tail in log-prob and gradient."""
    vocab = 151936
    bias = torch.full((vocab,), -12.0, device=device)
    bias[7] = 0.0
    hidden = torch.ones(1, 1, 2, device=device).requires_grad_()
    weight, labels = torch.zeros(vocab, 2, device=device), torch.tensor([[7]], device=device)
    leaf = bias.clone().requires_grad_()
    logps = exo_kernels.linear_token_logps(hidden, weight, labels, bias=leaf, shift=False, impl=impl, schedule=schedule)
    assert abs(logps.item() - bias.double().log_softmax(0)[7].item()) < 2e-6
    (grad,) = torch.autograd.grad(logps.sum(), leaf)
    expected = torch.nn.functional.one_hot(labels[0, 0], vocab) - bias.double().softmax(0)
    torch.testing.assert_close(grad.double(), expected, rtol=3e-6, atol=1e-9)


def test_zero_coefficient_of_an_overflowing_fp16_row(impl, device):
    """Check that the deferred gradient of a row that overflows is 0 if its coefficient is 0."""
    weight = torch.full((5, 4), 6e4, dtype=torch.float16, device=device)
    weight[0] = -6e4
    hidden = torch.zeros(1, 2, 4, dtype=torch.float16, device=device).requires_grad_()
    labels = torch.zeros(1, 2, dtype=torch.long, device=device)
    logps = exo_kernels.linear_token_logps(hidden, weight, labels, shift=False, schedule="deferred", impl=impl)
    (grad,) = torch.autograd.grad(logps, hidden, torch.tensor([[0.0, 1.0]], device=device))
    assert not grad[0, 0].any()


@pytest.mark.parametrize("schedule", ["deferred", "store", "recompute"])
def test_autocast_around_backward_only(impl, device, schedule):
    """Check that the backward pass uses the dtypes of the forward pass, and gives the same bits."""
    case = make_linear_case(4, 5, 16, 37, bias=False, reference_model="tokens").to(torch.float32, device)
    tensors = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    logps = exo_kernels.linear_token_logps(*tensors, case.labels, schedule=schedule, impl=impl)
    expected = torch.autograd.grad(logps.sum(), tensors, retain_graph=True)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        result = torch.autograd.grad(logps.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_reference_states_get_no_gradient(impl, device):
    case = make_linear_case(4, 3, 8, 33, reference_model="hidden").to(torch.float32, device)
    ref = case.options["ref_hidden"].requires_grad_()
    loss = exo_kernels.fused_linear_exo_loss(case.hidden, case.weight, case.labels, ref_hidden=ref, impl=impl)
    assert not loss.requires_grad


def test_targets_outside_the_columns_have_no_logit(impl, device):
    implementation = dispatch.implementation(impl)
    a = torch.zeros(2, 16, device=device)[:, :7]
    targets = torch.tensor([-1, 7], device=device)
    stats, _ = implementation.chunk_logps(a, None, targets, LogitTransform.of(1.0, None, 1.0), False)
    assert stats[0].isnan().all() and not stats[1].any()


def test_softmax_of_a_row_does_not_depend_on_the_batch():
    """Check with two threads, with which torch sums a single row in another order."""
    tiles = importlib.import_module("exo_kernels.chunked.tiles")
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        z = torch.randn(5, 2**18, generator=torch.Generator().manual_seed(0))
        batch, single = tiles.softmax(z), tiles.softmax(z[:1])
    finally:
        torch.set_num_threads(n_threads)
    assert all(torch.equal(a[:1], b) for a, b in zip(batch, single, strict=True))


@pytest.mark.parametrize("function", ["linear_sequence_logps", "linear_token_logps"])
@pytest.mark.parametrize("bounds", [[0, 3, 2, 6], [1, 6], [0, 5]], ids=str)
def test_boundaries_are_checked(function, bounds):
    arguments = torch.zeros(6, 4), torch.zeros(5, 4), torch.ones(6, dtype=torch.long)
    with pytest.raises(ValueError, match="cu_seqlens: expected 0 = c_0"):
        getattr(exo_kernels, function)(*arguments, cu_seqlens=torch.tensor(bounds))


@every_schedule
def test_labels_are_checked(schedule):
    hidden, weight = torch.zeros(4, 3, 5).requires_grad_(), torch.zeros(7, 5).requires_grad_()
    with pytest.raises(ValueError, match="labels: expected values in"):
        exo_kernels.fused_linear_exo_loss(hidden, weight, torch.full((4, 3), 7), torch.zeros(4), schedule=schedule)


# The arithmetic of the plan.


def test_oversized_group_does_not_change_other_chunks():
    units = plan.group_chunks([2500] + [100] * 11, 1000)
    assert [part.stop - part.start for unit in units[1:] for part in unit.parts] == [600, 500]


def test_groups_without_rows_are_one_unit():
    assert len(plan.group_chunks([0] * 4000, 1000)) == 1


def test_store_fits_to_the_byte():
    sizes = plan.Sizes(1000, 512, 32000, torch.float32, torch.device("cpu"), False)
    needs = plan.Needs(True, True, False, False, False)
    fits = 1000 * sizes.stored_row_bytes + sizes.row_bytes
    assert plan.choose("auto", needs, sizes, fits)[0] == "store"
    assert plan.choose("auto", needs, sizes, fits - 1)[0] == "recompute"


def test_operations_and_bytes_of_every_schedule():
    sizes = plan.Sizes(1000, 512, 32000, torch.float32, torch.device("cpu"), False)
    narrow = sizes._replace(dtype=torch.bfloat16)
    needs = plan.Needs(True, True, False, False, False)
    one = 2 * 100 * 512 * 32000
    for schedule, products, extra in (
        ("deferred", 4, 0), ("recompute", 4, 0), ("store", 3, 100 * sizes.stored_row_bytes),
    ):  # fmt: skip
        planned = plan.explain(schedule, "", needs, sizes, 2**29, [100])
        assert planned.flops == products * one and planned.extra_bytes == 100 * sizes.row_bytes + extra
    assert narrow.fixed_bytes == matmul.BLOCK_BYTES
    assert narrow.chunk_rows(2**29) == (2**29 - matmul.BLOCK_BYTES) // narrow.row_bytes
    planned = plan.explain("store", "", needs, narrow, 2**29, [100])
    assert planned.extra_bytes == 100 * (narrow.row_bytes + narrow.stored_row_bytes) + narrow.fixed_bytes
    assert plan.explain("store", "", needs, narrow, 2**29, [0]).extra_bytes == 0
