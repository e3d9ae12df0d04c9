"""What all parts share: a contender's result, targets, ratios, the machine, and the JSON of a session.

Ratios are taken round by round: neighbours in time share the noise. Left out: what a row says and how its table looks
(*_report.py), figures (plot.py).
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

# Beginnings of environment variables that change the figures.
SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "THP_", "MALLOC_", "PYTORCH_", "CUDA_", "TORCHINDUCTOR_")
PEERS = ("liger-kernel", "cut-cross-entropy", "trl", "transformers")  # compared with where they are installed


@dataclass
class Result:
    """One contender on one workload; everything but the errors is empty where the gate was not passed."""

    name: str
    errors: dict[str, float] = field(default_factory=dict)  # relative, against the oracle in fp64
    tolerance: float | None = None
    not_timed: str = ""  # why
    times: list[Time] = field(default_factory=list)
    memory: Memory | None = None

    @property
    def seconds(self) -> list[float]:
        return [t.seconds for t in self.times]


def versus(faster: Range | None) -> str:
    """How many times as fast ours is, with its range; a dash for ours itself."""
    if faster is None:
        return f"{'-':>12} {'':13}"
    return f"{faster['median']:12.2f} {'({min:.2f}..{max:.2f})'.format(**faster):>13}"


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


def spread(values: list[float]) -> Range:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def speedup(result: Result, over: Result | None) -> Range | None:
    """The other's time over the result's."""
    if over is None or not over.times or not result.times:
        return None
    return spread([b / a for a, b in zip(result.seconds, over.seconds, strict=True)])


def with_targets(found: list[dict[str, Any]], targets: list[Target]) -> list[dict[str, Any]]:
    """The rows of a workload, the first of which carries its targets."""
    found[0]["targets"] = [asdict(target) for target in targets]
    return found


def verdicts(found: list[dict[str, Any]]) -> list[str]:
    """A line that says which targets are met; none where there are none."""
    targets = [str(Target(**target)) for target in found[0]["targets"]]
    return ["targets: " + ", ".join(targets)] if targets else []


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
    """Of everything that is timed; None where it is not installed."""
    try:
        import triton
    except ImportError:
        found = None
    else:
        found = triton.__version__
    all_versions = {"torch": str(torch.__version__), "triton": found, "python": platform.python_version()}
    return all_versions | {name: _installed(name) for name in PEERS}


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that was measured, with a + where files had been changed since; None outside a repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../exo_kernels", "*.py")
        return git("rev-parse", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def as_json(device: str, found: list[dict[str, Any]]) -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = {"machine": machine(device), "versions": versions(), "commit": commit(), "date": now, "rows": found}
    return json.dumps(report, indent=1) + "\n"


def heading(device: str) -> str:
    """The machine and what runs on it, in a line."""
    m, v = machine(device), versions()
    threads = f", {m['threads']} threads" if "threads" in m else ""
    triton = f", triton {v['triton']}" if device == "cuda" else ""
    peers = "".join(f", {name} {v[name]}" for name in PEERS if v[name])
    settings = "".join(f", {key}={value}" for key, value in m["settings"].items())
    return f"{m['name']}{threads}; torch {v['torch']}{triton}, python {v['python']}{peers}{settings}"
