"""Read the part of YAML that people write by hand, with errors of one line.

Numbers are decimal and 1e-3 is one; true and false are the only booleans; a key may appear once. YAML 1.1 would also
read 010 as 8, 1:30 as 90, `no` as false and 2024-01-01 as a date.
"""

import re
from pathlib import Path
from typing import Any

import yaml

MOST_CHARACTERS = 1_000_000
MOST_NODES = 10_000  # with aliases expanded
_NULL = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]{1,300}")
_FLOAT = re.compile(r"[-+]?(?:[0-9]{1,300}\.?[0-9]{0,300}|\.[0-9]{1,300})(?:[eE][-+]?[0-9]{1,9})?")


def read(path: Path, *, typed: bool) -> Any:
    """Read a file. ValueError of one line if it cannot be read, is too long or is not YAML; see `parse`."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except UnicodeDecodeError:
        raise ValueError("expected UTF-8 text") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    return parse(text, typed=typed)


def parse(text: str, *, typed: bool) -> Any:
    """Return the value of a YAML document; without `typed` every scalar is a text or None."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"expected at most {MOST_CHARACTERS:,} characters")
    try:
        node = yaml.compose(text, yaml.BaseLoader)
        if node is None:
            return None
        if _count(node, {}) > MOST_NODES:
            raise ValueError(f"expected at most {MOST_NODES:,} values, those of aliases counted each time")
        return _value(node, typed)
    except RecursionError:
        raise ValueError("brackets or blocks are nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{_place(mark)}{problem}" if mark else problem) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _value(node: Any, typed: bool) -> Any:
    place = _place(node.start_mark)
    if isinstance(node, yaml.SequenceNode) and node.tag == yaml.resolver.BaseResolver.DEFAULT_SEQUENCE_TAG:
        return [_value(part, typed) for part in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG:
        return _mapping(node, typed)
    if not isinstance(node, yaml.ScalarNode) or node.tag != yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG:
        raise ValueError(f"{place}expected no tag; got {node.tag}")
    text: str = node.value
    if node.style is not None:  # quoted
        return text
    if text in _NULL:
        return None
    if not typed:
        return text
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _mapping(node: Any, typed: bool) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in node.value:
        name = _value(key, typed=False)
        if not isinstance(name, str):
            raise ValueError(f"{_place(key.start_mark)}expected a text as key")
        if name in values:
            raise ValueError(f"{_place(key.start_mark)}key {name!r} appears twice")
        values[name] = _value(value, typed)
    return values


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: "


def _count(node: Any, counts: dict[int, int]) -> int:
    """Count the values below a node with aliases expanded. ValueError for one that contains itself."""
    if id(node) in counts:
        if not counts[id(node)]:
            raise ValueError("an alias contains itself")
        return counts[id(node)]
    counts[id(node)] = 0
    below: list[Any] = []
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    counts[id(node)] = 1 + sum(_count(part, counts) for part in below)
    return counts[id(node)]
