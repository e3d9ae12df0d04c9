"""What made what: a stage's record of its inputs and outputs, and whether it still holds.

A stage is asked for (`stage`), begins to write with `begin` and ends with `finish`; its run.json then holds the sha256
of what it read and of what it made. The same request again goes on with a run that did not finish, and leaves one that
did as it is. `source` is how a stage finds its input: a stage's directory stands for what that stage makes. `holds`
tells that a stage need not run again. Left out: where inside itself a run goes on (checkpoints).
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from exo.cli.errors import RunError
from exo.cli.paths import DATA_SUFFIXES, split_paths
from exo.runs.record import (
    _IMMATERIAL,
    INPUTS,
    OUTPUTS,
    OWN_FILES,
    command,
    digest,
    is_temporary,
    record,
)

_IMMATERIAL |= {"save_steps", "save_total_limit", "resume_from_checkpoint", "allow_changes", "on_nan", "nproc", "fsdp"}
_DATA_FILES = DATA_SUFFIXES
_READ_FILES = (*_DATA_FILES, ".safetensors", ".txt", ".pos", ".neg", ".model", ".jinja")


def source(option: str, path: str, *stages: str, prepared: str = "") -> str:
    """The file or model directory that an option names.

    `stages` are those that make such a thing. A directory of one of them stands for its product; that of prepare for
    its file `prepared`. RunError where the run has not finished; ValueError where nothing is there, or what another
    stage made.
    """
    if len(several := split_paths(path)) > 1:
        return ",".join(source(option, str(part), *stages, prepared=prepared) for part in several)
    place = Path(path)
    making = " or ".join(f"python -m exo.{stage}" for stage in stages)
    run = record(place if place.is_dir() else place.parent)
    if run is not None:
        if place.is_dir() and run["stage"] not in stages:
            raise ValueError(
                f"--{option} {path}: expected what {' or '.join(stages)} makes; found a run of {run['stage']}; "
                f"{making} makes one"
            )
        if "finished" not in run:
            raise RunError(f"--{option} {path}: its run did not finish; this goes on with it: {command(run)}")
        if place.is_dir():
            product = prepared if run["stage"] == "prepare" else OUTPUTS[run["stage"]]
            place = place / product
            if not place.exists():
                raise ValueError(f"--{option} {path}: expected {product} in it, which this task does not make")
            return str(place)
    if is_missing(path):
        makes = f"; {making} makes one" if making else ""
        raise ValueError(f"--{option} {path}: no such file or directory{makes}")
    return path


def is_missing(path: str) -> bool:
    """Whether nothing is there. What could be a hub name ("gpt2", "owner/name") is left to whoever loads it."""
    place = Path(_directory(path))
    local = path.startswith((".", "~", "/")) or place.suffix in _DATA_FILES
    return not place.exists() and (local or (place.parent != Path() and place.parent.is_dir()))


def _directory(path: str) -> str:
    """Return the directory of a split, DIRECTORY@test; any other path as it is."""
    before, at, _ = path.rpartition("@")
    return before if at and not Path(path).exists() and Path(before).is_dir() else path


def inputs(config: Any, stage: str) -> dict[str, str]:
    """Return the options of a stage that name what it reads: those of INPUTS, and a chat template that is a file."""
    inputs = {name: getattr(config, name) for name in INPUTS[stage] if getattr(config, name)}
    template = getattr(config, "chat_template", None)
    return inputs | ({"chat_template": template} if template and Path(template).is_file() else {})


def fingerprint(path: str) -> str:
    """sha256 of what an option names: a file, a model directory, one of shards; a hub name stands for itself."""
    if len(several := split_paths(path)) > 1:
        return hashlib.sha256("".join(fingerprint(str(part)) for part in several).encode()).hexdigest()
    place = Path(_directory(path))
    if place.is_file():
        return digest(place)
    if ":" in path and not place.exists() and (code := _code(path.partition(":")[0])):
        which = "".join(map(digest, code)) + path.partition(":")[2]  # the source, and its function
        return hashlib.sha256(which.encode()).hexdigest()
    if not place.is_dir():
        return path
    run = record(place)
    product = place / OUTPUTS.get(run["stage"], ".") if run is not None else place
    if product.is_file():
        return digest(product)
    files = sorted(
        f
        for f in place.rglob("*")
        if f.suffix in _READ_FILES and f.name not in OWN_FILES and not is_temporary(place, f)
    )
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.relative_to(place)} {digest(file)}\n".encode())
    return whole.hexdigest()


def _code(module: str) -> list[Path]:
    """The source of a module, with that of its package; none where there is no such module."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return []
    origin = Path((found.origin if found else None) or "")
    if found is None or not origin.is_file():  # "frozen", "built-in"
        return []
    return sorted(origin.parent.rglob("*.py")) if found.submodule_search_locations else [origin]
