"""Draw files that `pytest benchmarks/ --results FILE` wrote: for every file, one line of panels per suite.

    python -m benchmarks.plot FILE ... [--out PICTURE.png]

Needs matplotlib.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    accuracy,
    linear_contenders,
    linear_peers,
    linear_report,
    linear_scaling,
    logits_report,
    plot_step,
    step_report,
)
from benchmarks.harness import OURS
from benchmarks.logits_contenders import COMPILED, EAGER, EAGER_LOW
from benchmarks.logits_workload import MIB

COLOURS = {
    OURS: "#0072b2", linear_contenders.FROZEN: "#56b4e9", linear_contenders.LARGE: "#004c78",
    linear_contenders.MATMULS: "#009e73", linear_contenders.FROZEN_MATMULS: "#7fcfb9",
    COMPILED: "#e69f00", EAGER: "#8c8c8c", EAGER_LOW: "#c8c8c8", linear_contenders.EAGER_ROWS: "#b4b4b4",
    linear_peers.LIGER: "#cc79a7", linear_peers.LIGER_TRITON: "#e0acca", linear_peers.CCE: "#d55e00",
    linear_peers.TORCH: "#c7b42c", linear_peers.TORCH_BEST: "#e3d77a", accuracy.OURS_SUMS: "#56b4e9",
    **plot_step.COLOURS,
}  # fmt: skip
NAMES = {OURS: "exo_kernels", COMPILED: "torch.compile", EAGER: "eager PyTorch (fp32 log-softmax)"}
BAR = 0.24  # inches
GAP = 1.2  # bars
Rows = list[dict[str, Any]]


def draw(reports: list[dict[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    lines = [(report, suite, rows) for report in reports for suite, rows in _suites(report).items()]
    heights = [LINES[suite][1](rows) for _, suite, rows in lines]
    figure, panels = pyplot.subplots(
        len(lines), 2, figsize=(12, sum(heights) + 1.0), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for (report, suite, rows), (left, right) in zip(lines, panels, strict=True):
        LINES[suite][0](left, right, rows)
        left.set_title(f"{TITLES[suite]}\n{_machine(report)}", loc="left", fontsize=10)
    present = dict.fromkeys(r["contender"] for _, _, rows in lines for r in rows if "contender" in r)
    handles = [Patch(color=COLOURS[name], label=NAMES.get(name, name)) for name in present]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 5), frameon=False)
    figure.savefig(out, dpi=150)


def _suites(report: dict[str, Any]) -> dict[str, Rows]:
    suites: dict[str, Rows] = {}
    for row in report["rows"]:
        suites.setdefault(row.get("suite", logits_report.SUITE), []).append(row)
    return suites


def _machine(report: dict[str, Any]) -> str:
    machine, versions = report["machine"], report["versions"]
    threads = f" ({machine['threads']} threads)" if "threads" in machine else ""
    return f"{machine['name']}{threads}, torch {versions['torch']}, {report['date'][:10]}"


def _layout(rows: Rows) -> tuple[list[float], dict[str, float], float]:
    """Return the positions of the rows' bars and the workloads' labels, and the height, all in bars."""
    positions, labels, at = [], {}, 0.0
    for workload in dict.fromkeys(row["workload"] for row in rows):
        group = [row for row in rows if row["workload"] == workload]
        labels[_label(group[0])] = at + (len(group) - 1) / 2
        positions += [at + i for i in range(len(group))]
        at += len(group) + GAP
    return positions, labels, at


def _label(row: dict[str, Any]) -> str:
    if row.get("suite") == step_report.SUITE:
        return plot_step.label(row)
    if row.get("suite") == accuracy.SUITE:
        return f"D = {row['hidden']}, V = {row['vocab']}\n{row['sequences']} x {row['length']} tokens"
    shape = f"V = {row['vocab']}, {row['dtype']}"
    if row.get("suite") == linear_report.SUITE:
        shape = f"{row['objective']}\nK = {row['group_size']}, D = {row['hidden']}\n{shape}"
    share = "all" if row["rows_with_loss"] == row["rows"] else f"{row['rows_with_loss'] / row['rows']:.0%}"
    return f"{shape}\n{row['rows']} rows, {share} with loss"


def _bars_height(rows: Rows) -> float:
    return BAR * _layout(rows)[2] + 1.2


def _time_and_memory(left, right, rows: Rows) -> None:
    _panel(left, rows, _time)
    _panel(right, rows, _memory)
    right.tick_params(labelleft=False)
    linear = rows[0].get("suite") == linear_report.SUITE
    bracket = "peers: ours is faster by; ours: over bare matmuls" if linear else "speed-up over eager"
    left.set_xlabel(f"milliseconds: median, line from min to max\n(in brackets: {bracket})")
    right.set_xlabel("peak MiB beyond inputs and gradients\n(in brackets: share of the fp32 logits)")


Bar = tuple[float, float, float, str]  # median, min, max, text


def _time(row: dict[str, Any]) -> Bar | None:
    if "seconds" not in row:
        return None
    s, name = row["seconds"], row["contender"]
    ratio = row.get("x_eager") if name != EAGER else None
    if row.get("suite") == step_report.SUITE:
        ratio = None if name == OURS else row["ours_is_faster"]
    if row.get("suite") == linear_report.SUITE:
        ratio = row.get("of_matmuls") if name.startswith(OURS) else row["ours_is_faster"]
        ratio = None if name in linear_report.BOUNDS else ratio
    text = f"{1e3 * s['median']:,.3g} ms" if s["median"] < 1 else f"{s['median']:.2f} s"
    text += f" ({ratio['median']:.{2 if name.startswith(OURS) and 'suite' in row else 1}f}x)" if ratio else ""
    return 1e3 * s["median"], 1e3 * s["min"], 1e3 * s["max"], text


def _memory(row: dict[str, Any]) -> Bar | None:
    if "extra_bytes" not in row:
        return None
    mib = row["extra_bytes"] / MIB
    return mib, mib, mib, f"{mib:,.0f} MiB ({row['extra_of_fp32_logits']:.2f})" if mib >= 0.5 else "0 MiB"


def _error(row: dict[str, Any]) -> Bar | None:
    if "max_error" not in row:
        return None
    error = row["max_error"]
    return error, error, error, f"{error:.0e}"


def _panel(axes, rows: Rows, of: Callable[[dict[str, Any]], Bar | None], log: bool = False) -> None:
    positions, labels, height = _layout(rows)
    bars = [of(row) for row in rows]
    limit = 1.3 * max((bar[2] for bar in bars if bar), default=1) or 1
    for at, row, bar in zip(positions, rows, bars, strict=True):
        if bar is None:
            missing = row.get("not_timed") or row.get("not_run")
            axes.text(0, at, f" {'not measured' if missing else '-'}", va="center", fontsize=8, style="italic")
            continue
        value, low, high, text = bar
        axes.barh(at, value, height=0.86, color=COLOURS[row["contender"]])
        if low < high:
            axes.plot([low, high], [at, at], color="black", linewidth=0.8)
        axes.annotate(text, (high, at), (4, 0), textcoords="offset points", va="center", fontsize=8)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(min((bar[0] for bar in bars if bar), default=1) / 10, 5 * limit)
    else:
        axes.set_xlim(0, limit)
    axes.set_ylim(height - GAP, -0.9)
    axes.set_yticks(list(labels.values()), list(labels))
    axes.tick_params(axis="y", length=0)
    _tidy(axes)


def _tidy(axes) -> None:
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _growth(left, right, rows: Rows) -> None:
    """Draw time over tokens and over K, and memory over tokens with the budget."""
    tokens = [row for row in rows if row["workload"] == linear_scaling.TOKENS]
    groups = [row for row in rows if row["workload"] == linear_scaling.COMPLETIONS]
    for cases, key, name, colour in (
        (tokens, "rows", "over tokens", OURS),
        (groups, "group_size", "over K", linear_contenders.FROZEN),
    ):
        if cases:
            per_token = [1e6 * row["seconds"]["median"] / row["rows"] for row in cases]
            left.plot([row[key] for row in cases], per_token, marker="o", color=COLOURS[colour], label=name)
    if tokens:
        mib = [row["extra_bytes"] / MIB for row in tokens]
        right.plot([row["rows"] for row in tokens], mib, marker="o", color=COLOURS[OURS], label="measured")
        right.axhline(tokens[0]["budget_bytes"] / MIB, color="black", linewidth=0.8, linestyle="--", label="budget")
    left.set_ylabel("microseconds a token")
    left.set_xlabel("tokens; K at as many tokens in all")
    right.set_ylabel("peak MiB beyond inputs and gradients")
    right.set_xlabel("tokens")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.autoscale()
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.legend(frameon=False, fontsize=8)
        _tidy(axes)


def _step(left, right, rows: Rows) -> None:
    _panel(left, plot_step.bars(rows), _time)
    left.set_xlabel("milliseconds of a step: median, line from min to max\n(in brackets: ours is faster by)")
    plot_step.gains(right, rows)
    _tidy(right)


def _accuracy(left, right, rows: Rows) -> None:
    for axes, dtype in ((left, "float32"), (right, "bfloat16")):
        selected = [row for row in rows if row["dtype"] == dtype]
        if selected:
            _panel(axes, selected, _error, log=True)
        axes.set_xlabel(f"{dtype} operands: largest error of log-ratios, nats")


LINES: dict[str, tuple[Callable[[Any, Any, Rows], None], Callable[[Rows], float]]] = {
    logits_report.SUITE: (_time_and_memory, _bars_height),
    linear_report.SUITE: (_time_and_memory, _bars_height),
    linear_scaling.SUITE: (_growth, lambda rows: 3.0),
    step_report.SUITE: (_step, lambda rows: max(3.0, _bars_height(plot_step.bars(rows)))),
    accuracy.SUITE: (_accuracy, lambda rows: _bars_height([r for r in rows if r["dtype"] == "bfloat16"] or rows)),
}
TITLES = {
    logits_report.SUITE: "EXO loss from logits, forward + backward",
    linear_report.SUITE: "Losses from hidden states and the head, forward + backward",
    linear_scaling.SUITE: "EXO loss from hidden states: how it grows",
    step_report.SUITE: "A training step, from tokens to the update",
    accuracy.SUITE: "Accuracy against fp64",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Draw benchmark results.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON from pytest benchmarks/ --results")
    parser.add_argument("--out", type=Path, help="the picture (default: the first file's name with .png)")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.files[0].with_suffix(".png")
    draw([json.loads(file.read_text(encoding="utf-8")) for file in arguments.files], out)
    print(out)


if __name__ == "__main__":
    main()
