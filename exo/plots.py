"""Pictures of a run, as PNG. Colours are told apart by colour-blind readers; every axis has its unit."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none is looked for
import matplotlib.pyplot as plt  # noqa: E402

from exo import artifacts  # noqa: E402

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"
CURVES = (
    ("loss", "loss (nats)"),
    ("rewards/accuracies", "accuracy of the implicit reward"),
    ("accuracy", "accuracy"),
    ("rewards/margins", "margin of the implicit reward"),
    ("grad_norm", "gradient norm before clipping"),
)


def training_curves(directory: Path) -> list[Path]:
    """Draw metrics.jsonl as plots/training.png."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval_loss" in line]
    drawn = [(name, label) for name, label in CURVES if any(name in line for line in train)]
    figure, axes = plt.subplots(1, len(drawn), figsize=(4.2 * len(drawn), 3.4), squeeze=False)
    for axis, (name, label) in zip(axes[0], drawn, strict=True):
        points = [(line["step"], line[name]) for line in train if name in line]
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, color=BLUE, alpha=0.35, linewidth=1)
        axis.plot(steps, smooth(values), color=BLUE, linewidth=2, label="training")
        evals = [(line["step"], line["eval_" + name]) for line in held_out if "eval_" + name in line]
        if evals:
            axis.plot(*zip(*evals, strict=True), color=ORANGE, marker="o", linewidth=1.5, label="held-out")
        axis.set(xlabel="optimizer step", title=label)
        tidy(axis)
    axes[0][0].legend(frameon=False)
    return [save(figure, directory / "plots" / "training.png")]


def smooth(values: Sequence[float]) -> list[float]:
    """Mean of a window that trails by a twentieth of the curve."""
    width = max(1, len(values) // 20)
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def tidy(axis: plt.Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: plt.Figure, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    figure.tight_layout()
    with artifacts.staged_file(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def quickstart(
    path: Path, rewards: dict[str, list[list[float]]], results: dict[str, Any], loss: str, aligned: Path
) -> Path:
    """Rewards of held-out samples before and after, beside the accuracy while training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), width_ratios=(1.5, 1))
    for name, colour in (("before", GREY), ("after", BLUE)):
        values = [x for group in rewards[name] for x in group]
        mean, error = results[f"reward_{name}"]["mean"], results[f"reward_{name}"]["standard_error"]
        label = f"{name} {loss.upper()}: mean {mean:+.2f} $\\pm$ {error:.2f}"
        bins = [-6.25 + 0.5 * i for i in range(26)]
        left.hist(values, bins=bins, color=colour, alpha=0.55, label=label)
        left.axvline(mean, color=colour, linewidth=2)
    kl = results["kl_to_reference"]["mean"]
    left.set(
        xlabel="oracle reward of a held-out sample (log-odds of praise)",
        ylabel="samples",
        title=f"Sentiment before and after alignment, KL {kl:.1f} nats",
    )
    left.set_ylim(top=1.3 * left.get_ylim()[1])
    left.legend(loc="upper left", framealpha=0.9, edgecolor="none")
    lines = [json.loads(line) for line in (aligned / "metrics.jsonl").read_text().splitlines()]
    points = [(line["step"], line["rewards/accuracies"]) for line in lines if "rewards/accuracies" in line]
    steps, accuracies = zip(*points, strict=True)
    right.plot(steps, accuracies, color=BLUE, alpha=0.35, linewidth=1)
    right.plot(steps, smooth(accuracies), color=BLUE, linewidth=2)
    right.set(xlabel="optimizer step", title="Training pairs ranked as the oracle does")
    for axis in (left, right):
        tidy(axis)
    return save(figure, path)
