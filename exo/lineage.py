"""What made what: a stage's record of its inputs and outputs, and whether it still holds.

A stage is asked for (`stage`), begins to write with `begin` and ends with `finish`; its run.json then holds the sha256
of what it read and of what it made. The same request again goes on with a run that did not finish, and leaves one that
did as it is. `source` is how a stage finds its input: a stage's directory stands for what that stage makes. `holds`
tells that a stage need not run again. Left out: where inside itself a run goes on (checkpoints).
"""

import datetime
import hashlib
import importlib.util
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from exo import artifacts, console, records
from exo.artifacts import RunError
from exo.data.rows import parts
from exo.data.tables import FILES

C = TypeVar("C")

# The options of each stage that name what it reads.
INPUTS: dict[str, tuple[str, ...]] = {
    "prepare": ("source", "tokenizer"),
    "sft": ("model", "data"),
    "sample": ("model", "data"),
    "score": ("data", "reward_model", "oracle"),
    "reward": ("model", "data"),
    "align": ("model", "ref_model", "data", "eval_data"),
    "ppo": ("model", "data", "reward_model", "oracle"),
    "best_of_n": ("data",),
    "evaluate": ("model", "samples", "reference", "data", "baseline", "density", "reward_model", "oracle"),
    "judge": ("a", "b", "references", "template"),
    "label": ("references", "key"),
    "report": ("run",),
}
# What it makes; "." is a directory that is read as one.
OUTPUTS = {
    "prepare": ".",  # several files; who reads one says which
    "sft": ".",
    "sample": "samples.jsonl",
    "score": "scored.jsonl",
    "reward": ".",
    "align": ".",
    "ppo": ".",
    "best_of_n": "samples.jsonl",
    "evaluate": "evaluation.json",
    "judge": "judge.json",
    "label": "label.json",
    "report": "report.html",
    "train": "run.json",  # the plan; the steps have records of their own
}
# Where a run's results go and what it prints change nothing of what it makes.
_OWN = (artifacts.RUN_FILE, "metrics.jsonl")
_PASSING = ("profile", artifacts.STATES, artifacts.PIECES)
_IMMATERIAL = {"output_dir", "overwrite_output_dir", "logging_steps", "report_to", "reference_cache", "profile"}
_IMMATERIAL |= {"checkpoint_steps", "allow_changes", "on_nan", "nproc", "fsdp"}
_DATA_FILES = FILES
_READ_FILES = (*_DATA_FILES, ".safetensors", ".txt", ".pos", ".neg", ".model", ".jinja")


class Start(NamedTuple):
    """A run that has been asked for: when, and what its inputs were then."""

    config: Any
    stage: str
    goes_on: bool  # an earlier run of the same did not finish
    facts: dict[str, Any]  # of its record

    @property
    def template_date(self) -> datetime.date:
        """The date that chat templates show: a resumed run, and what is made from its files, keep it."""
        return datetime.date.fromisoformat(self.facts["template_date"])


def stage(name: str) -> Callable[[Callable[[C, Start], Path]], Callable[[C], Path]]:
    """A stage's run from its config: alone in its directory, and not where the same has been done already.

    RunError where the output directory cannot be used; before any work is done, and any process waits for another.
    """

    def of(run: Callable[[C, Start], Path]) -> Callable[[C], Path]:
        @wraps(run)
        def whole(config: C) -> Path:
            directory = config.output_dir  # type: ignore[attr-defined]
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            if processes > 1 and not hasattr(config, "nproc"):
                raise RunError(f"{name}: is done by one process; got {processes} (WORLD_SIZE)")
            with artifacts.locked(directory):
                start = _start(config, name)
                if start is None:
                    artifacts.clear(Path(directory))  # it may have been killed just then
                    console.say(f"{directory}: this run has finished; --overwrite_output_dir makes it again")
                    return Path(directory)
                return run(config, start)

        return whole

    return of


def _start(config: Any, stage: str) -> Start | None:
    """None where it has been done."""
    directory, paths = Path(config.output_dir), inputs(config, stage)
    artifacts.check_apart(config.output_dir, [_directory(str(p)) for path in paths.values() for p in parts(path)])
    if paths.get("oracle", "").startswith("."):
        raise ValueError(f"--oracle {paths['oracle']}: expected a module's full name, as in package.module:function")
    hashes = {name: fingerprint(path) for name, path in paths.items()}
    before = None if config.overwrite_output_dir else record(directory)
    facts = {"started": artifacts.now(), "inputs": hashes, "template_date": template_date(before, paths.values())}
    if before is None or before["stage"] != stage:
        artifacts.check(config.output_dir, overwrite=config.overwrite_output_dir)
        return Start(config, stage, False, facts)
    different = _differences(before, config, hashes)
    finished = "finished" in before
    if different and not finished and not _left_anything(directory):
        # it failed before it began, and is now asked for as it should be
        return Start(replace(config, overwrite_output_dir=True), stage, False, facts)
    if different and (finished or not getattr(config, "allow_changes", False)):
        allow = "" if finished or not hasattr(config, "allow_changes") else "--allow_changes goes on nevertheless, "
        raise RunError(
            f"--output_dir {directory}: holds an earlier run{'' if finished else ', unfinished'}, with "
            f"{'; '.join(different)}; {allow}--overwrite_output_dir begins anew"
        )
    if different:
        console.say(f"going on with changes: {'; '.join(different)}")
    if finished and not _whole(directory, before.get("outputs")):
        raise RunError(
            f"--output_dir {directory}: holds an earlier run whose files are not what it made; --overwrite_output_dir "
            "makes them again"
        )
    return None if finished else Start(config, stage, True, facts)


def template_date(before: Mapping[str, Any] | None, inputs: Iterable[str]) -> str:
    """Return the date of the earlier run that is resumed, or of the runs that made the inputs, or today's."""
    places = [place for place in map(Path, inputs) if place.exists()]
    runs = [before, *(record(place if place.is_dir() else place.parent) for place in places)]
    dates = [run["template_date"] for run in runs if run and "template_date" in run]
    return dates[0] if dates else datetime.date.today().isoformat()


def _left_anything(directory: Path) -> bool:
    """Whether a run that did not finish left more than its record."""
    own = (artifacts.RUN_FILE, artifacts.LOCK)
    return any(file.is_file() and file.name not in own and file.stat().st_size for file in directory.rglob("*"))


def _differences(before: Mapping[str, Any], config: Any, hashes: Mapping[str, str]) -> list[str]:
    """From the run that is there, each as it was and as it would be."""
    was, now = before["arguments"], asdict(config)
    found = [f"{name} {was.get(name)!r}, now {now.get(name)!r}" for name in changed(before, now)]
    other = [name for name in hashes if before.get("inputs", {}).get(name) != hashes[name]]
    return found + [f"another {name}" for name in other]


def goes_on(directory: Path, config: Any, stage: str) -> bool:
    """Whether an unfinished run with these options and the same inputs is there."""
    run = record(directory)
    if run is None or run["stage"] != stage or "finished" in run:
        return False
    hashes = {name: fingerprint(path) for name, path in inputs(config, stage).items()}
    return not _differences(run, config, hashes)


def begin(start: Start, *, keep: bool = False, **facts: Any) -> Path:
    """Make the run directory and its record; `keep` what an unfinished run of the same made, to go on with it.

    Call it once everything that can be checked has been, in one process: only now may an earlier run make room.
    """
    config, directory, known = start.config, Path(start.config.output_dir), dict(start.facts)
    if start.goes_on and keep:
        before = record(directory) or {}
        again = [*before.get("again", []), known.pop("started")]
        asked = artifacts.asked_for(config, start.stage) | known  # until it is seen that it can go on
        artifacts.update_run(directory, again=again, asked=asked, **facts)
        return directory
    artifacts.prepare(config.output_dir, overwrite=config.overwrite_output_dir or start.goes_on)
    artifacts.write_run(directory, config, start.stage, **known, **facts)
    return directory


def finish(directory: Path, **facts: Any) -> None:
    """The run is complete, and this is what it made."""
    artifacts.confirm(directory)
    made = {str(file.relative_to(directory)): _digest(file) for file in _made(directory)}
    artifacts.update_run(directory, **facts, outputs=made, finished=artifacts.now())


def record(directory: Path) -> dict[str, Any] | None:
    """The run.json of a directory that a stage of ours made; None without one."""
    run = records.read_run(directory)
    return run if run is not None and run["stage"] in OUTPUTS else None


def source(option: str, path: str, *stages: str, prepared: str = "") -> str:
    """The file or model directory that an option names.

    `stages` are those that make such a thing. A directory of one of them stands for its product; that of prepare for
    its file `prepared`. RunError where the run has not finished; ValueError where nothing is there, or what another
    stage made.
    """
    if len(several := parts(path)) > 1:
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


def command(run: Mapping[str, Any]) -> str:
    """Return the command that a record holds, as one would type it, on one line."""
    typed = shlex.join(run["command"])
    return typed if typed.isprintable() else ascii(typed)[1:-1]


def inputs(config: Any, stage: str) -> dict[str, str]:
    """Return the options of a stage that name what it reads: those of INPUTS, and a chat template that is a file."""
    inputs = {name: getattr(config, name) for name in INPUTS[stage] if getattr(config, name)}
    template = getattr(config, "chat_template", None)
    return inputs | ({"chat_template": template} if template and Path(template).is_file() else {})


def holds(directory: Path, config: Any, stage: str) -> bool:
    """Whether the directory has a finished run of that stage with these options, the same inputs and whole outputs."""
    run = record(directory)
    if run is None or run["stage"] != stage or "finished" not in run:
        return False
    paths = inputs(config, stage)
    same_inputs = run.get("inputs") == {name: fingerprint(path) for name, path in paths.items()}
    return not changed(run, asdict(config)) and same_inputs and _whole(directory, run.get("outputs"))


def changed(run: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Options whose values are not those that a run had; what it read is compared by content, not by name."""
    skipped = {*_IMMATERIAL, *INPUTS.get(run["stage"], ())}
    before = run["arguments"]
    names = dict.fromkeys([*before, *wanted])
    return [name for name in names if name not in skipped and before.get(name) != wanted.get(name)]


def _whole(directory: Path, outputs: Mapping[str, str] | None) -> bool:
    return outputs is not None and all(
        (directory / name).is_file() and _digest(directory / name) == sha for name, sha in outputs.items()
    )


def _made(directory: Path) -> list[Path]:
    """The files of a run but its record, its log and its pictures; and nothing hidden, which is half made."""
    return [
        file
        for file in sorted(directory.rglob("*"))
        if file.is_file()
        and file.suffix not in (".png", ".html")
        and file.name not in _OWN
        and not _passes(directory, file)
    ]


def _passes(directory: Path, file: Path) -> bool:
    """Whether it is half made, or of a run that has not ended."""
    return any(part.startswith(".") or part in _PASSING for part in file.relative_to(directory).parts)


def fingerprint(path: str) -> str:
    """sha256 of what an option names: a file, a model directory, one of shards; a hub name stands for itself."""
    if len(several := parts(path)) > 1:
        return hashlib.sha256("".join(fingerprint(str(part)) for part in several).encode()).hexdigest()
    place = Path(_directory(path))
    if place.is_file():
        return _digest(place)
    if ":" in path and not place.exists() and (code := _code(path.partition(":")[0])):
        which = "".join(map(_digest, code)) + path.partition(":")[2]  # the source, and its function
        return hashlib.sha256(which.encode()).hexdigest()
    if not place.is_dir():
        return path
    run = record(place)
    product = place / OUTPUTS.get(run["stage"], ".") if run is not None else place
    if product.is_file():
        return _digest(product)
    files = sorted(
        f for f in place.rglob("*") if f.suffix in _READ_FILES and f.name not in _OWN and not _passes(place, f)
    )
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.relative_to(place)} {_digest(file)}\n".encode())
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


def _digest(file: Path) -> str:
    state = file.stat()
    return _sha256(file, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(file: Path, size: int, changed: int) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
