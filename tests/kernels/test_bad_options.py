"""Bad options raise a ValueError with one line: the argument, what was expected, what was given."""

import pytest
import torch
from refusals import ALL_LOSSES, INF, LOSSES, NAN, ON_LOGITS, N, assert_refused, good, named

from exo_kernels import fused_dpo_loss, fused_exo_loss, preference_loss, sequence_logps, token_logps
from exo_kernels.validation import describe

HUGE = 10**400  # fits neither a float nor an int64
POSITIVE = [HUGE, 10**5000, 1e39, 1e-39, 1e300, 0.0, -1.0, 0, NAN, INF, -INF, "0.1", None, True, torch.tensor(0.1), 1j]


@pytest.mark.parametrize("bad", POSITIVE, ids=describe)
@pytest.mark.parametrize("name", ["beta_pi", "beta_r"])
@pytest.mark.parametrize("function", ALL_LOSSES, **named)
def test_betas(function, name, bad):
    """Check the betas, also beta_r if it is not used: a wrong number is a mistake."""
    assert_refused(name, function, **{name: bad})


@pytest.mark.parametrize("bad", POSITIVE, ids=describe)
@pytest.mark.parametrize("function", ON_LOGITS, **named)
def test_temperature(function, bad):
    assert_refused("temperature", function, temperature=bad)


@pytest.mark.parametrize("bad", [-0.1, 1.0, 1.5, NAN, INF, "0", True, torch.tensor(0.1), HUGE], ids=describe)
@pytest.mark.parametrize("function", ALL_LOSSES, **named)
def test_label_smoothing(function, bad):
    assert_refused("label_smoothing", function, label_smoothing=bad)


@pytest.mark.parametrize("zero", [0, 0.0, -0.0], ids=repr)
def test_label_smoothing_of_zero(zero):
    """Check that 0 is refused for EXO, whose reverse KL would be infinite, and allowed for DPO and with rewards."""
    assert "EXO" in assert_refused("label_smoothing", fused_exo_loss, label_smoothing=zero)
    assert_refused("label_smoothing", preference_loss, label_smoothing=zero)
    assert fused_dpo_loss(**good(fused_dpo_loss), label_smoothing=zero).isfinite()
    assert preference_loss(**good(preference_loss), label_smoothing=zero, objective="dpo").isfinite()
    assert fused_exo_loss(**good(fused_exo_loss), label_smoothing=zero, rewards=torch.zeros(N)).isfinite()
    assert fused_exo_loss(**good(fused_exo_loss), label_smoothing=zero, compat="official").isfinite()


CHOICES = {
    "impl": ["cuda", "Triton", "", None, 1],
    "reduction": ["average", "MEAN", None, True, torch.tensor(1)],
    "compat": ["trl", True, 0, ""],
    "shift": [1, 0, "True", torch.tensor(True)],
    "ignore_index": [None, -100.0, "x", True, torch.tensor(-100), 2**63, -(2**63) - 1, HUGE],
    "inplace_backward": [1, None, "no"],
    "return_stats": [1, None, "no"],
    "num_groups": [0, -1, 0.0, NAN, INF, "2", True, torch.tensor([2]), [2], HUGE, 1e-39, torch.tensor(True)],
}


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, bads in CHOICES.items() for bad in bads], ids=describe)
@pytest.mark.parametrize("function", LOSSES, **named)
def test_options_of_the_losses(function, name, bad):
    assert_refused(name, function, **{name: bad})


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("objective", "EXO"), ("objective", None), ("objective", "dpo "), ("reduction", "avg"), ("compat", "trl"),
        ("num_groups", 0), ("num_groups", torch.zeros(2)), ("label_smoothing", "0"),
    ],
    ids=repr,
)  # fmt: skip
def test_options_of_preference_loss(name, bad):
    assert_refused(name, preference_loss, **{name: bad})


@pytest.mark.parametrize("name", ["impl", "shift", "ignore_index"])
@pytest.mark.parametrize("function", [token_logps, sequence_logps], **named)
def test_options_of_log_probs(function, name):
    for bad in CHOICES[name]:
        assert_refused(name, function, **{name: bad})


@pytest.mark.parametrize("bad", [1, None, "yes"], ids=repr)
def test_return_entropy(bad):
    assert_refused("return_entropy", token_logps, return_entropy=bad)


@pytest.mark.parametrize("value", [0, -1.0, NAN, INF], ids=repr)
@pytest.mark.parametrize("function", ALL_LOSSES, **named)
def test_num_groups_as_a_tensor(function, value):
    """Check that the value of a CPU tensor is validated."""
    assert_refused("num_groups", function, num_groups=torch.tensor(value))


@pytest.mark.parametrize("function", ALL_LOSSES, **named)
def test_group_size_beyond_int64(function):
    assert_refused("group_size", function, group_size=HUGE)
    assert_refused("group_size", function, group_size=10**5000)


@pytest.mark.parametrize("function", ALL_LOSSES, **named)
def test_num_groups_needs_reduction_mean(function):
    for reduction in ("sum", "none"):
        assert_refused("num_groups", function, reduction=reduction, num_groups=2)


@pytest.mark.parametrize("function", ALL_LOSSES, **named)
def test_compat_is_for_pairs(function):
    for sizes in (1, 4, torch.tensor([2, 2])):
        assert_refused("group_size", function, compat="official", group_size=sizes)
    function(**good(function), compat="official", group_size=4, rewards=torch.zeros(N))  # compat has no effect here
