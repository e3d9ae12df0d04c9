"""The run directory: who may use it, what is written to it, and writing so that half a file is never seen.

Every file appears complete: written beside its place, flushed to the disk, renamed. Metrics are appended a whole
line at a time. Left out: checkpoints that can be resumed.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

RUN_FILE = "run.json"
STAGING = ".staging"  # how names of what is half made begin
PACKAGES = ("exo-kernels", "torch", "triton", "transformers", "tokenizers", "accelerate", "safetensors")


class RunError(RuntimeError):
    """Why a run cannot begin or go on; one line."""


def check(directory: str, *, overwrite: bool, inputs: Iterable[str] = ()) -> None:
    """RunError for a directory that no run may be written to: call it before any work is done.

    `inputs` are the paths that the run reads, which must not be in what may be removed.
    """
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise RunError(f"--output_dir {directory}: expected a directory, found a file")
    for name in inputs:
        if Path(name).exists() and Path(name).resolve().is_relative_to(path.resolve()):
            raise RunError(f"--output_dir {directory}: holds {name}, which this run reads; choose another")
    if is_run(path):
        if not overwrite:
            raise RunError(
                f"--output_dir {directory}: holds an earlier run; choose another or pass --overwrite_output_dir"
            )
    elif path.exists() and not all(entry.name.startswith(STAGING) for entry in path.iterdir()):
        # not ours to remove, whatever the flags say
        raise RunError(f"--output_dir {directory}: holds files that no run wrote; choose another")


def prepare(directory: str, *, overwrite: bool, inputs: Iterable[str] = ()) -> Path:
    """Create the run directory, and with `overwrite` empty it of an earlier run.

    Call it when everything else that can be checked has been: a run that cannot begin must not cost an earlier one.
    """
    check(directory, overwrite=overwrite, inputs=inputs)
    path = Path(directory)
    if is_run(path):
        _empty(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _empty(run: Path) -> None:
    """Remove all that is in a run, its record last: interrupted, it is still a run, which may make room again."""
    for entry in run.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != RUN_FILE:
            entry.unlink()
    (run / RUN_FILE).unlink()


def is_run(directory: Path, stage: str | None = None) -> bool:
    """Whether a run of ours (of that stage) left its record there."""
    try:
        record = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    ours = isinstance(record, dict) and {"stage", "command", "arguments"} <= record.keys()
    return ours and stage in (None, record["stage"])


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A directory to fill; on leaving it takes the place of `target`, on an error it vanishes.

    A new `target` appears in one rename; an old one is moved aside just before, and removed after.
    """
    staging = target.with_name(f".{target.name}.staging")
    previous = target.with_name(f".{target.name}.previous")
    for left_over in (staging, previous):
        shutil.rmtree(left_over, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        _flush_all(staging)
        if target.exists():
            os.rename(target, previous)
        os.rename(staging, target)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_into(directory: Path) -> Iterator[Path]:
    """Like `staged`, for files that join others in `directory`: each is moved into place once all are complete."""
    staging = directory / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        _flush_all(staging)
        for entry in sorted(staging.iterdir()):
            os.replace(entry, directory / entry.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _flush_all(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            _flush(file)


def _flush(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def write_json(path: Path, value: Any) -> None:
    with staged_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` once complete. The extension stays, for writers that look at it."""
    temporary = path.with_name(f"{STAGING}-{path.name}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Metrics:
    """metrics.jsonl: one object a line, one line a write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, **values: Any) -> None:
        self._file.write(json.dumps(values, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


def write_run(directory: Path, config: Any, stage: str, **facts: Any) -> None:
    """run.json: what was asked for, by which versions; and the facts a stage adds (when, hashes, results)."""
    write_json(
        directory / RUN_FILE,
        {
            "stage": stage,
            "command": ["python", "-m", f"exo.{stage}", *_flags(config)],
            "arguments": asdict(config),
            "versions": {"python": platform.python_version()} | _versions(),
            "platform": f"{platform.system()} {platform.machine()}",
        }
        | facts,
    )


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def update_run(directory: Path, **facts: Any) -> None:
    record = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
    write_json(directory / RUN_FILE, record | facts)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package, or a source tree that was not installed
    return found


def _flags(config: Any) -> list[str]:
    """What is not as it is by default, and where it goes."""
    values = {field.name: (getattr(config, field.name), field.default) for field in fields(config)}
    given = {name: value for name, (value, default) in values.items() if value != default or name == "output_dir"}
    given.pop("overwrite_output_dir", None)  # for whoever runs it again to say
    return [f"--{name.rstrip('_')}={'none' if value is None else value}" for name, value in given.items()]


def guarded(run: Callable[[Any], object], options: Any) -> int:
    """Run a stage for the command line: one line for what can go wrong, and an exit code."""
    try:
        run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        advice = (
            "Activations: lower --max_tokens_per_batch (of sample --batch_size), or --gradient_checkpointing. "
            "Gradients and Adam, 12 bytes a parameter: --lora_r. A second model: no --reference live."
        )
        print(f"error: {str(error).splitlines()[0]} {advice}", file=sys.stderr)
        return 1
    return 0
