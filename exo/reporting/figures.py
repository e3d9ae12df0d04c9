"""Draw the pictures of a report, one panel per file, so that a page can place them side by side or in a column.

A method has the same colour, marker and dashes in all pictures, distinguishable for colour-blind readers and in grey
print. Each function draws one picture and returns its path.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exo.evaluation.density import DensityRatio
from exo.reporting.results import Checkpoint, Results
from exo.reporting.statistics import Estimate, envelope
from exo.runs import plots
from exo.runs.plots import plt


class Style(NamedTuple):
    color: str
    marker: str
    linestyle: Any


STYLES = {
    "exo-rw": Style(plots.BLUE, "o", "-"),
    "dpo-rw": Style(plots.ORANGE, "s", (0, (5, 2))),
    "exo-pref": Style("#56b4e9", "^", (0, (3, 1, 1, 1))),
    "dpo-pref": Style("#e69f00", "v", (0, (1, 1))),
    "ppo": Style("#009e73", "D", (0, (6, 2, 1, 2))),
    "bon": Style("#cc79a7", "*", "none"),
}
SIZES = ((0, (1, 1)), (0, (3, 1)), "-", (0, (6, 1, 1, 1)))  # dashes by K, the smallest first
Metric = Callable[[Checkpoint], Estimate]
Lines = Mapping[str, tuple[str, Sequence[tuple[int, float, float]]]]  # label -> method, (step, mean, spread)


def _panel(xlabel: str, ylabel: str) -> tuple[plt.Figure, plt.Axes]:
    figure, axis = plt.subplots(figsize=(5.2, 4.2))
    axis.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axis


def _finish(figure: plt.Figure, path: Path) -> Path:
    """Add a legend below the panel, and save the picture."""
    axis = figure.axes[0]
    plots.tidy(axis)
    labels = axis.get_legend_handles_labels()[1]
    if labels:
        columns = 2 if max(map(len, labels)) < 30 else 1
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False, fontsize=9)
    return plots.save(figure, path)


def frontier(results: Results, metric: Metric, ylabel: str, path: Path, series: Sequence[str] = ()) -> Path:
    """Draw a metric of every checkpoint against its KL, for each method, or for each of `series`.

    A thin line is a run, a thick line the upper envelope of a method or series.
    """
    figure, axis = _panel("KL to the reference (nats)", ylabel)
    groups = {name: [t for t in results.evaluated if t.series == name] for name in series}
    if not groups:
        methods = dict.fromkeys(trial.method for trial in results.evaluated)
        groups = {method: [t for t in results.evaluated if t.method == method] for method in methods}
    start = [results.start.last] if results.start else []
    for i, (name, trials) in enumerate(groups.items()):
        style = STYLES[trials[0].method]
        color = plt.get_cmap("viridis")(0.85 * i / max(1, len(groups) - 1)) if series else style.color
        dashes = SIZES[i % len(SIZES)] if series else style.linestyle
        look: dict[str, Any] = {"color": color, "marker": style.marker}
        for trial in trials:
            _points(axis, trial.checkpoints, metric, look, alpha=0.25)
            points = [(c.kl.mean, metric(c).mean) for c in [*start, *trial.checkpoints] if c.kl]
            if points:
                axis.plot(*zip(*points, strict=True), color=color, linewidth=0.7, alpha=0.25)
        checkpoints = [checkpoint for trial in trials for checkpoint in trial.checkpoints]
        upper = envelope([(c.kl.mean, metric(c).mean) for c in checkpoints if c.kl])
        if upper:
            on_envelope = [c for c in checkpoints if c.kl and (c.kl.mean, metric(c).mean) in upper]
            _points(axis, on_envelope, metric, look, alpha=1)
            axis.plot(*zip(*upper, strict=True), color=color, linestyle=dashes, linewidth=2, zorder=3)
            axis.plot([], [], **look, linestyle=dashes, linewidth=2, label=name)  # for the legend
        for j, checkpoint in enumerate(c for c in checkpoints if c.kl_bound is not None):
            label = f"{trials[0].series}: KL at most this" if not j else None
            _bound(axis, checkpoint.kl_bound or 0.0, metric(checkpoint), look, label)
    kls = [c.kl.mean for trial in results.evaluated for c in trial.checkpoints if c.kl]
    if kls and max(kls) > 10 * statistics.median(kls):  # a diverged run must not squeeze the others
        axis.set_xscale("symlog", linthresh=max(0.1, 2 * statistics.median(kls)))
        axis.set_xlabel("KL to the reference (nats, logarithmic to the right)")
    for sft in start:
        error = 1.96 * metric(sft).standard_error
        axis.errorbar(0, metric(sft).mean, error, fmt="X", color="black", capsize=2, label="SFT", zorder=4)
    return _finish(figure, path)


def _points(axis: plt.Axes, checkpoints: Sequence[Checkpoint], metric: Metric, look: Any, alpha: float) -> None:
    """Draw checkpoints with 95% intervals in both directions."""
    measured = [(c.kl, metric(c)) for c in checkpoints if c.kl]
    x, y = [kl.mean for kl, _ in measured], [value.mean for _, value in measured]
    xerr, yerr = _errors(kl for kl, _ in measured), _errors(value for _, value in measured)
    axis.errorbar(x, y, yerr, xerr, **look, linestyle="none", markersize=4.5, elinewidth=0.8, alpha=alpha)


def _bound(axis: plt.Axes, kl: float, value: Estimate, look: Any, label: str | None) -> None:
    """Draw a point whose KL is at most `kl`, with an arrow to the left."""
    arrow = {"arrowstyle": "<-", "color": plots.GREY}  # matplotlib points from the text to the point, so reversed
    axis.annotate("", (kl, value.mean), (-24, 0), textcoords="offset points", arrowprops=arrow)
    axis.errorbar(kl, value.mean, 1.96 * value.standard_error, **look, linestyle="none", markersize=10, label=label)


def _errors(values: Iterable[Estimate]) -> list[list[float]]:
    """Return the distances from the means to the lower and upper ends of the 95% intervals."""
    pairs = [(max(0.0, value.mean - value.low), max(0.0, value.high - value.mean)) for value in values]
    return [[low for low, _ in pairs], [high for _, high in pairs]]


def against_step(lines: Lines, ylabel: str, path: Path, *, band: bool = False) -> Path:
    """Draw a metric against the step, with a band of plus and minus the spread."""
    figure, axis = _panel("optimizer step", ylabel)
    for label, (method, points) in lines.items():
        style = STYLES[method]
        steps, means, spreads = zip(*points, strict=True)
        axis.plot(steps, means, **style._asdict(), markersize=5, label=label)
        if band:
            low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
            high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
            axis.fill_between(steps, low, high, color=style.color, alpha=0.06, linewidth=0)
            for edge in (low, high):
                axis.plot(steps, edge, color=style.color, linestyle=style.linestyle, linewidth=0.7, alpha=0.6)
    return _finish(figure, path)


def sweep(rows: Mapping[str, Sequence[tuple[float, Estimate]]], option: str, path: Path) -> Path:
    """Draw the win rate over the reference against an option; `rows`: method -> (value, win rate)."""
    figure, axis = _panel(option, "win rate over the reference (%)")
    for method, points in rows.items():
        x, y = [value for value, _ in points], [100 * rate.mean for _, rate in points]
        error = [196 * rate.standard_error for _, rate in points]
        axis.errorbar(x, y, error, **STYLES[method]._asdict(), capsize=2, markersize=6, label=method)
    values = sorted({value for points in rows.values() for value, _ in points})
    if values[0] > 0 and values[-1] >= 4 * values[0]:
        axis.set_xscale("log")
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
    return _finish(figure, path)


def density(curves: Mapping[str, tuple[str, DensityRatio]], path: Path) -> Path:
    """Draw density ratios for one prompt; `curves`: label -> (method, or "" for an optimal policy, and the curve)."""
    figure, axis = _panel("log probability under the reference (nats)", "density over the reference's")
    axis.axhline(1, color=plots.GREY, linewidth=0.8, linestyle=":")
    optimal = iter([Style("#000000", "", dashes) for dashes in ("-", ":")])  # by beta
    for label, (method, curve) in curves.items():
        style = STYLES[method] if method else next(optimal)
        line = {"color": style.color, "linestyle": style.linestyle, "linewidth": 2.0 if method else 1.4}
        label = f"{label}: ESS {curve.effective:.3g} of {curve.samples}"
        axis.plot(curve.log_ref, curve.ratio, **line, alpha=0.4 if curve.thin else 1, label=label)
    axis.set_ylim(bottom=0)
    axis.locator_params(axis="x", nbins=6)
    return _finish(figure, path)


def training(lines: Mapping[str, tuple[str, Sequence[tuple[float, float]]]], ylabel: str, path: Path) -> Path:
    """Draw a metric of metrics.jsonl against the step, smoothed; `lines`: label -> (method, points)."""
    figure, axis = _panel("optimizer step", ylabel)
    for label, (method, points) in lines.items():
        steps, values = zip(*points, strict=True)
        style = STYLES.get(method, Style(plots.GREY, "", "-"))
        axis.plot(steps, values, color=style.color, alpha=0.2, linewidth=0.8)
        axis.plot(steps, plots.smooth(values), color=style.color, linestyle=style.linestyle, linewidth=1.8, label=label)
    return _finish(figure, path)
