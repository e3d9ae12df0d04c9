"""The one table: a line for each contender of a case, the same columns for all suites."""

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.harness import BOUND, MIB, OURS, UNITS, ratios, spread

WIDE = 0.15  # a spread that is shown, and widens the guard
BUSY = 0.05  # share of the CPU that other processes may use before CPU time is compared instead of wall time
Figure = dict[str, Any]  # a row of a result, as JSON has it


def times(row: Figure, of: Figure | None) -> float | None:
    """Return the median of row / of, round by round."""
    if of is None or not row["seconds"] or not of["seconds"]:
        return None
    return statistics.median(ratios(row, of))


def rate(result: Figure, row: Figure) -> float | None:
    """Return the rate of the case's work in its unit."""
    if not row["seconds"] or not result["work"] or row["contender"].startswith(BOUND) and result["unit"] == "GB/s":
        return None
    return result["work"] / statistics.median(row["seconds"]) / UNITS[result["unit"]]


def columns(result: Figure) -> tuple[list[str], dict[str, list[str]]]:
    """Return the headings that have figures, and the cells of every contender that has some."""
    rows = {row["contender"]: row for row in result["rows"]}
    ours = rows.get(OURS)
    form: list[tuple[str, Callable[[Figure], str]]] = [
        ("ms", lambda row: _number(1e3, statistics.median(row["seconds"]) if row["seconds"] else None)),
        ("min..max", _range),
        ("x ours", lambda row: _number(1, times(row, ours), ".2f")),
        (result["unit"], lambda row: _number(1, rate(result, row))),
        ("of bound", lambda row: _number(1, _share(rows.get(row["bound"]), row), ".0%")),
        ("extra MiB", lambda row: _number(1 / MIB, row["extra_bytes"], ",.1f")),
        ("launches", lambda row: _number(1, row["launches"], "d")),
        *((f"{kind} error", _error(kind)) for kind in _kinds(result)),
    ]
    cells = {name: [cell(row) for _, cell in form] for name, row in rows.items() if not row["reason"]}
    used = [i for i in range(len(form)) if any(line[i] != "-" for line in cells.values())]
    return [form[i][0] for i in used], {name: [line[i] for i in used] for name, line in cells.items()}


def lines(result: Figure) -> list[str]:
    """Return the table of one case for a terminal."""
    headings, cells = columns(result)
    widths = [max(len(h), *(len(line[i]) for line in cells.values())) + 2 for i, h in enumerate(headings)]
    rounds = max((len(row["seconds"]) for row in result["rows"]), default=0)
    notes = f"; {rounds} rounds" if rounds else ""
    if result["busy"] > BUSY:
        notes += f"; other processes used {result['busy']:.0%} of the CPU"
    first = max(len(row["contender"]) for row in result["rows"]) + 1
    table = ["", result["title"] + notes, " " * first + _aligned(headings, widths)]
    for row in result["rows"]:
        name, noise = row["contender"], spread(row["seconds"]) if row["seconds"] else 0.0
        wide = f"  spread {noise:.0%}" if noise > WIDE else ""
        table.append(
            f"{name:{first}}" + (f"  {row['reason']}" if row["reason"] else _aligned(cells[name], widths) + wide)
        )
    return table


def markdown(result: Figure) -> list[str]:
    """Return the table of one case for a page: without the launches, and who has no figures in a line below."""
    headings, cells = columns(result)
    kept = [i for i, heading in enumerate(headings) if heading != "launches"]
    table = ["| | " + " | ".join(headings[i] for i in kept) + " |", "|---" * (len(kept) + 1) + "|"]
    table += [f"| {name} | " + " | ".join(line[i] for i in kept) + " |" for name, line in cells.items()]
    reasons: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["reason"]:
            reasons.setdefault(row["reason"], []).append(row["contender"])
    without = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    return [*table, "", f"Without figures: {without}."] if reasons else table


def _aligned(cells: list[str], widths: list[int]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _share(bound: Figure | None, row: Figure) -> float | None:
    return None if bound is None else times(bound, row)


def _kinds(result: Figure) -> list[str]:
    return list(dict.fromkeys(kind for row in result["rows"] for kind in row["errors"]))


def _error(kind: str) -> Callable[[Figure], str]:
    return lambda row: _number(1, row["errors"].get(kind), ".0e")


def _number(factor: float, value: float | None, form: str = "") -> str:
    """Format a value, by default with four digits and without an exponent."""
    if value is None:
        return "-"
    value = factor * value if factor != 1 else value
    return format(value, form or (",.0f" if abs(value) >= 1000 else ".4g"))


def _range(row: Figure) -> str:
    return "..".join(_number(1e3, end(row["seconds"])) for end in (min, max)) if row["seconds"] else "-"
