"""Adversarial logits: offsets, the limits of the dtype, -inf, NaN, empty tensors.

Each of these cases has broken a published kernel: padding columns with 0 costs 29 nats at a common offset of -30, a
first block of -inf makes an online softmax NaN, an ignored row of inf makes a gradient NaN, and a bad row changes
another row.
"""

import math

import pytest
import torch
from budget import check_loss, check_tokens, loss_answer
from cases import DTYPES, IGNORED, aligned, make_case, make_labels, make_logits
from pairwise import pairwise

import exo_kernels

BLOCK = 4096  # of the Triton kernels
INF = torch.inf
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


# These vocabularies are no multiple of 16 bytes, of a block or of a tile. At 1e4, bf16 logits are 64 apart.
@pairwise({"vocab": [37, 1201, 4099], "offset": [1e4, -1e4, -30.0], "dtype": DTYPES})
def test_common_offset(impl, device, vocab, offset, dtype):
    labels = make_labels((1, 5), vocab, ignored=0.0)
    logits = (make_logits(aligned(labels), vocab, torch.float64) + offset).to(dtype)
    check_tokens(logits, labels, impl, device, entropy=vocab == 1201)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ends_of_fp16(impl, device, temperature):
    """Check logits of +-65504: scaling them in fp16 would overflow, and most gradients are subnormal or zero."""
    labels = make_labels((2, 5), 130, ignored=0.0)
    logits = torch.empty(2, 5, 130).uniform_(-65504, 65504, generator=torch.Generator().manual_seed(0)).half()
    logits[0, 0, :2] = 65504
    logits[1, :, ::2] = -65504
    logits[0, 1] = 65504  # uniform
    check_tokens(logits, labels, impl, device, temperature=temperature, entropy=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_confident_rows(impl, device, dtype):
    """Check rows where p is close to 1: p - 1 cancels, and would be 0 if p were rounded to fp16 first."""
    labels = make_labels((4, 6), 33, ignored=0.0)
    logits = torch.randn(4, 6, 33, generator=torch.Generator().manual_seed(1))
    gaps = torch.linspace(0, 40, 24).view(4, 6, 1)
    logits = logits.scatter_add(-1, aligned(labels).clamp(min=0)[..., None], gaps).to(dtype)
    check_tokens(logits, labels, impl, device, entropy=True)


PLACES = {
    "first-block": slice(0, BLOCK),
    "middle-block": slice(BLOCK, 2 * BLOCK),
    "last-block": slice(2 * BLOCK, None),
    "first-unit": slice(0, 8),
    "tail": slice(-3, None),
    "all-but-one": slice(1, None),
}


@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "entropy"])
@pytest.mark.parametrize("place", PLACES)
def test_block_of_minus_infinity(impl, device, place, entropy):
    vocab = 3 * BLOCK + 3
    labels = torch.tensor([[0, 0, BLOCK + 9, vocab - 1]])  # some at -inf, others not
    logits = make_logits(aligned(labels), vocab, torch.float32)
    logits[..., PLACES[place]] = -INF
    check_tokens(logits, labels, impl, device, entropy=entropy)


@dtypes
def test_row_of_minus_infinity(impl, device, dtype):
    """Check that log-prob is -inf, entropy is 0, and the gradient is g at the label and 0 elsewhere, never NaN."""
    logits = torch.randn(1, 4, 21, dtype=torch.float64).to(dtype).to(device)
    logits[0, 1:3] = -INF
    labels = torch.tensor([[5, 20, 0, IGNORED]], device=device)
    x = logits.requires_grad_()
    logps, entropy = exo_kernels.token_logps(x, labels, shift=False, impl=impl, return_entropy=True)
    assert logps[0, 1:3].tolist() == [-INF, -INF]
    assert entropy[0, 1:].tolist() == [0.0, 0.0, 0.0]
    assert logps[0, [0, 3]].isfinite().all()
    (grad,) = torch.autograd.grad(logps, x, torch.tensor([[1.0, 0.5, -2.0, 3.0]], device=device).to(logps))
    expected = torch.zeros(2, 21, device=device, dtype=dtype)
    expected[0, 20], expected[1, 0] = 0.5, -2.0
    assert torch.equal(grad[0, 1:3], expected)
    assert grad[0, 0].isfinite().all() and not grad[0, 3].any()
    (grad,) = torch.autograd.grad(exo_kernels.token_logps(x, labels, shift=False, impl=impl).sum(), x)
    assert torch.equal(grad[0, 1:3], (expected != 0).to(dtype))


@pytest.mark.parametrize("objective", ["exo", "dpo"])
def test_label_of_minus_infinity(impl, device, objective):
    """Check a completion of probability 0: EXO stays finite; DPO is inf if q > 0 there."""
    case = make_case(4, 3, 17, objective=objective, reduction="none", seed=7, weights=True)
    labels = case.labels.clone()
    labels[0, 1], labels[3, 1] = 4, 4  # the chosen completion of the first group, the rejected one of the second
    case = case._replace(labels=labels)
    case.logits[0, 0, 4] = case.logits[3, 0, 4] = -INF
    result = check_loss(case, impl, device)
    assert result["p"][[0, 3]].tolist() == [0.0, 0.0]
    assert result["losses"].isinf().tolist() == [objective == "dpo", False]
    assert result["grad"].isfinite().all()


# a row with +inf has no softmax: it is NaN, as in eager torch
@pytest.mark.parametrize("poison", [torch.nan, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("objective", ["exo", "dpo"])
def test_poison_stays_in_its_group(impl, device, objective, poison):
    case = make_case(6, 3, 64, objective=objective, reduction="none", seed=8).on(device)
    case = case._replace(weights=torch.ones(3), labels=case.labels.masked_fill(case.labels == IGNORED, 1))
    clean = loss_answer(case, case.logits, impl)
    bad = case.logits.clone()
    bad[2, 1, 40] = poison
    result = loss_answer(case, bad, impl)
    assert result["losses"].isnan().tolist() == [False, True, False]
    assert result["policy_logps"].isnan().tolist() == [False, False, True, False, False, False]
    scored = aligned(case.labels.cpu()) != IGNORED
    assert result["grad"][2:4][scored[2:4].to(device)].isnan().any(-1).all()  # NaN in every row of the group
    for name, others in {"losses": [0, 2], "p": [0, 1, 4, 5], "grad": [0, 1, 4, 5]}.items():  # the other groups
        assert torch.equal(result[name][others], clean[name][others]), name
    logps = exo_kernels.token_logps(bad, case.labels, impl=impl)
    assert logps.isnan().nonzero().tolist() == [[2, 1]]


@pytest.mark.parametrize("label", [64, -1, 2**31 - 1, 2**32, -(2**62)])
def test_unchecked_label_makes_only_its_row_nan(impl, device, monkeypatch, label):
    """Check that without validation, as on a GPU, a bad label reads nothing out of bounds and its row is NaN."""
    monkeypatch.setattr(exo_kernels.validation, "check_values", lambda device: False)
    case = make_case(4, 3, 64, reduction="none", seed=11).on(device)
    case = case._replace(weights=torch.ones(2), labels=case.labels.masked_fill(case.labels == IGNORED, 1))
    clean = loss_answer(case, case.logits, impl)
    case.labels[1, 1] = label
    result = loss_answer(case, case.logits, impl)
    assert result["losses"].isnan().tolist() == [True, False]
    assert torch.equal(result["grad"][2:], clean["grad"][2:])
    assert exo_kernels.token_logps(case.logits, case.labels, impl=impl).isnan().nonzero().tolist() == [[1, 0]]


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("poison", [torch.nan, INF, -INF], ids=["nan", "inf", "minus-inf"])
def test_rows_without_loss_are_never_read(impl, device, poison, inplace):
    case = make_case(4, 4, 131, torch.float16, seed=9).on(device)
    ignored = aligned(case.labels.cpu()).to(device) == IGNORED
    clean = loss_answer(case, case.logits, impl)
    bad = case.logits.masked_fill(ignored[..., None], poison)
    result = loss_answer(case, bad, impl, inplace_backward=inplace)
    assert not result["grad"][ignored].any()
    for name, value in clean.items():
        assert torch.equal(result[name], value), name
    entropies = exo_kernels.token_logps(bad, case.labels, impl=impl, return_entropy=True)[1]
    assert not entropies[ignored].any() and entropies.isfinite().all()


def test_reference_of_ignored_tokens_is_never_read(impl, device):
    case = make_case(4, 5, 20, per_token_ref=True, seed=10).on(device)
    ignored = aligned(case.labels.cpu()).to(device) == IGNORED
    poisoned = case._replace(ref_logps=case.ref_logps.masked_fill(ignored, torch.nan))
    clean, result = (loss_answer(c, c.logits, impl) for c in (case, poisoned))
    assert all(torch.equal(result[name], value) for name, value in clean.items())


@pytest.mark.parametrize("objective", ["exo", "dpo"])
def test_all_ignored(impl, device, objective):
    """Check the loss without tokens: that of a policy equal to its reference, with a gradient of exactly 0."""
    case = make_case(4, 3, 17, objective=objective)
    case = case._replace(labels=torch.full_like(case.labels, IGNORED), ref_logps=torch.zeros(4))
    result = check_loss(case, impl, device)
    assert result["policy_logps"].tolist() == [0.0] * 4
    assert not result["grad"].any()


@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "aligned"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_empty(impl, device, shape, shift, inplace):
    """Check empty input: loss 0 without sequences, the loss of policy = reference without tokens; gradient shapes."""
    x = torch.randn(*shape, 7, device=device).requires_grad_()
    labels = torch.zeros(shape, dtype=torch.long, device=device)
    n = shape[0]
    arguments = (x * 1, labels, torch.zeros(n, device=device))
    loss = exo_kernels.fused_exo_loss(*arguments, shift=shift, impl=impl, inplace_backward=inplace)
    no_tokens = n == 0 or shape[1] - shift < 1
    if no_tokens:
        assert abs(loss.item() - (2.76123 if n else 0.0)) < 5e-6
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.shape == x.shape and grad.isfinite().all()
    for results in (
        exo_kernels.token_logps(x, labels, shift=shift, impl=impl, return_entropy=True),
        (exo_kernels.sequence_logps(x, labels, shift=shift, impl=impl),),
    ):
        for result in results:
            assert result.shape in (shape, (n,)) and result.isfinite().all()
            (grad,) = torch.autograd.grad(result.sum(), x, retain_graph=True)
            assert grad.shape == x.shape


def test_empty_packed(impl, device):
    x = torch.randn(0, 7, device=device).requires_grad_()
    labels, bounds = torch.zeros(0, dtype=torch.long, device=device), torch.zeros(1, dtype=torch.long, device=device)
    for cu_seqlens, n in ((bounds, 0), (bounds.repeat(3), 2)):
        loss = exo_kernels.fused_exo_loss(x, labels, torch.zeros(n, device=device), cu_seqlens=cu_seqlens, impl=impl)
        assert abs(loss.item() - (2.76123 if n else 0.0)) < 5e-6
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.shape == x.shape
        assert exo_kernels.sequence_logps(x, labels, cu_seqlens=cu_seqlens, impl=impl).tolist() == [0.0] * n


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [1e30, -1e30, 0.0], [0.0, 3e38, -3e38]], ids=str)
@pytest.mark.parametrize("objective", ["exo", "dpo"])
def test_extreme_rewards(impl, device, objective, rewards):
    """Check tied rewards (a uniform target) and huge ones (a one-hot target): the loss is exact or inf, never NaN."""
    case = make_case(3, 3, 17, objective=objective, group_size=3, beta_r=0.1)
    result = check_loss(case.with_options(rewards=torch.tensor(rewards)), impl, device)
    assert result["q"].sum().item() == pytest.approx(1)
    assert not result["loss"].isnan() and not result["grad"].isnan().any()


@pytest.mark.parametrize("objective", ["exo", "dpo"])
@pytest.mark.parametrize("rewards", [None, [1.0, 2.0]], ids=["preferences", "rewards"])
def test_a_group_of_impossible_completions_is_nan(impl, device, objective, rewards):
    """Check a group in which every S is -inf: p does not exist, so loss and gradient must be NaN."""
    x = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0)).to(device)
    x[:2, 0, 3] = -INF
    labels = torch.tensor([[0, 3], [0, 3], [0, 3], [0, 3]], device=device)
    options = {} if rewards is None else {"rewards": torch.tensor(rewards * 2, device=device)}
    ref, function = torch.zeros(4, device=device), getattr(exo_kernels, f"fused_{objective}_loss")
    for which in (impl, "reference"):
        logits = x.clone().requires_grad_()
        losses, stats = function(logits, labels, ref, reduction="none", return_stats=True, impl=which, **options)
        losses.sum().backward()
        assert losses.isnan().tolist() == [True, False], which
        assert stats.p.isnan().tolist() == [True, True, False, False], which
        assert logits.grad[:2, 0].isnan().all() and logits.grad[2:].isfinite().all(), which


# p is (1/2, 1/2) and q is (1, exp(-d)), d = (r_0 - r_1) / beta_r: EXO's loss is log(1/2) + d / 2, DPO's is log 2.
SATURATED = {
    "fits-fp32": (torch.float32, 1e30, 1e-5, 5e34),
    "beyond-fp32": (torch.float32, 1e30, 1e-12, INF),
    "ends-of-fp32": (torch.float32, 3e38, 1e-3, INF),
    "ends-of-fp64": (torch.float64, 1e308, 1e-3, INF),
    "fp64": (torch.float64, 1e30, 1e-12, 5e41),
}


@pytest.mark.parametrize("name", SATURATED)
@pytest.mark.parametrize("objective", ["exo", "dpo"])
def test_rewards_that_saturate_the_target(impl, device, objective, name):
    """Check that the loss is exact, or inf with slope 0 if it overflows, and that other groups do not change."""
    dtype, high, beta_r, expected = SATURATED[name]
    low = -high if name.startswith("ends") else 0.0
    rewards = torch.tensor([high, low, 0.0, 0.0], dtype=dtype, device=device)
    labels = torch.tensor([[0, 1]] * 4, device=device)
    function = getattr(exo_kernels, f"fused_{objective}_loss")
    for which in (impl, "reference"):
        x = torch.zeros(4, 2, 2, dtype=dtype, device=device).requires_grad_()
        ref = torch.full((4,), -math.log(2), dtype=torch.float64, device=device)
        options = {"rewards": rewards, "beta_r": beta_r, "beta_pi": 0.5, "reduction": "none", "impl": which}
        losses, stats = function(x, labels, ref, return_stats=True, **options)
        losses.sum().backward()
        assert stats.q.tolist() == [1.0, 0.0, 0.5, 0.5]
        right = expected if objective == "exo" else math.log(2)
        assert losses[0].item() == pytest.approx(right, rel=1e-6), which
        slope = x.grad[:, 0, 1] * 2  # d log p / d logit is 1/2
        if objective == "dpo":
            assert slope[:2].tolist() == pytest.approx([-0.25, 0.25], rel=1e-6), which  # beta_pi (p - q)
        elif right == INF:
            assert slope[:2].tolist() == [0.0, 0.0], which
        else:  # beta_pi p (log p - log q - L)
            assert slope[:2].tolist() == pytest.approx([-right / 4, right / 4], rel=1e-6), which
        assert slope[2:].abs().max() < 1e-6 and losses[1].isfinite(), which
