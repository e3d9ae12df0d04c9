"""Bars of time and memory from files that `pytest benchmarks/ --results FILE` wrote: one line of panels a file.

    python -m benchmarks.plot FILE ... [--out PICTURE.png]

Needs matplotlib. Left out: everything that the table says in words.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.contenders import COMPILED, EAGER, EAGER_LOW, OURS
from benchmarks.workload import MIB

COLOURS = {OURS: "#0072b2", COMPILED: "#e69f00", EAGER: "#8c8c8c", EAGER_LOW: "#c8c8c8"}
NAMES = {OURS: "exo_kernels", COMPILED: "torch.compile", EAGER: "eager PyTorch (fp32)", EAGER_LOW: "eager, own dtype"}
BAR = 0.24  # inches
GAP = 1.2  # bars


def draw(reports: list[dict[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    heights = [BAR * _layout(report)[2] + 1.0 for report in reports]
    figure, panels = pyplot.subplots(
        len(reports), 2, figsize=(12, sum(heights) + 1.0), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for report, (left, right) in zip(reports, panels, strict=True):
        _panel(left, report, _time)
        _panel(right, report, _memory)
        right.tick_params(labelleft=False)
        left.set_title(_title(report), loc="left", fontsize=10)
    left.set_xlabel("milliseconds: median, line from min to max\n(in brackets: speed-up over eager)")
    right.set_xlabel("peak MiB beyond logits and gradient\n(in brackets: share of the fp32 logits)")
    present = dict.fromkeys(row["contender"] for report in reports for row in report["rows"])
    handles = [Patch(color=COLOURS[name], label=NAMES[name]) for name in present]
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    legend.set_title("EXO loss from logits, forward + backward", {"size": 13, "weight": "bold"})
    figure.savefig(out, dpi=150)


def _title(report: dict[str, Any]) -> str:
    machine, versions = report["machine"], report["versions"]
    threads = f" ({machine['threads']} threads)" if "threads" in machine else ""
    return f"{machine['name']}{threads}, torch {versions['torch']}, {report['date'][:10]}"


def _layout(report: dict[str, Any]) -> tuple[list[float], dict[str, float], float]:
    """Position of every row's bar, of every workload's label, and the height, all in bars."""
    positions, labels, at = [], {}, 0.0
    for workload in dict.fromkeys(row["workload"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["workload"] == workload]
        first = rows[0]
        share = "all" if first["rows_with_loss"] == first["rows"] else f"{first['rows_with_loss'] / first['rows']:.0%}"
        label = f"V = {first['vocab']}, {first['dtype']}\n{first['rows']} rows, {share} with loss"
        labels[label] = at + (len(rows) - 1) / 2
        positions += [at + i for i in range(len(rows))]
        at += len(rows) + GAP
    return positions, labels, at


def _time(row: dict[str, Any]) -> tuple[float, float, float, str]:  # median, min, max, text
    s = row["seconds"]
    speedup = f" ({row['x_eager']['median']:.1f}x)" if row["x_eager"] and row["contender"] != EAGER else ""
    return 1e3 * s["median"], 1e3 * s["min"], 1e3 * s["max"], f"{1e3 * s['median']:.3g} ms{speedup}"


def _memory(row: dict[str, Any]) -> tuple[float, float, float, str]:
    mib = row["extra_bytes"] / MIB
    return mib, mib, mib, f"{mib:,.0f} MiB ({row['extra_of_fp32_logits']:.2f})" if mib >= 0.5 else "0 MiB"


def _panel(axes, report: dict[str, Any], of) -> None:
    positions, labels, height = _layout(report)
    longest = 0.0
    for at, row in zip(positions, report["rows"], strict=True):
        if "seconds" not in row:
            axes.text(0, at, " not timed", va="center", fontsize=8, style="italic")
            continue
        value, low, high, text = of(row)
        axes.barh(at, value, height=0.86, color=COLOURS[row["contender"]])
        if high > low:
            axes.plot([low, high], [at, at], color="black", linewidth=0.8)
        axes.annotate(text, (high, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        longest = max(longest, high)
    axes.set_xlim(0, 1.3 * longest or 1)
    axes.set_ylim(height - GAP, -0.9)
    axes.set_yticks(list(labels.values()), list(labels))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


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
