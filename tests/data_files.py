"""Data files for the tests of the reader.

Files are written as bytes, because most errors in data files are below the level of JSON. Bad rows contain `CANARY`,
which must be in no message: errors never quote data.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from exo.data import DataError, read

CANARY = "canary-7f3a"
GOOD = {"prompt": "p", "chosen": " a", "rejected": " b"}
SCORED = {"prompt": "p", "completions": [" a", " b", " c"], "rewards": [1, 0.5, -2]}
H, A = "\n\nHuman:", "\n\nAssistant:"
HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: hello",
    "rejected": "\n\nHuman: hi\n\nAssistant: go away",
}


def put(folder: Path, content: bytes | str | list, name: str = "data.jsonl") -> Path:
    """Write a file of these bytes, this text, or one JSON line per row; return its path."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path | str, **options: Any) -> str:
    """Return the message of the DataError that reading this file raises; it must be one line."""
    with pytest.raises(DataError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert CANARY not in message
    return message


def scored(*completions: str, rewards: list | None = None) -> dict:
    values = list(range(len(completions))) if rewards is None else rewards
    return {"prompt": "p", "completions": list(completions), "rewards": values}
