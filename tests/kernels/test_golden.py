"""Golden values: losses and gradients of the published code, and values computed by hand.

golden_official.json has losses and gradients of the published loss functions (github.com/haozheji/exact-optimization,
src/align_stage/loss.py: exact_loss and dpo_loss), computed in float64 on fixed inputs of four shapes. Its "exo-pref"
uses the unnormalised log-targets (0, -10), as compat="official" does. The file has the logits before division by the
temperature, and for each gradient with respect to them the sum of absolute values and the twenty largest elements as
(sequence, row, id, value). attention_mask is 1 for real tokens, and positions below prompt_lens are prompt. The
published code mutates its inputs, so each loss was computed on fresh ones.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from cases import IGNORED

import exo_kernels
from exo_kernels import preference_loss, reference

CASES = json.loads((Path(__file__).parents[1] / "golden_official.json").read_text(encoding="utf-8"))["cases"]
LOSSES = [(case, name) for case in CASES for name in case["expected"]]


@pytest.mark.parametrize(("case", "name"), LOSSES, ids=[f"{case['name']}-{name}" for case, name in LOSSES])
def test_published_code(impl, device, case, name):
    objective, target = name.split("-")
    expected = case["expected"][name]
    logits = torch.tensor(case["policy_logits"], dtype=torch.float64)
    ref_logits = torch.tensor(case["ref_logits"], dtype=torch.float64)
    values = torch.tensor(case["labels_or_rewards"], dtype=torch.float64)
    positions = torch.arange(logits.shape[1])
    completion = torch.tensor(case["attention_mask"]).bool() & (positions >= torch.tensor(case["prompt_lens"])[:, None])
    labels = torch.tensor(case["input_ids"]).masked_fill(~completion, IGNORED)

    order = torch.arange(len(values))
    if target == "pref":  # the chosen completion must come first
        order = order.view(-1, 2)
        order = torch.where(values[order[:, :1]] < values[order[:, 1:]], order.flip(1), order).flatten()
    logits, ref_logits, labels = logits[order].requires_grad_(), ref_logits[order], labels[order]
    temperature = case["temperature"]
    ref = reference.token_logps(ref_logits, labels, temperature=temperature)
    assert ref.sum(-1).tolist() == pytest.approx([case["ref_logps"][i] for i in order], abs=1e-10)
    policy = reference.sequence_logps(logits, labels, temperature=temperature)
    assert policy.tolist() == pytest.approx([case["policy_logps"][i] for i in order], abs=1e-10)

    rows, aligned, options = logits, labels, {}
    if case["name"] in ("pairs-hot", "k8-rewards"):  # packed, with only the rows that have a loss
        scored = labels[:, 1:] != IGNORED
        rows, aligned, ref = logits[:, :-1][scored], labels[:, 1:][scored], ref[:, :-1][scored]
        options["cu_seqlens"] = torch.nn.functional.pad(scored.sum(-1).cumsum(0), (1, 0)).to(device)
    if target == "rw":
        options |= {"rewards": values.to(device), "beta_r": case["beta_r"]}
    elif objective == "exo":
        options["compat"] = "official"
    loss, stats = getattr(exo_kernels, f"fused_{objective}_loss")(
        rows.to(device), aligned.to(device), ref.to(device), group_size=case["group_size"], beta_pi=case["beta_pi"],
        temperature=temperature, impl=impl, return_stats=True, **options,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-12)
    assert torch.allclose(stats.policy_logps.cpu(), policy, rtol=0, atol=1e-12)
    assert logits.grad.abs().sum().item() == pytest.approx(expected["grad_abs_sum"], rel=1e-11)
    places = {int(old): new for new, old in enumerate(order)}
    top = [logits.grad[places[n], t, v].item() for n, t, v, _ in expected["grad_top20"]]
    assert top == pytest.approx([value for *_, value in expected["grad_top20"]], abs=1e-12)


# x = beta_pi (S_w - S_l): loss and dL/dx, K = 2. Columns: DPO; EXO with eps = 1e-3; EXO as published.
PAIRS = {
    0.0: [(0.69315, -0.5), (2.76123, -1.72669), (4.30685, -2.5)],
    5.0: [(0.00672, -0.00669), (0.00705, -0.01268), (0.02675, -0.03324)],
    -5.0: [(5.00672, -0.99331), (6.82135, -0.07916), (9.89289, -0.09972)],
    -10.0: [(10.00005, -0.99995), (6.90694, -0.00077), (9.99905, -0.00091)],
}
KINDS = {"dpo": {"objective": "dpo"}, "exo": {}, "official": {"compat": "official"}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", PAIRS)
def test_pairs(x, kind):
    loss, slope = pair(x, **KINDS[kind])
    assert (round(loss, 5), round(slope, 5)) == PAIRS[x][list(KINDS).index(kind)]


def pair(x: float, **options) -> tuple[float, float]:
    """Return the loss and its slope dL/dx for a chosen and a rejected completion at x."""
    beta = 0.1
    policy = torch.tensor([-50.0 + x / beta, -50.0], dtype=torch.float64, requires_grad=True)
    loss = preference_loss(policy, torch.full((2,), -50.0, dtype=torch.float64), beta_pi=beta, **options)
    loss.backward()
    return loss.item(), policy.grad[0].item() / beta


@pytest.mark.parametrize("x", [-40.0, -3.0, 0.0, 0.5, 30.0])
def test_dpo_on_a_pair_is_minus_logsigmoid(x):
    loss, slope = pair(x, objective="dpo")
    expected = -torch.nn.functional.logsigmoid(torch.tensor(x, dtype=torch.float64))
    assert loss == pytest.approx(expected.item(), rel=1e-13)
    assert slope == pytest.approx(-1 / (1 + math.exp(x)), rel=1e-12)


@pytest.mark.parametrize("eps", [1e-3, 0.1, 0.5, 0.9])
def test_minimum_of_exo_on_a_pair(eps):
    """Check that EXO has its minimum 0 at logit(1 - eps) and increases beyond it, while DPO always decreases."""
    best = math.log((1 - eps) / eps)
    loss, slope = pair(best, label_smoothing=eps)
    assert abs(loss) < 1e-15 and abs(slope) < 1e-15
    for x in (best - 2, best + 2):
        loss, slope = pair(x, label_smoothing=eps)
        p = 1 / (1 + math.exp(-x))
        assert loss > 0
        assert slope == pytest.approx(p * (1 - p) * (x - best), rel=1e-10)
        assert pair(x, objective="dpo")[1] < 0
    assert pair(12.0, compat="official")[1] > 0 > pair(8.0, compat="official")[1]  # its minimum is at 10


@pytest.mark.parametrize("k", [2, 3, 8])
def test_policy_equal_to_reference(impl, device, k):
    """Check the first loss of every run: log K for DPO, -log K - mean log q for EXO."""
    logps = torch.linspace(-90.0, -3.0, k, dtype=torch.float64)
    rewards = torch.linspace(-1.0, 2.0, k, dtype=torch.float64).square()
    log_q = torch.log_softmax(rewards / 0.4, 0)
    options = {"group_size": k, "rewards": rewards, "beta_r": 0.4}
    assert preference_loss(logps, logps, objective="dpo", **options).item() == pytest.approx(math.log(k))
    expected = -math.log(k) - log_q.mean().item()
    assert preference_loss(logps, logps, **options).item() == pytest.approx(expected)
    logits = torch.zeros(k, 1, 5, dtype=torch.float64, device=device)
    labels = torch.zeros(k, 1, dtype=torch.long, device=device)
    options["rewards"] = rewards.to(device)
    ref = torch.full((k,), -math.log(5), dtype=torch.float64, device=device)
    loss = exo_kernels.fused_exo_loss(logits, labels, ref, shift=False, impl=impl, **options)
    assert loss.item() == pytest.approx(expected)
    pref = -math.log(k) - (math.log(1 - 1e-3) + (k - 1) * math.log(1e-3 / (k - 1))) / k
    loss = exo_kernels.fused_exo_loss(logits, labels, ref, group_size=k, shift=False, impl=impl)
    assert loss.item() == pytest.approx(pref)
    if k == 2:
        assert round(loss.item(), 5) == 2.76123


@pytest.mark.parametrize("objective", ["exo", "dpo"])
def test_zero_log_zero_is_zero(objective):
    """Check that a log-prob of -inf gives p = 0, and that equal distributions have a divergence of exactly 0."""
    ref = torch.zeros(3, dtype=torch.float64)
    policy = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 1.0, -1e6], dtype=torch.float64)
    loss = preference_loss(policy, ref, objective=objective, group_size=3, rewards=rewards)
    loss.backward()
    expected = 0.0 if objective == "exo" else math.log(2)
    assert loss.item() == pytest.approx(expected, abs=1e-15)
    assert policy.grad.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-16)


@pytest.mark.parametrize("k", [2, 5])
def test_divergence_from_itself_is_zero(k):
    rewards = torch.randn(k, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    loss = preference_loss(rewards * 10, torch.zeros(k, dtype=torch.float64), rewards=rewards, group_size=k)
    assert abs(loss.item()) < 1e-15


def test_label_smoothing_is_shared_by_the_others():
    """Check that q is 1 - eps for the chosen completion and eps / (K - 1) for the others, and 1 in a group of one."""
    _, stats = exo_kernels.fused_exo_loss(
        torch.zeros(5, 1, 3, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.long), torch.zeros(5),
        group_size=torch.tensor([4, 1]), label_smoothing=0.3, shift=False, return_stats=True,
    )  # fmt: skip
    assert stats.q.tolist() == pytest.approx([0.7, 0.1, 0.1, 0.1, 1.0])
