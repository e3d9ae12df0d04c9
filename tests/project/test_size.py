"""The size of the product: lines per package, and files that fit on a few screens. Budgets only go down."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGES = "commands"
BUDGET = {  # lines of Python
    "exo_kernels": 4410, "cli": 1240, "runs": 830, "data": 4345, "distributed": 540, "evaluation": 1050, "models": 2150,
    "reporting": 1000, "rollouts": 1130, "experiments": 1345, "training": 2245, STAGES: 2220,
}  # fmt: skip
LONGEST = 300  # lines of a file
MOST_FILES = 16  # in a package


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_packages_stay_within_their_budgets():
    sizes = dict.fromkeys(BUDGET, 0)
    for path in [*(ROOT / "exo").rglob("*.py"), *(ROOT / "exo_kernels").rglob("*.py")]:
        parts = path.relative_to(ROOT).parts
        package = parts[0] if parts[0] == "exo_kernels" else STAGES if len(parts) == 2 else parts[1]
        sizes[package] += lines(path)
    over = {name: (size, BUDGET[name]) for name, size in sizes.items() if size > BUDGET[name]}
    assert not over, f"lines and budget: {over}"


def test_files_are_short():
    long = set()
    for package in ("exo", "exo_kernels"):
        folder = ROOT / package
        long |= {str(p.relative_to(folder)) for p in folder.rglob("*.py") if lines(p) > LONGEST}
    assert not long, f"over {LONGEST} lines: {sorted(long)}"


def test_packages_have_few_files():
    for folder in {path.parent for path in (ROOT / "exo").rglob("*.py")} - {ROOT / "exo"}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder
