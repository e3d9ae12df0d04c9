"""Comparison sheets for human raters, as CSV that spreadsheet programs open and give back changed.

Written: UTF-8 with a byte order mark, every cell quoted, no cell that a program would run as a formula. Read: whatever
separator, quotes, line breaks, byte order mark or encoding the program made of it: only items and verdicts matter, and
those are ASCII. Left out: the programs' own formats.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from exo.data import DataError

COLUMNS = ("item", "instruction", "reference answer", "answer 1", "answer 2", "verdict", "notes")
VERDICTS = {"1": "1", "1.0": "1", "1,0": "1", "2": "2", "2.0": "2", "2,0": "2", "tie": "tie"}  # 1.0: a program's doing
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Filled(NamedTuple):
    """What a rater wrote, by item."""

    verdicts: dict[str, str]  # "1", "2" or "tie"
    unreadable: dict[str, str]  # anything else that is not empty


def write(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """A sheet to fill in; the columns that a row lacks are empty."""
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", quoting=csv.QUOTE_ALL, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows({name: defused(text) for name, text in row.items()} for row in rows)


def defused(text: str) -> str:
    """With an apostrophe before what would be a formula."""
    return "'" + text if text.startswith(_FORMULA) else text


def read(path: Path, items: Iterable[str]) -> Filled:
    """A sheet that came back. Its items must be among `items`, each at most once; what is missing was not judged."""
    known = set(items)
    header, rows = _table(path)
    item, verdict = header.index("item"), header.index("verdict")
    filled, seen = Filled({}, {}), set()
    for number, row in rows:
        if not any(cell.strip() for cell in row):
            continue
        name, said = (row[column].strip() if column < len(row) else "" for column in (item, verdict))
        if name not in known:
            raise DataError(f"{path}:{number}: item {name[:20]!r} is not in the key; do not edit the column 'item'")
        if name in seen:
            raise DataError(f"{path}:{number}: item {name!r} appears twice; delete one of the rows")
        seen.add(name)
        if plain := VERDICTS.get(said.strip("'\"").rstrip(".").casefold()):
            filled.verdicts[name] = plain
        elif said:
            filled.unreadable[name] = said
    return filled


def _table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and each row with its line in the file."""
    content = path.read_bytes()
    # not strict: texts in another encoding come out garbled, but only ASCII is used
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = content.decode("utf-16" if wide else "utf-8-sig", errors="replace")
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
