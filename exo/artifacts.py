"""The run directory: who may use it, what is written to it, and writing so that half a file is never seen.

Every file appears complete: written beside its place, flushed to the disk, renamed. Metrics are appended a whole
line at a time. One process at a time writes to a run. Left out: what a run that was killed goes on from (checkpoints).
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
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

from exo import launch, signals
from exo.records import RUN_FILE, read_json, read_run

STAGING = ".staging"  # how names of what is half made begin
LOCK = ".lock"
STATES, PIECES = "resume", "pieces.jsonl"  # what an unfinished run goes on from
LOST = ("gloo", "NCCL", "Connection reset", "Connection closed")  # in errors of one process that waits for another
PACKAGES = ("exo-kernels", "torch", "triton", "transformers", "tokenizers", "accelerate", "safetensors")


class RunError(RuntimeError):
    """Why a run cannot begin or go on; one line."""


def check_apart(directory: str, inputs: Iterable[str]) -> None:
    """RunError where what a run reads is in its own directory, which may be emptied."""
    for name in inputs:
        if Path(name).exists() and Path(name).resolve().is_relative_to(Path(directory).resolve()):
            raise RunError(f"--output_dir {directory}: holds {name}, which this run reads; choose another")


def check(directory: str, *, overwrite: bool) -> None:
    """RunError for a directory that no run may be written to: call it before any work is done."""
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise RunError(f"--output_dir {directory}: expected a directory, found a file")
    if is_run(path):
        if not overwrite:
            raise RunError(
                f"--output_dir {directory}: holds an earlier run; choose another or pass --overwrite_output_dir"
            )
    elif path.exists() and not all(entry.name.startswith((STAGING, LOCK)) for entry in path.iterdir()):
        # not ours to remove, whatever the flags say
        raise RunError(f"--output_dir {directory}: holds files that no run wrote; choose another")


def prepare(directory: str, *, overwrite: bool) -> Path:
    """Create the run directory, and with `overwrite` empty it of an earlier run.

    Call it when everything else that can be checked has been: a run that cannot begin must not cost an earlier one.
    """
    check(directory, overwrite=overwrite)
    path = Path(directory)
    if is_run(path):
        _empty(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _empty(run: Path) -> None:
    """Remove all that is in a run, its record last: interrupted, it is still a run, which may make room again."""
    shutil.rmtree(run / STATES, ignore_errors=True)  # first: nothing is to go on in what is half removed
    for entry in run.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name not in (RUN_FILE, LOCK):
            entry.unlink()
    (run / RUN_FILE).unlink()


@contextmanager
def locked(directory: str) -> Iterator[None]:
    """RunError where another process writes to the run. A process that dies, however it does, locks nothing.

    Of several processes of one run the first locks for all.
    """
    path = Path(directory)
    if os.environ.get("RANK", "0") != "0" or (path.exists() and not path.is_dir()):
        yield
        return
    busy = RunError(f"--output_dir {directory}: another process is writing there; choose another")
    path.mkdir(parents=True, exist_ok=True)
    try:
        handle = open(path / LOCK, "a")
    except FileNotFoundError:  # removed by one that was just refused
        raise busy from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle.fileno()).st_ino != (path / LOCK).stat().st_ino:
                raise BlockingIOError  # someone ended, and someone else began, since it was opened
        except (BlockingIOError, FileNotFoundError):
            raise busy from None
        except OSError as error:
            raise RunError(f"--output_dir {directory}: its file system cannot lock ({error.strerror})") from None
        try:
            yield
        finally:
            (path / LOCK).unlink(missing_ok=True)
            if not any(path.iterdir()):  # refused, and so as it was before
                path.rmdir()


def is_run(directory: Path, stage: str | None = None) -> bool:
    """Whether a run of ours (of that stage) left its record there."""
    record = read_run(directory)
    return record is not None and stage in (None, record["stage"])


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A directory to fill; on leaving it takes the place of `target`, on an error it vanishes.

    A new `target` appears in one rename; an old one is moved aside just before, and removed after.
    """
    staging = target.with_name(f".{target.name}.staging")
    previous = target.with_name(f".{target.name}.previous")
    if previous.exists() and not target.exists():  # killed between two renames
        os.rename(previous, target)
    for left_over in (staging, previous):
        shutil.rmtree(left_over, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        flush_all(staging)
        if target.exists():
            os.rename(target, previous)
        os.rename(staging, target)
        flush(target.parent)
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
        flush_all(staging)
        for entry in sorted(staging.iterdir()):
            os.replace(entry, directory / entry.name)
        flush(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def flush_all(directory: Path) -> None:
    for entry in (*directory.rglob("*"), directory):
        flush(entry)


def flush(entry: Path) -> None:
    """A file's contents, or a directory's names, to the disk itself."""
    handle = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    with staged_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` once complete. The extension stays, for writers that look at it."""
    temporary = path.with_name(f"{STAGING}-{path.name}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def append(file: Any, text: str) -> None:
    """All of it to the end of an unbuffered file, or nothing: a full disk takes a part, and says so only later."""
    before, data = os.fstat(file.fileno()).st_size, text.encode()
    if file.write(data) != len(data):
        file.truncate(before)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


class Metrics:
    """metrics.jsonl: one object a line, one line a write. A run that goes on cuts what came after its state."""

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


class Pieces:
    """Work in pieces, kept as they are done: a line of JSON a piece. What a kill cut off is done again.

    All processes read what is known; one of them writes.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.known: dict[int, Any] = {}
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            try:
                number, sha, value = json.loads(line)
                if not line.endswith(b"\n") or sha != _digest(value) or not isinstance(number, int):
                    break
            except (ValueError, TypeError, RecursionError):
                break
            self.known[number] = value
            whole += len(line)
        self._file = open(path, "ab", buffering=0) if writes else None
        if self._file:
            self._file.truncate(whole)

    def keep(self, number: int, value: Any) -> None:
        if number not in self.known and self._file:
            append(self._file, f"{json.dumps([number, _digest(value), value])}\n")
        self.known[number] = value

    def close(self) -> None:
        if self._file:
            self._file.close()


def clear(run: Path) -> None:
    """Remove what a run goes on from, once it has ended and does not."""
    shutil.rmtree(run / STATES, ignore_errors=True)
    (run / PIECES).unlink(missing_ok=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def write_run(directory: Path, config: Any, stage: str, **facts: Any) -> None:
    """run.json: what was asked for, by which versions; and the facts a stage adds (when, hashes, results)."""
    write_json(directory / RUN_FILE, asked_for(config, stage) | facts)


def asked_for(config: Any, stage: str) -> dict[str, Any]:
    return {
        "stage": stage,
        "command": ["python", "-m", f"exo.{stage}", *_flags(config)],
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


def _flags(config: Any) -> list[str]:
    """What is not as it is by default, and where it goes."""
    values = {field.name: (getattr(config, field.name), field.default) for field in fields(config)}
    given = {name: value for name, (value, default) in values.items() if value != default or name == "output_dir"}
    given.pop("overwrite_output_dir", None)  # for whoever runs it again to say
    return [f"--{name.rstrip('_')}={'none' if value is None else value}" for name, value in given.items()]


def last_words(text: str) -> None:
    with contextlib.suppress(OSError):
        print(" ".join(text.splitlines()), file=sys.stderr, flush=True)


def command_line(config: Any) -> list[str]:
    """The flags that make this config."""
    return [*_flags(config), *["--overwrite_output_dir"] * getattr(config, "overwrite_output_dir", False)]


def guarded(run: Callable[[Any], object], options: Any) -> int:
    """Run a stage for the command line: one line for what can go wrong, and an exit code."""
    if launch.wanted(getattr(options, "nproc", 1)):
        module = run.__module__ if run.__module__ != "__main__" else sys.modules["__main__"].__spec__.name  # type: ignore
        return launch.run(module, command_line(options), options.nproc)
    try:
        signals.end_in_order()
        launch.follow()
        run(options)
    except KeyboardInterrupt:
        last_words("interrupted")
        return 130
    except signals.Stopped as stopped:
        last_words(f"stopped: {stopped}")
        return 128 + stopped.signum
    except (ValueError, RunError) as error:
        last_words(f"error: {error}")
        return 2 if isinstance(error, ValueError) else 1
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        last_words(f"error: {error.strerror or error}{where}")
        return 1
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError):
            if torch.distributed.is_initialized() and any(word in str(error) for word in LOST):
                last_words(
                    f"error: another process of this run has ended, or is not reached: {str(error).splitlines()[0]}"
                )
                return 1
            raise
        advice = (
            "Activations: lower --max_tokens_per_batch (of sample --batch_size), or --gradient_checkpointing. "
            "Gradients and Adam, 12 bytes a parameter: --lora_r. A second model: no --reference live."
        )
        last_words(f"error: {str(error).splitlines()[0]} {advice}")
        return 1
    return 0
