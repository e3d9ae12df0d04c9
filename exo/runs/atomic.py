"""Write files and directories atomically: a reader sees all of the content or none."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STAGING = ".staging"  # the names of unfinished files and directories begin with it


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a directory to fill. On exit it replaces `target`; on an error it is removed.

    A new `target` appears in one rename. An old one is moved aside just before, and removed after.
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
        fsync_all(staging)
        if target.exists():
            os.rename(target, previous)
        os.rename(staging, target)
        fsync(target.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def atomic_files(directory: Path) -> Iterator[Path]:
    """Yield a directory for files that join others in `directory`; they are moved when all are complete."""
    staging = directory / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        fsync_all(staging)
        for entry in sorted(staging.iterdir()):
            os.replace(entry, directory / entry.name)
        fsync(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def fsync_all(directory: Path) -> None:
    for entry in (*directory.rglob("*"), directory):
        fsync(entry)


def fsync(entry: Path) -> None:
    """Flush the contents of a file, or the names in a directory, to the disk."""
    handle = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, with the extension of `path`; on exit it replaces `path`."""
    temporary = path.with_name(f"{STAGING}-{path.name}")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
