"""run.json as it is read: the record of a run of ours, or nothing, whatever stands in the file.

Writing it: artifacts.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"


def read_run(directory: Path) -> dict[str, Any] | None:
    """The run.json of a directory; None if there is none, or if no run of ours wrote it."""
    try:
        record = read_json(directory / RUN_FILE)
    except (OSError, ValueError):
        return None
    needed = isinstance(record, dict) and {"stage", "command", "arguments"} <= record.keys()
    return (
        record if needed and all(holds(record[name]) for name, holds in _RECORDED.items() if name in record) else None
    )


def read_json(path: Path) -> Any:
    """The value of a JSON file. ValueError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict)


def _are_hashes(value: object) -> bool:
    """Texts by name; the name of a file is below the run."""
    return isinstance(value, dict) and all(
        isinstance(item, str) and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
        for name, item in value.items()
    )


_RECORDED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("stage", "started", "finished"), _is_text),
    **dict.fromkeys(("command", "again"), _are_texts),
    **dict.fromkeys(("arguments", "asked", "versions", "rows", "recipe"), _is_mapping),
    **dict.fromkeys(("inputs", "outputs"), _are_hashes),
}
