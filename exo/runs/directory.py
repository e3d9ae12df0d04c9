"""The run directory: who may use it, what is written to it, and writing so that half a file is never seen.

Every file appears complete: written beside its place, flushed to the disk, renamed. Metrics are appended a whole
line at a time. One process at a time writes to a run. Left out: what a run that was killed goes on from (checkpoints).
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from exo.cli.errors import RunError
from exo.runs.atomic import STAGING
from exo.runs.record import PIECES, RUN_FILE, STATES, read_run

LOCK = ".lock"


def check_inputs(directory: str, inputs: Iterable[str]) -> None:
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
def lock(directory: str) -> Iterator[None]:
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


def remove_resume_files(run: Path) -> None:
    """Remove what a run goes on from, once it has ended and does not."""
    shutil.rmtree(run / STATES, ignore_errors=True)
    (run / PIECES).unlink(missing_ok=True)
