"""The public interface of exo_kernels: its signatures in api.txt, its types and its version.

After an intended change, run `python tests/project/test_api.py` to rewrite api.txt.
"""

import difflib
import importlib
import inspect
import pickle
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import exo_kernels

SNAPSHOT = Path(__file__).parents[1] / "api.txt"
ROOT = SNAPSHOT.parents[1]
LOSSES = [name for name in exo_kernels.__all__ if name.startswith("fused_")]


def annotation(value: object) -> str:
    """Return an annotation in a form that is the same on every version of Python."""
    text = value.__name__ if isinstance(value, type) and not hasattr(value, "__args__") else str(value)
    text = re.sub(r"\b(typing|torch|torch\.distributed\.distributed_c10d|exo_kernels(\.\w+)+)\.(?=[A-Z])", "", text)
    return re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)


def signature(name: str, function: typing.Any) -> str:
    """Return a signature with one parameter per line."""
    lines, mark = [], ""
    signature = inspect.signature(function)
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not mark:
            lines.append(mark := "*")
        prefix = {p.VAR_KEYWORD: "**", p.VAR_POSITIONAL: "*"}.get(p.kind, "")
        hint = "" if p.annotation is p.empty else f": {annotation(p.annotation)}"
        default = "" if p.default is p.empty else f" = {p.default!r}"
        lines.append(prefix + p.name + hint + default)
    result = "" if signature.return_annotation is inspect.Signature.empty else signature.return_annotation
    return "\n".join([f"{name}(", *(f"    {line}," for line in lines), f") -> {annotation(result)}"])


def interface(prefix: str, owner: typing.Any, names: typing.Iterable[str]) -> Iterator[str]:
    """Yield the signatures of the public functions, classes and values of a module."""
    for name in sorted(names):
        value = getattr(owner, name)
        if inspect.ismodule(value):
            functions = [n for n, f in vars(value).items() if callable(f) and n[0].islower() and "exo" in _module(f)]
            yield from interface(f"{name}.", value, functions)
        elif isinstance(value, type) and hasattr(value, "_fields"):
            fields = "".join(f"    {field}: {annotation(hint)}\n" for field, hint in value.__annotations__.items())
            yield f"class {prefix}{name}:\n{fields.rstrip()}"
        elif isinstance(value, type):
            yield signature(f"class {prefix}{name}", value)
            for method, function in sorted(vars(value).items()):
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield signature(f"{prefix}{name}.{method}", function)
        else:
            yield signature(prefix + name, value)


def _module(function: typing.Any) -> str:
    return getattr(getattr(function, "func", function), "__module__", "")


def current() -> str:
    return "\n\n".join(interface("", exo_kernels, exo_kernels.__all__)) + "\n"


def test_signatures_match_the_snapshot():
    expected, actual = SNAPSHOT.read_text(encoding="utf-8"), current()
    diff = "\n".join(difflib.unified_diff(expected.splitlines(), actual.splitlines(), "api.txt", "now", lineterm=""))
    advice = "If the change is intended, run `python tests/project/test_api.py` and note it in CHANGELOG.md."
    assert expected == actual, f"the public interface changed:\n{diff}\n{advice}"


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_ordinary_functions(name):
    """Check that a loss has a name and documentation, an annotation for every argument, and can be pickled."""
    loss = getattr(exo_kernels, name)
    assert loss.__name__ == name and pickle.loads(pickle.dumps(loss)) is loss
    assert loss.__doc__.startswith("EXO" if "exo" in name else "DPO") and "Args:" in loss.__doc__
    parameters = inspect.signature(loss).parameters.values()
    assert all(p.annotation is not p.empty for p in parameters)
    assert all(f"{p.name}" in loss.__doc__ for p in parameters)


@pytest.mark.parametrize("name", LOSSES + ["token_logps", "linear_token_logps"])
def test_overloads_have_the_keywords_of_the_function(name):
    """Compare the signature with the TypedDict of keywords, which type checkers read."""
    function = getattr(exo_kernels, name)
    parameters = inspect.signature(function).parameters.values()
    expected = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    types = importlib.import_module("exo_kernels.api.types")
    kind = {"token": "RowKeywords", "linear": "HeadKeywords"}.get(name.split("_")[0])
    if kind is None:
        kind = "HiddenLossKeywords" if "linear" in name else "LogitsLossKeywords"
    keywords = typing.get_type_hints(getattr(types, kind))
    switch = "return_stats" if name in LOSSES else "return_entropy"
    assert keywords | {switch: bool} == expected


def test_the_version_is_in_one_place():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert exo_kernels.__version__ not in text and re.fullmatch(r"\d+\.\d+\.\d+", exo_kernels.__version__)


def test_statistics_are_returned_on_request():
    x, labels = torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.long)
    assert isinstance(exo_kernels.fused_exo_loss(x, labels, torch.zeros(2)), torch.Tensor)
    loss, stats = exo_kernels.fused_exo_loss(x, labels, torch.zeros(2), return_stats=True)
    assert isinstance(stats, exo_kernels.LossStats) and isinstance(loss, torch.Tensor)


if __name__ == "__main__":
    SNAPSHOT.write_text(current(), encoding="utf-8")
