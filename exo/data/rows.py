"""From what a path or a name stands for to its rows: JSON lines, JSON arrays, gzip of either, shards, tables, hub data.

Containers are told by their content, not by their name. Python's `json` takes NaN, 1e999, repeated keys and lone
surrogates without a word; here such a row is malformed. Rows come out one by one, each with the place to blame, a
malformed one as what is wrong with it, so that a bad row costs no other. Left out: CSV, other compression, streaming
from the hub.
"""

import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from exo.data import tables
from exo.data.errors import DataError, Malformed, StrPath, kind, names, show

Row = dict[str, Any]
Place = tuple[int, str]  # number of a row, and the file:line to blame
Rows = Generator[tuple[Place, Row | Malformed], None, None]

_SUFFIXES = (".jsonl", ".json", ".gz", ".parquet")
_ACCEPTED = (
    "accepted: a .jsonl file, a .json array of objects, .gz of either, .parquet, a directory of those, "
    "or a hub name owner/name:config@split"
)
# A whole string, or one character that opens, closes or parts; a lone quote opens a string that
# never ends, and stopping there keeps hostile input linear. Bytes will do: no byte of a longer
# UTF-8 character looks like one of these.
_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)


class Source(NamedTuple):
    rows: Rows  # to be closed
    container: str  # in words; "" for JSON, which needs none


def open_source(path: StrPath) -> Source:
    """What a path stands for; only a name that is no path of this machine is looked for on the hub."""
    try:
        place = Path(path)
        if place.is_dir():
            return _shards(place)
        if name := tables.hub_name(path):
            return Source(*tables.from_hub(name))
        if not place.is_file():
            what = "not a regular file" if place.exists() else "no such file or directory"
            raise DataError(f"{show(path)}: {what}; {_ACCEPTED}")
        return _file(place, show(path))
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{show(path)}: {error.strerror}") from None
    except ValueError:  # a NUL byte in it
        raise DataError(f"{show(path)}: no such file or directory; {_ACCEPTED}") from None


def _file(path: Path, shown: str) -> Source:
    with open(path, "rb") as file:
        parquet = file.read(4) == b"PAR1"
    if parquet:
        return Source(tables.from_parquet(path, shown), "parquet")
    return Source(json_rows(path), "")


def _shards(directory: Path) -> Source:
    """The files of a directory one after another, by name. Their rows are counted through."""
    files = sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))
    if not files:
        raise DataError(f"{show(directory)}: a directory without a data file; {_ACCEPTED}")
    for file in files:
        if not file.is_file() or file.suffix not in _SUFFIXES:
            raise DataError(
                f"{show(directory)}: expected a directory of data files alone ({', '.join(_SUFFIXES)}), "
                f"found {names([file.name])}; name one file, or move the others out"
            )
    sources = [_file(file, show(file)) for file in files]
    kinds = sorted({source.container or "JSON" for source in sources})
    container = f"{len(files)} {' and '.join(kinds)} file{'s' * (len(files) > 1)}"
    return Source(_chained(sources), container)


def _chained(sources: list[Source]) -> Rows:
    number = 0
    for source in sources:
        for (_, blamed), row in source.rows:
            number += 1
            yield (number, blamed), row


def json_rows(path: StrPath) -> Rows:
    """Every row of JSON lines or of one array, plain or gzipped."""
    with open(path, "rb") as file:
        for place, raw in _pieces(file, show(path)):
            try:
                yield place, _parse(raw)
            except Malformed as error:
                yield place, error


def _pieces(file: io.BufferedReader, shown: str) -> Iterator[tuple[Place, bytes]]:
    """Place and raw bytes of every row, unparsed.

    Lines end at \\n alone: `str.splitlines` would also cut at U+2028, which JSON strings may hold.
    Blank lines are no rows.
    """
    packed = file.peek(2).startswith(b"\x1f\x8b")
    stream = gzip.GzipFile(fileobj=file) if packed else file
    line, started = 0, False
    try:
        for line, raw in enumerate(stream, 1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not started and raw.lstrip().startswith(b"["):
                yield from _elements(raw + stream.read(), line, shown)
                return
            if raw.strip():
                started = True
                yield (line, f"{shown}:{line}"), raw
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{shown}:{line + 1}: the gzip data is cut off or damaged") from None


def _elements(body: bytes, line: int, shown: str) -> Iterator[tuple[Place, bytes]]:
    """The elements of a top-level array that begins on `line`, cut apart without parsing them."""
    depth = number = counted = 0
    start = body.index(b"[") + 1
    for token in _STRUCTURE.finditer(body):
        begin, end = token.span()
        char = body[begin : begin + 1]
        if char == b'"' and end - begin == 1:
            break
        depth += (char in b"[{") - (char in b"]}")
        if depth == 0 or (depth == 1 and char == b","):
            raw = body[start:begin].lstrip()
            # "[]" holds no row, but a comma promises one on either side.
            if raw or number or char == b",":
                number += 1
                line += body.count(b"\n", counted, begin - len(raw))
                counted = begin - len(raw)
                yield (number, f"{shown}:{line}: row {number}"), raw
            start = end
        if depth == 0:
            if char == b"]" and not body[end:].strip():
                return
            line += body.count(b"\n", counted, end)
            raise DataError(f"{shown}:{line}: the array ends here, the file does not")
    line += body.count(b"\n", counted)
    raise DataError(f"{shown}:{line}: the array is never closed; is the file cut off?")


def _parse(raw: bytes) -> Row:
    try:
        text = raw.rstrip(b"\r\n").decode("utf-8")  # or a cut-off row blames its line break
        row = json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8 (byte {error.start + 1} of the row)") from None
    except UnicodeEncodeError:
        raise Malformed("a lone surrogate (half a character) in a string") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"bad JSON: {error.msg} (character {error.pos + 1} of the row)") from None
    except RecursionError:
        raise Malformed("nested too deeply") from None
    except ValueError:  # CPython does not convert integers of several thousand digits
        raise Malformed("a number with too many digits") from None
    if not isinstance(row, dict):
        raise Malformed(f"a row must be an object, not {kind(row)}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise Malformed(f"key {names([key])} appears twice")
    return row


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Malformed("a number that is not finite (NaN, Infinity or too large)")
    return value
