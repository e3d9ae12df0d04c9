"""Run code that came with a model, such as a chat template, within a time and a memory limit.

jinja2's sandbox keeps a template from files and from Python's internals. It does not keep it from looping for hours or
from building a string of many gigabytes.
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
    """The code did not end in the time it was given."""


@contextlib.contextmanager
def run_bounded(seconds: float, extra_bytes: int) -> Iterator[None]:
    """Raise `TimeLimitExceeded` after `seconds`, and MemoryError for more than `extra_bytes` of new memory.

    The time limit needs the main thread and the memory limit needs Linux; elsewhere that limit is left out.
    """
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
