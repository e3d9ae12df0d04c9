"""Invariants of the losses on logits: relations between results that hold for any input."""

import importlib
import math

import pytest
import torch
from budget import accumulator, assert_same, compare, loss_answer, ulps_of
from cases import DTYPES, IGNORED, aligned, make_case, make_labels, make_logits, seeded

import exo_kernels
from exo_kernels import groups, objectives, preference_loss
from exo_kernels.ops import logits as logits_ops

both = pytest.mark.parametrize("objective", ["exo", "dpo"])
targets = pytest.mark.parametrize("rewards", [False, True], ids=["preferences", "rewards"])


def scores(n: int, seed: int = 0, spread: float = 5.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return policy sums, reference sums and rewards in float64."""
    rng = seeded(seed)
    policy, ref, rewards = (torch.randn(n, generator=rng, dtype=torch.float64) for _ in range(3))
    return policy * spread - 100, ref - 100, rewards


def slopes(policy: torch.Tensor, ref: torch.Tensor, **options) -> torch.Tensor:
    """Return dL/dS of every sequence, for the sum of the losses."""
    policy = policy.detach().requires_grad_()
    return torch.autograd.grad(preference_loss(policy, ref, reduction="sum", **options), policy)[0]


# The token pass.


@pytest.mark.parametrize("shift_by", [8192.0, -8192.0, -32.0])
def test_logits_plus_a_constant(impl, device, shift_by):
    """Check that a constant changes no bit. Logits are multiples of 2^-10, so the sum and x - max are exact."""
    labels = make_labels((2, 4), 1201)
    logits = (make_logits(aligned(labels), 1201, torch.float64) * 1024).round().div(1024).float().to(device)
    results = []
    for x in (logits, logits + shift_by):
        x = x.requires_grad_()
        logps, entropy = exo_kernels.token_logps(x, labels.to(device), return_entropy=True, impl=impl)
        results.append((logps.detach(), entropy.detach(), *torch.autograd.grad(logps.sum() + entropy.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("entropy", [False, True], ids=["logps", "entropy"])
def test_gradient_of_a_row_sums_to_zero(impl, device, entropy):
    labels = make_labels((2, 4), 300, ignored=0.0)
    x = make_logits(aligned(labels), 300, torch.float64).to(device).requires_grad_()
    logps, entropies = exo_kernels.token_logps(x, labels.to(device), return_entropy=True, impl=impl)
    (grad,) = torch.autograd.grad((entropies if entropy else logps).sum(), x)
    assert_same("sums", grad.sum(-1), torch.zeros(2, 4), 10.0)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "constants",
    [
        {"TILE_BYTES": 1},  # a row at a time
        {"TILE_BYTES": 40_000},
        {"TILE_BYTES": 2**40},
        {"VIEW_BYTES": 0},  # views of adjacent rows, however few
        {"VIEW_BYTES": 2**40, "TILE_BYTES": 40_000},
        {"LAZY_BYTES": 0},  # gradients in memory from mmap
    ],
    ids=str,
)
def test_tiling_changes_no_bit(monkeypatch, constants):
    """Check that tile sizes and the memory of the gradient change no bit, for every dtype."""
    for dtype in DTYPES:
        case = make_case(4, 9, 1201, dtype, seed=1)
        expected = loss_answer(case, case.logits, "chunked")
        for name, value in constants.items():
            module = "token_logps" if name == "VIEW_BYTES" else "tiles"
            monkeypatch.setattr(importlib.import_module(f"exo_kernels.chunked.{module}"), name, value)
        result = loss_answer(case, case.logits, "chunked")
        monkeypatch.undo()
        assert all(torch.equal(result[name], value) for name, value in expected.items())


@both
def test_packed_equals_padded_bit_for_bit(impl, device, objective):
    """Compare the layouts with 128 columns, so that rows are aligned in the same way in both."""
    lengths = [3, 1, 0, 4]
    packed = make_case(vocab=128, lengths=lengths, objective=objective, seed=2).on(device)
    logits = torch.full((4, 5, 128), torch.nan, device=device)
    labels = torch.full((4, 5), IGNORED, device=device)
    bounds = packed.options["cu_seqlens"].tolist()
    for i, length in enumerate(lengths):
        rows = slice(bounds[i], bounds[i + 1])
        logits[i, :length], labels[i, 1 : length + 1] = packed.logits[rows], packed.labels[rows]
    padded = packed._replace(logits=logits, labels=labels, options={})
    a, b = (loss_answer(case, case.logits, impl) for case in (packed, padded))
    grads = a.pop("grad"), torch.cat([g[:length] for g, length in zip(b.pop("grad"), lengths, strict=True)])
    assert torch.equal(*grads)
    assert all(torch.equal(a[name], b[name]) for name in a)
    # and with shift=False and labels shifted by hand
    moved = padded._replace(labels=labels.roll(-1, 1).index_fill(1, torch.tensor([4], device=device), IGNORED))
    c = loss_answer(moved.with_options(shift=False), logits, impl)
    assert all(torch.equal(b[name], c[name]) for name in b)


def test_sequence_does_not_depend_on_the_batch(impl, device):
    case = make_case(4, 4, 128, seed=3).on(device)
    together = exo_kernels.token_logps(case.logits, case.labels, impl=impl)
    for n in range(4):
        alone = exo_kernels.token_logps(case.logits[n : n + 1], case.labels[n : n + 1], impl=impl)
        assert torch.equal(alone[0], together[n])


# The group pass.


@both
@targets
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ([2], torch.float64),
        ([33], torch.float64),
        ([100], torch.float64),
        ([1, 32, 4, 65, 1], torch.float64),
        ([1, 3, 40], torch.float32),
    ],
    ids=str,
)
def test_group_pass_equals_objectives(impl, device, dtype, sizes, rewards, objective):
    """Compare with objectives.py; 33, 65 and 100 completions need more than one of the kernel's blocks of 32."""
    n = sum(sizes)
    policy, ref, r = scores(n, seed=n, spread=2.0)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    log_targets = objectives.preference_log_targets(objective, 0.01, None)
    beta_pi, beta_r = 0.7, 0.4
    arguments = [
        policy.to(dtype), torch.zeros(n).long(), ref, r if rewards else None, torch.arange(n + 1), offsets,
    ]  # fmt: skip
    arguments = [a if a is None else a.to(device) for a in arguments]
    result = logits_ops.group_loss(*arguments, objective, [beta_pi, beta_r, *log_targets], IGNORED, impl)

    expected = [[] for _ in range(4)]
    for a, b in zip(offsets, offsets[1:], strict=False):
        ratios = (policy.to(dtype).double() - ref)[None, a:b]
        log_p = objectives.policy_log_probs(ratios, beta_pi)
        if rewards:
            log_q = objectives.reward_log_target(r[None, a:b], beta_r)
        else:
            log_q = objectives.preference_log_target(torch.ones_like(log_p).bool(), *log_targets)
        loss, slope = objectives.OBJECTIVES[objective].function(log_p, log_q)
        for values, value in zip(expected, (loss, beta_pi * slope[0], log_p[0].exp(), log_q[0].exp()), strict=True):
            values.append(value)
    names = {"loss": 0, "slopes": 1, "p": 4, "q": 5}
    for (name, i), values in zip(names.items(), expected, strict=True):
        values = torch.cat(values)
        # fp64 rounded once at the end. 10: the largest |log p - log q|, because slopes are differences of these
        compare(name, result[i], values.to(dtype), values, 10 * math.sqrt(n) * ulps_of(torch.float64))
    assert torch.equal(result[6].cpu(), torch.ones(n, dtype=dtype))


@pytest.mark.parametrize("per_token", [False, True], ids=["sums", "per-token"])
def test_long_sequences_are_summed_in_float64(impl, device, per_token):
    """Check lengths around the block of 512 tokens, an empty sequence, and a sum of 1500 terms of -10 nats."""
    lengths = torch.tensor([511, 0, 512, 513, 1500, 1])
    offsets, n = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), int(lengths.sum())
    logps = -10 + torch.randn(n, generator=seeded(1))
    ref = logps + 0.01 * torch.randn(n, generator=seeded(2))
    targets = make_labels((n,), 5, ignored=0.4)
    scored = targets != IGNORED
    logps, ref = (x.masked_fill(~scored, torch.nan) for x in (logps, ref))  # must not be read

    def sums(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.sum() for part in x.double().where(scored, 0.0).split(lengths.tolist())])

    ref_logps = ref[None] if per_token else sums(ref)
    arguments = [x.to(device) for x in (logps, targets, ref_logps)]
    bounds = [offsets.to(device), torch.tensor([0, 4, 6], device=device)]
    result = logits_ops.group_loss(*arguments, None, *bounds, "exo", [0.5, 1.0, -0.1, -2.0], IGNORED, impl)
    for name, i, expected in (("policy", 2, sums(logps)), ("ratios", 3, sums(logps) - sums(ref))):
        compare(name, result[i], expected.float(), expected, 1e-10)
    assert result[6].tolist() == [part.sum().item() for part in scored.split(lengths.tolist())]


@both
def test_slopes_are_the_derivative(objective):
    """Check that the slope that an objective returns is the gradient of its loss."""
    rng = seeded(4)
    z = torch.randn(6, 5, generator=rng, dtype=torch.float64).mul(3).requires_grad_()
    log_q = torch.log_softmax(torch.randn(6, 5, generator=rng, dtype=torch.float64), -1)
    loss, slope = objectives.OBJECTIVES[objective].function(torch.log_softmax(z, -1), log_q)
    (expected,) = torch.autograd.grad(loss.sum(), z)
    assert_same("slope", slope.detach(), expected, 10.0)


@both
@targets
@pytest.mark.parametrize("k", [2, 3, 40])
def test_slopes_of_a_group_sum_to_zero(objective, rewards, k):
    policy, ref, r = scores(2 * k, seed=5)
    g = slopes(policy, ref, objective=objective, group_size=k, rewards=r if rewards else None, beta_pi=0.5)
    assert g.any()
    assert_same("sums", g.view(2, k).sum(-1), torch.zeros(2), g.abs().sum().item())


@both
@targets
def test_sums_plus_a_constant_per_group(objective, rewards):
    policy, ref, r = scores(6, seed=6)
    options = {"objective": objective, "group_size": 3, "rewards": r if rewards else None, "reduction": "none"}
    constants = torch.tensor([64.0, -32.0], dtype=torch.float64).repeat_interleave(3)
    result = preference_loss(policy + constants, ref, **options)
    assert_same("loss", result, preference_loss(policy, ref, **options), 20.0)


@both
@targets
def test_group_of_one_has_zero_loss(impl, device, objective, rewards):
    case = make_case(3, 3, 17, objective=objective, rewards=rewards, group_size=1, reduction="none", weights=True)
    case = case.on(device)
    result = loss_answer(case, case.logits, impl)
    assert result["losses"].tolist() == result["loss"].tolist() == [0.0, 0.0, 0.0]
    assert not result["grad"].any()
    assert result["p"].tolist() == result["q"].tolist() == [1.0, 1.0, 1.0]


@both
def test_permuting_a_group_permutes_its_slopes(objective):
    policy, ref, r = scores(5, seed=7)
    order = torch.tensor([3, 1, 4, 0, 2])
    options = {"objective": objective, "group_size": 5, "beta_pi": 0.3}
    g = slopes(policy, ref, rewards=r, **options)
    assert_same("rewards", slopes(policy[order], ref[order], rewards=r[order], **options), g[order])
    order = torch.tensor([0, 3, 4, 1, 2])  # the chosen one stays first
    g = slopes(policy, ref, **options)
    assert_same("preferences", slopes(policy[order], ref[order], **options), g[order], 10.0)


def test_swapping_a_tie_changes_nothing():
    policy, ref, _ = scores(2, seed=8)
    tie = torch.ones(2, dtype=torch.float64)
    a, b = preference_loss(policy, ref, rewards=tie), preference_loss(policy.flip(0), ref.flip(0), rewards=tie)
    assert_same("loss", a, b)


# The complete loss.


@both
@pytest.mark.parametrize("sizes", [2, torch.tensor([1, 3, 2])], ids=["even", "ragged"])
def test_reductions(impl, device, objective, sizes):
    case = make_case(6, 3, 19, objective=objective, group_size=sizes).on(device)

    def loss(**options) -> torch.Tensor:
        function = getattr(exo_kernels, f"fused_{objective}_loss")
        return function(case.logits, case.labels, case.ref_logps, impl=impl, **case.options, **options)

    each = loss(reduction="none")
    assert each.shape == (3,)
    assert torch.equal(loss(reduction="sum"), each.sum())
    assert torch.equal(loss(), each.sum() / 3)
    assert torch.equal(loss(num_groups=5), each.sum() / 5)
    assert torch.equal(loss(num_groups=torch.tensor(5, device=device)), each.sum() / 5)
    assert torch.equal(loss(return_stats=True)[1].losses, each)


@both
def test_two_micro_batches_equal_one_batch(impl, device, objective):
    """Check that with num_groups of the step, accumulated gradients equal those of one call bit for bit."""
    case = make_case(6, 3, 128, torch.float64, objective=objective, seed=9).on(device)
    full = loss_answer(case, case.logits, impl)["grad"]
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        part = case._replace(logits=case.logits[rows], labels=case.labels[rows], ref_logps=case.ref_logps[rows])
        parts.append(loss_answer(part.with_options(num_groups=3), part.logits, impl)["grad"])
    assert torch.equal(torch.cat(parts), full)


@both
@targets
def test_fused_loss_equals_preference_loss_of_sums(impl, device, objective, rewards):
    case = make_case(4, 3, 65, objective=objective, rewards=rewards, seed=10).on(device)
    options = {k: v for k, v in case.options.items() if k == "rewards"}
    result = loss_answer(case, case.logits, impl)
    sums = exo_kernels.sequence_logps(case.logits.double(), case.labels, impl=impl)
    expected = preference_loss(sums, case.ref_logps, objective=objective, **options)
    scale = sums.abs().sum().item()  # of float32 log-probs
    compare("loss", result["loss"].double(), expected, expected.cpu(), scale * ulps_of(torch.float32))


def test_spread_is_the_gradient_of_segment_sum(impl, device):
    """Check that the gradient of groups.segment_sum is groups.spread."""
    offsets = torch.tensor([0, 0, 3, 3, 7], device=device)
    values = torch.arange(7.0, device=device, dtype=accumulator(torch.float64)).requires_grad_()
    sums = groups.segment_sum(values, offsets)
    assert sums.tolist() == [0.0, 3.0, 0.0, 18.0]
    weights = torch.tensor([5.0, 6.0, 7.0, 8.0], device=device, dtype=torch.float64)
    (grad,) = torch.autograd.grad((sums * weights).sum(), values)
    assert torch.equal(grad, groups.spread(weights, offsets, 7))
    assert grad.tolist() == [6.0] * 3 + [8.0] * 4


def test_unchecked_offsets_stay_within_bounds():
    """Check that bad offsets, which a GPU does not validate, reach no row outside the input."""
    bad = torch.tensor([-3, 2, 1, 99, 4])
    inside = groups.within(bad, 6)
    assert inside.tolist() == [0, 2, 2, 6, 6]
    assert groups.within(torch.tensor([0, 2, 6]), 6).tolist() == [0, 2, 6]
    values = torch.arange(1.0, 5.0)
    assert groups.spread(values, inside, 6).tolist() == [1, 1, 3, 3, 3, 3]
    assert groups.spread(values, bad, 6).shape == (6,)
    assert groups.spread(values[:0], inside[:1], 3).tolist() == [0, 0, 0]


def test_spread_of_offsets_that_end_too_early():
    """Check that members behind the last segment get its value: unvalidated offsets must not read out of bounds."""
    spread = groups.spread(torch.tensor([1.0, 2.0]), torch.tensor([0, 2, 3]), 6)
    assert spread.tolist() == [1, 1, 2, 2, 2, 2]
