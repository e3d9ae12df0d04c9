"""The pictures of a report: one panel a file, so that they stand side by side on a screen and in a column on a phone.

A method keeps its colour, marker and dashes in all of them: colour-blind readers and grey print tell them apart. Each
function draws one picture and returns its path; numbers come from `results`. Left out: words (report, page).
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exo.evaluation.density import DensityRatio
from exo.reporting import results
from exo.reporting.results import Checkpoint, Estimate, Results, Setting
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
    "sft": Style("#000000", "X", "none"),
}
SIZES = ((0, (1, 1)), (0, (3, 1)), "-", (0, (6, 1, 1, 1)))  # dashes of K, from the least
Value = Callable[[Checkpoint], Estimate]


def _panel(xlabel: str, ylabel: str) -> tuple[plt.Figure, plt.Axes]:
    figure, axis = plt.subplots(figsize=(5.2, 4.2))
    axis.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axis


def _finish(figure: plt.Figure, path: Path) -> Path:
    """The legend goes below, where no data are."""
    axis = figure.axes[0]
    plots.tidy(axis)
    labels = axis.get_legend_handles_labels()[1]
    if labels:
        columns = 2 if max(map(len, labels)) < 30 else 1
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False, fontsize=9)
    return plots.save(figure, path)


def frontier(found: Results, value: Value, ylabel: str, path: Path, series: Sequence[str] = ()) -> Path:
    """Every checkpoint by its KL; a thin line is a run, a thick one the upper envelope of a method, or of `series`."""
    figure, axis = _panel("KL to the reference (nats)", ylabel)
    examples = {name: [t for t in found.evaluated if t.series == name] for name in series}
    examples = examples or {t.method: [u for u in found.evaluated if u.method == t.method] for t in found.evaluated}
    start = found.start.last if found.start else None
    for i, (name, trials) in enumerate(examples.items()):
        style = STYLES[trials[0].method]
        dashes = SIZES[i % len(SIZES)] if series else style.linestyle
        look: dict[str, Any] = {"color": _shade(i, len(examples)) if series else style.color, "marker": style.marker}
        points = [checkpoint for trial in trials for checkpoint in trial.checkpoints]
        for trial in trials:
            _points(axis, trial.checkpoints, value, look, alpha=0.25)
            _line(axis, ([start] if start else []) + list(trial.checkpoints), value, look["color"])
        top = results.envelope([(c.kl.mean, value(c).mean) for c in points if c.kl])
        if top:
            _points(axis, [c for c in points if c.kl and (c.kl.mean, value(c).mean) in top], value, look, alpha=1)
            x, y = zip(*top, strict=True)
            axis.plot(x, y, color=look["color"], linestyle=dashes, linewidth=2, zorder=3)
            axis.plot([], [], **look, linestyle=dashes, linewidth=2, label=name)  # for the legend
        for i, checkpoint in enumerate(c for c in points if c.kl_bound is not None):
            label = f"{trials[0].series}: KL at most this" if not i else None
            _bound(axis, checkpoint.kl_bound or 0.0, value(checkpoint), look, label)
    kls = [c.kl.mean for trial in found.evaluated for c in trial.checkpoints if c.kl]
    if kls and max(kls) > 10 * statistics.median(kls):  # a run that went astray must not squeeze the others
        axis.set_xscale("symlog", linthresh=max(0.1, 2 * statistics.median(kls)))
        axis.set_xlabel("KL to the reference (nats, logarithmic to the right)")
    if start:
        error = 1.96 * value(start).standard_error
        axis.errorbar(0, value(start).mean, error, fmt="X", color="black", capsize=2, label="SFT", zorder=4)
    return _finish(figure, path)


def _points(axis: plt.Axes, checkpoints: Sequence[Checkpoint], value: Value, look: Any, alpha: float) -> None:
    measured = [(c.kl, value(c)) for c in checkpoints if c.kl]
    x, y = [kl.mean for kl, _ in measured], [at.mean for _, at in measured]
    across, up = _errors(kl for kl, _ in measured), _errors(at for _, at in measured)
    axis.errorbar(x, y, up, across, **look, linestyle="none", markersize=4.5, elinewidth=0.8, alpha=alpha)


def _line(axis: plt.Axes, checkpoints: Sequence[Checkpoint], value: Value, color: Any) -> None:
    measured = [(c.kl.mean, value(c).mean) for c in checkpoints if c.kl]
    if measured:
        axis.plot(*zip(*measured, strict=True), color=color, linewidth=0.7, alpha=0.25)


def _bound(axis: plt.Axes, kl: float, at: Estimate, look: Any, label: str | None) -> None:
    """A point whose KL is this or less: an arrow to the left."""
    look_left = {"arrowstyle": "<-", "color": plots.GREY}  # from the text's place to the point, so turned round
    axis.annotate("", (kl, at.mean), (-24, 0), textcoords="offset points", arrowprops=look_left)
    axis.errorbar(kl, at.mean, 1.96 * at.standard_error, **look, linestyle="none", markersize=10, label=label)


def _errors(values: Iterable[Estimate]) -> list[list[float]]:
    """Lengths of the bars to the ends of the 95% intervals."""
    below, above = [], []
    for value in values:
        below.append(max(0.0, value.mean - value.low))
        above.append(max(0.0, value.high - value.mean))
    return [below, above]


def _shade(i: int, n: int) -> Any:
    return plt.get_cmap("viridis")(0.85 * i / max(1, n - 1))


def against_step(found: Results, value: str, ylabel: str, path: Path, *, band: bool = False) -> Path:
    """A checkpoint's number against its step, best setting of each method, mean over its seeds."""
    figure, axis = _panel("optimizer step", ylabel)
    for setting in found.best_of_method:
        rows = by_step(found, setting, value)
        if len(rows) > 1:
            steps, means, spreads = zip(*rows, strict=True)
            axis.plot(steps, means, **STYLES[setting.first.method]._asdict(), markersize=5, label=setting.first.series)
            if band:
                low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
                high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
                style = STYLES[setting.first.method]
                axis.fill_between(steps, low, high, color=style.color, alpha=0.06, linewidth=0)
                for edge in (low, high):
                    axis.plot(steps, edge, color=style.color, linestyle=style.linestyle, linewidth=0.7, alpha=0.6)
    return _finish(figure, path)


def by_step(found: Results, setting: Setting, name: str) -> list[tuple[int, float, float]]:
    """(step, mean over seeds, spread over a prompt's samples) of checkpoints that every seed has, the start first."""
    rows = []
    for i, checkpoint in enumerate(setting.first.checkpoints):
        same = [trial.checkpoints[i] for trial in setting.trials if i < len(trial.checkpoints)]
        estimate = results.over_seeds([getattr(c, name) for c in same])
        if checkpoint.step is not None and estimate is not None and len(same) == len(setting.trials):
            rows.append((checkpoint.step, estimate.mean, sum(c.spread for c in same) / len(same)))
    start = found.start.last if found.start else None
    value = getattr(start, name, None)
    return [(0, value.mean, start.spread), *rows] if rows and start and value else rows


def sweep(rows: Mapping[str, Sequence[tuple[float, Estimate]]], option: str, path: Path) -> Path:
    """Win rate over the reference against one option; `rows`: of each method (value, win rate)."""
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
    """Density ratios for one prompt; `curves`: label -> (method, or "" for the optimal policy)."""
    figure, axis = _panel("log probability under the reference (nats)", "density over the reference's")
    axis.axhline(1, color=plots.GREY, linewidth=0.8, linestyle=":")
    optimal = iter([Style("#000000", "", dashes) for dashes in ("-", ":")])  # one for each beta
    for label, (method, curve) in curves.items():
        style = STYLES[method] if method else next(optimal)
        line = {"color": style.color, "linestyle": style.linestyle, "linewidth": 2.0 if method else 1.4}
        label = f"{label}: ESS {curve.effective:.3g} of {curve.samples}"
        axis.plot(curve.log_ref, curve.ratio, **line, alpha=0.4 if curve.thin else 1, label=label)
    axis.set_ylim(bottom=0)
    axis.locator_params(axis="x", nbins=6)
    return _finish(figure, path)


def training(lines: Mapping[str, tuple[str, Sequence[tuple[float, float]]]], ylabel: str, path: Path) -> Path:
    """A number of metrics.jsonl against the step, smoothed; `lines`: label -> (method, points)."""
    figure, axis = _panel("optimizer step", ylabel)
    for label, (method, points) in lines.items():
        steps, values = zip(*points, strict=True)
        style = STYLES.get(method, Style(plots.GREY, "", "-"))
        axis.plot(steps, values, color=style.color, alpha=0.2, linewidth=0.8)
        axis.plot(steps, plots.smooth(values), color=style.color, linestyle=style.linestyle, linewidth=1.8, label=label)
    return _finish(figure, path)
