"""Autograd through the losses on logits: gradcheck, repeated and double backward, grad outputs, dtypes."""

import pytest
import torch
from cases import IGNORED, make_case, seeded
from torch.autograd import gradcheck

import exo_kernels
from exo_kernels import preference_loss

both = pytest.mark.parametrize("objective", ["exo", "dpo"])


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).mul(2).requires_grad_()


# Gradients, by finite differences. nondet_tol=0: the backward pass must give the same bits twice.


@pytest.mark.parametrize(("objective", "rewards"), [("exo", False), ("dpo", True)], ids=["exo", "dpo-rewards"])
def test_gradcheck_of_the_loss(impl, device, objective, rewards):
    case = make_case(3, 2, 3, torch.float64, objective=objective, rewards=rewards, group_size=3).on(device)
    function = getattr(exo_kernels, f"fused_{objective}_loss")
    x = random_logits(3, 2, 3).to(device).detach().requires_grad_()
    labels = torch.tensor([[0, 2], [0, IGNORED], [0, 1]], device=device)
    options = case.options | {"impl": impl, "beta_pi": 0.8, "temperature": 0.7}
    ref = case.ref_logps.masked_fill((labels[:, 1:] == IGNORED).all(-1), 0.0)  # 0 for a sequence without labels
    assert gradcheck(lambda x: function(x, labels, ref, **options), x, nondet_tol=0.0)


def test_gradcheck_of_ragged_losses(impl, device):
    """Check packed input with ragged groups and one gradient per group."""
    x = random_logits(5, 3).to(device).detach().requires_grad_()
    labels = torch.tensor([0, 2, 1, IGNORED, 1], device=device)
    options = {"group_size": torch.tensor([1, 2]), "cu_seqlens": torch.tensor([0, 1, 3, 5]), "reduction": "none"}
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    ref = torch.zeros(3, device=device)
    assert gradcheck(
        lambda x: exo_kernels.fused_exo_loss(x, labels, ref, impl=impl, beta_pi=1.0, **options), x, nondet_tol=0.0
    )


def test_gradcheck_of_log_probs_and_entropy(impl, device):
    """Check both outputs, alone and together: gradcheck also leaves either of them without a gradient."""
    x = random_logits(1, 3, 3).to(device).detach().requires_grad_()
    labels = torch.tensor([[0, IGNORED, 2]], device=device)
    options = {"impl": impl, "shift": False, "temperature": 1.3}
    assert gradcheck(lambda x: exo_kernels.token_logps(x, labels, return_entropy=True, **options), x, nondet_tol=0.0)
    assert gradcheck(lambda x: exo_kernels.sequence_logps(x, labels, **options), x, nondet_tol=0.0)


@both
def test_gradcheck_of_preference_loss(objective):
    policy = random_logits(5).detach().requires_grad_()
    options = {"objective": objective, "group_size": torch.tensor([1, 4]), "reduction": "none", "beta_pi": 0.6}
    assert gradcheck(lambda p: preference_loss(p, torch.zeros(5), **options), policy, nondet_tol=0.0)


# Backward passes.


def test_second_backward_is_exact(impl, device):
    """Check retain_graph with another grad_output: no saved tensor is scaled in place."""
    case = make_case(6, 3, 33, reduction="none").on(device)
    x = case.logits.clone().requires_grad_()
    losses = exo_kernels.fused_exo_loss(x, case.labels, case.ref_logps, impl=impl, reduction="none")
    logps, entropies = exo_kernels.token_logps(x, case.labels, impl=impl, return_entropy=True)
    for outputs in (losses, logps, entropies):
        weights = [torch.rand(outputs.shape, generator=seeded(i)).to(device) + 0.5 for i in range(2)]
        first, second, again = (
            torch.autograd.grad(outputs, x, w, retain_graph=True)[0] for w in (weights[0], weights[1], weights[0])
        )
        assert torch.equal(first, again) and not torch.equal(first, second)
        (doubled,) = torch.autograd.grad(outputs, x, 2 * weights[0], retain_graph=True)
        assert torch.equal(doubled, 2 * first)


def test_expanded_and_transposed_grad_outputs(impl, device):
    """Check gradients for a grad_output that is expanded (stride 0, as from a sum) or transposed."""
    case = make_case(6, 3, 33).on(device)
    x = case.logits.clone().requires_grad_()
    logps = exo_kernels.token_logps(x, case.labels, impl=impl)
    ones = torch.ones(6, 3, device=device)
    dense, expanded, summed = (
        torch.autograd.grad(outputs, x, g, retain_graph=True)[0]
        for outputs, g in ((logps, ones), (logps, ones[:1, :1].expand(6, 3)), (logps.sum(), None))
    )
    assert torch.equal(dense, expanded) and torch.equal(dense, summed)
    g = torch.rand(3, 6, generator=seeded(1)).to(device)
    transposed, dense = (torch.autograd.grad(logps, x, w, retain_graph=True)[0] for w in (g.t(), g.t().contiguous()))
    assert torch.equal(transposed, dense)
    losses = exo_kernels.fused_exo_loss(x, case.labels, case.ref_logps, reduction="none", impl=impl)
    each = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]
    (weighted,) = torch.autograd.grad(losses, x, torch.tensor([1.0, 0.0, -2.0], device=device), retain_graph=True)
    assert torch.equal(weighted[:2], each[0][:2]) and not weighted[2:4].any()
    assert torch.equal(weighted[4:], -2 * each[2][4:])


@pytest.mark.parametrize("what", ["loss", "logps", "sums", "preference"])
def test_double_backward_is_refused(impl, device, what):
    case = make_case(2, 3, 9, torch.float64).on(device)
    x = case.logits.clone().requires_grad_()
    if what == "preference":
        if device == "cpu" and impl == "triton":
            pytest.skip("preference_loss takes no impl")
        x = torch.randn(2, dtype=torch.float64, device=device).requires_grad_()
    result = {
        "loss": lambda: exo_kernels.fused_exo_loss(x, case.labels, case.ref_logps, impl=impl),
        "logps": lambda: exo_kernels.token_logps(x, case.labels, impl=impl).sum(),
        "sums": lambda: exo_kernels.sequence_logps(x, case.labels, impl=impl).sum(),
        "preference": lambda: preference_loss(x, torch.zeros(2, device=device)),
    }[what]()
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(result, x, create_graph=True)
        grad.pow(2).sum().backward()


def test_only_logits_get_gradients(impl, device):
    """Check that the reference's log-probs and the rewards are constants."""
    case = make_case(4, 3, 9, rewards=True).on(device)
    ref, rewards = case.ref_logps.requires_grad_(), case.options["rewards"].requires_grad_()
    assert not exo_kernels.fused_exo_loss(case.logits, case.labels, ref, rewards=rewards, impl=impl).requires_grad
    x = case.logits.clone().requires_grad_()
    exo_kernels.fused_exo_loss(x, case.labels, ref, rewards=rewards, impl=impl).backward()
    assert x.grad is not None and ref.grad is None and rewards.grad is None
    with torch.no_grad():
        assert not exo_kernels.token_logps(x, case.labels, impl=impl).requires_grad


def test_autocast_changes_nothing(impl, device):
    case = make_case(4, 3, 33).on(device)
    expected = exo_kernels.fused_exo_loss(case.logits, case.labels, case.ref_logps, impl=impl)
    with torch.autocast(device, dtype=torch.bfloat16):
        result = exo_kernels.fused_exo_loss(case.logits, case.labels, case.ref_logps, impl=impl)
    assert result.dtype == torch.float32 and torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_result_dtypes(impl, device, dtype):
    case = make_case(2, 3, 9, dtype).on(device)
    x = case.logits.requires_grad_()
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    loss, stats = exo_kernels.fused_exo_loss(x, case.labels, case.ref_logps, impl=impl, return_stats=True)
    logps, entropies = exo_kernels.token_logps(x, case.labels, impl=impl, return_entropy=True)
    sums = exo_kernels.sequence_logps(x, case.labels, impl=impl)
    assert {t.dtype for t in (loss, logps, entropies, sums, *stats[:-1])} == {expected}
    assert stats.tokens.dtype == torch.int64
    assert torch.autograd.grad(loss, x)[0].dtype == dtype
