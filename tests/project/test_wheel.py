"""The wheel contains the packages with their data files, and exo_kernels runs from it with torch alone."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# the installed packages, except torch and its requirements
BLOCKED = (
    *(
        "triton",
        "numpy",
        "transformers",
        "tokenizers",
        "accelerate",
        "safetensors",
        "peft",
        "rich",
        "matplotlib",
        "yaml",
    ),
    "exo",
)
PROGRAM = f"""
import sys
sys.modules |= dict.fromkeys({BLOCKED!r})
sys.path.insert(0, sys.argv[1])
import torch, exo_kernels
assert exo_kernels.__file__.startswith(sys.argv[1]), exo_kernels.__file__
x = torch.randn(2, 3, 5, requires_grad=True)
exo_kernels.fused_exo_loss(x, torch.ones(2, 3, dtype=torch.long), torch.zeros(2)).backward()
assert x.grad.isfinite().all()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for name in ("exo", "exo_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", directory]
    subprocess.run([*command, source], check=True, capture_output=True, cwd=directory)
    (path,) = directory.glob("*.whl")
    return path


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("exo", "exo_kernels"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(ROOT)) in names


def test_exo_kernels_runs_from_the_wheel_with_torch_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "site")]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
