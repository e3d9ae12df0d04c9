"""Preference and reward data: one strict reader for the files people bring.

`read` turns what a path or a hub name stands for (sources/) into groups, one prompt with its completions
each, whatever keys its rows have (formats/), and accounts for every row: used, skipped with a reason, or
refused with `file:line: what is wrong`. A prompt of chat messages is a `Chat` (formats/messages.py), which
text/chat_template.py renders. `write_jsonl` and `read_jsonl` carry rows between stages.

Errors name keys, types and places and never quote a row (errors.py): data is often private.

Left out: tokens, streaming.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from exo.data.dataset import Dataset, Example, write_jsonl
from exo.data.errors import DataError, Malformed, StrPath
from exo.data.formats.common import Purpose
from exo.data.formats.messages import Chat, Message, Reply
from exo.data.formats.reading import Tokens
from exo.data.reader import read
from exo.data.sources import files

__all__ = [
    "Chat", "DataError", "Dataset", "Example", "Message", "Purpose", "Reply", "Tokens", "read", "read_jsonl",
    "read_rows", "write_jsonl",
]  # fmt: skip


def read_jsonl(path: StrPath) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) of any stage's file: as strict about JSON as `read`, but without its shapes."""
    for (number, place), row in files.json_rows(path):
        if isinstance(row, Malformed):
            raise DataError(f"{place}: {row}")
        yield number, row


def read_rows(path: StrPath) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place to blame, row) of whatever `read` reads, but without its shapes."""
    with closing(files.open_source(path).rows) as stream:
        for (_, place), row in stream:
            if isinstance(row, Malformed):
                raise DataError(f"{place}: {row}")
            yield place, row
