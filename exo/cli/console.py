"""Print lines and progress on rank 0.

On a terminal rich draws a progress bar; elsewhere (a log, a pipe) a line is printed every so often.
"""

import os
import shutil
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich import progress as rich_progress

_STARTED = time.perf_counter()
_muted = os.environ.get("RANK", "0") != "0"


def mute() -> None:
    """Print nothing from now on."""
    global _muted
    _muted = True


def log(text: str = "") -> None:
    if not _muted:
        try:
            print(text if can_print(text) else text.encode("ascii", "backslashreplace").decode(), flush=True)
        except OSError:  # a run does not fail because its output cannot be written
            mute()


_warned: set[str] = set()


def warn(text: str) -> None:
    """Print a warning, once."""
    if text not in _warned:
        _warned.add(text)
        log(f"warning: {text}")


def can_print(text: str) -> bool:
    """Return whether standard output has every character of a text in its encoding."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def width() -> int:
    """Return the columns of the terminal, at least 40; 80 if there is none."""
    return max(40, shutil.get_terminal_size().columns)


def headline(text: str) -> None:
    log(f"\n== {text}  [{duration(time.perf_counter() - _STARTED)}]")


def counts(reasons: Mapping[str, int]) -> None:
    """Print how many rows were cut, dropped or noted, one line per reason."""
    for reason, count in sorted(reasons.items()):
        log(f"  {count:,} {reason}")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Show the progress of a known amount of work, with its rate and the time left."""

    def __init__(self, label: str, total: int, *, every: int, quiet: bool = False, done: int = 0) -> None:
        quiet = quiet or _muted
        self._label, self._total, self._every, self._quiet = label, total, every, quiet
        self._done, self._resumed_at, self._began = done, done, time.perf_counter()
        self._bar = None if quiet or sys.stdout is None or not sys.stdout.isatty() else _bar()
        if self._bar is not None:
            self._task = self._bar.add_task(label, total=total, completed=done, values="")
            self._bar.start()

    def advance(self, amount: int = 1, values: Mapping[str, float] | None = None) -> None:
        previous, self._done = self._done, self._done + amount
        finished = self._done >= self._total
        shown = "  ".join(f"{name} {_short(value)}" for name, value in (values or {}).items())
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, values=shown)
            if finished:
                self._bar.stop()
        elif not self._quiet and (finished or self._done // self._every > previous // self._every):
            spent = max(time.perf_counter() - self._began, 1e-9)
            rate_now = (self._done - self._resumed_at) / spent  # without the work of an earlier run
            left = (self._total - self._done) / rate_now
            rate = f"{rate_now:,.1f}/s" + (f", {duration(left)} left" if not finished else "")
            log("  " + "  ".join(filter(None, (f"{self._label} {self._done}/{self._total}", shown, rate))))

    def stop(self) -> None:
        """Stop the bar when the work ends early."""
        if self._bar is not None:
            self._bar.stop()


def _bar() -> "rich_progress.Progress":
    """Return a bar that fits 80 columns with three or four values; if there is less room, the values are cut."""
    from rich import progress as rich_progress
    from rich.table import Column

    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=4)),
        rich_progress.BarColumn(bar_width=8, table_column=Column(min_width=8)),
        rich_progress.MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=5)),
        rich_progress.TextColumn("{task.fields[values]}"),
        rich_progress.TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
