"""Suggestions for names that are not known."""

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str], otherwise: str = "--help lists them") -> str:
    """Return the end of an error message: the nearest known name, or where to find them."""
    close = difflib.get_close_matches(name.replace("-", "_"), sorted(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; {otherwise}"
