"""Graceful shutdown: training saves a checkpoint on SIGTERM, SIGINT and SIGHUP; a second signal exits at once.

Outside training a signal ends the process at once, because all results are on the disk already.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
ECHO_SECONDS = 2.0  # a terminal and a launcher may both send the same signal
NOTICE = b"\nStopping after this step and saving a checkpoint. Signal again (Ctrl-C) to quit now.\n"

_requested: int | None = None
_graceful = False


class Stopped(Exception):
    """Raised when a run stops because of a signal; the message is one line."""

    def __init__(self, signum: int, message: str = "") -> None:
        # the arguments are those of the constructor, because errors of other processes are unpickled
        super().__init__(signum, message or "no finished work is lost")
        self.signum = signum

    def __str__(self) -> str:
        return str(self.args[1])


@contextmanager
def graceful_shutdown() -> Iterator[None]:
    """Inside the context, the first signal only sets `stop_requested()`."""
    global _requested, _graceful
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    _requested, _graceful = None, True
    first = 0.0

    def handle(signum: int, frame: FrameType | None) -> None:
        global _requested
        nonlocal first
        if _requested is None:
            _requested, first = signum, time.monotonic()
            if _is_rank_0():
                with contextlib.suppress(OSError):  # the same signal may have ended the reader
                    os.write(2, NOTICE)
        elif time.monotonic() - first > ECHO_SECONDS:
            os._exit(128 + signum)

    previous = {number: signal.signal(number, handle) for number in handled()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _requested, _graceful = None, False


def handled() -> tuple[int, ...]:
    """Return the signals that stop a run: SIGHUP is not one of them under nohup, which ignores it."""
    if HANGUP is None or signal.getsignal(HANGUP) == signal.SIG_IGN:
        return SIGNALS
    return (*SIGNALS, HANGUP)


def exit_on_signals() -> None:
    """Raise SystemExit on SIGTERM and SIGHUP, so that temporary files are removed and child processes are stopped."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    if threading.current_thread() is threading.main_thread():
        for number in handled():
            if number != signal.SIGINT:
                signal.signal(number, end)


def exit_with_parent(parent: int) -> None:
    """Send this process SIGTERM when its parent process ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def is_graceful() -> bool:
    """Return whether signals only request a stop, as they do during training."""
    return _graceful


def stop_requested() -> int:
    """Return the signal that requested a stop, or 0."""
    return _requested or 0


def raise_if_stop_requested() -> None:
    """Raise Stopped if a signal requested a stop and no other rank has to agree on where.

    Call it between pieces of work that leave the state of the last step as it is.
    """
    if _requested is not None and os.environ.get("WORLD_SIZE", "1") == "1":
        raise Stopped(_requested)


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"
