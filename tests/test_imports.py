"""Imports point one way, and importing exo_kernels needs torch alone.

The first half reads the source; adding a module means adding a line to LAYERS, where its place in the house is decided.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import exo_kernels

ROOT = Path(exo_kernels.__file__).parents[1]

# Who may import whom in exo_kernels. Implementations are loaded by name in ops.py once dispatch.py has chosen; they
# never import one another, and nothing imports api.py but the package itself.
LAYERS = {
    "__init__": {"api", "linear", "modules", "objectives", "reference"},
    "modules": {"api", "linear", "validation"},
    "api": {"dispatch", "groups", "losses", "objectives", "ops", "reference", "validation", "value_checks"},
    "linear": {
        *("curve", "dtypes", "dispatch", "groups", "linear", "losses", "ops", "reference", "validation", "value_checks")
    },
    "losses": {"groups", "objectives", "ops", "reference", "validation"},
    "ops": {"dtypes", "groups", "validation", "value_checks"},
    "value_checks": {"validation"},
    "chunked": {"chunked", "curve", "dtypes", "groups", "objectives"},
    "reference": {"objectives"},
    "_triton": {"_triton", "curve"},
    "curve": set(),
    "dtypes": set(),
    "dispatch": set(),
    "groups": set(),
    "objectives": set(),
    "validation": set(),
}
# Of exo: stages talk through files. What several need lives in a module that is no stage; only the runs of several
# stages import them.
STAGES = {"prepare", "sft", "sample", "score", "reward", "align", "ppo", "best_of_n"}
STAGES |= {"evaluate", "judge", "label", "report"}
RUNS = {"train", "quickstart.recipe", "dry_run"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    """exo/quickstart/recipe.py: "exo.quickstart.recipe"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Every module or name that the file imports anywhere, in full: {"torch", "exo_kernels.api.token_logps"}."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: relative imports hide where they point"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sources("exo_kernels"), ids=module_of)
def test_layers_of_exo_kernels(path):
    layer = path.relative_to(ROOT / "exo_kernels").parts[0].removesuffix(".py")
    assert layer in LAYERS, "a new module: say in LAYERS what it may import"
    inside = {name.split(".")[1] for name in imported(path) if name.startswith("exo_kernels.")}
    assert inside <= LAYERS[layer] | ({"__version__"} if layer == "__init__" else set())


@pytest.mark.parametrize("path", sources("exo_kernels"), ids=module_of)
def test_exo_kernels_imports_torch_alone(path):
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert outside <= {"exo_kernels", "torch"} | ({"triton"} if "_triton" in path.parts else set())


@pytest.mark.parametrize("path", sources("exo") + sources("benchmarks"), ids=module_of)
def test_public_names_only(path):
    """Of exo_kernels; and reference.* by its own names, which are the public ones."""
    public = set(exo_kernels.__all__)
    used = {name.split(".", 1)[1] for name in imported(path) if name.startswith("exo_kernels.")}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "exo_kernels":
            used.add(node.attr)
    assert {name.split(".")[0] for name in used} <= public | {"__version__"}


@pytest.mark.parametrize("path", sources("exo"), ids=module_of)
def test_stages_talk_through_files(path):
    module = module_of(path).removeprefix("exo").removeprefix(".")
    names = imported(path)
    stages = {stage for stage in STAGES if any(f"{name}.".startswith(f"exo.{stage}.") for name in names)}
    assert not stages or module in RUNS, f"{module} imports the stages {stages}"


@pytest.mark.parametrize("path", sources("exo"), ids=module_of)
def test_one_package_knows_transformers(path):
    if any(name.split(".")[0] == "transformers" for name in imported(path)):
        assert module_of(path).startswith("exo.models")


@pytest.mark.parametrize("path", sources("exo_kernels") + sources("exo") + sources("benchmarks"), ids=module_of)
def test_nothing_imports_tests(path):
    tests = {p.stem for p in (ROOT / "tests").glob("*.py")} | {"tests"}
    assert not {name.split(".")[0] for name in imported(path)} & tests


# Fresh interpreters.

# Everything that is installed, but torch and what torch itself cannot do without.
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


def test_torch_is_enough():
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
    """Not by the import, and no kernel by another implementation. (torch itself imports triton with its compiler.)"""
    program = "import sys, torch\nbefore = 'triton' in sys.modules\nimport exo_kernels\n"
    program += "assert before or 'triton' not in sys.modules\n" + USE
    run(program + "assert 'exo_kernels._triton' not in sys.modules\n")


def test_importing_does_nothing_else():
    """No threads, no CUDA, no files open, no random numbers drawn, no output."""
    program = (
        "import threading, torch\nstate = torch.random.get_rng_state()\nimport exo_kernels\n"
        "assert threading.active_count() == 1\nassert not torch.cuda.is_initialized()\n"
        "assert torch.equal(state, torch.random.get_rng_state())\n"
    )
    assert run(program) == ""
