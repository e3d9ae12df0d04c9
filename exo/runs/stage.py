"""Start, resume or skip the run of a stage."""

import datetime
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from exo.cli import console
from exo.cli.errors import RunError
from exo.cli.paths import split_paths
from exo.runs import directory as run_directory
from exo.runs import record as run_record
from exo.runs.inputs import _directory, fingerprint, inputs
from exo.runs.record import changed, digest, output_files, outputs_intact, record

C = TypeVar("C")


class Start(NamedTuple):
    """A run that has been asked for: when, and what its inputs were then."""

    config: Any
    stage: str
    resumes: bool  # an earlier run of the same did not finish
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
            with run_directory.lock(directory):
                start = _start(config, name)
                if start is None:
                    run_directory.remove_resume_files(Path(directory))  # it may have been killed just then
                    console.log(f"{directory}: this run has finished; --overwrite_output_dir makes it again")
                    return Path(directory)
                return run(config, start)

        return whole

    return of


def _start(config: Any, stage: str) -> Start | None:
    """None where it has been done."""
    directory, paths = Path(config.output_dir), inputs(config, stage)
    run_directory.check_inputs(
        config.output_dir, [_directory(str(p)) for path in paths.values() for p in split_paths(path)]
    )
    if paths.get("oracle", "").startswith("."):
        raise ValueError(f"--oracle {paths['oracle']}: expected a module's full name, as in package.module:function")
    hashes = {name: fingerprint(path) for name, path in paths.items()}
    before = None if config.overwrite_output_dir else record(directory)
    facts = {"started": run_record.now(), "inputs": hashes, "template_date": template_date(before, paths.values())}
    if before is None or before["stage"] != stage:
        run_directory.check(config.output_dir, overwrite=config.overwrite_output_dir)
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
        console.log(f"going on with changes: {'; '.join(different)}")
    if finished and not outputs_intact(directory, before.get("outputs")):
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
    own = (run_record.RUN_FILE, run_directory.LOCK)
    return any(file.is_file() and file.name not in own and file.stat().st_size for file in directory.rglob("*"))


def _differences(before: Mapping[str, Any], config: Any, hashes: Mapping[str, str]) -> list[str]:
    """From the run that is there, each as it was and as it would be."""
    was, now = before["arguments"], asdict(config)
    found = [f"{name} {was.get(name)!r}, now {now.get(name)!r}" for name in changed(before, now)]
    other = [name for name in hashes if before.get("inputs", {}).get(name) != hashes[name]]
    return found + [f"another {name}" for name in other]


def is_resumable(directory: Path, config: Any, stage: str) -> bool:
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
    if start.resumes and keep:
        before = record(directory) or {}
        again = [*before.get("again", []), known.pop("started")]
        asked = run_record.describe_request(config, start.stage) | known  # until it is seen that it can go on
        run_record.update_run(directory, again=again, asked=asked, **facts)
        return directory
    run_directory.prepare(config.output_dir, overwrite=config.overwrite_output_dir or start.resumes)
    run_record.write_run(directory, config, start.stage, **known, **facts)
    return directory


def finish(directory: Path, **facts: Any) -> None:
    """The run is complete, and this is what it made."""
    run_record.confirm(directory)
    made = {str(file.relative_to(directory)): digest(file) for file in output_files(directory)}
    run_record.update_run(directory, **facts, outputs=made, finished=run_record.now())


def is_up_to_date(directory: Path, config: Any, stage: str) -> bool:
    """Whether the directory has a finished run of that stage with these options, the same inputs and whole outputs."""
    run = record(directory)
    if run is None or run["stage"] != stage or "finished" not in run:
        return False
    paths = inputs(config, stage)
    same_inputs = run.get("inputs") == {name: fingerprint(path) for name, path in paths.items()}
    return not changed(run, asdict(config)) and same_inputs and outputs_intact(directory, run.get("outputs"))
