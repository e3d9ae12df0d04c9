"""Comparison sheets for human raters as CSV, and the key that tells which answer is whose.

Sheets are written as UTF-8 with a byte order mark, every cell quoted and no cell a formula. They are read with any
separator, quoting, line ending and encoding that a spreadsheet program saves: only items and verdicts matter, and those
are ASCII.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from exo.data import DataError

SIDES = ("answer 1", "answer 2")
COLUMNS = ("item", "instruction", "reference answer", *SIDES, "verdict", "notes")
# Programs write 1.0 or 1,0 for 1.
VERDICTS = {"1": "1", "1.0": "1", "1,0": "1", "2": "2", "2.0": "2", "2,0": "2", "tie": "tie"}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Sheet(NamedTuple):
    """A rater's entries by item."""

    verdicts: dict[str, str]  # "1", "2" or "tie"
    unreadable: dict[str, str]  # any other text


def read_key(path: Path) -> dict[str, Any]:
    """Read the key.json of an export. ValueError if there is no such file, DataError if it is something else."""
    if not path.is_file():
        raise ValueError(f"--key {path}: no such file; python -m exo.label --mode export makes it")
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        is_valid = isinstance(key["raters"], int) and all(
            entry["matchup"] in key["matchups"] and {entry[side] for side in SIDES} == set(entry["matchup"].split(":"))
            for entry in key["items"].values()
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise DataError(f"--key {path}: expected the key.json that --mode export wrote")
    return key


def write(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write a sheet to fill in; columns missing from a row are empty."""
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", quoting=csv.QUOTE_ALL, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows({name: escape_formula(text) for name, text in row.items()} for row in rows)


def escape_formula(text: str) -> str:
    """Prefix text that a spreadsheet would run as a formula with an apostrophe."""
    return "'" + text if text.startswith(_FORMULA) else text


def read(path: Path, items: Iterable[str]) -> Sheet:
    """Read a filled sheet. Its items must be among `items`, each at most once; missing ones were not judged."""
    names = set(items)
    header, rows = _read_table(path)
    columns = [header.index("item"), header.index("verdict")]
    sheet, seen = Sheet({}, {}), set()
    for number, row in rows:
        if not any(cell.strip() for cell in row):
            continue
        item, text = (row[column].strip() if column < len(row) else "" for column in columns)
        if item not in names:
            raise DataError(f"{path}:{number}: item {item[:20]!r} is not in the key; do not edit the column 'item'")
        if item in seen:
            raise DataError(f"{path}:{number}: item {item!r} appears twice; delete one of the rows")
        seen.add(item)
        if verdict := VERDICTS.get(text.strip("'\"").rstrip(".").casefold()):
            sheet.verdicts[item] = verdict
        elif text:
            sheet.unreadable[item] = text
    return sheet


def _read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header, and the rows with their line numbers."""
    content = path.read_bytes()
    # Texts in another encoding come out garbled, but only ASCII is used.
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = content.decode(encoding, errors="replace")
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    for separator in ",;\t":
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        try:
            header = [name.strip().casefold() for name in next(reader, [])]
            if "item" in header and "verdict" in header:
                return header, [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from None
    raise DataError(f"{path}:1: expected a CSV file whose first line names the columns item and verdict")
