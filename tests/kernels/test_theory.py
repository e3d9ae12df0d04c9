"""The theorems of arXiv 2402.00856, section 3, on M completions, with the losses of this package in fp64.

examples/worlds.py draws groups and differentiates `preference_loss`; the fused losses and the losses from hidden states
are compared with that. The last tests compare with formulas of other implementations, written from their definitions.
"""

import math
from functools import cache

import pytest
import torch

from examples import worlds
from exo_kernels import fused_dpo_loss, fused_exo_loss, fused_linear_dpo_loss, fused_linear_exo_loss, preference_loss

SPLITS = [(1.0, 0.25), (0.5, 0.5), (0.25, 1.0), (0.1, 0.1)]  # (beta_pi, beta_r): three with the same product, one other
ALL_SPLITS = [*SPLITS, (2.0, 0.7)]
objectives = pytest.mark.parametrize("objective", worlds.OBJECTIVES)
splits = pytest.mark.parametrize(("beta_pi", "beta_r"), ALL_SPLITS)
pytestmark = pytest.mark.usefixtures("one_thread")


def case(seed: int = 0, **sizes) -> tuple[worlds.World, worlds.Family, torch.Tensor]:
    return worlds.random_case(torch.Generator().manual_seed(seed), **sizes)


def every_policy(world: worlds.World) -> worlds.Family:
    return worlds.Family(torch.eye(world.counts.numel(), dtype=torch.float64), world.log_ref)


def pi_hat_kl(world: worlds.World, one: torch.Tensor, other: torch.Tensor, beta_pi: float) -> torch.Tensor:
    """Return the KL between pi_hat of two policies, because pi* may be nearly one-hot and hide differences."""
    return worlds.kl(worlds.blend(world, one, beta_pi), worlds.blend(world, other, beta_pi))


# Theorem 3.1: the optimum.


@splits
def test_the_maximiser_of_the_alignment_objective(beta_pi, beta_r):
    """Check that J is largest at pi*, proportional to pi_ref exp(r / (beta_pi beta_r)), and that L-BFGS finds it."""
    world, _, _ = case(size=8)
    family, best = every_policy(world), worlds.optimum(world, beta_pi * beta_r)

    def height(log_pi: torch.Tensor) -> torch.Tensor:
        return worlds.alignment_objective(world, log_pi, beta_pi, beta_r)

    slope = worlds.gradient(lambda theta: height(best + family.features @ theta), torch.zeros(8, dtype=torch.float64))
    assert slope.abs().max() < 1e-13
    generator = torch.Generator().manual_seed(1)
    for scale in (0.01, 0.1, 1.0):
        other = torch.log_softmax(best + scale * torch.randn(8, dtype=torch.float64, generator=generator), 0)
        assert height(other) < height(best)
    reached = family(worlds.minimise(lambda theta: -height(family(theta)), torch.zeros(8, dtype=torch.float64)))
    assert pi_hat_kl(world, reached, best, beta_pi) < 1e-6
    assert pi_hat_kl(world, reached, worlds.optimum(world, 1.5 * beta_pi * beta_r), beta_pi) > 1e-3


@splits
def test_the_alignment_objective_is_a_reverse_kl(beta_pi, beta_r):
    """Check Eq. 11: J = -beta_r KL(pi_hat || pi*) + beta_r log Z."""
    world, family, theta = case()
    constant = beta_r * torch.logsumexp(world.log_ref + world.rewards / beta_r, 0)
    for policy in (family(theta), family(-theta), world.log_ref):
        gap = worlds.alignment_objective(world, policy, beta_pi, beta_r) - constant
        assert gap.item() == pytest.approx(-beta_r * worlds.divergence("exo", world, policy, beta_pi, beta_r).item())


@objectives
@splits
def test_optimum_is_that_of_both_losses_for_every_k(objective, beta_pi, beta_r):
    """Check that no group has a gradient at the optimum, where p = q, so that a small K has no bias."""
    world, _, _ = case(size=8)
    best = worlds.optimum(world, beta_pi * beta_r)
    generator = torch.Generator().manual_seed(2)
    samples = [worlds.draw(world, 1, k, generator) for k in (2, 3, 8) for _ in range(8)]
    for groups in (worlds.everything(world), *samples):
        slope = worlds.gradient(lambda lp, g=groups: worlds.loss(world, lp, g, objective, beta_pi, beta_r), best)
        assert slope.abs().max() < 1e-13
    family = every_policy(world)
    reached = worlds.minimise(
        lambda theta: worlds.loss(world, family(theta), worlds.everything(world), objective, beta_pi, beta_r),
        torch.zeros(8, dtype=torch.float64),
    )
    assert pi_hat_kl(world, family(reached), best, beta_pi) < 1e-6


# Theorems 3.2 and 3.3: the direction of the gradient.


@objectives
@splits
@pytest.mark.parametrize("seed", range(3))
def test_without_sampling_the_gradient_is_that_of_the_divergence(objective, beta_pi, beta_r, seed):
    """Check direction and length of the gradient for one group that has every completion as often as in pi_ref."""
    world, family, theta = case(seed)

    def value(t: torch.Tensor) -> torch.Tensor:
        return worlds.loss(world, family(t), worlds.everything(world), objective, beta_pi, beta_r)

    exact = worlds.exact_gradient(objective, world, family, theta, beta_pi, beta_r)
    assert torch.allclose(worlds.gradient(value, theta), exact, rtol=1e-11, atol=1e-14)
    if objective == "exo":
        kl = worlds.divergence("exo", world, family(theta), beta_pi, beta_r)
        assert value(theta).item() == pytest.approx(kl.item(), rel=1e-12)


@cache
def directions(objective: str, k: int, beta_pi: float, beta_r: float) -> list[worlds.Direction]:
    return [worlds.direction(objective, k, beta_pi, beta_r, seed) for seed in range(4)]


@objectives
@pytest.mark.parametrize(("beta_pi", "beta_r"), SPLITS)
def test_mean_gradient_approaches_that_of_the_divergence(objective, beta_pi, beta_r):
    """Check that angle and length approach those of the exact gradient as K grows.

    For small betas, the length is near 1 - 1/K of the exact one.
    """
    few, some, many = (directions(objective, k, beta_pi, beta_r) for k in (2, 32, 1024))
    assert sum(1 - each.own for each in few) > 30 * sum(1 - each.own for each in some)  # measured 86 to 700
    assert max(1 - each.own for each in many) < 3e-4  # measured 8e-5, most of it the noise of 65,536 draws
    assert max(abs(each.length - 1) for each in many) < 0.03  # measured 0.012
    assert max(each.length for each in few) < 0.7  # measured 0.04 to 0.53


@objectives
@pytest.mark.parametrize(("beta_pi", "beta_r"), SPLITS)
def test_mean_gradient_does_not_approach_the_other_divergence(objective, beta_pi, beta_r):
    at = directions(objective, 1024, beta_pi, beta_r)
    assert min(each.other for each in at) < 0.8  # measured 0.13 to 0.72
    assert all(1 - each.other > 40 * (1 - each.own) for each in at)  # measured 120 to 8,400


@objectives
def test_fused_losses_have_the_same_gradient(objective):
    """Check the losses from logits and from hidden states, on the M = 9 completions of two tokens out of three.

    theta[v, c] is the logit of token v in context c: 0 at the start, then 1 + the first token.
    """
    world, _, _ = case(3, size=9)
    theta = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn = worlds.draw(world, 8, 4, torch.Generator().manual_seed(0))
    labels = torch.stack((drawn.flatten() // 3, drawn.flatten() % 3), -1)  # (N, 2)
    contexts = torch.stack((torch.zeros(len(labels), dtype=torch.long), 1 + labels[:, 0]), -1)  # (N, 2)

    def log_pi(t: torch.Tensor) -> torch.Tensor:
        log_probs = torch.log_softmax(t, dim=0)
        return (log_probs[:, 0, None] + log_probs[:, 1:].T).flatten()

    expected = worlds.gradient(lambda t: worlds.loss(world, log_pi(t), drawn, objective, 0.5, 0.3), theta)
    options = {
        "group_size": 4,
        "rewards": world.rewards[drawn.flatten()],
        "beta_pi": 0.5,
        "beta_r": 0.3,
        "shift": False,
    }
    inputs = (labels, world.log_ref[drawn].flatten())
    fused = {"exo": fused_exo_loss, "dpo": fused_dpo_loss}[objective]
    linear = {"exo": fused_linear_exo_loss, "dpo": fused_linear_dpo_loss}[objective]
    hidden = torch.nn.functional.one_hot(contexts, 4).double()
    for value in (lambda t: fused(t.T[contexts], *inputs, **options), lambda t: linear(hidden, t, *inputs, **options)):
        assert torch.allclose(worlds.gradient(value, theta), expected, rtol=1e-11, atol=1e-14)


# Figure 1: the two divergences with a family that does not contain the optimum.


def test_exo_seeks_a_mode_and_dpo_covers_both():
    world, grid = worlds.two_modes()
    target = worlds.optimum(world, 1.0)
    exo, dpo = (worlds.bell(grid, worlds.fit(objective)) for objective in worlds.OBJECTIVES)
    valley = worlds.masses(grid, target)[1]
    assert worlds.masses(grid, exo)[0] > 0.95 and worlds.masses(grid, exo)[1] < 1.1 * valley
    assert worlds.masses(grid, dpo)[1] > 10 * valley and min(worlds.masses(grid, dpo)) > 0.15
    assert worlds.kl(exo, target) < 0.3 < 1.2 < worlds.kl(dpo, target)
    assert worlds.kl(target, dpo) < 0.56 < 4.9 < worlds.kl(target, exo)


def test_exo_seeks_a_mode_from_k_8_but_not_at_2():
    """Check that at K = 2, where the two divergences are nearly equal, EXO covers both modes, as DPO does."""
    _, grid = worlds.two_modes()
    few, many = (worlds.masses(grid, worlds.bell(grid, worlds.fit("exo", k))) for k in (2, 8))
    assert min(few) > 0.2
    assert many[0] > 0.95 and many[2] < 1e-4


def test_exo_has_a_local_minimum_at_the_minor_mode_and_dpo_has_not():
    world, grid = worlds.two_modes()
    start = torch.tensor([2.0, -0.5], dtype=torch.float64)
    ends = []
    for objective in worlds.OBJECTIVES:
        theta = worlds.minimise(
            lambda t, objective=objective: worlds.loss(
                world, worlds.bell(grid, t), worlds.everything(world), objective, 1.0, 1.0
            ),
            start,
        )
        ends.append((theta - worlds.fit(objective)).abs().max())
    assert ends[0] > 3 and ends[1] < 1e-4


# Formulas of other implementations, on pairs; `delta` is beta_pi (S_w - S_l).


def trl_exo_pair(delta: torch.Tensor, eps: float) -> torch.Tensor:
    """Return TRL's loss_type="exo_pair" by its definition: the reverse KL of two Bernoulli distributions."""
    chosen, rejected = torch.sigmoid(delta), torch.sigmoid(-delta)
    log_chosen, log_rejected = torch.nn.functional.logsigmoid(delta), torch.nn.functional.logsigmoid(-delta)
    return (chosen * (log_chosen - math.log1p(-eps)) + rejected * (log_rejected - math.log(eps))).mean()


def published_pair(delta: torch.Tensor, objective: str) -> torch.Tensor:
    """Return the published code's loss on pairs; the target of EXO is not normalised: its logarithms are 0 and -10."""
    log_p = torch.log_softmax(torch.stack((delta, torch.zeros_like(delta)), -1), -1)
    if objective == "dpo":
        return -log_p[:, 0].mean()
    return (log_p.exp() * (log_p - torch.tensor([0.0, -10.0]))).sum(-1).mean()


def assert_same_on_pairs(formula, tolerance: float, dtype=torch.float64, **options) -> None:
    """Compare the loss and its gradient with a formula, on 64 random pairs."""
    generator = torch.Generator().manual_seed(5)
    policy, ref = (-60 + 8 * torch.randn(128, dtype=torch.float64, generator=generator) for _ in range(2))
    results = []
    for value, kind in (
        (lambda x: preference_loss(x, ref.to(dtype), **options), dtype),
        (lambda x: formula(options["beta_pi"] * (x - ref).view(-1, 2).diff(dim=-1).neg().flatten()), torch.float64),
    ):
        logps = policy.to(dtype).to(kind).requires_grad_()
        loss = value(logps)
        results.append((loss.detach().double(), torch.autograd.grad(loss, logps)[0].double()))
    (loss, slope), (expected, expected_slope) = results
    assert expected_slope.abs().max() > 1e-5
    assert torch.allclose(loss, expected, rtol=tolerance, atol=tolerance)
    assert torch.allclose(slope, expected_slope, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("eps", [1e-3, 0.1, 0.5])
@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5, 2.0])
def test_exo_on_pairs_equals_trl(beta, eps):
    assert_same_on_pairs(lambda delta: trl_exo_pair(delta, eps), 1e-11, beta_pi=beta, label_smoothing=eps)


@objectives
@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_compat_official_on_pairs_is_the_published_loss(beta, objective):
    options = {"objective": objective, "beta_pi": beta, "compat": "official"}
    assert_same_on_pairs(lambda delta: published_pair(delta, objective), 1e-11, **options)
