"""Limit the time and the memory of code that comes with a model, such as a chat template.

jinja2's sandbox denies access to files and to Python's internals, but a template may still loop for hours or build a
string of many gigabytes.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class TimeLimitExceeded(Exception):
    """Raised in code that exceeds the time limit."""


@contextlib.contextmanager
def limited(seconds: float, extra_bytes: int) -> Iterator[None]:
    """Raise `TimeLimitExceeded` after `seconds` (main thread only) or MemoryError beyond `extra_bytes` (Linux only)."""
    with _time_limit(seconds), _memory_limit(extra_bytes):
        yield


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeLimitExceeded(f"still running after {seconds:g} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def _memory_limit(extra_bytes: int) -> Iterator[None]:
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    except (OSError, AttributeError):
        yield
        return
    limit = used + extra_bytes
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
