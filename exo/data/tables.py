"""Rows of tables: parquet files through pyarrow, and hub data through `datasets`; both imported when first needed.

A hub name is `owner/name`, with `:config` and `@split` where they are not the only one and `train`; a config that ends
in / is a folder of the repository. No code of the hub is run; HF_HUB_OFFLINE is heeded. Columns that nobody reads may
hold anything. Left out: streaming, revisions by name.
"""

import os
import re
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from exo.data.errors import DataError, Malformed, StrPath, names

Rows = Generator[tuple[tuple[int, str], dict[str, Any] | Malformed], None, None]

_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+/?))?(?:@([\w.\[\]%:+-]+))?", re.ASCII)
_FILES = (".jsonl", ".json", ".gz", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".zip", ".zst")


class HubName(NamedTuple):
    name: str
    config: str | None
    split: str


def hub_name(path: StrPath) -> HubName | None:
    """What a name says, if it can be one: what lies in a folder that is here, or looks like a file, is a path."""
    found = _HUB.fullmatch(os.fspath(path))
    if found is None or found[1].endswith(_FILES) or Path(found[1]).parent.is_dir():
        return None
    return HubName(found[1], found[2], found[3] or "train")


def from_hub(hub: HubName) -> tuple[Rows, str]:
    """Rows, and a word on where they are from."""
    shown = f"{hub.name}{f':{hub.config}' if hub.config else ''}@{hub.split}"
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise _missing(shown, "hub data", "datasets", error) from None
    try:
        folder = hub.config if hub.config and hub.config.endswith("/") else None
        part = {"data_dir": folder[:-1]} if folder else {"name": hub.config}
        dataset = datasets.load_dataset(hub.name, split=hub.split, **part)
    # unknown or out of reach, no such config or split, a script that is not run
    except (OSError, ValueError, RuntimeError) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{shown}: no such path here, and from the hub: {what}") from None
    _refuse_twins(shown, dataset.column_names)
    batches = dataset.with_format("arrow").iter(batch_size=1000)
    fingerprint = dataset._fingerprint  # of name, config, split and revision; there is no public name for it
    return _rows(batches, shown), f"from the hub, fingerprint {fingerprint}"


def from_parquet(path: Path, shown: str) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise _missing(shown, "parquet", "pyarrow", error) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_twins(shown, file.schema_arrow.names)
            yield from _rows(file.iter_batches(batch_size=1000), shown)
    except (OSError, pyarrow.ArrowException) as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{shown}: the parquet data is cut off or damaged: {what}") from None


def _rows(batches: Iterable[Any], shown: str) -> Rows:
    number = 0
    for batch in batches:
        for row in _unpacked(batch):
            number += 1
            yield (number, f"{shown}:{number}"), row


def _unpacked(batch: Any) -> list[dict[str, Any] | Malformed]:
    """Whole where that works: row by row takes ten times as long, and tells which row is bad."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            utf8 = isinstance(error, UnicodeDecodeError)
            return [Malformed("not UTF-8" if utf8 else "a value that Python cannot hold")]
    return [row for i in range(batch.num_rows) for row in _unpacked(batch.slice(i, 1))]


def _refuse_twins(shown: str, columns: list[str]) -> None:
    twins = {column for column in columns if columns.count(column) > 1}
    if twins:
        raise DataError(f"{shown}: column {names(sorted(twins))} appears twice")


def _missing(shown: str, what: str, package: str, error: ModuleNotFoundError) -> Exception:
    if error.name != package:
        return error
    return DataError(f"{shown}: {what} needs {package}: pip install {package}")
