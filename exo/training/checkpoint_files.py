"""The state of a run in a directory of its own: all of it or nothing, and known by its sha256 to be as it was written.

Tensors lie in safetensors files as torch's distributed checkpoints cut them: each process writes what it alone holds,
and a share of what all hold, and any number of processes reads them back, in other shards if need be. Beside them
state.json and a manifest with every file's size and sha256. It is written beside its place, flushed and renamed. Left
out: what belongs to a state (checkpoints).
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
FILE = 2 << 30  # bytes of a file at most, if no tensor is larger: each is in memory once more while it is written
Tensors = Mapping[str, Tensor]


class CheckpointNotWritten(Exception):
    """A state was not written, and why; one line."""


class Kind(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


def write(path: Path, tensors: Tensors, facts: Mapping[str, Any], accelerator: Accelerator, limit: int = 2) -> None:
    """Write a checkpoint of all ranks' tensors, then remove all but the newest `limit`."""
    staging = path.with_name(f".{path.name}.staging")
    main = accelerator.is_main_process
    try:
        if main:
            path.parent.mkdir(exist_ok=True)
            for left_over in path.parent.glob(".*"):
                shutil.rmtree(left_over)
            staging.mkdir()
        accelerator.wait_for_everyone()
        _write_tensors(staging / TENSORS, tensors)
        if main:
            said = json.dumps(facts, allow_nan=False, default=asdict)
            (staging / FACTS).write_text(said, encoding="utf-8")
        accelerator.wait_for_everyone()
        listed = _listed(staging, accelerator)
        if main:
            (staging / MANIFEST).write_bytes(_encoded(listed))
            fsync_all(staging)
            if path.exists():  # damaged, or the run would have gone on from it
                _remove(path)
            os.rename(staging, path)
            fsync(path.parent)
    except (OSError, CheckpointException) as error:
        if main:
            shutil.rmtree(staging, ignore_errors=True)  # on a full disk its room is needed
        raise CheckpointNotWritten(_cause(error)) from error
    if main:
        with contextlib.suppress(OSError):  # the state is there; what is left over is removed at the next one
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
    with _alone():
        checkpoint.save(dict(tensors), storage_writer=writer)


def kinds(path: Path) -> dict[str, Kind]:
    """Of the whole tensors in a state, or in a directory of safetensors."""
    found: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: Kind(tuple(kind.size), kind.properties.dtype) for name, kind in found.items()}


def read(path: Path, into: Tensors) -> None:
    """Fill tensors, of which each process asks for what it holds."""
    with _alone():
        checkpoint.load(dict(into), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


@contextmanager
def _alone() -> Iterator[None]:
    """Without being warned that one process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(error: OSError | CheckpointException) -> str:
    if isinstance(error, CheckpointException):
        rank, (found, _) = min(error.failures.items())
        whose = f" (rank {rank})" if torch.distributed.is_initialized() else ""
        return f"{getattr(found, 'strerror', None) or str(found).splitlines()[0]}{whose}"
    return error.strerror or str(error)


def _remove_old(state: Path, limit: int) -> None:
    """Keep the checkpoint just written and those before it; a later one was damaged, or not resumed from."""
    states = _states(state.parent)
    here = states.index(state)
    for other in states[here + 1 :] + states[: max(0, here + 1 - limit)]:
        _remove(other)


def _remove(state: Path) -> None:
    """At once, for whoever looks."""
    gone = state.with_name(f".{state.name}.gone")
    os.rename(state, gone)
    shutil.rmtree(gone)


def newest(directory: Path, accelerator: Accelerator | None = None) -> Path | None:
    """The newest state that is whole; one that is damaged is named, and passed over. All processes look together."""
    names = [path.name for path in _states(directory)]
    if accelerator is not None:
        names = gather.all_gather_json(names, accelerator)[0]
    for name in reversed(names):
        wrong = find_damage(directory / name, accelerator)
        if not wrong:
            return directory / name
        console.log(f"  {directory / name} is damaged and not used: {wrong}")
    return None


def find_damage(path: Path, accelerator: Accelerator | None = None) -> str:
    """What is wrong with a state, or "". Of several processes each reads a share of the files."""
    listed, wrong_with_it = _manifest(path)
    if accelerator is not None:  # one says for all
        listed, wrong_with_it = gather.all_gather_json([listed, wrong_with_it], accelerator)[0]
    if wrong_with_it:
        return wrong_with_it

    def wrong(name: str) -> str:
        file, (size, sha) = path / name, listed[name]
        try:
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} bytes of {size:,}"
            return "" if _sha256(file) == sha else f"{name} has other contents than were written"
        except OSError as error:
            return f"{name}: {error.strerror}"

    return next(filter(None, _shared(list(listed), wrong, accelerator)), "")


def _manifest(state: Path) -> tuple[dict[str, tuple[int, str]], str]:
    """Every file's size and sha256 as it was written; or what is wrong with the manifest itself."""
    try:
        said = (state / MANIFEST).read_bytes()
        whole = json.loads(said)
        if whole["version"] != VERSION:
            return {}, f"it is of another version of exo ({whole['version']}, and this one reads {VERSION})"
        return (
            (whole["files"], "") if said == _encoded(whole["files"]) else ({}, f"{MANIFEST} is not as it was written")
        )
    except OSError as error:
        return {}, f"{MANIFEST}: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}, f"{MANIFEST} cannot be read"


def _listed(state: Path, accelerator: Accelerator | None = None) -> dict[str, tuple[int, str]]:
    """Every file's size and sha256, but the manifest's."""
    names = sorted(str(f.relative_to(state)) for f in state.rglob("*") if f.is_file() and f.name != MANIFEST)
    facts = _shared(names, lambda name: ((state / name).stat().st_size, _sha256(state / name)), accelerator)
    return dict(zip(names, facts, strict=True))


def _shared(names: Sequence[str], of: Callable[[str], Any], accelerator: Accelerator | None) -> list[Any]:
    """What each process does of a save or a restore, which no signal cuts short."""
    return list(map(of, names)) if accelerator is None else gather.map_over_ranks(names, of, accelerator, heeding=False)


def _encoded(listed: Mapping[str, Any]) -> bytes:
    """The manifest, with its own sha256."""
    text = json.dumps({"version": VERSION, "files": listed}, indent=1, sort_keys=True)
    sha = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"version": VERSION, "files": listed, "sha256": sha}).encode()


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _states(directory: Path) -> list[Path]:
    """Return the checkpoints by step; hidden ones are incomplete."""
    return sorted((path for path in directory.glob("step-*") if path.name[5:].isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's name holds."""
    return int(checkpoint.name.removeprefix("step-"))
