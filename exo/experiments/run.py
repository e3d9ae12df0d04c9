"""Run the steps of a plan: those that are not up to date, in order or several at a time."""

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
from exo.experiments.plan import Recipe, Step
from exo.runs import directory as run_directory
from exo.runs import record as run_record
from exo.runs import stage as run_stage

RunStage = Callable[[str, Any], object]  # runs a stage, given its name and its options


def up_to(steps: list[Step], name: str | None) -> list[Step]:
    """Return the steps up to the last one with that name, or below it; None returns all."""
    if name is None:
        return steps
    _check_name(steps, "to", name)
    return steps[: max(i for i, step in enumerate(steps) if _is_below(step, name)) + 1]


def from_on(steps: list[Step], name: str | None) -> set[str]:
    """Return the names of the steps with that name, or below it, and of all that need them; None returns none."""
    if name is None:
        return set()
    _check_name(steps, "from", name)
    names = {step.name for step in steps if _is_below(step, name)}
    for step in steps:
        if names & set(step.needs):
            names.add(step.name)
    return names


def _is_below(step: Step, name: str) -> bool:
    return step.name == name or step.name.startswith(f"{name}/")


def _check_name(steps: list[Step], option: str, name: str) -> None:
    names = {step.name for step in steps} | {step.name.split("/")[0] for step in steps}
    require(any(_is_below(step, name) for step in steps), option, f"one of {', '.join(sorted(names))}", name)


def begin(config: Any, recipe: Recipe, steps: list[Step], directory: Path) -> None:
    """Write the record of the run: the command's config, the recipe and all steps of the plan.

    RunError if the directory has files that no run of a recipe wrote.
    """
    if not run_directory.is_run(directory, "train"):
        run_directory.prepare(str(directory), overwrite=False)
    run_record.write_run(
        directory,
        config,
        "train",
        makes="run.json",  # the plan; the steps have records of their own
        started=run_record.now(),
        recipe=dataclasses.asdict(recipe),
        plan=[
            {"name": step.name, "stage": step.stage, "needs": step.needs, "options": dataclasses.asdict(step.config)}
            | step.facts
            for step in steps
        ],
    )


class Runner(NamedTuple):
    """Runs steps below a directory."""

    directory: Path
    rerun: Collection[str]  # names of the steps that run even if they are up to date
    execute: RunStage  # pickled if there are several jobs
    threads: int | None = None  # of torch, unless OMP_NUM_THREADS is set

    def run(self, steps: list[Step], jobs: int) -> None:
        """Run the steps, record how many ran, and copy the report to the top of the directory."""
        _set_threads(self.threads)
        num_run = sum(self._in_order(steps) if jobs == 1 else self._in_parallel(steps, jobs))
        run_record.update_run(self.directory, steps_run=num_run)
        console.headline("Finished")
        if steps[-1].stage == "report":  # a single file, with its figures in it
            report = shutil.copyfile(self.directory / "report" / "report.html", self.directory / "report.html")
            console.log(f"report: {report}")

    def _is_done(self, step: Step) -> bool:
        return (
            step.name not in self.rerun
            and step.stage != "report"  # it reads all other steps and is fast
            and run_stage.status(self.directory / step.name, step.config, step.stage)[0] == "done"
        )

    def _in_order(self, steps: list[Step]) -> Iterator[bool]:
        """Yield for each step whether it ran."""
        for i, step in enumerate(steps, 1):
            if is_done := self._is_done(step):
                console.log(f"[{i}/{len(steps)}] {step.name}: already there")
            else:
                console.headline(f"{i}/{len(steps)} {step.name}")
                run_step(step, step.name in self.rerun, self.execute)
            yield not is_done

    def _in_parallel(self, steps: list[Step], jobs: int) -> Iterator[bool]:
        """Yield for each step whether it ran. A step starts when those that it needs are done.

        After a failure no other step starts, and the running steps end first.
        """
        waiting, done = list(steps), set[str]()
        running: dict[Future[float], Step] = {}
        context, setup = multiprocessing.get_context("spawn"), (self.threads, os.getpid())
        with ProcessPoolExecutor(jobs, context, _set_up_process, setup) as pool, _terminate_children_on_exit():
            while waiting or running:
                for step in [s for s in waiting if set(s.needs) <= done]:
                    if self._is_done(step):
                        waiting.remove(step)
                        done.add(step.name)
                        console.log(f"[{len(done)}/{len(steps)}] {step.name}: already there")
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
    """Set up a process that runs steps."""
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
    """Run a step, in processes of its own if it has several; resume an unfinished run of it unless `rerun`."""
    resumes = not rerun and run_stage.status(Path(step.config.output_dir), step.config, step.stage)[0] == "resume"
    config = dataclasses.replace(step.config, overwrite_output_dir=not resumes)
    if not needs_ranks(config):
        run(step.stage, config)
    elif run_ranks(f"exo.{step.stage}", command_line(config), config.nproc):
        raise RunError(f"{step.name}: failed; the message above says why")
