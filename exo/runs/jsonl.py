"""Append-only JSONL files: metrics, and results that a killed run does not compute again."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any


def append(file: Any, text: str) -> None:
    """All of it to the end of an unbuffered file, or nothing: a full disk takes a part, and says so only later."""
    before, data = os.fstat(file.fileno()).st_size, text.encode()
    if file.write(data) != len(data):
        file.truncate(before)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


class Metrics:
    """metrics.jsonl: one object a line, one line a write. A run that goes on cuts what came after its state."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "ab", buffering=0)

    def write(self, **values: Any) -> None:
        append(self._file, f"{json.dumps(values, allow_nan=False)}\n")

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def cut(self, size: int) -> None:
        if self.size() > size:
            self._file.truncate(size)

    def close(self) -> None:
        self._file.close()


class JsonlCache:
    """Work in pieces, kept as they are done: a line of JSON a piece. What a kill cut off is done again.

    All processes read what is known; one of them writes.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.known: dict[int, Any] = {}
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            try:
                number, sha, value = json.loads(line)
                if not line.endswith(b"\n") or sha != _checksum(value) or not isinstance(number, int):
                    break
            except (ValueError, TypeError, RecursionError):
                break
            self.known[number] = value
            whole += len(line)
        self._file = open(path, "ab", buffering=0) if writes else None
        if self._file:
            self._file.truncate(whole)

    def keep(self, number: int, value: Any) -> None:
        if number not in self.known and self._file:
            append(self._file, f"{json.dumps([number, _checksum(value), value])}\n")
        self.known[number] = value

    def close(self) -> None:
        if self._file:
            self._file.close()


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
