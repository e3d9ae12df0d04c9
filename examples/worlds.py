"""A world so small that the paper's theorems can be checked by machine: M completions, and every expectation a sum.

One prompt. The reference gives completion y the probability counts[y] / sum(counts), so one group that holds y
counts[y] times is the reference itself: K without sampling. The losses are the product's own (`preference_loss`); what
they are held against is written here from its definition in arXiv 2402.00856, section 3. Everything is fp64 and
differentiable in log pi. Left out: tokens, several prompts (the theorems hold prompt by prompt), pictures.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exo_kernels import preference_loss

OBJECTIVES = ("exo", "dpo")


class World(NamedTuple):
    """M completions of one prompt."""

    counts: Tensor  # (M,) int64 >= 1, the reference's probabilities times their sum
    rewards: Tensor  # (M,) fp64

    @property
    def log_ref(self) -> Tensor:  # (M,)
        return self.counts.double().log() - self.counts.sum().double().log()


class Family(NamedTuple):
    """Policies pi_ref exp(features theta): all there are where features is square, few where it is tall."""

    features: Tensor  # (M, D)
    log_ref: Tensor  # (M,)

    def __call__(self, theta: Tensor) -> Tensor:  # (M,) log pi
        return torch.log_softmax(self.log_ref + self.features @ theta, dim=0)


def random_case(generator: torch.Generator, *, size: int = 12, width: int = 4) -> tuple[World, Family, Tensor]:
    """A world, a family that is too small for it, and a policy of that family that is far from any optimum."""
    counts = torch.randint(1, 17, (size,), generator=generator)
    rewards, features, theta = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((size,), (size, width), (width,))
    )
    world = World(counts, rewards)
    return world, Family(features, world.log_ref), theta


def optimum(world: World, beta: float) -> Tensor:  # (M,) log-probabilities
    """pi*_beta, in proportion to pi_ref exp(r / beta). Eq. 5; eq. 10 with beta = beta_pi beta_r."""
    return torch.log_softmax(world.log_ref + world.rewards / beta, dim=0)


def blend(world: World, log_pi: Tensor, beta_pi: float) -> Tensor:  # (M,) log-probabilities
    """pi_hat, in proportion to pi^beta_pi pi_ref^(1 - beta_pi). Eq. 9."""
    return torch.log_softmax(beta_pi * log_pi + (1 - beta_pi) * world.log_ref, dim=0)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:  # ()
    return (log_a.exp() * (log_a - log_b)).sum()


def alignment_objective(world: World, log_pi: Tensor, beta_pi: float, beta_r: float) -> Tensor:  # ()
    """J = E_pi_hat[r] - beta_r KL(pi_hat || pi_ref), which is to be large. Eq. 8."""
    log_hat = blend(world, log_pi, beta_pi)
    return (log_hat.exp() * world.rewards).sum() - beta_r * kl(log_hat, world.log_ref)


def divergence(objective: str, world: World, log_pi: Tensor, beta_pi: float, beta_r: float) -> Tensor:  # ()
    """What the loss becomes as K grows: reverse KL for "exo" (Theorem 3.2), forward KL for "dpo" (Theorem 3.3)."""
    log_hat, log_target = blend(world, log_pi, beta_pi), optimum(world, beta_r)
    return kl(log_hat, log_target) if objective == "exo" else kl(log_target, log_hat)


def everything(world: World) -> Tensor:  # (1, K), K = sum(counts)
    """One group whose members are distributed exactly as pi_ref."""
    return torch.repeat_interleave(torch.arange(world.counts.numel()), world.counts)[None]


def draw(world: World, groups: int, k: int, generator: torch.Generator) -> Tensor:  # (groups, K)
    """K independent completions a group, from pi_ref."""
    flat = torch.multinomial(world.counts.double(), groups * k, replacement=True, generator=generator)
    return flat.view(groups, k)


def loss(world: World, log_pi: Tensor, groups: Tensor, objective: Any, beta_pi: float, beta_r: float) -> Tensor:  # ()
    """The product's loss with rewards, EXO-rw (eq. 15) or DPO-rw (eq. 19): its mean over groups of completions."""
    drawn = groups.flatten()
    return preference_loss(
        log_pi[drawn], world.log_ref[drawn], objective=objective, group_size=groups.shape[1],
        rewards=world.rewards[drawn], beta_pi=beta_pi, beta_r=beta_r,
    )  # fmt: skip


def gradient(value: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:  # like theta
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(value(theta), theta)[0]


def exact_gradient(
    objective: str, world: World, family: Family, theta: Tensor, beta_pi: float, beta_r: float
) -> Tensor:
    """Of the divergence that belongs to the objective."""
    return gradient(lambda t: divergence(objective, world, family(t), beta_pi, beta_r), theta)


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


class Direction(NamedTuple):
    """The mean gradient of a loss over many groups, held against the gradients of both divergences."""

    own: float  # cosine to that of the divergence the theorem names
    other: float  # cosine to that of the other one
    length: float  # its norm over that of its own divergence


def direction(objective: str, k: int, beta_pi: float, beta_r: float, seed: int, *, draws: int = 2**16) -> Direction:
    """For the random case of this seed. `draws` completions whatever K, so that the noise hardly depends on K."""
    generator = torch.Generator().manual_seed(seed)
    world, family, theta = random_case(generator)
    groups = draw(world, draws // k, k, generator)
    seen = gradient(lambda t: loss(world, family(t), groups, objective, beta_pi, beta_r), theta)
    exact = {name: exact_gradient(name, world, family, theta, beta_pi, beta_r) for name in OBJECTIVES}
    own = exact.pop(objective)
    return Direction(cosine(seen, own), cosine(seen, *exact.values()), (seen.norm() / own.norm()).item())


def minimise(value: Callable[[Tensor], Tensor], theta: Tensor, *, iterations: int = 500) -> Tensor:
    """The parameters of the local minimum that L-BFGS reaches from theta."""
    theta = theta.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=iterations, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        current = value(theta)
        current.backward()
        return current

    optimizer.step(closure)
    if not theta.isfinite().all():
        raise ValueError(f"theta: expected finite parameters after L-BFGS; found {theta.tolist()}; start nearer")
    return theta.detach()


# Figure 1: a unimodal family, and a target with two modes, on a grid.

MODES, SHARES, MODE_WIDTH, REF_WIDTH = (-2.0, 2.0), (0.75, 0.25), 0.6, 3.0


def two_modes() -> tuple[World, Tensor]:
    """A world on a grid, and the grid (M,). With beta_r = 1 its pi* has a major mode, a valley and a minor mode."""
    grid = torch.linspace(-6.0, 6.0, 121, dtype=torch.float64)
    counts = torch.round(100 * torch.exp(-0.5 * (grid / REF_WIDTH) ** 2)).long().clamp(min=1)
    modes, shares = (torch.tensor(values, dtype=torch.float64) for values in (MODES, SHARES))
    target = (shares * torch.exp(-0.5 * ((grid[:, None] - modes) / MODE_WIDTH) ** 2)).sum(-1)
    log_ref = World(counts, torch.zeros_like(grid)).log_ref
    return World(counts, target.log() - log_ref), grid


def fit(objective: str, k: int | None = None, *, seed: int = 0, draws: int = 2**14) -> Tensor:  # (2,)
    """The bell that the loss finds from pi_ref's own width, both betas 1; K = None means pi_ref without sampling."""
    world, grid = two_modes()
    groups = everything(world) if k is None else draw(world, draws // k, k, torch.Generator().manual_seed(seed))
    start = torch.tensor([0.0, math.log(REF_WIDTH)], dtype=torch.float64)
    return minimise(lambda theta: loss(world, bell(grid, theta), groups, objective, 1.0, 1.0), start)


def bell(grid: Tensor, theta: Tensor) -> Tensor:  # (M,) log-probabilities
    """A Gaussian on the grid; theta holds its mean and the logarithm of its width."""
    return torch.log_softmax(-0.5 * ((grid - theta[0]) / theta[1].exp()) ** 2, dim=0)


def masses(grid: Tensor, log_pi: Tensor) -> tuple[float, float, float]:
    """Probability of the major mode, of the valley and of the minor mode; the valley begins two widths from a mode."""
    pi, (major, minor) = log_pi.exp(), MODES
    reach = 2 * MODE_WIDTH
    valley = (grid > major + reach) & (grid < minor - reach)
    return pi[grid <= major + reach].sum().item(), pi[valley].sum().item(), pi[grid >= minor - reach].sum().item()
