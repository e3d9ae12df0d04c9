"""Make standard output and error safe: closed, full or broken ones do not end a run or change its exit code.

Needs only the standard library, because it runs before anything else is loaded.
"""

import contextlib
import io
import os
import sys
from typing import Any


def prepare() -> None:
    """Replace the streams of this process by ones whose writes never fail."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed (>&-): the next file that is opened would get its number
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, _Stream):
            stream = _Stream(stream, descriptor)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


class _Stream(io.TextIOWrapper):
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: io.TextIOWrapper, descriptor: int) -> None:
        settings = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        super().__init__(stream.detach(), encoding=stream.encoding, errors="backslashreplace", **settings)  # type: ignore
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        with self._dropping():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            super().flush()

    @contextlib.contextmanager
    def _dropping(self) -> Any:
        try:
            yield
        except BlockingIOError:
            pass  # a slow reader, which may read later
        except OSError as error:
            self._replace(error)

    def _replace(self, error: OSError) -> None:
        """Write to /dev/null from now on, with what is still buffered, so that nothing fails at exit."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._descriptor)
        os.close(null)
        if self._descriptor == 1 and not isinstance(error, BrokenPipeError):
            print(f"warning: standard output: {error.strerror}; the run continues without it", file=sys.stderr)
