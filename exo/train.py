"""The road from data to an aligned model, and the paper's experiment as one command.

python -m exo.train                                    the quickstart: every method, offline, in minutes, on a laptop
python -m exo.train --recipe NAME_OR_FILE.yaml         another experiment; --dry_run prints its plan with the cost
python -m exo.train --model DIR_OR_NAME --data FILE    align a model on your data, as python -m exo.align does
python -m exo.train --model tiny --data FILE           the same without weights, for a trial

A recipe's steps write below --output_dir. The same command again goes on where it stopped: a step whose result is whole
and whose inputs and options are the same is not run again.
"""

import dataclasses
import importlib
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exo import align
from exo.cli import console, signals, streams, yaml_files
from exo.cli.errors import ConfigError, RunError
from exo.cli.fields import SHOWN, option, require, shortened
from exo.cli.main import needs_ranks, prepare_process, print_error, run_command, run_ranks
from exo.cli.parse import command_line, given, parse
from exo.experiments import costs, plan
from exo.experiments.plan import Step
from exo.runs import directory as run_directory
from exo.runs import inputs as run_inputs
from exo.runs import record as run_record
from exo.runs import stage as run_stage


@dataclass(frozen=True)
class Config:
    recipe: str = option("quickstart", f"one of {', '.join(plan.SHIPPED)}, or a YAML file")
    output_dir: str | None = option(None, "directory of the run (default: runs/NAME of the recipe)")
    methods: str | None = option(None, f"some of {','.join(plan.METHODS)}")
    seeds: str | None = option(None, "seeds of alignment, with commas")
    sweep: str | None = option(None, "values to try, as in 'beta_pi=0.1,0.5 learning_rate=1e-6,3e-6'")
    full: bool = option(False, "the recipe's long form")
    source: str | None = option(None, "where the task's files are: a file, a directory, or a hub name")
    model: str | None = option(None, "causal LM to begin with")
    set: str | None = option(None, "options of stages, or of all, as in 'sft.max_steps=60 common.temperature=0.7'")
    from_: str | None = option(None, "run this step and those after it anew, whatever is there")
    to: str | None = option(None, "stop after this step")
    jobs: int = option(1, "steps at a time, each in a process of its own")
    dry_run: bool = option(False, "print the plan and its cost, and do nothing")

    def __post_init__(self) -> None:
        require(self.jobs >= 1, "jobs", ">= 1", self.jobs)


def run(config: Config) -> Path:
    """Run what is left of the plan and return the run directory."""
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"--recipe: expected one process, which runs the steps; got {world}; --jobs runs several")
    recipe = _recipe(config)
    directory = Path(config.output_dir or f"runs/{Path(config.recipe).stem}")
    whole = plan.plan(recipe, directory)
    for name in ("source", "model"):
        if (path := getattr(recipe, name)) and run_inputs.is_missing(path):
            raise ValueError(f"--{name} {path}: no such file or directory")
    steps = _until(whole, config.to)
    again = _from(steps, config.from_)
    if config.dry_run:
        costs.tell(recipe, steps, directory, again)
        return directory
    with run_directory.lock(str(directory)):
        return _go(config, recipe, whole, steps, directory, again)


def _go(
    config: Config, recipe: plan.Recipe, whole: list[Step], steps: list[Step], directory: Path, again: set[str]
) -> Path:
    _begin(config, recipe, whole, directory)
    if recipe.threads and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(recipe.threads)
    ran = _run_all(steps, directory, again, config.jobs, recipe.threads)
    run_record.update_run(directory, steps_run=ran)
    console.headline("Finished")
    page = directory / "report" / "report.html"
    if steps[-1].stage == "report":
        shutil.copyfile(page, directory / "report.html")  # it stands alone: its pictures are in it
        console.log(f"report: {directory / 'report.html'}")
    return directory


def _recipe(config: Config) -> plan.Recipe:
    changes: dict[str, Any] = {"source": config.source, "model": config.model}
    if config.methods:
        changes["methods"] = config.methods.split(",")
    if config.seeds:
        changes["seeds"] = [_number("seeds", text, int) for text in config.seeds.split(",")]
    if config.sweep:
        changes["sweep"] = {
            name: [_number("sweep", text, float) for text in values.split(",")]
            for name, values in (_assignment("sweep", part) for part in config.sweep.split())
        }
    if config.set:
        changes["stages"] = {}
        for part in config.set.split():
            name, value = _assignment("set", part)
            stage, dot, key = name.rpartition(".")
            require(bool(dot and stage and key), "set", "stage.option=value", part)
            section = changes if stage == "common" else changes["stages"]
            require(key not in section.get(stage, {}), "set", "each option once", part)
            try:
                section.setdefault(stage, {})[key] = yaml_files.parse(value, typed=True)
            except ValueError as error:
                raise ConfigError(f"--set {shortened(part, SHOWN)}: {error}") from None
    return plan.load(config.recipe, full=config.full, **changes)


def _assignment(name: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    require(bool(key and equals and value), name, "name=value", text)
    return key, value


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"--{name}: expected numbers, with commas; got {text!r}") from None


def _until(steps: list[Step], name: str | None) -> list[Step]:
    if name is None:
        return steps
    _known(steps, "to", name)
    return steps[: max(i for i, step in enumerate(steps) if _below(step, name)) + 1]


def _from(steps: list[Step], name: str | None) -> set[str]:
    """Names of the steps to run anew: that one, and all that need it."""
    if name is None:
        return set()
    _known(steps, "from", name)
    again = {step.name for step in steps if _below(step, name)}
    for step in steps:
        if again & set(step.needs):
            again.add(step.name)
    return again


def _below(step: Step, name: str) -> bool:
    return step.name == name or step.name.startswith(f"{name}/")


def _known(steps: list[Step], option: str, name: str) -> None:
    names = {step.name for step in steps} | {step.name.split("/")[0] for step in steps}
    require(any(_below(step, name) for step in steps), option, f"one of {', '.join(sorted(names))}", name)


def _begin(config: Config, recipe: plan.Recipe, steps: list[Step], directory: Path) -> None:
    """The record of the whole. An earlier run of a recipe there is gone on with; anything else there is refused."""
    if not run_directory.is_run(directory, "train"):
        run_directory.prepare(str(directory), overwrite=False)
    run_record.write_run(directory, config, "train", started=run_record.now(), recipe=dataclasses.asdict(recipe), plan=[
        {"name": step.name, "stage": step.stage, "needs": step.needs, "options": dataclasses.asdict(step.config)}
        | step.facts
        for step in steps
    ])  # fmt: skip


def _run_all(steps: list[Step], directory: Path, again: set[str], jobs: int, threads: int | None) -> int:
    """Run what does not hold, in order or several at a time; return how many ran."""
    ran = 0
    for step in _one_by_one(steps, directory, again) if jobs == 1 else _at_once(steps, directory, again, jobs, threads):
        ran += step is not None
    return ran


def _held(step: Step, directory: Path, again: set[str]) -> bool:
    return (
        step.name not in again
        and step.stage != "report"  # it reads all the others, and takes a moment
        and run_stage.is_up_to_date(directory / step.name, step.config, step.stage)
    )


def _one_by_one(steps: list[Step], directory: Path, again: set[str]) -> Iterator[Step | None]:
    for i, step in enumerate(steps, 1):
        if _held(step, directory, again):
            console.log(f"[{i}/{len(steps)}] {step.name}: already there")
            yield None
            continue
        console.headline(f"{i}/{len(steps)} {step.name}")
        _stage(step, step.name in again)
        yield step


def _at_once(
    steps: list[Step], directory: Path, again: set[str], jobs: int, threads: int | None
) -> Iterator[Step | None]:
    """Each step as soon as those it needs are there. One that fails stops the rest; those under way end first."""
    waiting, done = list(steps), set[str]()
    under_way: dict[Future[float], Step] = {}
    begun = (threads, os.getpid())
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begun, begun) as pool, _ended_with_us():
        while waiting or under_way:
            for step in [s for s in waiting if set(s.needs) <= done]:
                if _held(step, directory, again):
                    waiting.remove(step)
                    done.add(step.name)
                    console.log(f"[{len(done)}/{len(steps)}] {step.name}: already there")
                    yield None
                elif len(under_way) < jobs:
                    waiting.remove(step)
                    under_way[pool.submit(_timed, step, step.name in again)] = step
            for future in wait(under_way, return_when=FIRST_COMPLETED).done if under_way else ():
                step = under_way.pop(future)
                try:
                    seconds = future.result()
                except BrokenProcessPool:
                    names = ", ".join(s.name for s in (step, *under_way.values()))
                    raise RunError(
                        f"{names}: the process of one of them was killed, perhaps for lack of memory; run it again, "
                        "with fewer --jobs if need be"
                    ) from None
                except Exception:
                    pool.shutdown(cancel_futures=True)
                    print_error(f"{step.name}: failed")
                    raise
                done.add(step.name)
                console.log(f"[{len(done)}/{len(steps)}] {step.name}  {console.duration(seconds)}")
                yield step


@contextmanager
def _ended_with_us() -> Iterator[None]:
    """Whoever ends the driver ends the steps under way; those that train leave their state."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        for child in multiprocessing.active_children():
            child.terminate()
        raise


def _begun(threads: int | None, driver: int) -> None:
    """What a process of a step does first."""
    streams.prepare()
    console.mute()
    signals.exit_with_parent(driver)
    if threads and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)


def _timed(step: Step, anew: bool) -> float:
    began = time.perf_counter()
    _stage(step, anew)
    return time.perf_counter() - began


def _stage(step: Step, anew: bool) -> None:
    """Run it; go on with it where it did not finish."""
    resumes = not anew and run_stage.is_resumable(Path(step.config.output_dir), step.config, step.stage)
    config = dataclasses.replace(step.config, overwrite_output_dir=not resumes)
    if needs_ranks(config):
        if run_ranks(f"exo.{step.stage}", command_line(config), config.nproc):
            raise RunError(f"{step.name}: failed; see the error above")
        return
    importlib.import_module(f"exo.{step.stage}").run(config)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
    # --data is for alignment; a recipe says where its data are with --source
    own = {field.name for field in dataclasses.fields(align.Config)} - {"output_dir", "seed"}
    if "recipe" not in (asked := given(arguments)) and asked & own:
        return align.main(arguments)
    options = parse(Config, arguments, prog="python -m exo.train", description=None)
    return run_command(run, options)


if __name__ == "__main__":
    prepare_process(__name__)
    raise SystemExit(main())
