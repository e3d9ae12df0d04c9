"""What a plan costs before it runs: tokens and operations of each step, as far as its options tell.

An upper bound: completions as long as they may be. 6 operations a parameter and token to train, 2 to run the model.
Left out: time, which depends on the machine.
"""

from pathlib import Path
from typing import Any

from exo import console, lineage, models
from exo.pipeline import Recipe, Step


def tell(recipe: Recipe, steps: list[Step], directory: Path, again: set[str]) -> None:
    """Print the plan, a step a line: what is there already, and what the others will take."""
    console.say(f"{recipe.title}: {len(steps)} steps below {directory}")
    parameters = _parameters(recipe)
    total = 0.0
    for i, step in enumerate(steps, 1):
        there = step.name not in again and lineage.holds(directory / step.name, step.config, step.stage)
        tokens, train = _tokens(step.stage, step.config)
        work = (6 if train else 2) * tokens * (parameters or 0)
        total += 0 if there else work
        amount = f"at most {tokens:,} tokens" if tokens else ""
        cost = f", {work:.1e} operations" if work else ""
        console.say(f"[{i}/{len(steps)}] {step.name:40s} {'already there' if there else amount + cost}")
    if parameters:
        console.say(f"{parameters / 1e6:,.0f}M parameters; at most {total:.1e} operations are left to do")


def _parameters(recipe: Recipe) -> int | None:
    """Of the model to begin with; None where a step makes it, or where its config cannot be had now."""
    if recipe.model is None:
        return None
    try:
        return models.parameters_of(recipe.model)
    except ValueError as error:
        console.say(f"operations unknown: {error}")
        return None


def _tokens(stage: str, config: Any) -> tuple[int, bool]:
    """(tokens through the model, whether it is trained); 0 where the data decide."""
    if stage in ("sft", "align", "reward", "ppo"):
        rows = config.batch_size * max(config.max_steps, 0)
        if stage == "align":
            rows *= config.max_completions or 1
        return rows * config.max_length, True
    if stage == "sample":
        return (config.prompts or 0) * config.epochs * config.k * config.max_new_tokens, False
    if stage == "evaluate":
        return config.prompts * config.k * config.max_length, False
    return 0, False
