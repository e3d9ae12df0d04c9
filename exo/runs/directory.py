"""The run directory: which directories a run may use, and the lock that lets one process at a time write there."""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from exo.cli.errors import RunError
from exo.runs.atomic import STAGING
from exo.runs.record import CHECKPOINTS, PARTIAL_RESULTS, RUN_FILE, read_run

LOCK = ".lock"


def check_inputs(directory: str, inputs: Iterable[str]) -> None:
    """Raise RunError if an input of a run is in its own directory, which may be emptied."""
    for name in inputs:
        if Path(name).exists() and Path(name).resolve().is_relative_to(Path(directory).resolve()):
            raise RunError(f"--output_dir {directory}: holds {name}, which this run reads; choose another")


def check(directory: str, *, overwrite: bool) -> None:
    """Raise RunError if no run may be written to the directory. Call it before any work."""
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise RunError(f"--output_dir {directory}: expected a directory, found a file")
    if is_run(path):
        if not overwrite:
            raise RunError(
                f"--output_dir {directory}: holds an earlier run; choose another or pass --overwrite_output_dir"
            )
    elif path.exists() and not all(entry.name.startswith((STAGING, LOCK)) for entry in path.iterdir()):
        # never remove files that no run wrote
        raise RunError(f"--output_dir {directory}: holds files that no run wrote; choose another")


def prepare(directory: str, *, overwrite: bool) -> Path:
    """Create the run directory; with `overwrite`, remove an earlier run from it.

    Call it after every other check: a run that cannot start must not remove an earlier one.
    """
    check(directory, overwrite=overwrite)
    path = Path(directory)
    if is_run(path):
        _empty(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _empty(run: Path) -> None:
    """Remove all files of a run, its record last, so that it is still a run if this is interrupted."""
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)  # first: a run that is half removed must not resume
    for entry in run.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name not in (RUN_FILE, LOCK):
            entry.unlink()
    (run / RUN_FILE).unlink()


@contextmanager
def lock(directory: str) -> Iterator[None]:
    """Hold the lock of a run directory; rank 0 holds it for all ranks. A process that dies releases it.

    The `filelock` package would leave its file behind, which is removed here: hence the check of its inode.

    Raises:
        RunError: if another process holds it, or the file system cannot lock.
    """
    path = Path(directory)
    if os.environ.get("RANK", "0") != "0" or (path.exists() and not path.is_dir()):
        yield
        return
    busy = RunError(f"--output_dir {directory}: another process is writing there; choose another")
    path.mkdir(parents=True, exist_ok=True)
    try:
        handle = open(path / LOCK, "a")
    except FileNotFoundError:  # another process was refused and has just removed the directory
        raise busy from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle.fileno()).st_ino != (path / LOCK).stat().st_ino:
                raise BlockingIOError  # since the file was opened, another process released it and a third took it
        except (BlockingIOError, FileNotFoundError):
            raise busy from None
        except OSError as error:
            raise RunError(f"--output_dir {directory}: its file system cannot lock ({error.strerror})") from None
        try:
            yield
        finally:
            (path / LOCK).unlink(missing_ok=True)
            if not any(path.iterdir()):  # the run was refused: leave nothing
                path.rmdir()


def is_run(directory: Path, stage: str | None = None) -> bool:
    """Return whether the directory has the record of a run (of that stage)."""
    record = read_run(directory)
    return record is not None and stage in (None, record["stage"])


def remove_resume_files(run: Path) -> None:
    """Remove the files from which a run resumes, when it has finished."""
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    (run / PARTIAL_RESULTS).unlink(missing_ok=True)
