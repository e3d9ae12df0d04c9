"""A recipe: an experiment as a YAML file. The task, the methods, and the options of each stage by their own names.

Left out: the steps that a recipe makes (pipeline).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exo.cli import yaml_files
from exo.cli.errors import ConfigError
from exo.cli.fields import require, shortened
from exo.cli.spelling import suggestion

METHODS = ("exo-rw", "dpo-rw", "exo-pref", "dpo-pref", "ppo", "bon")
RECIPES = Path(__file__).parent / "recipes"
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@dataclass(frozen=True)
class Recipe:
    title: str
    task: str
    source: str | None = None  # of the task's data
    model: str | None = None  # to begin with; none: the task makes one
    oracle: str | None = None  # module:function, or "classifier": one trained on the task's labelled texts
    methods: Sequence[str] = METHODS
    group_sizes: Sequence[int] = (4,)  # K of exo-rw and dpo-rw
    seeds: Sequence[int] = (0,)  # of alignment and of the samples that evaluate it
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # of options of the methods' stages
    threads: int | None = None
    common: Mapping[str, Any] = field(default_factory=dict)  # options of every stage that has them
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    full: Mapping[str, Any] = field(default_factory=dict)  # what the long form changes
    notes: str = ""  # where the paper and its published scripts differ

    def __post_init__(self) -> None:
        for name, (holds, expected) in _TYPES.items():
            value = getattr(self, name)
            require(holds(value), name, expected, value)
        for method in self.methods:
            require(method in METHODS, "methods", f"some of {','.join(METHODS)}", method)
        require(len(self.seeds) > 0, "seeds", "one at least", self.seeds)
        for name in ("methods", "group_sizes", "seeds"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), name, "each once", ",".join(map(str, values)))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _is_integer(value: object, least: int, below: int = 2**32) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < below


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(of, value))


def _is_mapping(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Mapping) and all(isinstance(key, str) and of(item) for key, item in value.items())
    )


def _is_number(value: object) -> bool:
    """A number, or a text that is one: to YAML 1.1 1e-3 is a text."""
    try:
        return not isinstance(value, bool) and isinstance(value, str | int | float) and float(value) == float(value)
    except (ValueError, OverflowError):
        return False


_TEXT = (_is_text, "a text")
_MAYBE_TEXT = (lambda value: value is None or _is_text(value), "a text")
_OPTIONS = _is_mapping(_is_scalar)
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "title": _TEXT,
    "task": _TEXT,
    "source": _MAYBE_TEXT,
    "model": _MAYBE_TEXT,
    "oracle": _MAYBE_TEXT,
    "methods": (_is_list(_is_text), "a list of methods"),
    "group_sizes": (_is_list(lambda k: _is_integer(k, 2)), "a list of integers >= 2"),
    "seeds": (_is_list(lambda seed: _is_integer(seed, 0)), "a list of integers in [0, 2^32)"),
    "sweep": (
        _is_mapping(lambda values: _is_list(_is_number)(values) and len(values) > 0),
        "a mapping of options to lists of numbers",
    ),
    "threads": (lambda value: value is None or _is_integer(value, 1, 2**16), "an integer >= 1"),
    "common": (_OPTIONS, "a mapping of options to single values"),
    "stages": (_is_mapping(_OPTIONS), "a mapping of stages to mappings of options to single values"),
    "full": (lambda value: isinstance(value, Mapping), "a mapping of what the long form changes"),
    "notes": (lambda value: isinstance(value, str), "a text"),
}


def load(name: str, *, full: bool = False, **changes: Any) -> Recipe:
    """Read the recipe of that name, or a YAML file; `changes` that are None change nothing."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if (path.parent == RECIPES and path.stem not in SHIPPED) or not path.is_file():
        expected = f"one of {', '.join(SHIPPED)}, or a YAML file of your own"
        raise ConfigError(f"--recipe {shortened(name, 100)}: expected {expected}")
    try:
        values = yaml_files.read(path, typed=True)
    except ValueError as error:
        raise ConfigError(f"--recipe {path}: {error}") from None
    known = {f.name for f in dataclasses.fields(Recipe)}
    if not isinstance(values, dict) or not {"title", "task"} <= values.keys():
        raise ConfigError(f"--recipe {path}: expected a mapping with title and task")
    long = values.get("full", {})
    if full and isinstance(long, Mapping):  # another type is refused below
        values = _merged(values, long)
    for key in values:
        if key not in known:
            raise ConfigError(f"--recipe {path}: unknown key {key!r}{suggestion(str(key), known)}")
    return Recipe(**_merged(values, {key: value for key, value in changes.items() if value is not None}))


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge, anything else replaces; a sweep replaces a sweep."""
    merged = dict(below)
    for key, value in above.items():
        deeper = isinstance(value, Mapping) and isinstance(below.get(key), Mapping) and key != "sweep"
        merged[key] = _merged(below[key], value) if deeper else value
    return merged
