"""Open a path or a hub name as a stream of rows: JSON lines, JSON arrays, compressed files, tables, directories.

The content of a file decides its type, except for csv and tsv, which need the suffix. Python's `json` accepts NaN,
1e999, repeated keys and lone surrogates; here such a row is malformed. Each row is yielded with its place in the file,
a malformed row as an error, so that one bad row does not affect the others. For the same reason the elements of a JSON
array are split before they are parsed; the array itself is read into memory.
"""

import bz2
import gzip
import io
import json
import lzma
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from exo.cli.paths import DATA_SUFFIXES, StrPath
from exo.data.errors import DataError, Malformed, Place, Row, Rows, kind, names, show
from exo.data.sources import tables

_ACCEPTED = (
    "accepted: a .jsonl file, a .json array of objects, .csv, .tsv, these with .gz, .bz2, .xz or .zst, .parquet, "
    ".arrow, a directory of those or of save_to_disk, or a hub name owner/name:config@split"
)
# first bytes: (name, function that opens the file)
_COMPRESSED: dict[bytes, tuple[str, Callable[[Any], Any]]] = {
    b"\x1f\x8b": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ": ("xz", lzma.LZMAFile),
    b"\x28\xb5\x2f\xfd": ("zstd", tables.zstd),
}
_SPLIT = re.compile(
    r"(?:^|[-_.])(train(ing)?|test(ing)?|validation|valid|val|dev|eval(uation)?|held[-_]?out)(?![a-z])[^.]*",
    re.IGNORECASE,
)
_SHARD = re.compile(r"[-_.]?\d+(-of-\d+)?$")
_NOT_DATA = re.compile(
    r"(readme|licen[cs]e|dataset_infos?\.json$|dataset_dict\.json$|checksums|sha256sums)", re.IGNORECASE
)
# A string, or one structural character. A lone quote starts an unterminated string; stopping there keeps hostile input
# linear. Matching bytes is safe, because no byte of a multibyte UTF-8 character equals one of these.
_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)


class Source(NamedTuple):
    rows: Rows  # the caller closes it
    container: str  # the type of the files, in words; "" for a JSON file


def open_source(path: StrPath) -> Source:
    """Open a path, or a hub name if no such path exists; DataError if it is neither."""
    try:
        local, split = _parse_split(path)
        if local.is_dir():
            return _directory(local, split)
        if name := tables.hub_name(path):
            return Source(*tables.from_hub(name))
        if not local.is_file():
            problem = "not a regular file" if local.exists() else "no such file or directory"
            raise DataError(f"{show(path)}: {problem}; {_ACCEPTED}")
        return _file(local, show(path))
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{show(path)}: {error.strerror}") from None
    except ValueError:  # a NUL byte in it
        raise DataError(f"{show(path)}: no such file or directory; {_ACCEPTED}") from None


def _parse_split(path: StrPath) -> tuple[Path, str | None]:
    """Return the path and the split of DIRECTORY@split; other paths have no split."""
    local = Path(path)
    directory, _, split = os.fspath(path).rpartition("@")
    if directory and split and not local.exists() and Path(directory).is_dir():
        return Path(directory), split
    return local, None


def _file(path: Path, shown: str) -> Source:
    with open(path, "rb") as file:
        magic = file.read(8)
    if magic.startswith(b"PAR1"):
        return Source(tables.from_parquet(path, shown), "parquet")
    if magic.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return Source(tables.from_arrow(path, shown), "arrow")
    if magic.startswith(b"PK\x03\x04"):
        raise DataError(f"{shown}: a zip archive; unpack it and name the file or the directory in it")
    plain = path.with_suffix("") if any(magic.startswith(prefix) for prefix in _COMPRESSED) else path
    if plain.suffix in (".csv", ".tsv"):
        return Source(_delimited(path, shown, "," if plain.suffix == ".csv" else "\t"), plain.suffix[1:])
    return Source(json_rows(path), "")


def _delimited(path: Path, shown: str, delimiter: str) -> Rows:
    with open(path, "rb") as file:
        stream, compression = _decompressed(file)
        try:
            yield from tables.from_delimited(stream, shown, delimiter)
        except _DAMAGED as error:
            raise _damaged(shown, compression, error) from None


def _directory(directory: Path, split: str | None) -> Source:
    """Open the files of a directory, sorted by name; of a data set with splits, open those of one split."""
    if (directory / "state.json").is_file() or (directory / "dataset_dict.json").is_file():
        return Source(*tables.from_disk(directory, split))
    files = sorted(
        file
        for file in directory.iterdir()
        if not file.name.startswith(".") and not (file.is_file() and _NOT_DATA.match(file.name))
    )
    if not files:
        raise DataError(f"{show(directory)}: a directory without a data file; {_ACCEPTED}")
    for file in files:
        if not file.is_file() or file.suffix not in DATA_SUFFIXES:
            raise DataError(
                f"{show(directory)}: expected a directory of data files alone ({', '.join(DATA_SUFFIXES)}), "
                f"found {names([file.name])}; name one file, or move the others out"
            )
    files, remark = _files_of_split(directory, files, split)
    sources = [_file(file, show(file)) for file in files]
    kinds = sorted({source.container or "JSON" for source in sources})
    container = f"{len(files)} {' and '.join(kinds)} file{'s' * (len(files) > 1)}{remark}"
    return Source(_chain(sources), container)


def _files_of_split(directory: Path, files: list[Path], split: str | None) -> tuple[list[Path], str]:
    """Return the files of a split (default: train) and a remark on it; all files if no name has a split."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        match = _SPLIT.search(file.name.partition(".")[0])
        by_split.setdefault(_SHARD.sub("", match[0].lstrip("-_.")) if match else "", []).append(file)
    splits = sorted(filter(None, by_split))
    if split is None and len(by_split) == 1:
        return files, ""
    chosen = split or ("training" if "training" in splits and "train" not in splits else "train")
    if chosen not in splits or (split is None and "" in by_split):
        existing = ", ".join(f"{directory.name}@{name}" for name in splits) or "none"
        unsplit = f" and {names(file.name for file in by_split[''])}" if "" in by_split else ""
        raise DataError(
            f"{show(directory)}: expected the files of one split, {chosen!r}; found splits {existing}{unsplit}; name "
            "one, or move the other files out"
        )
    return by_split[chosen], f" of split {chosen}, out of {', '.join(splits)}" if len(splits) > 1 else ""


def _chain(sources: list[Source]) -> Rows:
    number = 0
    for source in sources:
        for (_, place), row in source.rows:
            number += 1
            yield (number, place), row


def json_rows(path: StrPath) -> Rows:
    """Yield every row of JSON lines or of one array, plain or compressed."""
    with open(path, "rb") as file:
        for place, raw in _split_rows(file, show(path)):
            try:
                yield place, _parse(raw)
            except Malformed as error:
                yield place, error


def _split_rows(file: io.BufferedReader, shown: str) -> Iterator[tuple[Place, bytes]]:
    """Yield the place and the unparsed bytes of every row.

    Lines end at \\n only; `str.splitlines` would also split at U+2028, which JSON strings may hold. Blank lines are
    skipped.
    """
    stream, compression = _decompressed(file)
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
    except _DAMAGED as error:
        raise _damaged(f"{shown}:{line + 1}", compression, error) from None


_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, OSError)


def _decompressed(file: io.BufferedReader) -> tuple[Any, str]:
    """Return the decompressed stream of a file and the name of its compression, or ""."""
    magic = file.peek(8)
    for prefix, (name, decompress) in _COMPRESSED.items():
        if magic.startswith(prefix):
            return decompress(file), name
    return file, ""


def _damaged(place: str, compression: str, error: Exception) -> Exception:
    """Return the error to raise for a stream that ends early."""
    return DataError(f"{place}: the {compression} data is cut off or damaged") if compression else error


def _elements(body: bytes, line: int, shown: str) -> Iterator[tuple[Place, bytes]]:
    """Yield the unparsed elements of a top-level array that begins on `line`."""
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
            # "[]" holds no row, but a comma has one on either side
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
        text = raw.rstrip(b"\r\n").decode("utf-8")  # without the line break, which an error would count
        row = _DECODER.decode(text)
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


# made once, because json.loads would make one for each row
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
