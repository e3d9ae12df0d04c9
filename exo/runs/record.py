"""Read and write run.json, the record of a run: command, options, versions, hashes of inputs and outputs."""

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
from typing import Any, NamedTuple

from exo.cli.parse import as_flags
from exo.runs.atomic import write_json

RUN_FILE = "run.json"


class StageFiles(NamedTuple):
    reads: tuple[str, ...]  # the options that name what the stage reads
    makes: str  # the file in its directory that later stages read; "." if they read the directory


STAGES: dict[str, StageFiles] = {}  # of the stage modules that are imported: runs/stage.stage fills it


def read_run(directory: Path) -> dict[str, Any] | None:
    """Return the run.json of a directory; None if there is none, or if its content is not that of a run."""
    try:
        record = read_json(directory / RUN_FILE)
    except (OSError, ValueError):
        return None
    needed = isinstance(record, dict) and {"stage", "command", "arguments"} <= record.keys()
    return (
        record if needed and all(holds(record[name]) for name, holds in _RECORDED.items() if name in record) else None
    )


def read_json(path: Path) -> Any:
    """Return the value of a JSON file. ValueError if it is not JSON."""
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
    """Return whether the value maps names of files below the run to texts."""
    return isinstance(value, dict) and all(
        isinstance(item, str) and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
        for name, item in value.items()
    )


_RECORDED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("stage", "started", "finished"), _is_text),
    **dict.fromkeys(("command", "again"), _are_texts),
    **dict.fromkeys(("arguments", "resume_request", "versions", "rows", "recipe"), _is_mapping),
    **dict.fromkeys(("inputs", "outputs"), _are_hashes),
    "reads": _are_texts,
    "makes": lambda value: _is_text(value) and _are_hashes({value: ""}),
}
CHECKPOINTS, PARTIAL_RESULTS = "checkpoints", "pieces.jsonl"  # an unfinished run resumes from them
OWN_FILES = (RUN_FILE, "metrics.jsonl")  # not outputs of a stage
_TEMPORARY = ("profile", CHECKPOINTS, PARTIAL_RESULTS)
# options that do not change what a run computes
_IMMATERIAL = {
    *("output_dir", "overwrite_output_dir", "logging_steps", "report_to", "reference_cache", "profile", "save_steps"),
    *("save_total_limit", "resume_from_checkpoint", "allow_changes", "on_nan", "nproc", "fsdp"),
}
PACKAGES = ("exo-kernels", "torch", "triton", "transformers", "tokenizers", "accelerate", "safetensors")


def write_run(directory: Path, config: Any, stage: str, **facts: Any) -> None:
    """Write run.json: the command, the options and versions, and the facts of a stage (times, hashes, results)."""
    write_json(directory / RUN_FILE, describe_request(config, stage) | facts)


def describe_request(config: Any, stage: str) -> dict[str, Any]:
    files = STAGES.get(stage)
    return (files._asdict() if files else {}) | {
        "stage": stage,
        "command": ["python", "-m", f"exo.{stage}", *as_flags(config)],
        "arguments": asdict(config),
        "versions": {"python": platform.python_version()} | versions(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def confirm_resume(directory: Path) -> None:
    """Record the options of a run that has resumed with them. Until now they were a request, which could fail."""
    record = read_json(directory / RUN_FILE)
    if request := record.pop("resume_request", None):
        write_json(directory / RUN_FILE, record | request)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def update_run(directory: Path, **facts: Any) -> None:
    write_json(directory / RUN_FILE, read_json(directory / RUN_FILE) | facts)


def versions() -> dict[str, str]:
    result = {}
    for name in PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package, or a source tree that was not installed
    return result


def record(directory: Path) -> dict[str, Any] | None:
    """Return the run.json of a directory that a stage made, with its `reads` and `makes`; None without one."""
    run = read_run(directory)
    if run is None:
        return None
    files = STAGES.get(run["stage"])
    run = (files._asdict() if files else {}) | run
    return run if "makes" in run else None


def command(run: Mapping[str, Any]) -> str:
    """Return the command that a record holds, as one would type it, on one line."""
    typed = shlex.join(run["command"])
    return typed if typed.isprintable() else ascii(typed)[1:-1]


def changed(run: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    """Return the options whose values differ from those of a run, but those that name inputs."""
    skipped = {*_IMMATERIAL, *run.get("reads", ())}
    previous = run["arguments"]
    names = dict.fromkeys([*previous, *requested])
    return [name for name in names if name not in skipped and previous.get(name) != requested.get(name)]


def outputs_intact(directory: Path, outputs: Mapping[str, str] | None) -> bool:
    return outputs is not None and all(
        (directory / name).is_file() and digest(directory / name) == sha for name, sha in outputs.items()
    )


def output_files(directory: Path) -> list[Path]:
    """Return the files of a run without its record, its log, its pictures and hidden files, which are unfinished."""
    return [
        file
        for file in sorted(directory.rglob("*"))
        if file.is_file()
        and file.suffix not in (".png", ".html")
        and file.name not in OWN_FILES
        and not is_temporary(directory, file)
    ]


def is_temporary(directory: Path, file: Path) -> bool:
    """Return whether a file is unfinished, or belongs to an unfinished run."""
    return any(part.startswith(".") or part in _TEMPORARY for part in file.relative_to(directory).parts)


def digest(file: Path) -> str:
    state = file.stat()
    return _sha256(file, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(file: Path, size: int, changed: int) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
