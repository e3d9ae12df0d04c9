"""Print a plan, with upper bounds of the tokens and operations of each step.

The bounds assume completions of maximum length, 6 operations per parameter and token to train and 2 to sample. They
include neither numbers that depend on the data (epochs, all prompts of a file) nor the scoring of samples.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from exo import models
from exo.cli import console
from exo.experiments.plan import Step
from exo.experiments.recipe import Recipe
from exo.experiments.run import is_done

DEPEND_ON_DATA = ("sft", "reward", "align", "sample")  # stages whose tokens may depend on the size of the data


def print_plan(recipe: Recipe, steps: list[Step], directory: Path, rerun: Collection[str]) -> None:
    """Print for each step that it is up to date, or its cost. `rerun` has the names of the steps to run in any case."""
    console.log(f"{recipe.title}: {len(steps)} steps below {directory}")
    parameters = 0  # unknown if a step creates the model
    try:
        parameters = models.parameters_of(recipe.model) if recipe.model else 0
    except ValueError as error:
        console.log(f"operations unknown: {error}")
    total = 0.0
    to_run: set[str] = set()
    for i, step in enumerate(steps, 1):
        if not to_run & set(step.needs) and is_done(step, rerun):
            cost = "up to date"
        else:
            to_run.add(step.name)
            trained, drawn = _bound_tokens(step.stage, step.config)
            operations = (6 * trained + 2 * drawn) * parameters
            total += operations
            parts = [f"trains on at most {trained:,} tokens"] * bool(trained)
            parts += [f"draws at most {drawn:,} tokens"] * bool(drawn)
            parts += [f"{operations:.1e} operations"] * bool(operations)
            parts += ["depends on the size of the data"] * (not parts and step.stage in DEPEND_ON_DATA)
            cost = ", ".join(parts)
        console.log(f"[{i}/{len(steps)}] {step.name:40s} {cost}".rstrip())
    if parameters:
        console.log(f"{parameters / 1e6:,.0f}M parameters; {total:.1e} operations for the tokens above")


def _bound_tokens(stage: str, config: Any) -> tuple[int, int]:
    """Return upper bounds of the tokens that a step trains on and draws; 0 if they depend on the data."""
    match stage:
        case "sft" | "reward" | "align":
            completions = {"sft": 1, "reward": 2}.get(stage) or config.max_completions or 2
            return config.batch_size * max(config.max_steps, 0) * completions * config.max_length, 0
        case "ppo":  # actor and critic
            rows = config.batch_size * config.max_steps
            return 2 * rows * config.max_length, rows // config.ppo_epochs * config.max_new_tokens
        case "sample":
            return 0, (config.prompts or 0) * config.epochs * config.k * config.max_new_tokens
        case "evaluate" if config.model:  # of one model; the run may have several
            return 0, config.prompts * config.k * config.max_new_tokens
    return 0, 0
