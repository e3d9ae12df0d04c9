"""Standard output and error that cannot end a run: closed, full, a broken pipe, or without some character.

A run goes on without output that nobody can read, and its exit code is that of its work. Only the standard library is
needed here: `exo` prepares the streams before it loads anything else.
"""

import contextlib
import io
import os
import sys
from typing import Any


def prepare() -> None:
    """Make the process's streams as described above."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # a closed one (>&-): the next file that is opened would take its place
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
            pass  # a reader that is slow, and may read on
        except OSError as error:
            self._replace(error)

    def _replace(self, error: OSError) -> None:
        """Write to /dev/null from now on. What is still buffered goes there too, so that nothing fails at exit."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._descriptor)
        os.close(null)
        if self._descriptor == 1 and not isinstance(error, BrokenPipeError):
            print(f"warning: standard output: {error.strerror}; the run goes on without it", file=sys.stderr)
