"""What a person sees while a run goes on: plain lines, and a progress line with rates and an estimate.

On a terminal the progress line is redrawn in place; elsewhere (a log, a pipe) it is printed every `logging_steps`.
"""

import sys
import time
from collections.abc import Mapping

_STARTED = time.perf_counter()


def say(text: str = "") -> None:
    print(text, flush=True)


def headline(text: str) -> None:
    say(f"\n== {text}  [{duration(time.perf_counter() - _STARTED)}]")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """One line for a known amount of work: how far, how fast, how long yet."""

    def __init__(self, label: str, total: int, *, every: int, quiet: bool = False) -> None:
        self._label, self._total, self._every, self._quiet = label, total, every, quiet
        self._done, self._began = 0, time.perf_counter()
        self._live = sys.stdout.isatty()

    def advance(self, amount: int = 1, values: Mapping[str, float] | None = None) -> None:
        before, self._done = self._done, self._done + amount
        finished = self._done >= self._total
        due = finished or self._done // self._every > before // self._every
        if self._quiet or not (due or self._live):
            return
        spent = time.perf_counter() - self._began
        left = spent / self._done * (self._total - self._done)
        parts = [f"{self._label} {self._done}/{self._total}"]
        parts += [f"{name} {_short(value)}" for name, value in (values or {}).items()]
        parts += [f"{self._done / spent:,.1f}/s" if spent else "", f"{duration(left)} left" if left >= 1 else ""]
        line = "  ".join(part for part in parts if part)
        if self._live:
            print(f"\r\x1b[2K{line}", end="\n" if finished else "", flush=True)
        else:
            say("  " + line)


def _short(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.2e}"
