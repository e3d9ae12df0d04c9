"""Rows, targets and table of the logits path. Code shared by all reports is in report.py."""

from typing import Any

from benchmarks import logits_contenders, report
from benchmarks.harness import OURS
from benchmarks.logits_workload import MIB, Workload
from benchmarks.report import Result, Target

SUITE = "logits"
CPU_SPEEDUP, CPU_EXTRA = 2.0, 1 / 8  # over eager; relative to the fp32 logits
GPU_SPEEDUP, GPU_BANDWIDTH = 4.0, 0.90  # over eager in fp32; relative to the measured copy bandwidth


def rows(workload: Workload, results: list[Result]) -> list[dict[str, Any]]:
    by_name = {r.name: r for r in results}
    rows = []
    for r in results:
        row: dict[str, Any] = {
            "suite": SUITE, "workload": str(workload), "vocab": workload.vocab, "sequences": workload.sequences,
            "length": workload.length, "dtype": str(workload.dtype).removeprefix("torch."),
            "group_size": workload.group_size, "rows": workload.rows, "rows_with_loss": workload.rows_with_loss,
            "bound_bytes": workload.bound_bytes, "fp32_logits_bytes": workload.fp32_logits_bytes,
            "contender": r.name, "not_timed": r.not_timed, "tolerance": r.tolerance,
            "loss_error": r.errors.get("loss"), "gradient_error": r.errors.get("gradient"),
        }  # fmt: skip
        if r.times and r.memory is not None:
            row |= {
                "seconds": report.spread(r.seconds),
                "wall_seconds": report.spread([t.wall_seconds for t in r.times]),
                "rounds_seconds": r.seconds,
                "x_eager": report.speedup(r, by_name.get(logits_contenders.EAGER)),
                "x_compile": report.speedup(r, by_name.get(logits_contenders.COMPILED)),
                "extra_bytes": r.memory.extra,
                "extra_bytes_allocated": r.memory.allocated,
                "extra_bytes_resident": r.memory.resident,
                "extra_of_fp32_logits": r.memory.extra / workload.fp32_logits_bytes,
            }
            copies = [t.copy_bytes_per_second for t in r.times]
            if all(copies):
                pairs = zip(r.seconds, copies, strict=True)
                row["copy_bytes_per_second"] = report.spread(copies)
                row["bound_of_copy"] = report.spread([workload.bound_bytes / s / c for s, c in pairs])
        rows.append(row)
    return rows


def targets(row: dict[str, Any]) -> list[Target]:
    """Return the acceptance targets for the row of ours."""
    targets = []
    gpu = "bound_of_copy" in row
    if row["x_eager"]:
        targets.append(Target("x eager", row["x_eager"]["median"], GPU_SPEEDUP if gpu else CPU_SPEEDUP, True))
    if gpu:
        targets.append(Target("bound / copy bandwidth", row["bound_of_copy"]["median"], GPU_BANDWIDTH, True))
    else:
        targets.append(Target("extra / fp32 logits", row["extra_of_fp32_logits"], CPU_EXTRA, False))
    return targets


def block(block: list[dict[str, Any]]) -> list[str]:
    """Return the table of one workload."""
    first = block[0]
    size = f"{first['rows']} rows, {first['rows_with_loss']} with loss, K={first['group_size']}"
    fp32 = first["fp32_logits_bytes"] / MIB
    verdicts: list[str] = []
    rounds = max(len(row.get("rounds_seconds", ())) for row in block)
    lines = [
        "",
        f"EXO loss forward + backward, V={first['vocab']} {first['dtype']}: {size}; fp32 logits {fp32:.0f} MiB; "
        f"bound {first['bound_bytes'] / MIB:.0f} MiB; {rounds} rounds",
    ]
    gpu = any("bound_of_copy" in row for row in block)
    header = f"{'':17}{'ms':>8} {'(min..max)':>16}{'x eager':>9} {'(min..max)':>13}{'x compile':>10}"
    header += f"{'extra MiB':>11}{'/fp32 logits':>13}{'error':>9}"
    lines.append(header + (f"{'wall ms':>9}{'GB/s':>7}{'of copy':>9}" if gpu else ""))
    for row in block:
        lines.append(_line(row))
        if row["contender"] == OURS and "seconds" in row:
            verdicts = [str(target) for target in targets(row)]
    return lines + ["targets: " + ", ".join(verdicts)]


def _line(row: dict[str, Any]) -> str:
    name = f"{row['contender']:17}"
    if "seconds" not in row:
        return f"{name}  not timed: {row['not_timed']}"
    s, eager, compiled = row["seconds"], row["x_eager"], row["x_compile"]
    spread = f"({1e3 * s['min']:.4g}..{1e3 * s['max']:.4g})"
    line = f"{name}{1e3 * s['median']:8.4g} {spread:>16}"
    line += f"{eager['median']:9.2f} {'({min:.2f}..{max:.2f})'.format(**eager):>13}" if eager else f"{'-':>9} {'':13}"
    line += f"{compiled['median']:10.2f}" if compiled else f"{'-':>10}"
    line += f"{row['extra_bytes'] / MIB:11.1f}{row['extra_of_fp32_logits']:13.3f}{row['gradient_error']:9.0e}"
    if "bound_of_copy" in row:
        rate = row["bound_bytes"] / s["median"] / 1e9
        line += f"{1e3 * row['wall_seconds']['median']:9.4g}{rate:7.0f}{row['bound_of_copy']['median']:9.1%}"
    return line
