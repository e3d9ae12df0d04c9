"""How bad data is refused: the errors and the words they are made of. None quotes a row: data is often private."""

import json
import math
import os
from collections.abc import Iterable
from typing import Any

StrPath = str | os.PathLike[str]
_TYPES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
_TYPES |= {int: "a number", float: "a number", type(None): "null"}


class DataError(ValueError):
    """Data that cannot be used. One line, `file:line: what is wrong`, that quotes no row."""


class Malformed(Exception):
    """What is wrong with a row, raised where its place in the file is not known."""


def string(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise Malformed(f"{name} must be a string, not {kind(value)}")


def number(name: str, value: Any) -> float:
    # To Python a bool is an int; here it is a label that nobody turned into a reward.
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
    if isinstance(value, str) and value[:1] == "[":  # of a csv, say
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Malformed(f"{name} must be an array, and its text is no JSON") from None
    if isinstance(value, list) and value:
        return value
    raise Malformed(f"{name} must be an array, and not empty")


def kind(value: Any) -> str:
    """In the words of JSON; a table may hold other things, dates say."""
    return _TYPES.get(type(value), f"of type {type(value).__name__}")


def names(keys: Iterable[str]) -> str:
    shown = [repr(key[:40] + "..." * (len(key) > 40)) for key in keys]
    return ", ".join(shown[:8] + [f"{len(shown) - 8} more"] * (len(shown) > 8)) or "none"


def show(path: StrPath) -> str:
    shown = os.fspath(path)
    return shown if shown.isprintable() else ascii(shown)
