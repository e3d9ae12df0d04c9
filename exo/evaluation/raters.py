"""Comparison sheets for human raters as CSV, and the statistics of their verdicts.

Sheets are written as UTF-8 with a byte order mark, every cell quoted and no cell a formula. They are read with any
separator, quoting, line ending and encoding that a spreadsheet program saves: only items and verdicts matter, and those
are ASCII.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exo.data import DataError
from exo.evaluation import metrics as evaluation_metrics

COLUMNS = ("item", "instruction", "reference answer", "answer 1", "answer 2", "verdict", "notes")
VERDICTS = {"1": "1", "1.0": "1", "1,0": "1", "2": "2", "2.0": "2", "2,0": "2", "tie": "tie"}  # 1.0: a program's doing
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class Sheet(NamedTuple):
    """A rater's entries by item."""

    verdicts: dict[str, str]  # "1", "2" or "tie"
    unreadable: dict[str, str]  # anything else that is not empty


def write(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write a sheet to fill in; columns missing from a row are empty."""
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", quoting=csv.QUOTE_ALL, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows({name: defused(text) for name, text in row.items()} for row in rows)


def defused(text: str) -> str:
    """Prefix text that a spreadsheet would run as a formula with an apostrophe."""
    return "'" + text if text.startswith(_FORMULA) else text


def read(path: Path, items: Iterable[str]) -> Sheet:
    """Read a filled sheet. Its items must be among `items`, each at most once; missing ones were not judged."""
    known = set(items)
    header, rows = _table(path)
    item, verdict = header.index("item"), header.index("verdict")
    filled, seen = Sheet({}, {}), set()
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
    """Return the header, and the rows with their line numbers."""
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


OUTCOMES = ("win", "tie", "lose")
_POINTS = {"win": 1.0, "tie": 0.5, "lose": 0.0, "split": 0.5}


def pool(items: Sequence[Sequence[str]], seed: int) -> dict[str, Any]:
    """Count every judgement. An item contributes the mean over its raters to the win rate."""
    counts = Counter(outcome for item in items for outcome in item)
    shares = [sum(_POINTS[outcome] for outcome in item) / len(item) for item in items]
    return {name: counts[name] for name in OUTCOMES} | {"win_rate": _rate(shares, seed)}


def majority(items: Sequence[Sequence[str]], seed: int) -> dict[str, Any]:
    """Count every item once, with the verdict that most of its raters chose; without one it is split."""
    outcomes = [_most(item) for item in items]
    counts = Counter(outcomes)
    rate = _rate([_POINTS[outcome] for outcome in outcomes], seed)
    return {name: counts[name] for name in (*OUTCOMES, "split")} | {"win_rate": rate}


def _most(item: Sequence[str]) -> str:
    (first, most), *rest = Counter(item).most_common(2)
    return "split" if rest and rest[0][1] == most else first


def _rate(values: Sequence[float], seed: int) -> dict[str, float]:
    low, high = evaluation_metrics.bootstrap(values, seed)
    return {"mean": sum(values) / len(values), "low": low, "high": high}


def agreement(items: Sequence[Sequence[str]]) -> tuple[float | None, float | None]:
    """Return the share of pairs of raters that agree on an item, and Fleiss' kappa, the agreement beyond chance.

    Both are None if no item has two raters; kappa is None if all verdicts are equal.
    """
    shared = [Counter(item) for item in items if len(item) > 1]
    pairs = sum(n * (n - 1) for n in (counts.total() for counts in shared))
    if not pairs:
        return None, None
    agreed = sum(n * (n - 1) for counts in shared for n in counts.values()) / pairs
    whole = sum(shared, Counter[str]())
    chance = sum((n / whole.total()) ** 2 for n in whole.values())
    return agreed, (agreed - chance) / (1 - chance) if len(whole) > 1 else None
