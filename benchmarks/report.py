"""From rounds to rows, verdicts, a table and JSON. Ratios are taken round by round: neighbours in time share the noise.

Left out: figures (plot.py).
"""

import datetime
import json
import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import contenders
from benchmarks.measure import Memory, Time
from benchmarks.workload import MIB, Workload

Range = dict[str, float]  # median, min, max

CPU_SPEEDUP, CPU_EXTRA = 2.0, 1 / 8  # x eager; of the fp32 logits
GPU_SPEEDUP, GPU_BANDWIDTH = 4.0, 0.90  # x eager in fp32; of the measured copy bandwidth, on the bound's bytes

# Beginnings of environment variables that change the figures.
SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "THP_", "MALLOC_", "PYTORCH_", "CUDA_", "TORCHINDUCTOR_")


@dataclass
class Result:
    """One contender on one workload; everything but the errors is empty where the gate was not passed."""

    name: str
    loss_error: float | None = None  # relative, against the oracle in fp64
    gradient_error: float | None = None
    tolerance: float | None = None
    not_timed: str = ""  # why
    times: list[Time] = field(default_factory=list)
    memory: Memory | None = None

    @property
    def seconds(self) -> list[float]:
        return [t.seconds for t in self.times]


@dataclass(frozen=True)
class Target:
    name: str
    value: float
    goal: float
    at_least: bool  # else at most

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.name} {self.value:.3g} ({sign} {self.goal:g}) {'MET' if self.met else 'MISSED'}"


def _range(values: list[float]) -> Range:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _speedup(result: Result, over: Result | None) -> Range | None:
    if over is None or not over.times or not result.times:
        return None
    return _range([b / a for a, b in zip(result.seconds, over.seconds, strict=True)])


def rows(workload: Workload, results: list[Result]) -> list[dict[str, Any]]:
    by_name = {r.name: r for r in results}
    found = []
    for r in results:
        row: dict[str, Any] = {
            "workload": str(workload), "vocab": workload.vocab, "sequences": workload.sequences,
            "length": workload.length, "dtype": str(workload.dtype).removeprefix("torch."),
            "group_size": workload.group_size, "rows": workload.rows, "rows_with_loss": workload.rows_with_loss,
            "bound_bytes": workload.bound_bytes, "fp32_logits_bytes": workload.fp32_logits_bytes,
            "contender": r.name, "not_timed": r.not_timed, "tolerance": r.tolerance,
            "loss_error": r.loss_error, "gradient_error": r.gradient_error,
        }  # fmt: skip
        if r.times and r.memory is not None:
            row |= {
                "seconds": _range(r.seconds),
                "wall_seconds": _range([t.wall_seconds for t in r.times]),
                "rounds_seconds": r.seconds,
                "x_eager": _speedup(r, by_name.get(contenders.EAGER)),
                "x_compile": _speedup(r, by_name.get(contenders.COMPILED)),
                "extra_bytes": r.memory.extra,
                "extra_bytes_allocated": r.memory.allocated,
                "extra_bytes_resident": r.memory.resident,
                "extra_of_fp32_logits": r.memory.extra / workload.fp32_logits_bytes,
            }
            copies = [t.copy_bytes_per_second for t in r.times]
            if all(copies):
                pairs = zip(r.seconds, copies, strict=True)
                row["copy_bytes_per_second"] = _range(copies)
                row["bound_of_copy"] = _range([workload.bound_bytes / s / c for s, c in pairs])
        found.append(row)
    return found


def targets(row: dict[str, Any]) -> list[Target]:
    """The acceptance targets on the row of ours."""
    found = []
    gpu = "bound_of_copy" in row
    if row["x_eager"]:
        found.append(Target("x eager", row["x_eager"]["median"], GPU_SPEEDUP if gpu else CPU_SPEEDUP, True))
    if gpu:
        found.append(Target("bound / copy bandwidth", row["bound_of_copy"]["median"], GPU_BANDWIDTH, True))
    else:
        found.append(Target("extra / fp32 logits", row["extra_of_fp32_logits"], CPU_EXTRA, False))
    return found


def machine(device: str) -> dict[str, Any]:
    """Name and every setting from outside that changes the figures."""
    settings = {k: v for k, v in os.environ.items() if k.startswith(SETTINGS) and os.sep not in v}
    info: dict[str, Any] = {
        "device": device,
        "system": f"{platform.system()} {platform.machine()}",
        "settings": settings,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return info | {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    info["huge_pages"] = huge.read_text().strip() if huge.exists() else None
    return info | {"name": _cpu_name(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    try:
        import triton
    except ImportError:
        found = None
    else:
        found = triton.__version__
    return {"torch": str(torch.__version__), "triton": found, "python": platform.python_version()}


def as_json(device: str, found: list[dict[str, Any]]) -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = {"machine": machine(device), "versions": versions(), "date": now, "rows": found}
    return json.dumps(report, indent=1) + "\n"


def table(device: str, found: list[dict[str, Any]]) -> list[str]:
    """Lines of text, a block for each workload."""
    m, v = machine(device), versions()
    threads = f", {m['threads']} threads" if "threads" in m else ""
    triton = f", triton {v['triton']}" if device == "cuda" else ""
    settings = "".join(f", {key}={value}" for key, value in m["settings"].items())
    lines = [f"{m['name']}{threads}; torch {v['torch']}{triton}, python {v['python']}{settings}"]
    for workload in dict.fromkeys(row["workload"] for row in found):
        lines += _block([row for row in found if row["workload"] == workload])
    return lines


def _block(block: list[dict[str, Any]]) -> list[str]:
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
        if row["contender"] == contenders.OURS and "seconds" in row:
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
