"""Write rows as JSON lines between stages, and read them without detecting a format."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

from exo.cli.paths import StrPath
from exo.data.errors import DataError, Malformed, Place, Row, Rows
from exo.data.formats.messages import Chat, Reply
from exo.data.sources import files


def read_jsonl(path: StrPath) -> Iterator[tuple[int, Row]]:
    """Yield (line, row) of a JSON file; DataError with `file:line` for JSON that `read` would refuse."""
    return ((number, row) for (number, _), row in _valid(files.json_rows(path)))


def read_rows(path: StrPath) -> Iterator[tuple[str, Row]]:
    """Yield (file:line, row) of any path that `read` takes, with any columns."""
    with closing(files.open_source(path).rows) as stream:
        yield from ((place, row) for (_, place), row in _valid(stream))


def _valid(stream: Rows) -> Iterator[tuple[Place, Row]]:
    for place, row in stream:
        if isinstance(row, Malformed):
            raise DataError(f"{place[1]}: {row}")
        yield place, row


def write_jsonl(path: StrPath, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one object per line and return their number; a Chat as its messages and tools, a Reply as its message.

    Not atomic: an error leaves a partial file.
    """
    count = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            plain = {key: _plain(value) for key, value in row.items()}
            if isinstance(row.get("prompt"), Chat) and row["prompt"].tools:
                plain["tools"] = list(row["prompt"].tools)
            file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def _plain(value: Any) -> Any:
    if isinstance(value, Chat):
        return list(value.messages)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.message if isinstance(value, Reply) else value
