"""Data files for the tests of the reader.

They are written as bytes, because most of what goes wrong in data files goes wrong below JSON. `CANARY` stands in every
bad row and must turn up in no message: errors never quote data.
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
    """A file of these bytes, this text, or one JSON line for each of these rows."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert CANARY not in message
    return message


def scored(*completions: str, rewards: list | None = None) -> dict:
    values = list(range(len(completions))) if rewards is None else rewards
    return {"prompt": "p", "completions": list(completions), "rewards": values}
