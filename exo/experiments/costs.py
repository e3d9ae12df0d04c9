"""Print a plan, with bounds on the tokens and operations of each step.

The bounds assume completions of the largest length, 6 operations per parameter and token to train and 2 to sample.

Left out: numbers that depend on the data (epochs, all prompts of a file), the scoring of samples, and time.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from exo import models
from exo.cli import console
from exo.experiments.plan import Recipe, Step
from exo.runs import stage as run_stage

DATA_DECIDE = ("sft", "reward", "align", "sample")  # stages whose tokens may depend on the size of the data


def print_plan(recipe: Recipe, steps: list[Step], directory: Path, rerun: Collection[str]) -> None:
    """Print a line per step: already there, or its cost. `rerun` has the names of the steps to run in any case."""
    console.log(f"{recipe.title}: {len(steps)} steps below {directory}")
    parameters = 0  # unknown if a step makes the model
    try:
        parameters = models.parameters_of(recipe.model) if recipe.model else 0
    except ValueError as error:
        console.log(f"operations unknown: {error}")
    total = 0.0
    to_run: set[str] = set()
    for i, step in enumerate(steps, 1):
        # A step whose input changes runs again, and so does the report, which reads everything.
        keeps = step.name not in rerun and step.stage != "report" and not to_run & set(step.needs)
        if keeps and run_stage.status(directory / step.name, step.config, step.stage)[0] == "done":
            cost = "already there"
        else:
            to_run.add(step.name)
            trained, drawn = _tokens(step.stage, step.config)
            operations = (6 * trained + 2 * drawn) * parameters
            total += operations
            parts = [f"trains on at most {trained:,} tokens"] * bool(trained)
            parts += [f"draws at most {drawn:,} tokens"] * bool(drawn)
            parts += [f"{operations:.1e} operations"] * bool(operations)
            parts += ["depends on the size of the data"] * (not parts and step.stage in DATA_DECIDE)
            cost = ", ".join(parts)
        console.log(f"[{i}/{len(steps)}] {step.name:40s} {cost}".rstrip())
    if parameters:
        console.log(f"{parameters / 1e6:,.0f}M parameters; {total:.1e} operations for the tokens above")


def _tokens(stage: str, config: Any) -> tuple[int, int]:
    """Return the tokens that a step trains on and draws, at most; 0 if that depends on the data."""
    match stage:
        case "sft" | "reward" | "align":
            completions = {"sft": 1, "reward": 2}.get(stage) or config.max_completions or 2
            return config.batch_size * max(config.max_steps, 0) * completions * config.max_length, 0
        case "ppo":  # actor and critic
            rows = config.batch_size * config.max_steps
            return 2 * rows * config.max_length, rows // config.ppo_epochs * config.max_new_tokens
        case "sample":
            return 0, (config.prompts or 0) * config.epochs * config.k * config.max_new_tokens
        case "evaluate" if config.model:  # one model, though the run may have several
            return 0, config.prompts * config.k * config.max_new_tokens
    return 0, 0
