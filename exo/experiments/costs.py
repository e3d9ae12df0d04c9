"""What a plan costs before it runs: the tokens that its steps train on and draw, as far as their options tell.

Bounds, with completions as long as they may be: 6 operations a parameter and token to train, 2 to draw. Left out: what
the data decide (epochs, all prompts of a file), log-probs and scores of what was drawn, and time.
"""

from pathlib import Path
from typing import Any

from exo import models
from exo.cli import console
from exo.experiments.plan import Recipe, Step
from exo.runs import stage as run_stage

DATA_DECIDE = ("sft", "reward", "align", "sample")  # how many tokens, where no option says how many steps or prompts


def tell(recipe: Recipe, steps: list[Step], directory: Path, again: set[str]) -> None:
    """Print the plan, a step a line: what is there already, and what the others will take."""
    console.log(f"{recipe.title}: {len(steps)} steps below {directory}")
    parameters = _parameters(recipe)
    total = 0.0
    anew: set[str] = set()
    for i, step in enumerate(steps, 1):
        # what a step reads is made again with it; and the report reads everything
        there = step.name not in again and step.stage != "report" and not anew & set(step.needs)
        if there and run_stage.is_up_to_date(directory / step.name, step.config, step.stage):
            cost = "already there"
        else:
            anew.add(step.name)
            trained, drawn = _tokens(step.stage, step.config)
            work = (6 * trained + 2 * drawn) * (parameters or 0)
            total += work
            counts = ((trained, "trains on"), (drawn, "draws"))
            parts = [f"{verb} at most {tokens:,} tokens" for tokens, verb in counts if tokens]
            parts += [f"{work:.1e} operations"] * bool(work)
            parts += ["as much as the data have"] * (not parts and step.stage in DATA_DECIDE)
            cost = ", ".join(parts)
        console.log(f"[{i}/{len(steps)}] {step.name:40s} {cost}".rstrip())
    if parameters:
        console.log(f"{parameters / 1e6:,.0f}M parameters; {total:.1e} operations for the tokens named above")


def _parameters(recipe: Recipe) -> int | None:
    """Of the model to begin with; None where a step makes it, or where its config cannot be had now."""
    if recipe.model is None:
        return None
    try:
        return models.parameters_of(recipe.model)
    except ValueError as error:
        console.log(f"operations unknown: {error}")
        return None


def _tokens(stage: str, config: Any) -> tuple[int, int]:
    """(trained on, drawn); 0 where the data decide."""
    if stage in ("sft", "align", "reward"):
        completions = {"sft": 1, "reward": 2, "align": getattr(config, "max_completions", None) or 2}[stage]
        return config.batch_size * max(config.max_steps, 0) * completions * config.max_length, 0
    if stage == "ppo":  # actor and critic
        rows = config.batch_size * config.max_steps
        return 2 * rows * config.max_length, rows // config.ppo_epochs * config.max_new_tokens
    if stage == "sample":
        return 0, (config.prompts or 0) * config.epochs * config.k * config.max_new_tokens
    if stage == "evaluate" and config.model:  # a checkpoint; how many the run leaves is not known here
        return 0, config.prompts * config.k * config.max_new_tokens
    return 0, 0
