"""Plot a run as PNG, in colours that colour-blind readers can distinguish; every axis has its unit."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # needs no display
import matplotlib.pyplot as plt  # noqa: E402

from exo.runs.atomic import atomic_file  # noqa: E402

TRAINING = Path("plots/training.png")  # in the directory of a run
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"
CURVES = (
    ("loss", "loss (nats)"),
    ("rewards/accuracies", "accuracy of the implicit reward"),
    ("accuracy", "accuracy"),
    ("rewards/margins", "margin of the implicit reward"),
    ("grad_norm", "gradient norm before clipping"),
)


def training_curves(directory: Path) -> None:
    """Draw metrics.jsonl as TRAINING."""
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
    save(figure, directory / TRAINING)


def smooth(values: Sequence[float]) -> list[float]:
    """Return the trailing mean over a twentieth of the curve."""
    width = max(1, len(values) // 20)
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def tidy(axis: plt.Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: plt.Figure, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    figure.tight_layout()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path
