"""Losses on logits against the fp64 oracle, within the error budget: implementations, shapes, dtypes, options."""

import pytest
import torch
from budget import assert_same, check_loss, check_tokens, compare
from cases import DTYPES, IGNORED, aligned, make_case, make_labels, make_logits, sums_of
from torch.nn.functional import cross_entropy

import exo_kernels
from exo_kernels import reference

# 1: a single token. 2: shorter than 16 bytes. 127, 128, 129: with and without an incomplete 16-byte unit.
# 4097: one column in the second block of 4096. 50257 (GPT-2): odd, so alignment changes from row to row; 13 blocks.
VOCABULARIES = [1, 2, 127, 128, 129, 4097, 50257]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@dtypes
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_token_logps(impl, device, vocab, dtype):
    n, t = (1, 4) if vocab > 4097 else (3, 4)
    labels = make_labels((n, t), vocab, ignored=0.0 if vocab > 4097 else 0.3)
    logits = make_logits(aligned(labels), vocab, dtype)
    check_tokens(logits, labels, impl, device)


@dtypes
@pytest.mark.parametrize("vocab", [1, 2, 129, 4097, 50257])
def test_entropy(impl, device, vocab, dtype):
    labels = make_labels((3, 4) if vocab <= 4097 else (1, 4), vocab, seed=1)
    logits = make_logits(aligned(labels), vocab, dtype, seed=1)
    check_tokens(logits, labels, impl, device, entropy=True)


# 0.8 as in the paper; 0.01 makes rows one-hot, 100 makes them uniform
@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "entropy"])
@pytest.mark.parametrize("temperature", [0.01, 0.8, 100.0])
def test_temperature(impl, device, temperature, entropy):
    labels = make_labels((3, 4), 300, seed=2)
    logits = make_logits(aligned(labels), 300, torch.float32, seed=2)
    check_tokens(logits, labels, impl, device, entropy=entropy, temperature=temperature)


# test_laws.py tests larger groups in the group pass.
@pytest.mark.parametrize("rewards", [False, True], ids=["preferences", "rewards"])
@pytest.mark.parametrize("objective", ["exo", "dpo"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_loss_over_group_sizes(impl, device, k, objective, rewards):
    check_loss(make_case(2 * k, 3, 11, objective=objective, rewards=rewards, group_size=k, seed=k), impl, device)


@dtypes
@pytest.mark.parametrize("objective", ["exo", "dpo"])
def test_loss_over_dtypes(impl, device, objective, dtype):
    case = make_case(4, 6, 257, dtype, objective=objective, rewards=True, group_size=2, temperature=0.8)
    check_loss(case, impl, device)


@pytest.mark.parametrize("rewards", [False, True], ids=["preferences", "rewards"])
@pytest.mark.parametrize("objective", ["exo", "dpo"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_ragged_groups_of_ragged_sequences(impl, device, index, objective, rewards):
    case = make_case(
        vocab=9, lengths=[2, 5, 0, 3, 1, 4, 0], objective=objective, rewards=rewards, beta_pi=0.7,
        group_size=torch.tensor([1, 4, 2], dtype=index), reduction="none", weights=True,
    )  # fmt: skip
    case = case.with_options(cu_seqlens=case.options["cu_seqlens"].to(index))
    check_loss(case._replace(labels=case.labels.to(index)), impl, device)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "none", "weights": True},
        {"reduction": "sum", "objective": "dpo"},
        {"num_groups": 7},
        {"num_groups": 2.5},
        {"num_groups": torch.tensor(7)},
        {"num_groups": torch.tensor(7.0, dtype=torch.float64)},
        {"per_token_ref": True, "ref_dtype": torch.float32},
        {"per_token_ref": True, "ref_dtype": torch.float64},
        {"ref_dtype": torch.float32},
        {"shift": False},
        {"shift": True, "per_token_ref": True},
        {"lengths": [5, 0, 1, 7]},
        {"lengths": [5, 0, 1, 7], "per_token_ref": True, "shift": False},
        {"temperature": 0.8, "beta_pi": 2.0},
        {"rewards": True, "beta_r": 0.05},
        {"label_smoothing": 0.3},
        {"group_size": 4, "label_smoothing": 0.3},
        {"group_size": 4, "label_smoothing": 0.3, "objective": "dpo"},
        {"compat": "official"},
        {"compat": "official", "objective": "dpo"},
    ],
    ids=lambda o: "-".join(f"{k}_{v}" for k, v in o.items()).replace(" ", "").replace("torch.", ""),
)
def test_options(impl, device, options):
    check_loss(make_case(4, 3, 37, torch.float32, seed=5, **options), impl, device)


def test_int32_labels_equal_int64_bit_for_bit(impl, device):
    case = make_case().on(device)
    a = exo_kernels.fused_exo_loss(case.logits, case.labels, case.ref_logps, impl=impl)
    b = exo_kernels.fused_exo_loss(case.logits, case.labels.int(), case.ref_logps, impl=impl)
    assert torch.equal(a, b)


def test_other_ignore_index(impl, device):
    """Check other values of ignore_index, also a valid id and values beyond int32."""
    case = make_case(vocab=11).on(device)
    expected = exo_kernels.token_logps(case.logits, case.labels, impl=impl)
    for index in (-1, 10**12, -(2**40)):
        labels = case.labels.masked_fill(case.labels == IGNORED, index)
        assert torch.equal(exo_kernels.token_logps(case.logits, labels, ignore_index=index, impl=impl), expected)
    labels = case.labels.masked_fill(case.labels == IGNORED, 3)
    result = exo_kernels.token_logps(case.logits, labels, ignore_index=3, impl=impl)
    assert torch.equal(result, expected.where(aligned(labels.cpu()).to(device) != 3, 0.0))


@dtypes
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_sequence_logps(impl, device, packed, dtype):
    """Check that the result is token_logps summed in float64, with the same gradient."""
    case = make_case(vocab=50, dtype=dtype, lengths=[4, 0, 9] if packed else None, temperature=0.8).on(device)
    x = case.logits.requires_grad_()
    logps = exo_kernels.token_logps(x, case.labels, impl=impl, **case.layout())
    sums = exo_kernels.sequence_logps(x, case.labels, impl=impl, **case.layout())
    expected = sums_of(logps.detach().double(), case.options.get("cu_seqlens"))
    order = len(logps) * torch.finfo(torch.float64).eps * expected.abs().cpu()  # another order of summation
    compare("sums", sums, expected.to(logps.dtype), expected, order)
    weights = torch.arange(1.0, sums.numel() + 1, device=device)
    if packed:
        rows = weights.repeat_interleave(case.options["cu_seqlens"].diff())
    else:
        rows = weights[:, None].expand(case.labels.shape)
    grads = [torch.autograd.grad(outputs, x, w.to(outputs))[0] for outputs, w in ((sums, weights), (logps, rows))]
    assert torch.equal(*grads)


# The oracle itself. test_golden.py has golden values of losses.


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_oracle_is_cross_entropy(temperature):
    labels = make_labels((3, 4), 31)
    logits = make_logits(aligned(labels), 31, torch.float64).requires_grad_()
    shifted = cross_entropy(logits[:, :-1].flatten(0, 1) / temperature, labels[:, 1:].flatten(), reduction="none")
    logps = reference.token_logps(logits, labels, temperature=temperature)
    assert torch.equal(logps[:, -1], torch.zeros(3))
    assert_same("logps", logps[:, :-1].flatten(), -shifted.detach(), shifted.detach().clamp(min=1))
    (expected,) = torch.autograd.grad(-shifted.sum(), logits)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert_same("grad", grad, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_impl_reference_is_the_oracle(packed):
    """Check that impl="reference" passes every argument on and gives the same bits."""
    options = dict(
        group_size=torch.tensor([3, 1]), rewards=True, beta_pi=0.3, beta_r=0.4, temperature=0.7, num_groups=3
    )
    case = make_case(vocab=17, seed=3, lengths=[3, 0, 2, 4] if packed else None, **options)
    loss, stats = exo_kernels.fused_exo_loss(
        case.logits, case.labels, case.ref_logps, impl="reference", return_stats=True, **case.options
    )
    expected, expected_stats = reference.fused_exo_loss(
        case.logits, case.labels, case.ref_logps, return_stats=True, **case.options
    )
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(stats, expected_stats, strict=True))
    for name in ("token_logps", "sequence_logps"):
        result = getattr(exo_kernels, name)(case.logits, case.labels, impl="reference", **case.layout())
        assert torch.equal(result, getattr(reference, name)(case.logits, case.labels, **case.layout()))
