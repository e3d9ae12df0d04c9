"""run.json as it is read: the record of a run of ours, or nothing, whatever stands in the file.

Writing it: artifacts.
"""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from exo.cli.parse import as_flags
from exo.runs.atomic import write_json

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
STATES, PIECES = "checkpoints", "pieces.jsonl"  # what an unfinished run goes on from
PACKAGES = ("exo-kernels", "torch", "triton", "transformers", "tokenizers", "accelerate", "safetensors")


def write_run(directory: Path, config: Any, stage: str, **facts: Any) -> None:
    """run.json: what was asked for, by which versions; and the facts a stage adds (when, hashes, results)."""
    write_json(directory / RUN_FILE, describe_request(config, stage) | facts)


def describe_request(config: Any, stage: str) -> dict[str, Any]:
    return {
        "stage": stage,
        "command": ["python", "-m", f"exo.{stage}", *as_flags(config)],
        "arguments": asdict(config),
        "versions": {"python": platform.python_version()} | versions(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def confirm(directory: Path) -> None:
    """What a run that goes on was asked for is what it is, from now on: nothing has refused it."""
    record = read_json(directory / RUN_FILE)
    if asked := record.pop("asked", None):
        write_json(directory / RUN_FILE, record | asked)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def update_run(directory: Path, **facts: Any) -> None:
    write_json(directory / RUN_FILE, read_json(directory / RUN_FILE) | facts)


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package, or a source tree that was not installed
    return found


# The options of each stage that name what it reads.
INPUTS: dict[str, tuple[str, ...]] = {
    "prepare": ("source", "tokenizer"),
    "sft": ("model", "data"),
    "sample": ("model", "data"),
    "score": ("data", "reward_model", "oracle"),
    "reward": ("model", "data"),
    "align": ("model", "ref_model", "data", "eval_data"),
    "ppo": ("model", "data", "reward_model", "oracle"),
    "best_of_n": ("data",),
    "evaluate": ("model", "samples", "reference", "data", "baseline", "density", "reward_model", "oracle"),
    "judge": ("a", "b", "references", "template"),
    "label": ("references", "key"),
    "report": ("run",),
}
# What it makes; "." is a directory that is read as one.
OUTPUTS = {
    "prepare": ".",  # several files; who reads one says which
    "sft": ".",
    "sample": "samples.jsonl",
    "score": "scored.jsonl",
    "reward": ".",
    "align": ".",
    "ppo": ".",
    "best_of_n": "samples.jsonl",
    "evaluate": "evaluation.json",
    "judge": "judge.json",
    "label": "label.json",
    "report": "report.html",
    "train": "run.json",  # the plan; the steps have records of their own
}
# Where a run's results go and what it prints change nothing of what it makes.
OWN_FILES = (RUN_FILE, "metrics.jsonl")
_PASSING = ("profile", STATES, PIECES)
_IMMATERIAL = {"output_dir", "overwrite_output_dir", "logging_steps", "report_to", "reference_cache", "profile"}


def record(directory: Path) -> dict[str, Any] | None:
    """The run.json of a directory that a stage of ours made; None without one."""
    run = read_run(directory)
    return run if run is not None and run["stage"] in OUTPUTS else None


def command(run: Mapping[str, Any]) -> str:
    """Return the command that a record holds, as one would type it, on one line."""
    typed = shlex.join(run["command"])
    return typed if typed.isprintable() else ascii(typed)[1:-1]


def changed(run: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Options whose values are not those that a run had; what it read is compared by content, not by name."""
    skipped = {*_IMMATERIAL, *INPUTS.get(run["stage"], ())}
    before = run["arguments"]
    names = dict.fromkeys([*before, *wanted])
    return [name for name in names if name not in skipped and before.get(name) != wanted.get(name)]


def outputs_intact(directory: Path, outputs: Mapping[str, str] | None) -> bool:
    return outputs is not None and all(
        (directory / name).is_file() and digest(directory / name) == sha for name, sha in outputs.items()
    )


def output_files(directory: Path) -> list[Path]:
    """The files of a run but its record, its log and its pictures; and nothing hidden, which is half made."""
    return [
        file
        for file in sorted(directory.rglob("*"))
        if file.is_file()
        and file.suffix not in (".png", ".html")
        and file.name not in OWN_FILES
        and not is_temporary(directory, file)
    ]


def is_temporary(directory: Path, file: Path) -> bool:
    """Whether it is half made, or of a run that has not ended."""
    return any(part.startswith(".") or part in _PASSING for part in file.relative_to(directory).parts)


def digest(file: Path) -> str:
    state = file.stat()
    return _sha256(file, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(file: Path, size: int, changed: int) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
