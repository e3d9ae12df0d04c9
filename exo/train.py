"""Run an experiment with one command: the paper's, or another recipe; or align a model on your data.

python -m exo.train                                    the quickstart: every method, offline, in minutes, on a laptop
python -m exo.train --recipe NAME_OR_FILE.yaml         another experiment; --dry_run prints its plan and its cost
python -m exo.train --model DIR_OR_NAME --data FILE    align a model on your data, like python -m exo.align
python -m exo.train --model tiny --data FILE           the same with a small new model, to try it out

Each step of a recipe writes to its directory below --output_dir. Run the same command again to resume: steps that
finished with the same inputs and options do not run again.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exo.cli.errors import ConfigError
from exo.cli.fields import SHOWN, option, require, shortened
from exo.cli.main import prepare_process, run_command
from exo.cli.parse import given, parse
from exo.experiments.recipe import METHODS, SHIPPED

if TYPE_CHECKING:
    from exo.experiments.recipe import Recipe


@dataclass(frozen=True)
class Config:
    recipe: str = option("quickstart", f"one of {', '.join(SHIPPED)}, or a YAML file")
    output_dir: str | None = option(None, "directory of the run (default: runs/NAME of the recipe)")
    methods: str | None = option(None, f"some of {','.join(METHODS)}")
    seeds: str | None = option(None, "seeds of alignment, separated by commas")
    sweep: str | None = option(None, "values to try, such as 'beta_pi=0.1,0.5 learning_rate=1e-6,3e-6'")
    full: bool = option(False, "run the recipe's long form")
    source: str | None = option(None, "files of the task: a file, a directory, or a hub name")
    model: str | None = option(None, "causal LM to start from")
    set: str | None = option(None, "options of one stage, or of all: 'sft.max_steps=60 common.temperature=0.7'")
    from_: str | None = option(None, "run this step and the steps that need it again, even if they are up to date")
    to: str | None = option(None, "stop after this step")
    jobs: int = option(1, "number of steps to run in parallel, each in a process")
    dry_run: bool = option(False, "print the plan and its cost only")

    def __post_init__(self) -> None:
        require(self.jobs >= 1, "jobs", ">= 1", self.jobs)


def run(config: Config) -> Path:
    """Run the steps that are not up to date and return the run directory."""
    from exo.experiments import costs, plan
    from exo.experiments import run as experiment_run
    from exo.runs import directory as run_directory
    from exo.runs import inputs as run_inputs

    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"--recipe: expected one process; got {world}; use --jobs to run several steps in parallel")
    recipe = load_recipe(config)
    directory = Path(config.output_dir or f"runs/{Path(config.recipe).stem}")
    all_steps = plan.plan(recipe, directory)
    for name in ("source", "model"):
        if (path := getattr(recipe, name)) and run_inputs.is_missing(path):
            raise ValueError(f"--{name} {path}: no such file or directory")
    steps = experiment_run.steps_up_to(all_steps, config.to)
    rerun = experiment_run.names_from(steps, config.from_)
    if config.dry_run:
        costs.print_plan(recipe, steps, directory, rerun)
        return directory
    with run_directory.lock(str(directory)):
        experiment_run.begin(config, recipe, all_steps, directory)
        experiment_run.Runner(directory, rerun, run_stage, recipe.threads).run(steps, config.jobs)
    return directory


def run_stage(stage: str, config: Any) -> None:
    """Run a stage by name."""
    importlib.import_module(f"exo.{stage}").run(config)


def load_recipe(config: Config) -> Recipe:
    """Load the recipe and apply the options that change it."""
    from exo.experiments import recipe

    changes: dict[str, Any] = {"source": config.source, "model": config.model}
    if config.methods:
        changes["methods"] = config.methods.split(",")
    if config.seeds:
        changes["seeds"] = [_number("seeds", text, int) for text in config.seeds.split(",")]
    if config.sweep:
        changes["sweep"] = {
            name: [_number("sweep", text, float) for text in values.split(",")]
            for name, values in (_split_assignment("sweep", part) for part in config.sweep.split())
        }
    if config.set:
        changes |= _parse_settings(config.set)
    return recipe.load(config.recipe, full=config.full, **changes)


def _parse_settings(text: str) -> dict[str, Any]:
    """Parse --set: options of stages, and of common."""
    from exo.cli import yaml_files

    common: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]] = {}
    for part in text.split():
        name, value = _split_assignment("set", part)
        stage, _, key = name.rpartition(".")
        require(bool(stage and key), "set", "stage.option=value", part)
        section = common if stage == "common" else stages.setdefault(stage, {})
        require(key not in section, "set", "each option once", part)
        try:
            section[key] = yaml_files.parse(value, typed=True)
        except ValueError as error:
            raise ConfigError(f"--set {shortened(part, SHOWN)}: {error}") from None
    return {key: value for key, value in (("common", common), ("stages", stages)) if value}


def _split_assignment(name: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    require(bool(key and equals and value), name, "name=value", text)
    return key, value


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"--{name}: expected numbers separated by commas; got {text!r}") from None


def main(argv: Sequence[str] | None = None) -> int:
    from exo import align

    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
    # Without --recipe, an option of alignment such as --data means alignment. The data of a recipe are its --source.
    alignment = {field.name for field in dataclasses.fields(align.Config)} - {"output_dir", "seed"}
    options = given(arguments)
    if "recipe" not in options and options & alignment:
        return align.main(arguments)
    return run_command(run, parse(Config, arguments, prog="python -m exo.train", description=None))


if __name__ == "__main__":
    prepare_process(__name__)
    raise SystemExit(main())
