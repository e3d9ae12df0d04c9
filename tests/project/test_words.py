"""User-facing text is plain English: it avoids a list of words and beginnings of sentences."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = [
    "heeded", "anew", "held to", "said", "gone on from", "goes on from", "cannot be had", "made anew", "bears",
    "mends?", "mended", "parted", "of one's own", "whoever", "is whole", "are whole", "state that is whole",
]  # fmt: skip
PATTERN = re.compile(rf"\b({'|'.join(WORDS)})\b", re.IGNORECASE)
# Functions that print their arguments, and the pages of the documentation.
PRINTED = {"log", "warn", "headline", "print", "print_error"}
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
STAGES = [path.stem for path in (ROOT / "exo").glob("*.py") if path.stem not in ("__init__", "api", "inspect")]


def texts(tree: ast.AST):
    """Yield (line, text) of each string that is printed or raised."""
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if isinstance(node, ast.Raise) or name in PRINTED:
            for part in ast.walk(call):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


def offences(place: str, lines) -> list[str]:
    return [f"{place}:{line}: {match.group()}" for line, text in lines for match in PATTERN.finditer(text)]


def test_messages():
    wrong = []
    for path in [*(ROOT / "exo").rglob("*.py"), *(ROOT / "exo_kernels").rglob("*.py")]:
        wrong += offences(str(path.relative_to(ROOT)), texts(ast.parse(path.read_text(encoding="utf-8"))))
    assert not wrong, "\n".join(wrong)


def test_help():
    wrong = []
    for stage in STAGES:
        module = importlib.import_module(f"exo.{stage}")
        fields = [(field.name, field.metadata["help"]) for field in dataclasses.fields(module.Config)]
        wrong += offences(f"exo.{stage}", [*fields, ("docstring", module.__doc__)])
    assert not wrong, "\n".join(wrong)


def test_pages():
    wrong = []
    for name in PAGES:
        wrong += offences(name, enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1))
    for path in (ROOT / "exo").rglob("*.j2"):
        wrong += offences(path.name, enumerate(path.read_text(encoding="utf-8").splitlines(), 1))
    assert not wrong, "\n".join(wrong)


def test_first_lines_of_docstrings():
    """Check that no docstring starts with a relative clause."""
    riddle = re.compile(r"(Whether|What|Of (several|all|each)|Nothing|How to be)\b")
    wrong = []
    for path in [*(ROOT / "exo").rglob("*.py"), *(ROOT / "exo_kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                first = (ast.get_docstring(node) or "").split("\n")[0]
                if riddle.match(first):
                    wrong.append(f"{path.relative_to(ROOT)}: {first}")
    assert not wrong, "\n".join(wrong)
