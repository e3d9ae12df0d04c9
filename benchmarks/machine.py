"""The machine: the kind that baselines and results are kept for, and everything else that changes a figure."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

# prefixes of environment variables that change the results
SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "THP_", "MALLOC_", "PYTORCH_", "CUDA_", "TORCHINDUCTOR_")
PEERS = ("liger-kernel", "trl", "transformers", "cut-cross-entropy", "quack-kernels")
ROOT = Path(__file__).parents[1]


def kind(device: str) -> str:
    """Return the kind of machine: device, number of cores and torch's minor version."""
    torch_version = ".".join(str(torch.__version__).split(".")[:2])
    cores = "" if device == "cuda" else f"-{torch.get_num_threads()}-cores"
    return re.sub(r"[^a-z0-9.]+", "-", f"{name(device)}{cores}-torch-{torch_version}".lower())


def name(device: str) -> str:
    """Return the GPU's name, or the processor's with its family and model, which tell generations apart."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).name
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} {fields.get('cpu family', '')}.{fields.get('model', '')}"


def describe(device: str) -> dict[str, Any]:
    """Return what a file of results says about the machine, the versions and the settings."""
    info = {
        "kind": kind(device), "name": name(device), "device": device,
        "system": f"{platform.system()} {platform.machine()}", "versions": versions(), "commit": commit(),
        "settings": {k: v for k, v in os.environ.items() if k.startswith(SETTINGS) and os.sep not in v},
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return info | {"memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return info | {"threads": torch.get_num_threads(), "huge_pages": huge.read_text().strip() if huge.exists() else ""}


def versions() -> dict[str, str]:
    """Return the versions of python, torch, triton and the peers that are installed."""
    result = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("triton", *PEERS):
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


def commit() -> str | None:
    """Return the commit, with a + if files have changed since; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "exo_kernels", "exo", "benchmarks/*.py")
        return git("rev-parse", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def heading(device: str) -> str:
    """Return a line with the machine, versions and settings."""
    info = describe(device)
    threads = f", {info['threads']} threads" if "threads" in info else ""
    listed = ", ".join(f"{package} {version}" for package, version in info["versions"].items())
    settings = "".join(f", {key}={value}" for key, value in info["settings"].items())
    return f"{info['name']}{threads}; {listed}{settings}"
