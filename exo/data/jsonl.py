"""Write rows between stages as JSON lines, and read them back without detecting a format."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

from exo.data.errors import DataError, Malformed, StrPath
from exo.data.formats.messages import Chat, Reply
from exo.data.sources import files


def read_jsonl(path: StrPath) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) of a JSON file; DataError with `file:line` for JSON that `read` would refuse."""
    for (number, place), row in files.json_rows(path):
        if isinstance(row, Malformed):
            raise DataError(f"{place}: {row}")
        yield number, row


def read_rows(path: StrPath) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file:line, row) of any path that `read` takes, whatever the columns are."""
    with closing(files.open_source(path).rows) as stream:
        for (_, place), row in stream:
            if isinstance(row, Malformed):
                raise DataError(f"{place}: {row}")
            yield place, row


def write_jsonl(path: StrPath, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one object a line; return how many. A Chat is written as its messages and tools, a Reply as its message.

    Not atomic: an error leaves half a file behind.
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
    """Return a Chat as its messages and a Reply as its message; other values as they are."""
    if isinstance(value, Chat):
        return list(value.messages)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.message if isinstance(value, Reply) else value
