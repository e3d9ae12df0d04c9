"""Being told to stop: SIGTERM, SIGINT and SIGHUP wait for a place where nothing is lost, a second one does not.

Only training waits; everywhere else a signal ends the process at once, because what has been done is on the disk.
Left out: what is saved (checkpoints).
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
HANGUP = getattr(signal, "SIGHUP", None)  # of a terminal that closes; Windows has none
ECHO = 2.0  # seconds in which a second signal is the first, which the terminal and a launcher both passed on
SAID = b"\nstopping at the next step, with its state saved; once more stops at once\n"

_asked: int | None = None
_alone = _heeded = False


class Stopped(Exception):
    """A run that was told to stop has; one line."""

    def __init__(self, signum: int, said: str = "") -> None:
        super().__init__(signum, said or "nothing was done that would be lost")  # as it is made again elsewhere
        self.signum = signum

    def __str__(self) -> str:
        return str(self.args[1])


@contextmanager
def graceful_shutdown(*, alone: bool) -> Iterator[None]:
    """For the while signals ask; `alone` says that no other process has to agree on where to stop."""
    global _asked, _alone, _heeded
    if threading.current_thread() is not threading.main_thread():
        yield  # Python hands signals to the main thread alone
        return
    _asked, _alone, _heeded = None, alone, True
    first = 0.0

    def ask(signum: int, frame: FrameType | None) -> None:
        global _asked
        nonlocal first
        if _asked is None:
            _asked, first = signum, time.monotonic()
            with contextlib.suppress(OSError):  # who was listening may be gone, of the same signal
                os.write(2, SAID)
        elif time.monotonic() - first > ECHO:
            os._exit(128 + signum)

    before = {number: signal.signal(number, ask) for number in handled()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked, _alone, _heeded = None, False, False


def handled() -> tuple[int, ...]:
    """The signals that stop a run. Under nohup, which ignores SIGHUP, that is none of them."""
    if HANGUP is None or signal.getsignal(HANGUP) == signal.SIG_IGN:
        return SIGNALS
    return (*SIGNALS, HANGUP)


def exit_on_signals() -> None:
    """SIGTERM and SIGHUP unwind, as SIGINT does: unfinished files are removed, and child processes are stopped."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    if threading.current_thread() is threading.main_thread():
        for number in handled():
            if number != signal.SIGINT:
                signal.signal(number, end)


def exit_with_parent(parent: int) -> None:
    """Where the process that began this one is killed, this one is told to stop, as by SIGTERM."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def is_graceful() -> bool:
    """Whether this is training, where signals wait."""
    return _heeded


def stop_requested() -> int:
    """The signal that asked to stop; 0 for none."""
    return _asked or 0


def raise_if_stop_requested() -> None:
    """Called between pieces of work that leave the last step's state as it is. Several processes agree first (loop,
    processes)."""
    if _asked is not None and _alone:
        raise Stopped(_asked)
