"""Figures and numbers for the theorems of arXiv 2402.00856: python examples/theory.py --output_dir runs/theory

About a minute on one core. Draws theory.png and prints what docs/paper.md reports. tests/kernels/test_theory.py
checks the same code against bounds.
"""

import argparse
from pathlib import Path

import torch
import worlds
from matplotlib import pyplot as plt

from exo.runs.atomic import atomic_file
from exo.runs.plots import BLUE, GREY, ORANGE

GREEN, PURPLE = "#009e73", "#cc79a7"
SPLITS = {(1.0, 0.25): BLUE, (0.5, 0.5): ORANGE, (0.25, 1.0): GREEN, (0.1, 0.1): PURPLE}
SIZES = [2**i for i in range(1, 11)]
CASES = 20
TITLES = {
    "exo": "Theorem 3.2: EXO-rw and KL($\\hat\\pi$ || $\\pi^*$)",
    "dpo": "Theorem 3.3: DPO-rw and KL($\\pi^*$ || $\\hat\\pi$)",
}
Sweep = dict[tuple[str, tuple[float, float]], list[list[worlds.Direction]]]  # one list of cases for each K


def sweep() -> Sweep:
    return {
        (objective, split): [[worlds.direction(objective, k, *split, seed) for seed in range(CASES)] for k in SIZES]
        for objective in worlds.OBJECTIVES
        for split in SPLITS
    }


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Least, median, most."""
    ordered = torch.tensor(values, dtype=torch.float64).sort().values
    return ordered[0].item(), ordered.quantile(0.5).item(), ordered[-1].item()


def print_directions(swept: Sweep) -> None:
    print(f"cosine of the mean gradient to the exact one: median (least) of {CASES} random cases; length: median")
    for (objective, split), by_size in swept.items():
        print(f"\n{objective}-rw, beta_pi {split[0]}, beta_r {split[1]}")
        print(f"{'K':>5} {'own divergence':>18} {'the other one':>18} {'length':>8}")
        for k, cases in zip(SIZES, by_size, strict=True):
            own, other, length = (quantiles([getattr(c, name) for c in cases]) for name in worlds.Direction._fields)
            print(f"{k:>5} {own[1]:>8.4f} ({own[0]:+.4f}) {other[1]:>8.4f} ({other[0]:+.4f}) {length[1]:>8.3f}")


def print_fits(fits: dict[str, torch.Tensor]) -> None:
    world, grid = worlds.two_modes()
    target = worlds.optimum(world, 1.0)
    print("\na bell fitted to two modes: its mean and width, its mass in three places, nats")
    print(f"{'':>12} {'mean':>7} {'width':>6} {'major':>7} {'valley':>7} {'minor':>7} {'KL(.||*)':>9} {'KL(*||.)':>9}")
    print(f"{'pi*':>12} {'':>14} " + " ".join(f"{mass:>7.4f}" for mass in worlds.masses(grid, target)))
    for name, theta in fits.items():
        log_pi = worlds.bell(grid, theta)
        places = " ".join(f"{mass:>7.4f}" for mass in worlds.masses(grid, log_pi))
        both = f"{worlds.kl(log_pi, target):>9.3f} {worlds.kl(target, log_pi):>9.3f}"
        print(f"{name:>12} {theta[0]:>7.3f} {theta[1].exp():>6.3f} {places} {both}")


def draw_directions(axis: plt.Axes, swept: Sweep, objective: str) -> None:
    for split, colour in SPLITS.items():
        least, median, _ = zip(
            *(quantiles([case.own for case in cases]) for cases in swept[objective, split]), strict=True
        )
        axis.plot(SIZES, least, color=colour, linewidth=1.2, linestyle=":")
        axis.plot(SIZES, median, color=colour, marker="o", markersize=3.5, label=f"{split[0]:g}, {split[1]:g}")
    other = [quantiles([case.other for case in cases])[1] for cases in swept[objective, (1.0, 0.25)]]
    axis.plot(SIZES, other, color=GREY, linestyle="--", label="1, 0.25: the other KL")
    axis.set_xscale("log", base=2)
    axis.set(
        title=TITLES[objective],
        xlabel="K, completions a group",
        ylabel=f"cosine: median, dotted the least of {CASES}",
        ylim=(-0.65, 1.05),
    )
    axis.set_xticks(SIZES, [str(k) for k in SIZES])
    axis.legend(frameon=False, title="$\\beta_\\pi$, $\\beta_r$", loc="lower right")


def draw_fits(axis: plt.Axes, fits: dict[str, torch.Tensor]) -> None:
    world, grid = worlds.two_modes()
    step = (grid[1] - grid[0]).item()
    target = worlds.optimum(world, 1.0).exp() / step
    axis.fill_between(grid, target, color=GREY, alpha=0.3, linewidth=0, label="target $\\pi^*$")
    for objective, colour in (("exo", BLUE), ("dpo", ORANGE)):
        for suffix, style, k in (("", "-", "$\\infty$"), (" K=2", ":", "2")):
            density = worlds.bell(grid, fits[objective + suffix]).exp() / step
            axis.plot(grid, density, color=colour, linestyle=style, label=f"{objective.upper()}, K = {k}")
    axis.set(title="Figure 1: one bell for two modes", xlabel="y", ylabel="probability density (per unit of y)")
    axis.legend(frameon=False)


def draw_valley(axis: plt.Axes, fits: dict[str, torch.Tensor]) -> None:
    world, grid = worlds.two_modes()
    for objective, colour in (("exo", BLUE), ("dpo", ORANGE)):
        points = [worlds.masses(grid, worlds.bell(grid, fits[f"{objective} K={k}"]))[1] for k in SIZES]
        axis.plot(SIZES, points, color=colour, marker="o", markersize=3.5, label=objective.upper())
        limit = worlds.masses(grid, worlds.bell(grid, fits[objective]))[1]
        axis.axhline(limit, color=colour, linestyle=":", linewidth=1.2, label=f"{objective.upper()}, K = $\\infty$")
    level = worlds.masses(grid, worlds.optimum(world, 1.0))[1]
    axis.axhline(level, color=GREY, linestyle="--", linewidth=1.2, label="target $\\pi^*$")
    axis.set_xscale("log", base=2)
    axis.set_xticks(SIZES, [str(k) for k in SIZES])
    axis.set(
        title="Mass in the valley between the modes",
        xlabel="K, completions a group",
        ylabel="probability of the valley",
    )
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/theory", help="where theory.png goes (default: %(default)s)")
    directory = Path(parser.parse_args().output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the tensors are small
    swept = sweep()
    fits = {objective: worlds.fit(objective) for objective in worlds.OBJECTIVES}
    fits |= {f"{objective} K={k}": worlds.fit(objective, k) for k in SIZES for objective in worlds.OBJECTIVES}
    print_directions(swept)
    print_fits(fits)
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.6))
    for axis, objective in zip(axes[0], worlds.OBJECTIVES, strict=True):
        draw_directions(axis, swept, objective)
    draw_fits(axes[1][0], fits)
    draw_valley(axes[1][1], fits)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with atomic_file(directory / "theory.png") as temporary:
        figure.savefig(temporary, dpi=110)
    print(f"\n{directory / 'theory.png'}")


if __name__ == "__main__":
    main()
