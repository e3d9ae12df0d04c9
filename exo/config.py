"""Options: a frozen dataclass a stage, read from flags and from a YAML file that flags override.

A field's type and default make its flag; `option` adds the help and the range. Names are Hugging Face's where it has
one; dashes and underscores are the same. Unknown names are errors that suggest the nearest known one. Left out: nested
options.
"""

import argparse
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

from exo import yaml_files
from exo.limits import Limits
from exo.spelling import suggestion

T = TypeVar("T")
SMALLEST, LARGEST = 1.2e-38, 3.4e38  # of fp32, in which models and losses compute
IN_FP64 = ("learning_rate", "critic_learning_rate")  # numbers that only Python and the optimizer compute with
SHOWN = 100  # characters of a wrong value in a message


class ConfigError(ValueError):
    """An option that cannot be used; one line."""


class Range(NamedTuple):
    """What an option's values must be; none of an option that may be None is in every range."""

    holds: Callable[[Any], bool]
    expected: str


def at_least(least: int) -> Range:
    return Range(lambda value: value >= least, f">= {least}")


def named(what: str) -> Range:
    """A text that must be given."""
    return Range(lambda value: bool(value.strip()), what)


MODEL = named("a directory or a hub name")
POSITIVE = Range(lambda value: 0 < value < math.inf, "a finite number > 0")
NOT_NEGATIVE = Range(lambda value: 0 <= value < math.inf, ">= 0")
SHARE = Range(lambda value: 0 <= value <= 1, "in [0, 1]")
TOP_P = Range(lambda value: 0 < value <= 1, "in (0, 1]")
PART = Range(lambda value: 0 <= value < 1, "in [0, 1)")


def option(default: Any, help: str, range: Range | None = None) -> Any:
    """A dataclass field with the text of its flag's help, and what is expected of its value."""
    return dataclasses.field(default=default, metadata={"help": help, "range": range})


@dataclass(frozen=True)
class Stage:
    """What every stage has in common."""

    output_dir: str = option("runs/stage", "directory of the run")
    overwrite_output_dir: bool = option(False, "replace an earlier run in output_dir")
    seed: int = option(0, "seed of every random choice", Range(lambda value: 0 <= value < 2**32, "in [0, 2^32)"))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value, range = field.name, getattr(self, field.name), field.metadata["range"]
            require(value is None or range is None or range.holds(value), name, range and range.expected, value)
            _check_size(name, value)
        require(bool(self.output_dir.strip()), "output_dir", "a directory", self.output_dir)


@dataclass(frozen=True)
class Compute(Stage):
    """What every stage that runs a model has in common."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "compute dtype over fp32 weights; auto is bfloat16 on a GPU that has it, else float32"
    )
    device: Literal["auto", "cpu"] = option("auto", "cpu keeps off a GPU that is there")
    nproc: int = option(
        1, "processes on this machine, a GPU each; torchrun and accelerate launch work too", at_least(1)
    )


def _list(text: str | None) -> list[str]:
    """Return the items of an option with commas, without the blanks around them."""
    return [part.strip() for part in text.split(",")] if text else []


def _pairs(text: str | None) -> list[tuple[str, str]]:
    """Return the (name, column) pairs of --columns; one without "=" has an empty column."""
    parts = [part.partition("=") for part in _list(text)]
    return [(name.strip(), column.strip()) for name, _, column in parts]


def _are_columns(text: str) -> bool:
    pairs = _pairs(text)
    complete = all(name and column and "=" not in column for name, column in pairs)
    return bool(pairs) and complete and len(dict(pairs)) == len(pairs)


def _are_weights(text: str) -> bool:
    try:
        return all(0 < float(part) < math.inf for part in _list(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class SourceOptions(Stage):
    """What every stage that reads rows has in common."""

    columns: str | None = option(
        None, "columns by other names: prompt=question,chosen=better", Range(_are_columns, "name=column, with commas")
    )
    ignore_columns: str | None = option(None, "columns to leave out, with commas; all: every one that no format reads")
    system_column: str | None = option(None, "the column of the system prompt, if it is not called system")
    skip_invalid: bool = option(
        False, "count malformed rows, and rows that the tokenizer or its template refuses, instead of stopping"
    )

    def reading(self) -> dict[str, Any]:
        """Return the options of exo.data.read that hold for every file of the stage."""
        return {
            "columns": dict(_pairs(self.columns)) or None,
            "ignore_columns": _list(self.ignore_columns),
            "system_column": self.system_column,
            "skip_invalid": self.skip_invalid,
        }


@dataclass(frozen=True)
class DataOptions(SourceOptions):
    """What every stage that takes --data has in common: it may name several files."""

    data_weights: str | None = option(
        None, "shares of the files of --data in an epoch: 2,1", Range(_are_weights, "numbers > 0, with commas")
    )

    def mixing(self) -> dict[str, Any]:
        """Return the options of exo.data.read that mix the files of --data."""
        return {"weights": [float(part) for part in _list(self.data_weights)] or None, "seed": self.seed}

    def reading_of(self, option: str) -> dict[str, Any]:
        """Return the options of exo.data.read for the file that an option names; those of --data are mixed.

        Another file may have its own column names, so --columns need not apply to it.
        """
        return self.reading() | (self.mixing() if option == "data" else {"columns_required": False})


@dataclass(frozen=True)
class ChatOptions(Stage):
    """What every stage that reads prompts has in common."""

    chat_template: str = option(
        "auto",
        "auto renders chat messages and data sets of chats with the tokenizer's template; always renders plain prompts "
        "too, as a user's turn; none renders messages alone; a file, a name of the tokenizer's, chatml or plain sets "
        "the template and is used like always",
    )
    template_kwargs: str | None = option(
        None, "arguments of the chat template as a JSON object, such as '{\"enable_thinking\": false}'"
    )


@dataclass(frozen=True)
class Scoring(Compute):
    """What every stage has in common that runs a model on whole texts."""

    max_tokens_per_batch: int = option(8192, "tokens of input per forward pass; bounds the memory", at_least(1))


@dataclass(frozen=True)
class Training(Scoring):
    """What every stage that trains has in common."""

    batch_size: int = option(64, "prompts per optimizer step, over all processes", at_least(1))
    learning_rate: float = option(1e-6, "peak learning rate of AdamW", POSITIVE)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = option("cosine", "decay after the warm-up")
    warmup_steps: int = option(0, "steps of linear warm-up; overrides warmup_ratio when > 0", NOT_NEGATIVE)
    warmup_ratio: float = option(0.0, "share of the steps spent on warm-up", SHARE)
    weight_decay: float = option(0.0, "decoupled weight decay", NOT_NEGATIVE)
    adam_beta1: float = option(0.9, "AdamW's first moment", PART)
    adam_beta2: float = option(0.95, "AdamW's second moment", PART)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", POSITIVE)
    max_grad_norm: float = option(1.0, "clip the gradient's norm; 0 means never", NOT_NEGATIVE)
    dropout: bool = option(False, "train with the model's own dropout")
    gradient_checkpointing: bool = option(False, "make activations again in the backward pass: less memory, more time")
    compile: bool = option(False, "compile the model's body with torch.compile")
    fsdp: bool = option(False, "several processes hold the model in shards (FSDP2), instead of each all of it (DDP)")
    profile: int = option(0, "steps to profile: a trace in output_dir/profile, and where their time goes", NOT_NEGATIVE)
    max_length: int = option(1024, "tokens of prompt and completion together", at_least(2))
    logging_steps: int = option(10, "steps between printed lines; metrics.jsonl has every step", at_least(1))
    checkpoint_steps: int = option(
        100, "steps between states that a killed run goes on from; 0 saves one only when told to stop", NOT_NEGATIVE
    )
    allow_changes: bool = option(False, "go on with an unfinished run though options, inputs or processes are others")
    on_nan: Literal["stop", "skip"] = option(
        "stop", "a loss or gradient that is not finite ends the run before the update, or skips the update"
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype of the saved models; auto is that of --model's weights. Resumable checkpoints stay in fp32"
    )
    report_to: Literal["none", "tensorboard"] = option("none", "also send metrics there, through accelerate")


@dataclass(frozen=True)
class DataTraining(Training, ChatOptions):
    """What every stage has in common that trains on rows of data, again and again."""

    num_train_epochs: float = option(1.0, "passes over the data, unless max_steps is set", POSITIVE)
    max_steps: int = option(
        -1, "optimizer steps; -1 means num_train_epochs decides", Range(lambda n: n == -1 or n >= 1, ">= 1, or -1")
    )
    max_completion_length: int | None = option(
        None, "tokens of a completion, its end of sequence included", at_least(1)
    )
    max_prompt_length: int | None = option(
        None,
        "tokens of a prompt, its last, as many as sample used; none keeps half of max_length at least and cuts the "
        "completion first",
        at_least(1),
    )
    truncate: Literal["prompt-left", "drop", "error"] = option(
        "prompt-left",
        "rows over the limits: cut (the completion's end first, then the prompt's beginning), skip, or stop",
    )

    def limits(self) -> Limits:
        """Return the limits on the lengths of rows."""
        return Limits(self.max_length, self.max_completion_length, self.truncate, self.max_prompt_length)


def parse(cls: type[T], argv: Sequence[str] | None, *, prog: str, description: str | None) -> T:
    """Build `cls` from flags; `--config FILE.yaml` supplies what the flags leave out. Exits with 2 on errors."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(cls, prog=prog, description=description)
    parser.add_argument("--config", metavar="FILE.yaml", help="options by name; flags override them")
    try:
        file, flags = _split_config(arguments)
        values = vars(parser.parse_args([*_checked(file, cls), *flags]))
        values.pop("config")
        return cls(**values)
    except ConfigError as error:
        parser.error(str(error))


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """`cls` from values of a YAML file, each as its flag would take it: to YAML 1e-3 is a text."""
    known: Any = cls
    try:
        return cls(**vars(_recipe_parser(known).parse_args(_flags(values))))
    except argparse.ArgumentError as error:
        raise ConfigError(shortened(str(error).removeprefix("argument "), 4 * SHOWN)) from None


def given(arguments: Sequence[str]) -> set[str]:
    """Names of the options that are on a command line, or in the file that it names."""
    try:
        in_file = _read(_split_config(arguments)[0])
    except ConfigError:  # whoever parses them says what is wrong
        in_file = {}
    flags = [argument.split("=")[0].removeprefix("--") for argument in arguments if argument.startswith("--")]
    return {name.replace("-", "_") for name in [*flags, *in_file]}


def _split_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    head = _Parser(add_help=False, allow_abbrev=False, exit_on_error=False)
    head.add_argument("--config", action="append")
    try:
        known, rest = head.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error).removeprefix("argument ")) from None
    files = known.config or [None]
    require(len(files) == 1, "config", "one file", ", ".join(map(str, files)))
    return files[0], rest


def _read(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        options = yaml_files.read(Path(file), typed=False)
    except ValueError as error:
        raise ConfigError(f"--config {file}: {error}") from None
    if not isinstance(options, dict):
        raise ConfigError(f"--config {file}: expected a mapping of option names to values")
    return options


def _checked(file: str | None, cls: type) -> list[str]:
    """The file's options as flags, so that both go through the same parser."""
    options = _read(file)
    known = {field.name.rstrip("_") for field in dataclasses.fields(cls)}
    names = [key.replace("-", "_") for key in options]
    for key, value in options.items():
        name = key.replace("-", "_")
        if names.count(name) > 1:
            raise ConfigError(f"--config {file}: {key}: given twice, with dashes and with underscores")
        if name not in known:
            raise ConfigError(f"--config {file}: unknown option {key!r}{suggestion(name, known)}")
        if isinstance(value, dict | list):
            raise ConfigError(f"--config {file}: {key}: expected one value, got a {type(value).__name__}")
    return _flags(options)


def _flags(values: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={'none' if value is None else value}" for name, value in values.items()]


def _parser(cls: type, **settings: Any) -> "_Parser":
    parser = _Parser(allow_abbrev=False, **settings)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        _add(parser, field, hints[field.name])
    return parser


@cache  # a plan has hundreds of steps of a dozen kinds
def _recipe_parser(cls: type) -> "_Parser":
    return _parser(cls, prog="recipe", add_help=False, exit_on_error=False)


class _Parser(argparse.ArgumentParser):
    """argparse that takes dashes for underscores and suggests the nearest flag."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = [_underscored(a) for a in args]
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = {name.removeprefix("--") for name in self._option_string_actions}
            name = unknown[0].removeprefix("--").split("=")[0]
            self.error(f"unknown option {unknown[0].split('=')[0]}{suggestion(name, known)}")
        return values

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {shortened(message, 4 * SHOWN)}\n")


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _add(parser: argparse.ArgumentParser, field: Any, hint: Any) -> None:
    required = field.default is dataclasses.MISSING
    text = field.metadata.get("help", "")
    if not required and field.default is not None:
        text += f" (default: {field.default})"
    settings: dict[str, Any] = {"help": text.replace("%", "%%"), "required": required}
    if not required:
        settings["default"] = field.default
    optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
    base = next(a for a in typing.get_args(hint) if a is not type(None)) if optional else hint
    if typing.get_origin(base) is Literal:
        settings["choices"] = typing.get_args(base)
    elif base is bool:
        settings |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    else:
        settings |= {"type": _or_none(base) if optional else base, "metavar": base.__name__.upper()}
    # `from` is no name for a field of Python's: it is written from_
    parser.add_argument(f"--{field.name.rstrip('_')}", dest=field.name, **settings)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def _or_none(base: Any) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else base(text)

    convert.__name__ = base.__name__  # argparse names the type in its message
    return convert


def require(condition: bool, name: str, expected: str | None, got: object) -> None:
    """ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"--{name}: expected {expected}; got {shortened(repr(got), SHOWN)}")


def _check_size(name: str, value: object) -> None:
    """ConfigError for a value that its type allows and that no run could use."""
    if isinstance(value, int):
        require(-(2**63) <= value < 2**63, name, "a 64-bit integer", value)
    elif isinstance(value, float) and value and name not in IN_FP64:
        require(SMALLEST <= abs(value) <= LARGEST, name, f"a number that fp32 holds, {SMALLEST} to {LARGEST}", value)
    elif isinstance(value, str):
        # what no file system takes, or what would break a message's line; "\x85" is a line's end to Python
        broken = any(ord(character) < 32 or character in "\x7f\x85\u2028\u2029" for character in value)
        require(not broken, name, "text without control characters", value)


def shortened(text: str, most: int) -> str:
    """One line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
