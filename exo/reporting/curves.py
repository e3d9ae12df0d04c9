"""Draw reward against KL, reward and KL against the step, and the sweeps.

Each function writes its pictures to a directory and returns the values of its section, or None if the run has none.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

from exo.reporting import figures
from exo.reporting.results import Results, Setting
from exo.reporting.statistics import Estimate, envelope, interpolate, mean_over_seeds


def frontier(results: Results, directory: Path) -> dict[str, Any] | None:
    if not results.evaluated:
        return None
    ylabel = "reward, mean over held-out samples"
    reward = figures.frontier(results, lambda c: c.reward, ylabel, directory / "frontier.png")
    accuracy = figures.frontier(results, lambda c: c.accuracy, "accuracy", directory / "accuracy.png")
    by_size = {}
    for method in dict.fromkeys(trial.method for trial in results.evaluated if trial.k):
        series = list(dict.fromkeys(trial.series for trial in results.evaluated if trial.method == method))
        if len(series) > 1:
            path = directory / f"frontier-{method}.png"
            by_size[method] = figures.frontier(results, lambda c: c.reward, ylabel, path, series)
    return {
        "at_equal_kl": _at_equal_kl(results),
        "reward": reward,
        "accuracy": accuracy,
        "by_size": by_size,
        "is_truncated": any((trial.evaluation["top_p"] or 1) < 1 for trial in results.evaluated),
    }


def _at_equal_kl(results: Results) -> dict[str, Any] | None:
    """Return the height of each method's envelope at the largest KL that all methods reach."""
    points: dict[str, list[tuple[float, float]]] = {}
    for trial in results.evaluated:
        for checkpoint in trial.checkpoints:
            if checkpoint.kl:
                points.setdefault(trial.method, []).append((checkpoint.kl.mean, checkpoint.reward.mean))
    if not points:
        return None
    common = min(max(kl for kl, _ in measured) for measured in points.values())
    heights = {method: interpolate(envelope(measured), common) for method, measured in points.items()}
    reached = [(height, method) for method, height in heights.items() if height is not None]
    return {
        "kl": common,
        "rewards": [f"{height:+.2f} ({method})" for height, method in sorted(reached, reverse=True)],
        "without": [method for method, height in heights.items() if height is None],
    }


def progress(results: Results, directory: Path) -> dict[str, Any] | None:
    lines = by_step(results, "reward")
    if not lines:
        return None
    declined = []
    for series, (_, points) in lines.items():
        step, highest, _ = max(points, key=lambda point: point[1])
        if highest > points[-1][1]:
            declined.append(f"{series} (from {highest:+.2f} at step {step} to {points[-1][1]:+.2f})")
    kl_label = "KL to the reference (nats)"
    return {
        "declined": declined,
        "reward": figures.against_step(lines, "reward", directory / "reward-steps.png", band=True),
        "kl": figures.against_step(by_step(results, "kl"), kl_label, directory / "kl-steps.png"),
    }


def by_step(results: Results, metric: str) -> figures.Lines:
    """Return a metric against the step for the best setting of each method, if it has several points.

    A point is (step, mean over seeds, spread over a prompt's samples) of a checkpoint that all seeds have. The first
    point is SFT.
    """
    lines = {}
    for setting in results.best_per_method:
        points = []
        for i, first in enumerate(setting.first.checkpoints):
            checkpoints = [trial.checkpoints[i] for trial in setting.trials if i < len(trial.checkpoints)]
            estimate = mean_over_seeds([getattr(checkpoint, metric) for checkpoint in checkpoints])
            if first.step is not None and estimate and len(checkpoints) == len(setting.trials):
                points.append((first.step, estimate.mean, fmean(checkpoint.spread for checkpoint in checkpoints)))
        sft = setting.start.last
        if points and (value := getattr(sft, metric)):
            points.insert(0, (0, value.mean, sft.spread))
        if len(points) > 1:
            lines[setting.first.series] = setting.first.method, points
    return lines


def sweeps(results: Results, directory: Path) -> list[dict[str, Any]]:
    """Return the picture and the best value of each method for each swept option."""
    sweeps = []
    for option in results.varied:
        rows = {best.first.method: _along(results, best, option) for best in results.best_per_method}
        rows = {method: points for method, points in rows.items() if len(points) > 1}
        if rows:
            path = figures.sweep(rows, option, directory / f"sweep-{option}.png")
            best = {method: max(points, key=lambda point: point[1].mean)[0] for method, points in rows.items()}
            texts = [f"{method} at {value:g}" for method, value in best.items()]
            sweeps.append({"option": option, "picture": path, "best": texts})
    return sweeps


def _along(results: Results, best: Setting, option: str) -> list[tuple[float, Estimate]]:
    """Return (value, win rate over the reference) of the settings that differ from the best only in the option."""
    points = []
    for setting in results.settings:
        options, rate = setting.first.options, setting.win_rate("reference")
        others_equal = options | {option: None} == best.first.options | {option: None}
        if setting.first.method == best.first.method and others_equal and rate and options.get(option) is not None:
            points.append((options[option], rate))
    return sorted(points)
