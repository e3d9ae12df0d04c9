"""Read tables: parquet and arrow with pyarrow, hub data and save_to_disk with `datasets`, csv and tsv.

pyarrow and `datasets` are imported when first needed. A hub name is `owner/name`, with an optional `:config` and
`@split` (default: train); a config that ends in / is a folder of the repository. No code from the hub is run, and
HF_HUB_OFFLINE is respected. Columns that no format reads may hold anything. The fields of a csv are texts, except in
columns that are numeric by name (_NUMBERS).
"""

import csv
import importlib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from exo.cli.paths import DATA_SUFFIXES, StrPath
from exo.data.errors import DataError, Malformed, Row, Rows, names

_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+/?))?(?:@([\w.\[\]%:+-]+))?", re.ASCII)
_PATHS = (*DATA_SUFFIXES, ".txt", ".zip")
_NUMBERS = re.compile(
    r"labels?|choice|rank|.*(score|rating|reward|_logps|_strength|_preference|_response_id|helpfulness|margin|weight).*"
)


class HubName(NamedTuple):
    name: str
    config: str | None
    split: str


def hub_name(path: StrPath) -> HubName | None:
    """Return the parts of a hub name; None for a path into an existing directory, or the name of a file."""
    parts = _HUB.fullmatch(os.fspath(path))
    if parts is None or parts[1].endswith(_PATHS) or Path(parts[1]).parent.is_dir():
        return None
    return HubName(parts[1], parts[2], parts[3] or "train")


def from_hub(hub: HubName) -> tuple[Rows, str]:
    """Return the rows of a hub data set, and its fingerprint in words."""
    shown = f"{hub.name}{f':{hub.config}' if hub.config else ''}@{hub.split}"
    datasets = _imported("datasets", shown, "hub data")
    try:
        folder = hub.config if hub.config and hub.config.endswith("/") else None
        part = {"data_dir": folder[:-1]} if folder else {"name": hub.config}
        dataset = datasets.load_dataset(hub.name, split=hub.split, **part)
    # unknown, unreachable, without the config or split, or a script
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{shown}: no such path here, and from the hub: {_first_line(error)}") from None
    _refuse_duplicates(shown, dataset.column_names)
    batches = dataset.with_format("arrow").iter(batch_size=1000)
    # of name, config, split and revision; it has no public name
    return _rows(batches, shown), f"from the hub, fingerprint {dataset._fingerprint}"


def from_disk(directory: Path, split: str | None) -> tuple[Rows, str]:
    """Return the rows of a directory of save_to_disk, and its split in words; the default split is train."""
    shown = str(directory)
    datasets = _imported("datasets", shown, "a directory of save_to_disk")
    try:
        saved = datasets.load_from_disk(shown)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{shown}: the directory of save_to_disk is damaged: {_first_line(error)}") from None
    note = "save_to_disk"
    if isinstance(saved, datasets.DatasetDict):
        splits, chosen = sorted(saved), split or "train"
        if chosen not in saved:
            raise DataError(f"{shown}: expected one of the splits {', '.join(splits)}; name it as {shown}@{splits[0]}")
        note += f", split {chosen} out of {', '.join(splits)}"
        saved = saved[chosen]
    elif split is not None:
        raise DataError(f"{shown}: has no splits; expected the path without @{split}")
    _refuse_duplicates(shown, saved.column_names)
    return _rows(saved.with_format("arrow").iter(batch_size=1000), shown), note


def from_parquet(path: Path, shown: str) -> Rows:
    """Yield the rows of a parquet file."""
    parquet = _imported("pyarrow.parquet", shown, "parquet")
    with _arrow_errors(shown, "parquet"), parquet.ParquetFile(path) as file:
        _refuse_duplicates(shown, file.schema_arrow.names)
        yield from _rows(file.iter_batches(batch_size=1000), shown)


def from_arrow(path: Path, shown: str) -> Rows:
    """Yield the rows of an arrow file, or of a stream, which `datasets` writes with the same suffix."""
    pyarrow, ipc = _imported("pyarrow", shown, "arrow"), _imported("pyarrow.ipc", shown, "arrow")
    with _arrow_errors(shown, "arrow"), pyarrow.memory_map(str(path)) as memory:
        if memory.read(6) == b"ARROW1":
            file = ipc.open_file(memory)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            memory.seek(0)
            file = batches = ipc.open_stream(memory)
        _refuse_duplicates(shown, file.schema.names)
        yield from _rows(batches, shown)


@contextmanager
def _arrow_errors(shown: str, format: str) -> Iterator[None]:
    """Convert errors of pyarrow into a DataError."""
    pyarrow = _imported("pyarrow", shown, format)
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{shown}: the {format} data is cut off or damaged: {_first_line(error)}") from None


def zstd(file: io.BufferedReader) -> Any:
    """Return the decompressed stream of a zstd file."""
    pyarrow = _imported("pyarrow", file.name, "zstd")
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"))


def from_delimited(stream: Any, shown: str, delimiter: str) -> Rows:
    """Yield the rows of a csv or tsv with a header; the place is the line on which a row ends."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if len(header) == 1 and (";" in header[0] or "\t" in header[0] or "," in header[0]):
            raise DataError(f"{shown}:1: one column alone; expected columns with {delimiter!r} between them")
        _refuse_duplicates(shown, header)
        number = 0
        for fields in reader:
            if not fields:
                continue
            number += 1
            yield (number, f"{shown}:{reader.line_num}"), _delimited(header, fields)
    except csv.Error as error:
        raise DataError(f'{shown}:{reader.line_num}: bad csv: {error}; expected texts with " quoted as ""') from None
    finally:
        text.detach()  # the caller closes the file


def _delimited(header: list[str], fields: list[str]) -> Row | Malformed:
    if len(fields) != len(header):
        return Malformed(f"{len(fields)} fields, and the header has {len(header)}")
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return Malformed("not UTF-8")
    return {name: _number(name, value) for name, value in zip(header, fields, strict=True)}


def _number(name: str, value: str) -> Any:
    """Return the field of a numeric column as a number or a bool, an empty one as None; others unchanged."""
    if not _NUMBERS.fullmatch(name):
        return value
    if not value.strip():
        return None
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for convert in (int, float):
        with suppress(ValueError):
            return convert(value)
    return value


def _rows(batches: Iterable[Any], shown: str) -> Rows:
    number = 0
    for batch in batches:
        columns = zip(batch.schema.names, batch.schema.types, strict=True)
        has_tools = any("tool" in name or "tool_calls" in str(type) for name, type in columns)
        for row in _unpacked(batch):
            number += 1
            yield (number, f"{shown}:{number}"), _without_nulls(row) if has_tools else row


def _without_nulls(value: Any) -> Any:
    """Return a value without the nulls that a table fills in for keys that only other rows have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _unpacked(batch: Any) -> list[Row | Malformed]:
    """Return the rows of a batch; if that fails, convert them one by one, ten times as slow, to find the bad row."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            utf8 = isinstance(error, UnicodeDecodeError)
            return [Malformed("not UTF-8" if utf8 else "a value that Python cannot hold")]
    return [row for i in range(batch.num_rows) for row in _unpacked(batch.slice(i, 1))]


def _refuse_duplicates(shown: str, columns: list[str]) -> None:
    duplicates = {column for column in columns if columns.count(column) > 1}
    if duplicates:
        raise DataError(f"{shown}: column {names(sorted(duplicates))} appears twice")


def _imported(module: str, shown: str, purpose: str) -> Any:
    """Import a module of an optional package; raise DataError with the package to install if it is missing."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise DataError(f"{shown}: {purpose} needs {package}: pip install {package}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
