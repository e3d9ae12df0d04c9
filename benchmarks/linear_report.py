"""Rows, targets and table of the linear path. Code shared by all reports is in report.py."""

from typing import Any

from benchmarks import linear_contenders as c
from benchmarks import linear_peers as peers
from benchmarks import report
from benchmarks.harness import OURS
from benchmarks.linear_workload import EXO, Workload
from benchmarks.logits_workload import MIB
from benchmarks.report import Result, Target

SUITE = "linear"
CPU_MATMULS, CPU_EAGER, CPU_COMPILE, CPU_LIGER = 1.15, 3.3, 2.5, 2.8  # over the bare matmuls; speedups
GPU_BOUND, GPU_BOUND_ROWS, GPU_LARGE, GPU_LIGER, GPU_PEERS = 1.10, 4096, 1.15, 3.0, 0.95
BOUNDS = (c.MATMULS, c.FROZEN_MATMULS)


def rows(work: Workload, results: list[Result], bounds: dict[str, str]) -> list[dict[str, Any]]:
    """Return one row per contender: ours, the bare matmuls, the others. `bounds` names the matmuls of each."""
    by_name = {r.name: r for r in results}
    rows = []
    for r in sorted(results, key=lambda r: 0 if r.name.startswith(OURS) else 1 if r.name in BOUNDS else 2):
        row: dict[str, Any] = {
            "suite": SUITE, "workload": str(work), "objective": work.objective, "group_size": work.group_size,
            "sequences": work.sequences, "length": work.length, "hidden": work.hidden, "vocab": work.vocab,
            "dtype": str(work.dtype).removeprefix("torch."), "budget_bytes": work.budget,
            "rows": work.rows, "rows_with_loss": work.rows_with_loss, "matmul_flops": work.matmul_flops,
            "between_bytes": work.between_bytes, "fp32_logits_bytes": work.fp32_logits_bytes,
            "contender": r.name, "not_timed": r.not_timed, "tolerance": r.tolerance,
            **{f"{what}_error": r.errors.get(what) for what in ("loss", "hidden", "weight")},
        }  # fmt: skip
        if r.times:
            row |= _times(work, r, by_name, by_name.get(bounds.get(r.name, "")))
        if r.memory is not None:
            row |= {
                "extra_bytes": r.memory.extra,
                "extra_bytes_allocated": r.memory.allocated,
                "extra_bytes_resident": r.memory.resident,
                "extra_of_fp32_logits": r.memory.extra / work.fp32_logits_bytes,
            }
        rows.append(row)
    return report.with_targets(rows, targets(work, rows))


def _times(work: Workload, r: Result, by_name: dict[str, Result], bound: Result | None) -> dict[str, Any]:
    ours = by_name.get(OURS)
    times = {
        "seconds": report.spread(r.seconds),
        "wall_seconds": report.spread([t.wall_seconds for t in r.times]),
        "rounds_seconds": r.seconds,
        "x_eager": report.speedup(r, by_name.get(c.EAGER)),
        "x_compile": report.speedup(r, by_name.get(c.COMPILED)),
        "ours_is_faster": None if ours is None else report.speedup(ours, r),
    }
    if bound is None:
        return times
    times["of_matmuls"] = report.speedup(bound, r)
    copies = [t.copy_bytes_per_second for t in r.times]
    if all(copies):
        bare = zip(r.seconds, bound.seconds, copies, strict=True)
        times["copy_bytes_per_second"] = report.spread(copies)
        times["of_bound"] = report.spread([s / (m + work.between_bytes / copy) for s, m, copy in bare])
    return times


def targets(work: Workload, rows: list[dict[str, Any]]) -> list[Target]:
    """Return the acceptance targets of one workload."""
    timed = {row["contender"]: row for row in rows if "seconds" in row}
    gpu = any("of_bound" in row for row in timed.values())
    if work.objective != EXO:
        return _faster(timed, peers.LIGER, GPU_LIGER if gpu else CPU_LIGER)
    if gpu:
        return _gpu_targets(work, timed)
    return [
        *_at_most(timed, OURS, "of_matmuls", CPU_MATMULS),
        *_at_most(timed, c.FROZEN, "of_matmuls", CPU_MATMULS),
        *_faster(timed, c.EAGER, CPU_EAGER),
        *_faster(timed, c.COMPILED, CPU_COMPILE),
        *_faster(timed, peers.TORCH, 1.0),
        *_faster(timed, peers.TORCH_BEST, 1.0),
    ]


def _gpu_targets(work: Workload, timed: dict[str, dict[str, Any]]) -> list[Target]:
    targets = _at_most(timed, c.LARGE, "of_matmuls", GPU_LARGE)
    if work.rows_with_loss >= GPU_BOUND_ROWS:
        targets += _at_most(timed, OURS, "of_bound", GPU_BOUND) + _at_most(timed, c.FROZEN, "of_bound", GPU_BOUND)
    for name in (c.COMPILED, *peers.PORTABLE):
        targets += _faster(timed, name, GPU_PEERS)
    return targets


def _at_most(timed: dict[str, dict[str, Any]], name: str, ratio: str, goal: float) -> list[Target]:
    if name not in timed:
        return []
    return [Target(f"{name} {ratio.replace('_', ' ')}", timed[name][ratio]["median"], goal, False)]


def _faster(timed: dict[str, dict[str, Any]], name: str, goal: float) -> list[Target]:
    if name not in timed:
        return []
    return [Target(f"x {name}", timed[name]["ours_is_faster"]["median"], goal, True)]


def block(block: list[dict[str, Any]]) -> list[str]:
    """Return the table of one workload."""
    first = block[0]
    rounds = max(len(row.get("rounds_seconds", ())) for row in block)
    gpu = any("of_bound" in row for row in block)
    header = f"{'':25}{'ms':>8} {'(min..max)':>16}{'ours faster':>12} {'(min..max)':>13}{'/ matmuls':>10}"
    header += f"{'extra MiB':>11}{'errors':>9}{'hidden':>7}{'weight':>7}"
    return [
        "",
        f"{first['objective']} from hidden states, forward + backward, K={first['group_size']}, D={first['hidden']} "
        f"V={first['vocab']} {first['dtype']}: {first['rows']} rows, {first['rows_with_loss']} with loss; fp32 logits "
        f"{first['fp32_logits_bytes'] / MIB:.0f} MiB; budget {first['budget_bytes'] / MIB:.0f} MiB; {rounds} rounds",
        header + (f"{'/ bound':>9}{'wall ms':>9}" if gpu else ""),
        *(_line(row) for row in block),
        *report.verdicts(block),
    ]


def _line(row: dict[str, Any]) -> str:
    name = f"{row['contender']:25}"
    if "seconds" not in row:
        return f"{name}  not timed: {row['not_timed']}"
    s, faster = row["seconds"], row["ours_is_faster"]
    spread = f"({1e3 * s['min']:.4g}..{1e3 * s['max']:.4g})"
    line = f"{name}{1e3 * s['median']:8.4g} {spread:>16}"
    line += report.versus(None if row["contender"] == OURS else faster)
    line += f"{row['of_matmuls']['median']:10.3f}" if "of_matmuls" in row else f"{'-':>10}"
    line += f"{row['extra_bytes'] / MIB:11.1f}" if "extra_bytes" in row else f"{'-':>11}"
    for what, width in (("loss", 9), ("hidden", 7), ("weight", 7)):
        error = row[f"{what}_error"]
        line += f"{'-':>{width}}" if error is None else f"{error:{width}.0e}"
    if "of_bound" in row:
        line += f"{row['of_bound']['median']:9.3f}{1e3 * row['wall_seconds']['median']:9.4g}"
    return line
