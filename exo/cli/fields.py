"""Define options: their help, ranges and checks."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from exo.cli.errors import ConfigError

SMALLEST, LARGEST = 1.2e-38, 3.4e38  # of fp32, in which models and losses compute
IN_FP64 = ("learning_rate", "critic_learning_rate")  # numbers that only Python and the optimizer compute with
SHOWN = 100  # characters of a wrong value in a message


class Range(NamedTuple):
    """The values of an option. None is in every range, if the option may be None."""

    holds: Callable[[Any], bool]
    expected: str


def at_least(least: int) -> Range:
    return Range(lambda value: value >= least, f">= {least}")


def named(expected: str) -> Range:
    """Return the range of a text that must be given."""
    return Range(lambda value: bool(value.strip()), expected)


MODEL = named("a directory or a hub name")
POSITIVE = Range(lambda value: 0 < value < math.inf, "a finite number > 0")
NOT_NEGATIVE = Range(lambda value: 0 <= value < math.inf, ">= 0")
SHARE = Range(lambda value: 0 <= value <= 1, "in [0, 1]")
TOP_P = Range(lambda value: 0 < value <= 1, "in (0, 1]")
PART = Range(lambda value: 0 <= value < 1, "in [0, 1)")


def option(default: Any, help: str, range: Range | None = None) -> Any:
    """Return a dataclass field with the help of its flag and the range of its values."""
    return dataclasses.field(default=default, metadata={"help": help, "range": range})


def require(condition: bool, name: str, expected: str | None, got: object) -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"--{name}: expected {expected}; got {shortened(repr(got), SHOWN)}")


def check_size(name: str, value: object) -> None:
    """Raise ConfigError for a value that has the right type and is of no use."""
    if isinstance(value, int):
        require(-(2**63) <= value < 2**63, name, "a 64-bit integer", value)
    elif isinstance(value, float) and value and name not in IN_FP64:
        require(SMALLEST <= abs(value) <= LARGEST, name, f"a number that fp32 holds, {SMALLEST} to {LARGEST}", value)
    elif isinstance(value, str):
        # no file system takes it, or it would break the line of a message; Python ends lines at "\x85" too
        broken = any(ord(character) < 32 or character in "\x7f\x85\u2028\u2029" for character in value)
        require(not broken, name, "text without control characters", value)


def shortened(text: str, most: int) -> str:
    """Return the text as one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
