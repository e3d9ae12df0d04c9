"""Rows, targets and table of the training step. Code shared by all reports is in report.py."""

from typing import Any

from benchmarks import report
from benchmarks.harness import OURS
from benchmarks.step_contenders import PADDED, TRL
from benchmarks.step_workload import Workload

SUITE = "step"
MIB = 2**20
CPU_SHARED, CPU_TRL, GPU_SHARED, GPU_TRL = 2.0, 7.0, 3.0, 2.0  # speedups
MEMORY_OF_TRL = 0.25


def rows(work: Workload, results: list[report.Result], device: str) -> list[dict[str, Any]]:
    """Return one row per contender."""
    by_name = {result.name: result for result in results}
    rows = []
    for r in results:
        row: dict[str, Any] = {
            "suite": SUITE, "workload": str(work), **work._asdict(), "padded_tokens": work.padded_tokens,
            "shared_tokens": work.shared_tokens, "contender": r.name, "not_timed": r.not_timed,
            **{f"{what}_error": r.errors.get(what) for what in ("loss", "gradient")},
        }  # fmt: skip
        if r.times:
            row |= {
                "seconds": report.spread(r.seconds),
                "rounds_seconds": r.seconds,
                "tokens_per_second": work.padded_tokens / report.spread(r.seconds)["median"],
                "ours_is_faster": report.speedup(by_name[OURS], r),
            }
        if r.memory is not None:
            row |= {"extra_bytes": r.memory.extra}
        rows.append(row)
    return report.with_targets(rows, targets(work, rows, device))


def targets(work: Workload, rows: list[dict[str, Any]], device: str) -> list[report.Target]:
    timed = {row["contender"]: row for row in rows if "seconds" in row}
    gpu = device == "cuda"
    goals = []
    if gpu and (work.group_size, work.prompt) == (4, 1024) or not gpu and work.vocab == 4096:
        faster = timed[PADDED]["ours_is_faster"]["median"]
        goals.append(report.Target("x padded", faster, GPU_SHARED if gpu else CPU_SHARED, True))
    if TRL in timed:
        faster = timed[TRL]["ours_is_faster"]["median"]
        goals.append(report.Target("x TRL", faster, GPU_TRL if gpu else CPU_TRL, True))
        share = timed[OURS]["extra_bytes"] / timed[TRL]["extra_bytes"]
        goals.append(report.Target("memory of TRL's", share, MEMORY_OF_TRL, False))
    return goals


def block(block: list[dict[str, Any]]) -> list[str]:
    """Return the table of one workload."""
    first = block[0]
    rounds = max(len(row.get("rounds_seconds", ())) for row in block)
    return [
        "",
        f"a step, K={first['group_size']}, prompt {first['prompt']}, completion {first['completion']}, "
        f"{first['prompts']} prompts: {first['padded_tokens']:,} tokens padded, {first['shared_tokens']:,} shared; "
        f"{first['layers']} layers, D={first['hidden']}, V={first['vocab']}; {rounds} rounds",
        f"{'':26}{'ms':>9} {'(min..max)':>18}{'tokens/s':>11}{'ours faster':>12} {'(min..max)':>13}{'extra MiB':>11}"
        f"{'loss err':>10}{'gradient':>10}",
        *map(_line, block),
        *report.verdicts(block),
    ]


def _line(row: dict[str, Any]) -> str:
    name = f"{row['contender']:26}"
    if "seconds" not in row:
        return f"{name}  not timed: {row['not_timed']}"
    s, faster = row["seconds"], row["ours_is_faster"]
    spread = f"({1e3 * s['min']:.4g}..{1e3 * s['max']:.4g})"
    line = f"{name}{1e3 * s['median']:9.4g} {spread:>18}{row['tokens_per_second']:11,.0f}"
    line += report.versus(None if row["contender"] == OURS else faster)
    line += f"{row['extra_bytes'] / MIB:11.1f}" if "extra_bytes" in row else f"{'-':>11}"
    for what in ("loss", "gradient"):
        error = row[f"{what}_error"]
        line += f"{'-':>10}" if error is None else f"{error:10.0e}"
    return line
