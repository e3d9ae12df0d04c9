"""Start, resume or skip the run of a stage."""

import datetime
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from exo.cli import console
from exo.cli.errors import RunError
from exo.cli.paths import split_paths
from exo.runs import directory as run_directory
from exo.runs import record as run_record
from exo.runs.inputs import fingerprint, inputs, without_split
from exo.runs.record import changed, digest, output_files, outputs_intact, record

OLD_CHECKPOINTS = "resume"  # where versions before 0.2 saved checkpoints
C = TypeVar("C")


class Start(NamedTuple):
    """A requested run: when, and with which inputs."""

    config: Any
    stage: str
    resumes: bool  # an unfinished run with these options is there
    facts: dict[str, Any]  # for run.json

    @property
    def template_date(self) -> datetime.date:
        """The date in chat templates, which a resumed run and the runs that read its files keep."""
        return datetime.date.fromisoformat(self.facts["template_date"])


def stage(
    name: str, *, reads: tuple[str, ...], makes: str
) -> Callable[[Callable[[C, Start], Path]], Callable[[C], Path]]:
    """Make a function of (config, start) a stage: it holds the lock of its directory and skips what is done.

    Args:
        name: the stage, which is also its module.
        reads: the options that name files, models or runs that the stage reads.
        makes: the file in `output_dir` that a later stage reads; "." if it reads the directory itself.

    Raises:
        RunError: if the output directory cannot be used; before any work, and before a rank waits for another.
    """
    run_record.STAGES[name] = run_record.StageFiles(reads, makes)

    def of(run: Callable[[C, Start], Path]) -> Callable[[C], Path]:
        @wraps(run)
        def locked(config: C) -> Path:
            directory = config.output_dir  # type: ignore[attr-defined]
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            if processes > 1 and not hasattr(config, "nproc"):
                raise RunError(f"{name}: runs in one process; got {processes} (WORLD_SIZE)")
            with run_directory.lock(directory):
                start = _start(config, name)
                if start is None:
                    run_directory.remove_resume_files(Path(directory))  # the process may have died before this
                    console.log(f"{directory}: this run has finished; pass --overwrite_output_dir to run it again")
                    return Path(directory)
                return run(config, start)

        return locked

    return of


def _start(config: Any, stage: str) -> Start | None:
    """Return the run to do, or None if it has been done."""
    directory, paths = Path(config.output_dir), inputs(config, stage)
    run_directory.check_inputs(
        config.output_dir, [without_split(str(p)) for path in paths.values() for p in split_paths(path)]
    )
    if paths.get("oracle", "").startswith("."):
        raise ValueError(f"--oracle {paths['oracle']}: expected a module's full name, as in package.module:function")
    previous = None if config.overwrite_output_dir else record(directory)
    facts = {
        "started": run_record.now(),
        "inputs": {name: fingerprint(path) for name, path in paths.items()},
        "template_date": template_date(previous, paths.values()),
    }
    state, changes = ("new", []) if previous is None else status(directory, config, stage)
    if state == "new":
        run_directory.check(config.output_dir, overwrite=config.overwrite_output_dir)
        return Start(config, stage, False, facts)
    assert previous is not None
    if "finished" not in previous and (directory / OLD_CHECKPOINTS).is_dir():
        raise RunError(
            f"--output_dir {directory}: an unfinished run of an older version; finish it with that version or pass "
            "--overwrite_output_dir"
        )
    if state == "changed" and "finished" not in previous:
        if not _left_anything(directory):  # it failed before its first result
            return Start(replace(config, overwrite_output_dir=True), stage, False, facts)
        if getattr(config, "allow_changes", False):
            console.log(f"resuming with changes: {'; '.join(changes)}")
            state = "resume"
    if state == "changed":
        unfinished = "" if "finished" in previous else ", unfinished"
        resumable = unfinished and hasattr(config, "allow_changes")
        allow = "pass --allow_changes to resume nevertheless, or " if resumable else ""
        raise RunError(
            f"--output_dir {directory}: holds an earlier run{unfinished}, with {'; '.join(changes)}; "
            f"{allow}pass --overwrite_output_dir to start again"
        )
    return None if state == "done" else Start(config, stage, True, facts)


def status(directory: Path, config: Any, stage: str) -> tuple[Literal["new", "resume", "done", "changed"], list[str]]:
    """Compare the run in a directory with a request: return its state, and what differs if that is "changed".

    The inputs are compared by content. A finished run whose files were changed since is "changed" too.
    """
    run = record(directory)
    if run is None or run["stage"] != stage:
        return "new", []
    requested = asdict(config)
    hashes = {name: fingerprint(path) for name, path in inputs(config, stage).items()}
    recorded = run.get("inputs", {})
    changes = [
        f"{name} {run['arguments'].get(name)!r}, now {requested.get(name)!r}" for name in changed(run, requested)
    ]
    changes += [f"another {name}" for name in recorded | hashes if recorded.get(name) != hashes.get(name)]
    if not changes and "finished" in run and not outputs_intact(directory, run.get("outputs")):
        changes.append("files that are not what it made")
    return "changed" if changes else "done" if "finished" in run else "resume", changes


def template_date(previous: Mapping[str, Any] | None, inputs: Iterable[str]) -> str:
    """Return the date of the earlier run that is resumed, or of the runs that made the inputs, or today's."""
    paths = [Path(without_split(str(part))) for path in inputs for part in split_paths(path)]
    places = [path for path in paths if path.exists()]
    runs = [previous, *(record(place if place.is_dir() else place.parent) for place in places)]
    dates = [run["template_date"] for run in runs if run and "template_date" in run]
    return dates[0] if dates else datetime.date.today().isoformat()


def _left_anything(directory: Path) -> bool:
    """Return whether an unfinished run left more than its record."""
    ignored = (run_record.RUN_FILE, run_directory.LOCK)
    return any(file.is_file() and file.name not in ignored and file.stat().st_size for file in directory.rglob("*"))


def begin(start: Start, *, keep: bool = False, **facts: Any) -> Path:
    """Create the run directory and its record; with `keep`, keep the files of an unfinished run, to resume it.

    Call it in one process after every check: it may remove an earlier run.
    """
    config, directory, start_facts = start.config, Path(start.config.output_dir), dict(start.facts)
    if start.resumes and keep:
        previous = record(directory) or {}
        again = [*previous.get("again", []), start_facts.pop("started")]
        request = run_record.describe_request(config, start.stage) | start_facts  # confirm_resume makes it the record
        run_record.update_run(directory, again=again, resume_request=request, **facts)
        return directory
    run_directory.prepare(config.output_dir, overwrite=config.overwrite_output_dir or start.resumes)
    run_record.write_run(directory, config, start.stage, **start_facts, **facts)
    return directory


def finish(directory: Path, **facts: Any) -> None:
    """Record that the run is complete, and the hashes of its files."""
    run_record.confirm_resume(directory)
    outputs = {str(file.relative_to(directory)): digest(file) for file in output_files(directory)}
    run_record.update_run(directory, **facts, outputs=outputs, finished=run_record.now())
