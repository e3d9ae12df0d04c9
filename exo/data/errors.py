"""Types of rows, errors for bad data, and the checks that raise them.

No message quotes a row, because data is often private.
"""

import json
import math
import os
from collections.abc import Generator, Iterable
from typing import Any

from exo.cli.paths import StrPath

_TYPES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
_TYPES |= {int: "a number", float: "a number", type(None): "null"}


class DataError(ValueError):
    """Raised for data that cannot be used, with one line `file:line: message` that quotes no row."""


class Malformed(Exception):
    """Raised for a row by code that does not have its place in the file."""


Row = dict[str, Any]
Place = tuple[int, str]  # number of a row, and its file:line
Rows = Generator[tuple[Place, Row | Malformed], None, None]


def string(name: str, value: Any) -> str:
    """Return the value if it is a string; raise Malformed otherwise."""
    if isinstance(value, str):
        return value
    raise Malformed(f"{name} must be a string, not {kind(value)}")


def number(name: str, value: Any) -> float:
    """Return the value as a float if it is a finite number; raise Malformed otherwise."""
    # a bool is an int to Python, but a label and no reward
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Malformed(f"{name} must be a number, not {kind(value)}")
    try:
        converted = float(value)
    except OverflowError:
        raise Malformed(f"{name} is too large for a float") from None
    if not math.isfinite(converted):
        raise Malformed(f"{name} is not finite (NaN or infinite)")
    return converted


def array(name: str, value: Any) -> list[Any]:
    """Return the value if it is a list, or its JSON (in a csv field), and not empty; raise Malformed otherwise."""
    if isinstance(value, str) and value[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Malformed(f"{name} must be an array, and its text is no JSON") from None
    if isinstance(value, list) and value:
        return value
    raise Malformed(f"{name} must be an array, and not empty")


def kind(value: Any) -> str:
    """Return the JSON type of a value for messages; tables hold other types too, such as dates."""
    return _TYPES.get(type(value), f"of type {type(value).__name__}")


def names(keys: Iterable[str]) -> str:
    """Return up to eight keys, quoted and cut to 40 characters."""
    shown = [repr(key[:40] + "..." * (len(key) > 40)) for key in keys]
    return ", ".join(shown[:8] + [f"{len(shown) - 8} more"] * (len(shown) > 8)) or "none"


def show(path: StrPath) -> str:
    """Return a path on one line."""
    shown = os.fspath(path)
    return shown if shown.isprintable() else ascii(shown)
