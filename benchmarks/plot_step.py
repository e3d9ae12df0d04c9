"""Panels of the training step: times of the workloads with a peer or a target, and the gain of sharing the prompt."""

from typing import Any

from benchmarks.step_contenders import PADDED, TRL

COLOURS = {PADDED: "#56b4e9", TRL: "#8c8c8c"}
SHADES = {2: "#9ecae1", 4: "#4292c6", 8: "#084594"}  # by K
WIDTH = 0.26


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows drawn as bars of time: those of workloads with TRL or with a target."""
    chosen = {row["workload"] for row in rows if row["contender"] == TRL or row.get("targets")}
    return [row for row in rows if row["workload"] in chosen]


def label(row: dict[str, Any]) -> str:
    return (
        f"K = {row['group_size']}, {row['prompt']}:{row['completion']}\n"
        f"{row['layers']} layers, D = {row['hidden']}, V = {row['vocab']}"
    )


def gains(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the speedup over padded rows by prompt:completion, with a bar for each K."""
    drawn = {row["workload"] for row in bars(rows)}
    padded = [row for row in rows if row["contender"] == PADDED and "seconds" in row and row["workload"] not in drawn]
    shapes = [(p, c) for p, c in dict.fromkeys((row["prompt"], row["completion"]) for row in padded)]
    shapes = [shape for shape in shapes if sum((row["prompt"], row["completion"]) == shape for row in padded) > 1]
    for row in padded:
        if (row["prompt"], row["completion"]) not in shapes:
            continue
        faster, k = row["ours_is_faster"], row["group_size"]
        at = shapes.index((row["prompt"], row["completion"])) + WIDTH * (list(SHADES).index(k) - 1)
        axes.bar(at, faster["median"], width=0.9 * WIDTH, color=SHADES[k])
        axes.plot([at, at], [faster["min"], faster["max"]], color="black", linewidth=0.8)
        axes.annotate(f"{faster['median']:.2f}", (at, faster["max"]), (0, 3), textcoords="offset points", ha="center",
                      fontsize=8)  # fmt: skip
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(shapes)), [f"{p}:{c}" for p, c in shapes])
    axes.set_xlabel("tokens of prompt : completion")
    axes.set_ylabel("times as fast as padded rows")
    axes.legend(
        [axes.bar(0, 0, color=shade) for shade in SHADES.values()], [f"K = {k}" for k in SHADES], frameon=False,
        fontsize=8,
    )  # fmt: skip
    axes.set_ylim(bottom=0)
