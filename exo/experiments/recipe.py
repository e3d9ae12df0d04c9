"""Read a recipe: a YAML file with the task, the methods and the options of the stages of an experiment."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from exo.cli.errors import ConfigError
from exo.cli.fields import Range, require, shortened
from exo.cli.spelling import suggestion

METHODS = ("exo-rw", "dpo-rw", "exo-pref", "dpo-pref", "ppo", "bon")
RECIPES = Path(__file__).parent / "recipes"
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))

Check = Callable[[Any], bool]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _is_number(value: object) -> bool:
    """Return whether the value is a number, or a text that is one: to YAML 1.1, 1e-3 is a text."""
    try:
        return not isinstance(value, bool) and isinstance(value, str | int | float) and float(value) == float(value)
    except (ValueError, OverflowError):
        return False


def _is_integer(least: int, below: int = 2**32) -> Check:
    return lambda value: type(value) is int and least <= value < below


def _is_list(of: Check, least: int = 0) -> Check:
    return lambda value: isinstance(value, list | tuple) and len(value) >= least and all(map(of, value))


def _is_mapping(of: Check) -> Check:
    return lambda value: (
        isinstance(value, Mapping) and all(isinstance(key, str) and of(item) for key, item in value.items())
    )


def _key(holds: Check, expected: str, default: Any = MISSING) -> Any:
    """Return the field of a key of the file. If its default is None, its value may be None too."""
    metadata = {"range": Range(holds, expected)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """The keys of a recipe's file. ConfigError for a value of another type."""

    title: str = _key(_is_text, "a text")
    task: str = _key(_is_text, "a text")
    source: str | None = _key(_is_text, "a text", None)  # of the task's data
    model: str | None = _key(_is_text, "a text", None)  # to start from; None if the task creates one
    # module:function, or "classifier": a reward model trained on the task's labelled texts
    oracle: str | None = _key(_is_text, "a text", None)
    methods: Sequence[str] = _key(_is_list(_is_text), "a list of methods", METHODS)
    group_sizes: Sequence[int] = _key(_is_list(_is_integer(2)), "a list of integers >= 2", (4,))  # K of *-rw
    # of alignment, and of the samples that evaluate it
    seeds: Sequence[int] = _key(_is_list(_is_integer(0)), "a list of integers in [0, 2^32)", (0,))
    # values of options of the methods' stages
    sweep: Mapping[str, Sequence[Any]] = _key(
        _is_mapping(_is_list(_is_number, 1)), "a mapping of options to lists of numbers", {}
    )
    threads: int | None = _key(_is_integer(1, 2**16), "an integer >= 1", None)
    # options of every stage that has them
    common: Mapping[str, Any] = _key(_is_mapping(_is_scalar), "a mapping of options to single values", {})
    stages: Mapping[str, Mapping[str, Any]] = _key(
        _is_mapping(_is_mapping(_is_scalar)), "a mapping of stages to mappings of options to single values", {}
    )
    # changes of the long form
    full: Mapping[str, Any] = _key(lambda value: isinstance(value, Mapping), "a mapping of keys to values", {})
    # differences between the paper and its published scripts
    notes: str = _key(lambda value: isinstance(value, str), "a text", "")

    def __post_init__(self) -> None:
        for key in dataclasses.fields(self):
            (holds, expected), value = key.metadata["range"], getattr(self, key.name)
            require((value is None and key.default is None) or holds(value), key.name, expected, value)
        for method in self.methods:
            require(method in METHODS, "methods", f"some of {','.join(METHODS)}", method)
        require(len(self.seeds) > 0, "seeds", "at least one", self.seeds)
        for name in ("methods", "group_sizes", "seeds"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), name, "each once", ",".join(map(str, values)))


def load(name: str, *, full: bool = False, **changes: Any) -> Recipe:
    """Read a shipped recipe or a YAML file, and apply the changes that are not None."""
    from exo.cli import yaml_files

    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if (path.parent == RECIPES and path.stem not in SHIPPED) or not path.is_file():
        raise ConfigError(f"--recipe {shortened(name, 100)}: expected one of {', '.join(SHIPPED)}, or a YAML file")
    try:
        values = yaml_files.read(path, typed=True)
    except ValueError as error:
        raise ConfigError(f"--recipe {path}: {error}") from None
    keys = {key.name for key in dataclasses.fields(Recipe)}
    if not isinstance(values, dict) or not {"title", "task"} <= values.keys():
        raise ConfigError(f"--recipe {path}: expected a mapping with title and task")
    if full and isinstance(values.get("full"), Mapping):  # Recipe refuses other types
        values = merge(values, values["full"])
    for key in values:
        if key not in keys:
            raise ConfigError(f"--recipe {path}: unknown key {key!r}{suggestion(str(key), keys)}")
    return Recipe(**merge(values, {key: value for key, value in changes.items() if value is not None}))


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with the changes: mappings merge, other values and sweeps are replaced."""
    merged = dict(values)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(values.get(key), Mapping) and key != "sweep"
        merged[key] = merge(values[key], value) if nested else value
    return merged
