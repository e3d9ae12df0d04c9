"""Imports go from higher to lower layers only, and exo_kernels needs torch alone.

The first half reads the source. A new package or command must be added to LAYERS.
"""

import ast
import subprocess
import sys
from pathlib import Path

import exo_kernels

ROOT = Path(exo_kernels.__file__).parents[1]

# Packages and commands by layer, lowest first. A file may import from its package and from lower layers.
KERNEL_LAYERS = (
    ("objectives", "groups", "numerics", "validation", "dispatch"),
    ("value_checks", "reference"),
    ("chunked", "_triton", "schedules"),
    ("ops",),
    ("api",),
    ("__init__",),
)
LAYERS = (
    ("cli",),
    ("runs", "data"),
    ("distributed", "evaluation"),
    ("models", "reporting"),
    ("rollouts", "experiments"),
    ("training",),
    (
        "prepare",
        "sft",
        "sample",
        "reward",
        "score",
        "align",
        "ppo",
        "best_of_n",
        "evaluate",
        "judge",
        "label",
        "report",
    ),
    ("train", "inspect"),
)
EDGES = 110  # the most (importing, imported) pairs of packages and commands of exo
# The only packages of exo that may import these libraries.
IMPORTERS = {
    "accelerate": {"distributed", "models", "training"},
    "transformers": {"models"},
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Return every module or name that the file imports anywhere: {"torch", "exo_kernels.api.logits.token_logps"}."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide where they point"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(path: Path) -> str:
    """Return the package or command of a file: exo/data/text/limits.py is part of "data"."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def upward(package: str, layers: tuple[tuple[str, ...], ...]) -> tuple[list[str], set[tuple[str, str]]]:
    """Return the imports that do not go down, and the (importing, imported) pairs of parts."""
    layer = {part: number for number, parts in enumerate(layers) for part in parts}
    wrong, edges = [], set()
    for path in sources(package):
        part = part_of(path)
        for name in imported(path):
            target = name.split(".")[1] if name.startswith(f"{package}.") else part
            if target in (part, "__version__") or (package == "exo" and part == "__init__"):
                continue
            edges.add((part, target))
            if layer[target] >= layer[part]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    return wrong, edges


def test_imports_go_down():
    assert upward("exo_kernels", KERNEL_LAYERS)[0] == []
    wrong, edges = upward("exo", LAYERS)
    assert wrong == []
    assert len(edges) <= EDGES, sorted(edges)


def test_implementations_do_not_import_one_another():
    for path in sources("exo_kernels/chunked") + sources("exo_kernels/_triton") + sources("exo_kernels/schedules"):
        others = {name.split(".")[1] for name in imported(path) if name.startswith("exo_kernels.")}
        assert not others & ({"chunked", "_triton", "schedules"} - {part_of(path)}), path


def test_exo_kernels_needs_torch_alone():
    for path in sources("exo_kernels"):
        outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
        assert outside <= {"exo_kernels", "torch"} | ({"triton"} if "_triton" in path.parts else set()), path


def test_others_use_the_public_names_of_exo_kernels():
    public = {*exo_kernels.__all__, "__version__"}
    for path in sources("exo") + sources("benchmarks"):
        if path.name == "planted.py":  # it wraps private functions on purpose
            continue
        used = {name.split(".")[1] for name in imported(path) if name.startswith("exo_kernels.")}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "exo_kernels":
                used.add(node.attr)
        assert used <= public, path


def test_only_some_packages_import_certain_libraries():
    tests = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tests"}
    for path in sources("exo") + sources("exo_kernels") + sources("benchmarks"):
        names = {name.split(".")[0] for name in imported(path)}
        assert not names & tests, path
        if path.is_relative_to(ROOT / "exo"):
            assert all(part_of(path) in parts for library, parts in IMPORTERS.items() if library in names), path


# Tests in fresh interpreters.

# The installed packages, except torch and its requirements.
BLOCKED = """
import sys
for name in ("triton", "numpy", "transformers", "tokenizers", "accelerate", "datasets", "safetensors", "peft", "pytest",
             "huggingface_hub", "flash_attn", "rich", "matplotlib", "yaml", "pandas", "scipy", "exo"):
    sys.modules[name] = None
"""
USE = """
import torch, exo_kernels
x = torch.randn(2, 3, 5, requires_grad=True)
labels = torch.ones(2, 3, dtype=torch.long)
for impl in ("auto", "chunked", "reference"):
    loss = exo_kernels.fused_exo_loss(x, labels, torch.zeros(2), impl=impl)
    loss.backward()
assert x.grad.isfinite().all()
"""


def run(program: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", program]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_exo_kernels_runs_with_torch_alone():
    run(BLOCKED + USE)


def test_a_missing_triton_is_one_clear_line():
    run(
        BLOCKED + USE + "try:\n"
        "    exo_kernels.token_logps(x, labels, impl='triton')\n"
        "except ValueError as error:\n"
        "    assert 'pip install triton' in str(error) and len(str(error).splitlines()) == 1\n"
        "else:\n"
        "    raise AssertionError('ran without triton')\n"
    )


def test_triton_is_imported_when_a_kernel_is_first_used():
    """Check that neither the import nor another implementation loads a kernel. (torch itself may import triton.)"""
    program = "import sys, torch\nbefore = 'triton' in sys.modules\nimport exo_kernels\n"
    program += "assert before or 'triton' not in sys.modules\n" + USE
    run(program + "assert 'exo_kernels._triton' not in sys.modules\n")


def test_importing_has_no_side_effects():
    """Check that the import starts no thread, does not initialize CUDA, draws no random number and has no output."""
    program = (
        "import threading, torch\nstate = torch.random.get_rng_state()\nimport exo_kernels\n"
        "assert threading.active_count() == 1\nassert not torch.cuda.is_initialized()\n"
        "assert torch.equal(state, torch.random.get_rng_state())\n"
    )
    assert run(program) == ""
