"""Code shared by all reports: results, targets, ratios, the machine, and the JSON of a session.

Ratios are computed round by round, because calls close in time have the same noise.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Memory, Time

Range = dict[str, float]  # median, min, max

# Prefixes of environment variables that change the results.
SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "THP_", "MALLOC_", "PYTORCH_", "CUDA_", "TORCHINDUCTOR_")
PEERS = ("liger-kernel", "cut-cross-entropy", "trl", "transformers")  # benchmarked if installed


@dataclass
class Result:
    """A contender's result on a workload; without times and memory if it did not pass the gate."""

    name: str
    errors: dict[str, float] = field(default_factory=dict)  # relative, against the fp64 oracle
    tolerance: float | None = None
    not_timed: str = ""  # the reason
    times: list[Time] = field(default_factory=list)
    memory: Memory | None = None

    @property
    def seconds(self) -> list[float]:
        return [t.seconds for t in self.times]


def versus(faster: Range | None) -> str:
    """Format the speedup of ours over a contender with its range; a dash for ours."""
    if faster is None:
        return f"{'-':>12} {'':13}"
    return f"{faster['median']:12.2f} {'({min:.2f}..{max:.2f})'.format(**faster):>13}"


@dataclass(frozen=True)
class Target:
    name: str
    value: float
    goal: float
    at_least: bool  # otherwise at most

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.name} {self.value:.3g} ({sign} {self.goal:g}) {'MET' if self.met else 'MISSED'}"


def spread(values: list[float]) -> Range:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def speedup(result: Result, over: Result | None) -> Range | None:
    """Return the ratio of the time of `over` to that of the result."""
    if over is None or not over.times or not result.times:
        return None
    return spread([b / a for a, b in zip(result.seconds, over.seconds, strict=True)])


def with_targets(rows: list[dict[str, Any]], targets: list[Target]) -> list[dict[str, Any]]:
    """Add the targets of a workload to the first of its rows, and return the rows."""
    rows[0]["targets"] = [asdict(target) for target in targets]
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line with the targets, met or missed; no line if there are none."""
    targets = [str(Target(**target)) for target in rows[0]["targets"]]
    return ["targets: " + ", ".join(targets)] if targets else []


def machine(device: str) -> dict[str, Any]:
    """Return the name of the machine and all settings that change the results."""
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
    """Return the versions of torch, triton, python and the peers; None if not installed."""
    try:
        import triton
    except ImportError:
        triton_version = None
    else:
        triton_version = triton.__version__
    all_versions = {"torch": str(torch.__version__), "triton": triton_version, "python": platform.python_version()}
    return all_versions | {name: _installed(name) for name in PEERS}


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit, with a + if files have changed since; None outside a repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../exo_kernels", "*.py")
        return git("rev-parse", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def as_json(device: str, rows: list[dict[str, Any]]) -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = {"machine": machine(device), "versions": versions(), "commit": commit(), "date": now, "rows": rows}
    return json.dumps(report, indent=1) + "\n"


def heading(device: str) -> str:
    """Return a line with the machine, versions and settings."""
    m, v = machine(device), versions()
    threads = f", {m['threads']} threads" if "threads" in m else ""
    triton = f", triton {v['triton']}" if device == "cuda" else ""
    peers = "".join(f", {name} {v[name]}" for name in PEERS if v[name])
    settings = "".join(f", {key}={value}" for key, value in m["settings"].items())
    return f"{m['name']}{threads}; torch {v['torch']}{triton}, python {v['python']}{peers}{settings}"
