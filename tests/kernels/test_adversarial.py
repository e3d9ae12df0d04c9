"""Logits that are hard on purpose: offsets, the ends of the dtype, -inf, NaN, nothing at all.

Each of these has broken a published kernel: tail columns at 0 are 29 nats off at a common offset of -30, a first block
of -inf makes an online softmax NaN, an ignored row of inf makes a gradient NaN, one bad row reaches another.
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


# No multiple of 16 bytes, of a block, or of anything else a tile could be. 1e4 leaves bf16 logits 64 apart.
@pairwise({"vocab": [37, 1201, 4099], "offset": [1e4, -1e4, -30.0], "dtype": DTYPES})
def test_common_offset(impl, device, vocab, offset, dtype):
    labels = make_labels((1, 5), vocab, ignored=0.0)
    logits = (make_logits(aligned(labels), vocab, torch.float64) + offset).to(dtype)
    check_tokens(logits, labels, impl, device, entropy=vocab == 1201)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ends_of_fp16(impl, device, temperature):
    """Logits of +-65504: scaling them in fp16 would overflow, and most gradients are subnormal or zero."""
    labels = make_labels((2, 5), 130, ignored=0.0)
    logits = torch.empty(2, 5, 130).uniform_(-65504, 65504, generator=torch.Generator().manual_seed(0)).half()
    logits[0, 0, :2] = 65504
    logits[1, :, ::2] = -65504
    logits[0, 1] = 65504  # uniform
    check_tokens(logits, labels, impl, device, temperature=temperature, entropy=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_confident_rows(impl, device, dtype):
    """p - 1 cancels: with p rounded to fp16 before the subtraction nothing would be left."""
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
    labels = torch.tensor([[0, 0, BLOCK + 9, vocab - 1]])  # inside the hole, and outside it
    logits = make_logits(aligned(labels), vocab, torch.float32)
    logits[..., PLACES[place]] = -INF
    check_tokens(logits, labels, impl, device, entropy=entropy)


@dtypes
def test_row_of_minus_infinity(impl, device, dtype):
    """Log-prob -inf; the gradient is g on the label and 0 elsewhere; entropy 0. Never NaN."""
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
    """One completion is impossible: its p is 0. EXO does not mind; DPO says inf where q asks for it."""
    case = make_case(4, 3, 17, objective=objective, reduction="none", seed=7, weights=True)
    labels = case.labels.clone()
    labels[0, 1], labels[3, 1] = 4, 4  # a chosen one in the first group, a rejected one in the second
    case = case._replace(labels=labels)
    case.logits[0, 0, 4] = case.logits[3, 0, 4] = -INF
    result = check_loss(case, impl, device)
    assert result["p"][[0, 3]].tolist() == [0.0, 0.0]
    assert result["losses"].isinf().tolist() == [objective == "dpo", False]
    assert result["grad"].isfinite().all()


# +inf has no softmax: as with eager torch, the row is NaN
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
    assert result["grad"][2:4][scored[2:4].to(device)].isnan().any(-1).all()  # told, in every row that it moves
    for name, others in {"losses": [0, 2], "p": [0, 1, 4, 5], "grad": [0, 1, 4, 5]}.items():
        assert torch.equal(result[name][others], clean[name][others]), name
    logps = exo_kernels.token_logps(bad, case.labels, impl=impl)
    assert logps.isnan().nonzero().tolist() == [[2, 1]]


@pytest.mark.parametrize("label", [64, -1, 2**31 - 1, 2**32, -(2**62)])
def test_unchecked_labels_poison_their_own_row(impl, device, monkeypatch, label):
    """What a GPU does without EXO_KERNELS_CHECK: nothing is read out of bounds, and the row is NaN, never a number."""
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


def test_reference_where_nothing_is_scored_is_never_read(impl, device):
    case = make_case(4, 5, 20, per_token_ref=True, seed=10).on(device)
    ignored = aligned(case.labels.cpu()).to(device) == IGNORED
    poisoned = case._replace(ref_logps=case.ref_logps.masked_fill(ignored, torch.nan))
    clean, result = (loss_answer(c, c.logits, impl) for c in (case, poisoned))
    assert all(torch.equal(result[name], value) for name, value in clean.items())


@pytest.mark.parametrize("objective", ["exo", "dpo"])
def test_all_ignored(impl, device, objective):
    """No token, no log-ratio: the loss where policy and reference agree, gradient exactly 0."""
    case = make_case(4, 3, 17, objective=objective)
    case = case._replace(labels=torch.full_like(case.labels, IGNORED), ref_logps=torch.zeros(4))
    result = check_loss(case, impl, device)
    assert result["policy_logps"].tolist() == [0.0] * 4
    assert not result["grad"].any()


@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "aligned"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0), (2, 1)], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_empty(impl, device, shape, shift, inplace):
    """No sequences: loss 0. No tokens: the loss where policy and reference agree. The gradient has the right shape."""
    x = torch.randn(*shape, 7, device=device).requires_grad_()
    labels = torch.zeros(shape, dtype=torch.long, device=device)
    n = shape[0]
    arguments = (x * 1, labels, torch.zeros(n, device=device))
    loss = exo_kernels.fused_exo_loss(*arguments, shift=shift, impl=impl, inplace_backward=inplace)
    nothing = n == 0 or shape[1] - shift < 1
    if nothing:
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
    """Ties make a uniform target; a target that is one-hot in every way still has a finite, exact loss or inf."""
    case = make_case(3, 3, 17, objective=objective, group_size=3, beta_r=0.1)
    result = check_loss(case.but(rewards=torch.tensor(rewards)), impl, device)
    assert result["q"].sum().item() == pytest.approx(1)
    assert not result["loss"].isnan() and not result["grad"].isnan().any()


@pytest.mark.parametrize("objective", ["exo", "dpo"])
@pytest.mark.parametrize("rewards", [None, [1.0, 2.0]], ids=["preferences", "rewards"])
def test_a_group_of_impossible_completions_is_nan(impl, device, objective, rewards):
    """Every S is -inf: no distribution exists, so neither loss nor gradient may be a number."""
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
    """The loss is right, or inf with slope 0 if the dtype cannot hold it; other groups are untouched; never NaN."""
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
