"""Format estimates, dates and lists as text. Most functions are also filters of the templates."""

from collections.abc import Iterable, Sequence
from datetime import datetime

from exo.reporting.statistics import Estimate


def plus_minus(value: Estimate | None, form: str = "+.2f") -> str:
    return f"{value.mean:{form}} ± {value.standard_error:.2f}" if value else ""


def percent(value: Estimate | None) -> str:
    return f"{100 * value.mean:.1f}% ± {100 * value.standard_error:.1f}" if value else ""


def interval(value: Estimate | None, form: str = ".2f") -> str:
    return f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}]" if value else ""


def percent_interval(value: Estimate | None) -> str:
    if value is None:
        return ""
    mean, low, high = (f"{100 * x:.1f}" for x in value[:3])
    return f"{mean}% [{low}, {high}]"


def listed(items: Iterable[str]) -> str:
    """Return "a, b and c"."""
    *others, last = items
    return f"{', '.join(others)} and {last}" if others else last


def date(timestamp: str) -> str:
    return datetime.fromisoformat(timestamp).strftime("%d %B %Y, %H:%M UTC")


def shorten(text: str, length: int = 80) -> str:
    """Return the text on one line, or only the end of a long one."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"…{line[-length:]}"


def without_empty_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    columns = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in columns], [[row[i] for i in columns] for row in rows]
