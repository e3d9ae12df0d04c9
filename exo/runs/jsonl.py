"""Append-only JSONL files: a log of metrics, and a cache of results that a killed run does not compute again."""

import errno
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

START = b'{"key": '  # of every line of a cache


def append(file: Any, text: str) -> None:
    """Append the text to an unbuffered file, or nothing of it: a full disk takes a part and reports no error."""
    size, data = os.fstat(file.fileno()).st_size, text.encode()
    if file.write(data) != len(data):
        file.truncate(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


class JsonlLog:
    """A log such as metrics.jsonl: one object a line, one line a write. A resumed run cuts it at its checkpoint."""

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
    """A dictionary in a file: one line {"key", "value", "sha"} for each entry, keys and values being JSON.

    Every rank reads it and one of them writes. The last line is removed if a crash has cut it; other damaged lines are
    ignored. Threads may call `put`.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.entries, self.damaged, size = read_cache(path)
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab", buffering=0) if writes else None
        if self._file:
            self._file.truncate(size)

    def put(self, key: str | int, value: Any) -> None:
        with self._lock:
            if key not in self.entries and self._file:
                append(self._file, json.dumps({"key": key, "value": value, "sha": _checksum(key, value)}) + "\n")
            self.entries[key] = value

    def close(self) -> None:
        if self._file:
            os.fsync(self._file.fileno())
            self._file.close()


def read_cache(path: Path) -> tuple[dict[Any, Any], list[int], int]:
    """Return the entries of a cache, the numbers of its damaged lines, and its size without a line that was cut."""
    entries: dict[Any, Any] = {}
    damaged = []
    content = path.read_bytes() if path.exists() else b""
    *lines, rest = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key, value = row["key"], row["value"]
            if row["sha"] != _checksum(key, value):
                raise ValueError
            entries[key] = value
        except (ValueError, LookupError, TypeError, RecursionError):
            damaged.append(number)
    if not (rest.startswith(START) or START.startswith(rest)):
        damaged.append(len(lines) + 1)
    return entries, damaged, len(content) - len(rest)


def _checksum(key: Any, value: Any) -> str:
    return hashlib.sha256(json.dumps([key, value]).encode()).hexdigest()[:16]
