"""A training checkpoint on disk: complete or absent, and verified by sha256.

Tensors are safetensors files as torch's distributed checkpoints write them: each rank writes its shards and a share of
what all ranks hold, and any number of ranks reads them back, sharded in any way. state.json holds the rest, and a
manifest the size and sha256 of every file. A checkpoint is written beside its place, flushed and renamed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from exo.cli import console
from exo.distributed import gather
from exo.distributed.fsdp import local_tensor
from exo.runs.atomic import fsync, fsync_all

VERSION = 2
FACTS, MANIFEST, TENSORS = "state.json", "manifest.json", "tensors"
FILE = 2 << 30  # largest size of a file in bytes, unless a tensor is larger: writing copies it in memory
Tensors = Mapping[str, Tensor]


class CheckpointNotWritten(Exception):
    """Raised with one line if a checkpoint could not be written."""


class Kind(NamedTuple):
    """Shape and dtype of a saved tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def write(path: Path, tensors: Tensors, facts: Mapping[str, Any], accelerator: Accelerator, limit: int = 2) -> None:
    """Write a checkpoint of all ranks' tensors, then remove all but the newest `limit`."""
    staging = path.with_name(f".{path.name}.staging")
    main = accelerator.is_main_process
    try:
        if main:
            path.parent.mkdir(exist_ok=True)
            for incomplete in path.parent.glob(".*"):
                shutil.rmtree(incomplete)
            staging.mkdir()
        accelerator.wait_for_everyone()
        _write_tensors(staging / TENSORS, tensors)
        if main:
            text = json.dumps(facts, allow_nan=False, default=asdict)
            (staging / FACTS).write_text(text, encoding="utf-8")
        accelerator.wait_for_everyone()
        files = _digests(staging, accelerator)
        if main:
            (staging / MANIFEST).write_bytes(_encode_manifest(files))
            fsync_all(staging)
            if path.exists():  # damaged, or not resumed from
                _remove(path)
            os.rename(staging, path)
            fsync(path.parent)
    except (OSError, CheckpointException) as error:
        if main:
            shutil.rmtree(staging, ignore_errors=True)  # a full disk needs the space
        raise CheckpointNotWritten(_cause(error)) from error
    if main:
        with contextlib.suppress(OSError):  # the checkpoint is written; the next one removes what is left over
            _remove_old(path, limit)
    accelerator.wait_for_everyone()


def _write_tensors(directory: Path, tensors: Tensors) -> None:
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        part = local_tensor(tensor)
        if size and size + part.nbytes > FILE:
            number, size = number + 1, 0
        numbers[name], size = number, size + part.nbytes
    writer = HuggingFaceStorageWriter(str(directory), fqn_to_index_mapping=numbers, save_distributed=True)
    with _no_warning():
        checkpoint.save(dict(tensors), storage_writer=writer)


def kinds(path: Path) -> dict[str, Kind]:
    """Return shape and dtype of the unsharded tensors in a directory of safetensors."""
    metadata: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: Kind(tuple(kind.size), kind.properties.dtype) for name, kind in metadata.items()}


def read(path: Path, into: Tensors) -> None:
    """Fill the tensors from a checkpoint; each rank reads its own shards."""
    with _no_warning():
        checkpoint.load(dict(into), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


@contextmanager
def _no_warning() -> Iterator[None]:
    """Hide torch's warning that a single rank is not distributed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(error: OSError | CheckpointException) -> str:
    if isinstance(error, CheckpointException):
        rank, (failure, _) = min(error.failures.items())
        where = f" (rank {rank})" if torch.distributed.is_initialized() else ""
        return f"{getattr(failure, 'strerror', None) or str(failure).splitlines()[0]}{where}"
    return error.strerror or str(error)


def _remove_old(state: Path, limit: int) -> None:
    """Keep the checkpoint just written and those before it; a later one was damaged, or not resumed from."""
    states = _states(state.parent)
    here = states.index(state)
    for other in states[here + 1 :] + states[: max(0, here + 1 - limit)]:
        _remove(other)


def _remove(state: Path) -> None:
    """Remove a checkpoint so that no reader sees a part of it."""
    gone = state.with_name(f".{state.name}.gone")
    os.rename(state, gone)
    shutil.rmtree(gone)


def newest(directory: Path, accelerator: Accelerator | None = None) -> Path | None:
    """Return the newest intact checkpoint, or None; print which damaged ones are skipped. All ranks call."""
    names = [path.name for path in _states(directory)]
    if accelerator is not None:
        names = gather.all_gather_json(names, accelerator)[0]
    for name in reversed(names):
        damage = find_damage(directory / name, accelerator)
        if not damage:
            return directory / name
        console.log(f"  {directory / name} is damaged and not used: {damage}")
    return None


def find_damage(path: Path, accelerator: Accelerator | None = None) -> str:
    """Return what is wrong with a checkpoint, or "". Each rank reads a share of the files."""
    files, problem = _read_manifest(path)
    if accelerator is not None:  # rank 0 decides for all
        files, problem = gather.all_gather_json([files, problem], accelerator)[0]
    if problem:
        return problem

    def damage(name: str) -> str:
        file, (size, sha) = path / name, files[name]
        try:
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} bytes of {size:,}"
            return "" if _sha256(file) == sha else f"{name} has other contents than were written"
        except OSError as error:
            return f"{name}: {error.strerror}"

    return next(filter(None, gather.map_over_ranks(list(files), damage, accelerator, interruptible=False)), "")


def _read_manifest(state: Path) -> tuple[dict[str, tuple[int, str]], str]:
    """Return every file's size and sha256 from the manifest, and what is wrong with the manifest itself, or ""."""
    try:
        content = (state / MANIFEST).read_bytes()
        manifest = json.loads(content)
        if manifest["version"] != VERSION:
            return {}, f"another version of exo wrote it ({manifest['version']}; this one reads {VERSION})"
        intact = content == _encode_manifest(manifest["files"])
        return (manifest["files"], "") if intact else ({}, f"{MANIFEST} was changed after it was written")
    except OSError as error:
        return {}, f"{MANIFEST}: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}, f"{MANIFEST} cannot be read"


def _digests(state: Path, accelerator: Accelerator | None = None) -> dict[str, tuple[int, str]]:
    """Return size and sha256 of every file but the manifest."""
    names = sorted(str(f.relative_to(state)) for f in state.rglob("*") if f.is_file() and f.name != MANIFEST)

    def digest(name: str) -> tuple[int, str]:
        return (state / name).stat().st_size, _sha256(state / name)

    return dict(zip(names, gather.map_over_ranks(names, digest, accelerator, interruptible=False), strict=True))


def _encode_manifest(files: Mapping[str, Any]) -> bytes:
    """Return the manifest's bytes, with its own sha256."""
    text = json.dumps({"version": VERSION, "files": files}, indent=1, sort_keys=True)
    sha = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"version": VERSION, "files": files, "sha256": sha}).encode()


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _states(directory: Path) -> list[Path]:
    """Return the checkpoints by step; hidden ones are incomplete."""
    return sorted((path for path in directory.glob("step-*") if path.name[5:].isdecimal()), key=step_of)


def resume_hint(checkpoint: Path | None) -> str:
    """Return the end of an error message: how to resume from a checkpoint, or "" without one."""
    return f"; the last checkpoint is {checkpoint}; run the same command again to resume" if checkpoint else ""


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's name holds."""
    return int(checkpoint.name.removeprefix("step-"))
