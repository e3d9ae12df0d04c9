"""Suggest the nearest name for an unknown one."""

import difflib
from collections.abc import Iterable

RENAMED = {"checkpoint_steps": "save_steps"}  # options of 0.1


def suggestion(name: str, known: Iterable[str], otherwise: str = "--help lists them") -> str:
    """Return the end of an error message: the nearest known name, or where to find them."""
    if renamed := RENAMED.get(name.replace("-", "_")):
        return f"; it is called {renamed} since 0.2"
    close = nearest(name, known)
    return f"; did you mean {close}?" if close else f"; {otherwise}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is spelled most like this one, or "" if none is close."""
    return next(iter(difflib.get_close_matches(name.replace("-", "_"), sorted(known), n=1)), "")
