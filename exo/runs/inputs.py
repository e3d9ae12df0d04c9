"""Find the inputs of a stage, and hash them.

`source` finds the file that an option names; a run directory may be given instead of the file in it. `fingerprint` is
the sha256 of its content, which run.json records.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from exo.cli.errors import RunError
from exo.cli.paths import DATA_SUFFIXES, split_paths
from exo.runs.record import OWN_FILES, STAGES, command, digest, is_temporary, read_run, record

_READ_FILES = (*DATA_SUFFIXES, ".safetensors", ".txt", ".pos", ".neg", ".model", ".jinja")


def source(option: str, path: str, *stages: str, prepared: str = "") -> str:
    """Return the file or model directory that an option names.

    For a run directory of one of the `stages` it is the file that the stage makes; for one of `prepare` it is the file
    `prepared`.

    Raises:
        RunError: if the run in the directory has not finished.
        ValueError: if there is nothing, or the run of another stage or of an older version.
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
            raise RunError(f"--{option} {path}: its run did not finish; resume it: {command(run)}")
        if place.is_dir():
            product = prepared if run["stage"] == "prepare" else run["makes"]
            place = place / product
            if not place.exists():
                raise ValueError(f"--{option} {path}: expected {product} in it, which this task does not make")
            return str(place)
    elif place.is_dir() and read_run(place) and not (place / "config.json").exists():
        raise ValueError(f"--{option} {path}: a run of an older version; name the file in it, or run it again")
    if is_missing(path):
        makes = f"; {making} makes one" if making else ""
        raise ValueError(f"--{option} {path}: no such file or directory{makes}")
    return path


def is_missing(path: str) -> bool:
    """Return whether nothing is there. A possible hub name ("gpt2", "owner/name") is not missing."""
    place = Path(without_split(path))
    local = path.startswith((".", "~", "/")) or place.suffix in DATA_SUFFIXES
    return not place.exists() and (local or (place.parent != Path() and place.parent.is_dir()))


def without_split(path: str) -> str:
    """Return DIRECTORY for the path DIRECTORY@test of a split, and any other path as it is."""
    directory, at, _ = path.rpartition("@")
    return directory if at and not Path(path).exists() and Path(directory).is_dir() else path


def inputs(config: Any, stage: str) -> dict[str, str]:
    """Return what a stage reads, by name: options that it declares, `input_files`, a template file."""
    inputs = {name: getattr(config, name) for name in STAGES[stage].reads if getattr(config, name)}
    if hasattr(config, "input_files"):
        inputs |= config.input_files()
    template = getattr(config, "chat_template", None)
    return inputs | ({"chat_template": template} if template and Path(template).is_file() else {})


def fingerprint(path: str) -> str:
    """Return the sha256 of files, of a model directory or of one of shards; return a hub name as it is."""
    if len(several := split_paths(path)) > 1:
        return hashlib.sha256("".join(fingerprint(str(part)) for part in several).encode()).hexdigest()
    place = Path(without_split(path))
    if place.is_file():
        return digest(place)
    if ":" in path and not place.exists() and (code := _code(path.partition(":")[0])):
        source = "".join(map(digest, code)) + path.partition(":")[2]  # the source, and its function
        return hashlib.sha256(source.encode()).hexdigest()
    if not place.is_dir():
        return path
    run = record(place)
    product = place / run["makes"] if run is not None else place
    if product.is_file():
        return digest(product)
    files = sorted(
        f
        for f in place.rglob("*")
        if f.suffix in _READ_FILES and f.name not in OWN_FILES and not is_temporary(place, f)
    )
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(place)} {digest(file)}\n".encode())
    return total.hexdigest()


def _code(module: str) -> list[Path]:
    """Return the source files of a module, or of all of its package; none if there is no such module."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return []
    origin = Path((spec.origin if spec else None) or "")
    if spec is None or not origin.is_file():  # "frozen", "built-in"
        return []
    return sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
