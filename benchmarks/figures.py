"""Draw the pictures of kept results: `python -m benchmarks.figures [FILE ...]`, by default all of results/*.json.

Each picture has a line of panels for every file, that is for every kind of machine.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks import accuracy, linear, logits, peers, step
from benchmarks.harness import BOUND, EAGER, MIB, OURS, PADDED
from benchmarks.table import times

RESULTS = Path(__file__).parent / "results"
COLORS = {
    OURS: "#0072b2", linear.FROZEN: "#56b4e9", accuracy.OURS_SUMS: "#56b4e9", PADDED: "#56b4e9", BOUND: "#009e73",
    linear.FROZEN_BOUND: "#7fcfb9", EAGER: "#8c8c8c", linear.EAGER_ROWS: "#b4b4b4", logits.EAGER_LOW: "#c8c8c8",
    logits.COMPILED: "#e69f00", logits.PUBLISHED: "#5d4e60", peers.TRL: "#d55e00", peers.TRL_METRICS: "#e89f6a",
    step.TRL: "#d55e00", step.TRL_LIVE: "#e89f6a", peers.LIGER: "#cc79a7", peers.TORCH: "#c7b42c",
    peers.TORCH_TUNED: "#e3d77a",
}  # fmt: skip
OTHER_COLOR = "#a06a4a"
Result = dict[str, Any]
Figure = Callable[[Result, dict[str, Any]], float | None]  # of a result and one of its rows


def seconds(result: Result, row: dict[str, Any]) -> float | None:
    return 1e3 * statistics.median(row["seconds"]) if row["seconds"] else None


def per_token(result: Result, row: dict[str, Any]) -> float | None:
    """Microseconds a token with loss."""
    value = seconds(result, row)
    return None if value is None else 1e3 * value / result["sizes"]["n"]


def extra_mib(result: Result, row: dict[str, Any]) -> float | None:
    return row["extra_bytes"] / MIB if row["extra_bytes"] is not None else None


def share_of_bound(result: Result, row: dict[str, Any]) -> float | None:
    bounds = [other for other in result["rows"] if other["contender"] == row["bound"]]
    share = times(bounds[0], row) if bounds and not row["contender"].startswith(BOUND) else None
    return None if share is None else 100 * share


def largest_error(result: Result, row: dict[str, Any]) -> float | None:
    return row["errors"].get("max")


def bars(axes: Any, results: Sequence[Result], value: Figure, label: str, log: bool = False) -> None:
    """Draw a bar for every contender of every result, with its value written beside it."""
    at, ticks = 0.0, []
    for result in results:
        rows = [(row, value(result, row)) for row in result["rows"] if not row["reason"]]
        drawn = [(row["contender"], number) for row, number in rows if number is not None]
        ticks.append((at + (len(drawn) - 1) / 2, short_title(result)))
        for name, number in drawn:
            axes.barh(at, number, height=0.86, color=COLORS.get(name, OTHER_COLOR))
            form = ".0e" if log else ",.0f" if number >= 100 else ".3g"
            text = f" {number:{form}}  {name}"
            axes.annotate(text, (number, at), va="center", fontsize=7)
            at += 1
        at += 1
    axes.set_yticks([y for y, _ in ticks], [title for _, title in ticks], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(at - 1, -1)
    if log:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(low / 3, high * 100)
    else:
        axes.set_xlim(0, 1.4 * axes.get_xlim()[1])
    axes.set_xlabel(label)
    _tidy(axes, "x")


def curves(axes: Any, results: Sequence[Result], size: str, value: Figure, label: str) -> None:
    """Draw a line for every contender over one of the sizes."""
    points: dict[str, list[tuple[float, float]]] = {}
    for result in sorted(results, key=lambda r: r["sizes"][size]):
        for row in result["rows"]:
            number = None if row["reason"] else value(result, row)
            if number is not None:
                points.setdefault(row["contender"], []).append((result["sizes"][size], number))
    for name, line in points.items():
        axes.plot(*zip(*line, strict=True), marker="o", markersize=3, color=COLORS.get(name, OTHER_COLOR), label=name,
                  linewidth=2.2 if name == OURS else 1.2, zorder=3 if name == OURS else 2)  # fmt: skip
    axes.set_xscale("log", base=2)
    sizes = sorted({result["sizes"][size] for result in results})
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=8, rotation=30)
    axes.set_xlabel({"n": "rows with loss", "V": "vocabulary", "K": "completions per prompt, same rows"}[size])
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    _tidy(axes, "both")


def _tidy(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def short_title(result: Result) -> str:
    s = result["sizes"]
    if result["suite"] == step.SUITE:
        return f"K={s['K']}, {s['prompt']}:{s['completion']} tokens\n{s['layers']} layers, D={s['D']}, V={s['V']:,}"
    head = {"logits": "EXO from logits", "linear": f"{s.get('objective')}, K={s.get('K')}", "accuracy": "log-ratio"}
    width = f"D={s['D']}, " if "D" in s else ""
    rows = f", n={s['n']:,}" if "n" in s else ""
    return f"{head[result['suite']]}\n{width}V={s['V']:,}\n{s['dtype']}{rows}"


def growth(results: Sequence[Result], size: str) -> list[Result]:
    """Return the cases that differ from the others in one size alone: the largest such set of the linear suite."""

    def others(result: Result) -> tuple[Any, ...]:
        s = result["sizes"]
        fixed = {"n": ("V", "K"), "V": ("n", "K"), "K": ("n", "V")}[size]
        return (s["objective"], s["D"], s["dtype"], *(s[name] for name in fixed))

    sets: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        if result["suite"] == linear.SUITE and not result["keep_memory"]:
            sets.setdefault(others(result), []).append(result)
    largest = max(sets.values(), key=len, default=[])
    return largest if len(largest) > 1 else []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description="Draw benchmark results.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all of benchmarks/results/*.json")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the pictures")
    arguments = parser.parse_args(argv)
    reports = [json.loads(p.read_text(encoding="utf-8")) for p in arguments.files or sorted(RESULTS.glob("*.json"))]
    if not reports:
        raise SystemExit("no results to draw: run `make bench`")
    for name, draw, columns in PICTURES:
        heights = [draw(None, report["results"]) for report in reports]
        figure, panels = plt.subplots(
            len(reports), columns, figsize=(4.6 * columns if columns > 1 else 8, sum(heights) + 0.6), squeeze=False,
            height_ratios=heights, layout="constrained",
        )  # fmt: skip
        for report, line in zip(reports, panels, strict=True):
            draw(line, report["results"])
            info = report["machine"]
            threads = f", {info['threads']} threads" if "threads" in info else ""
            title = f"{info['name']}{threads}, torch {info['versions']['torch']}, {report['date'][:10]}"
            line[0].set_title(title, loc="left", fontsize=9)
        labels = {label: h for axes in panels.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        if labels:
            figure.legend(labels.values(), labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        figure.savefig(arguments.out / f"{name}.png", dpi=130)
        plt.close(figure)
        print(arguments.out / f"{name}.png")


def _bars_height(results: Sequence[Result], value: Figure) -> float:
    lines = [sum(value(r, row) is not None for row in r["rows"]) + 1 for r in results]
    return 0.9 + 0.17 * sum(lines)


def speed(line: Any, results: Sequence[Result]) -> float:
    for axes, size in zip(line if line is not None else (), ("n", "V", "K"), strict=False):
        curves(axes, growth(results, size), size, per_token, "microseconds a row with loss")
    return 3.6


def memory(line: Any, results: Sequence[Result]) -> float:
    if line is not None:
        curves(line[0], growth(results, "V"), "V", extra_mib, "peak MiB beyond inputs and gradients")
        curves(line[1], growth(results, "n"), "n", extra_mib, "peak MiB beyond inputs and gradients")
    return 3.6


def _bar_picture(suites: tuple[str, ...], value: Figure, label: str, log: bool = False, least: int = 1):
    """Return a picture of the cases of some suites in which at least so many take part."""

    def draw(line: Any, results: Sequence[Result]) -> float:
        grown = [id(r) for size in ("n", "V", "K") for r in growth(results, size)]
        chosen = [r for r in results if r["suite"] in suites and not r["keep_memory"] and id(r) not in grown]
        chosen = [r for r in chosen if sum(value(r, row) is not None for row in r["rows"]) >= least]
        if line is not None:
            bars(line[0], chosen, value, label, log)
        return _bars_height(chosen, value)

    return draw


BOUND_LABEL = "percent of the bound: bare matmuls, or from logits a copy"
ERROR_LABEL = "largest error of a log-ratio of 512 tokens, nats"
PICTURES = (
    ("speed", speed, 3),
    ("memory", memory, 2),
    ("bound", _bar_picture(("logits", "linear"), share_of_bound, BOUND_LABEL, least=4), 1),
    ("accuracy", _bar_picture(("accuracy",), largest_error, ERROR_LABEL, log=True), 1),
    ("step", _bar_picture(("step",), seconds, "milliseconds of a training step"), 1),
)


if __name__ == "__main__":
    main()
