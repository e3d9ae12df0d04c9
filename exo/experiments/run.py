"""Run the steps of a plan that are not up to date, in order or in parallel."""

import dataclasses
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from exo.cli import console, signals, streams
from exo.cli.errors import RunError
from exo.cli.fields import require
from exo.cli.main import needs_ranks, print_error, run_ranks
from exo.cli.parse import command_line
from exo.experiments.plan import Step
from exo.experiments.recipe import Recipe
from exo.runs import directory as run_directory
from exo.runs import record as run_record
from exo.runs import stage as run_stage

RunStage = Callable[[str, Any], object]  # runs a stage, given its name and its options


def steps_up_to(steps: list[Step], name: str | None) -> list[Step]:
    """Return the steps up to the last one with that name, or below it; all steps if the name is None."""
    return steps if name is None else steps[: _indices(steps, "to", name)[-1] + 1]


def names_from(steps: list[Step], name: str | None) -> set[str]:
    """Return the names of the steps with that name, or below it, and of all that need them; none if it is None."""
    if name is None:
        return set()
    names = {steps[i].name for i in _indices(steps, "from", name)}
    for step in steps:
        if names & set(step.needs):
            names.add(step.name)
    return names


def _indices(steps: list[Step], option: str, name: str) -> list[int]:
    """Return the indices of the steps with that name, or below it. ConfigError if there is none."""
    indices = [i for i, step in enumerate(steps) if f"{step.name}/".startswith(f"{name}/")]
    names = {step.name for step in steps} | {step.name.split("/")[0] for step in steps}
    require(bool(indices), option, f"one of {', '.join(sorted(names))}", name)
    return indices


def is_done(step: Step, rerun: Collection[str]) -> bool:
    """Return whether a step is up to date. A report never is, because it reads all other steps and is fast."""
    if step.name in rerun or step.stage == "report":
        return False
    return run_stage.status(Path(step.config.output_dir), step.config, step.stage)[0] == "done"


def begin(config: Any, recipe: Recipe, steps: list[Step], directory: Path) -> None:
    """Write the record of the run: the command's config, the recipe and all steps of the plan.

    RunError if the directory has other files than those of such a run.
    """
    if not run_directory.is_run(directory, "train"):
        run_directory.prepare(str(directory), overwrite=False)
    plan = [
        {"name": step.name, "stage": step.stage, "needs": step.needs, "options": dataclasses.asdict(step.config)}
        | step.facts
        for step in steps
    ]
    facts = {"started": run_record.now(), "recipe": dataclasses.asdict(recipe), "plan": plan}
    run_record.write_run(directory, config, "train", makes="run.json", **facts)  # each step has a record too


class Runner(NamedTuple):
    """Runs steps below a directory."""

    directory: Path
    rerun: Collection[str]  # names of the steps that run even if they are up to date
    execute: RunStage  # pickled if there are several jobs
    threads: int | None = None  # of torch, unless OMP_NUM_THREADS is set

    def run(self, steps: list[Step], jobs: int) -> None:
        """Run the steps, record the number of those that ran, and copy the report to the directory."""
        _set_threads(self.threads)
        num_run = sum(self._in_order(steps) if jobs == 1 else self._in_parallel(steps, jobs))
        run_record.update_run(self.directory, steps_run=num_run)
        console.headline("Finished")
        if steps[-1].stage == "report":  # one file, which includes its figures
            report = shutil.copyfile(self.directory / "report" / "report.html", self.directory / "report.html")
            console.log(f"report: {report}")

    def _in_order(self, steps: list[Step]) -> Iterator[bool]:
        """Yield for each step whether it ran."""
        for i, step in enumerate(steps, 1):
            if is_done(step, self.rerun):
                console.log(f"[{i}/{len(steps)}] {step.name}: up to date")
                yield False
            else:
                console.headline(f"{i}/{len(steps)} {step.name}")
                run_step(step, step.name in self.rerun, self.execute)
                yield True

    def _in_parallel(self, steps: list[Step], jobs: int) -> Iterator[bool]:
        """Yield for each step whether it ran. A step starts when the steps that it needs are done.

        After a failure no other step starts, and the error is raised when the running steps have ended.
        """
        waiting, done = list(steps), set[str]()
        running: dict[Future[float], Step] = {}
        context, setup = multiprocessing.get_context("spawn"), (self.threads, os.getpid())
        with ProcessPoolExecutor(jobs, context, _set_up_process, setup) as pool, _terminate_children_on_exit():
            while waiting or running:
                for step in [s for s in waiting if set(s.needs) <= done]:
                    if is_done(step, self.rerun):
                        waiting.remove(step)
                        done.add(step.name)
                        console.log(f"[{len(done)}/{len(steps)}] {step.name}: up to date")
                        yield False
                    elif len(running) < jobs:
                        waiting.remove(step)
                        running[pool.submit(_timed, step, step.name in self.rerun, self.execute)] = step
                for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    step = running.pop(future)
                    try:
                        seconds = future.result()
                    except BrokenProcessPool:
                        names = ", ".join(s.name for s in (step, *running.values()))
                        raise RunError(
                            f"{names}: the process of one of them was killed, perhaps because memory ran out; run the "
                            "command again, with fewer --jobs if needed"
                        ) from None
                    except Exception:
                        pool.shutdown(cancel_futures=True)
                        print_error(f"{step.name}: failed")
                        raise
                    done.add(step.name)
                    console.log(f"[{len(done)}/{len(steps)}] {step.name}  {console.duration(seconds)}")
                    yield True


@contextmanager
def _terminate_children_on_exit() -> Iterator[None]:
    """Terminate the running steps if this process is interrupted; those that train save a checkpoint."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        for child in multiprocessing.active_children():
            child.terminate()
        raise


def _set_up_process(threads: int | None, parent: int) -> None:
    streams.prepare()
    console.mute()
    signals.exit_with_parent(parent)
    _set_threads(threads)


def _set_threads(threads: int | None) -> None:
    if threads and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)


def _timed(step: Step, rerun: bool, execute: RunStage) -> float:
    """Run a step and return its seconds."""
    start = time.perf_counter()
    run_step(step, rerun, execute)
    return time.perf_counter() - start


def run_step(step: Step, rerun: bool, run: RunStage) -> None:
    """Run a step, in several processes if its options need them; resume its unfinished run unless `rerun`."""
    resumes = not rerun and run_stage.status(Path(step.config.output_dir), step.config, step.stage)[0] == "resume"
    config = dataclasses.replace(step.config, overwrite_output_dir=not resumes)
    if not needs_ranks(config):
        run(step.stage, config)
    elif run_ranks(f"exo.{step.stage}", command_line(config), config.nproc):
        raise RunError(f"{step.name}: failed; see the message above")
