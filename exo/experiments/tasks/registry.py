"""Find the function of a task by its name, without importing the others."""

import importlib
from typing import Any

# The module of each task in this package. The function of a task has the task's name.
TASKS = {
    "quickstart": "quickstart",
    "polarity": "reviews",
    "imdb": "reviews",
    "tldr": "tldr",
    "preferences": "preferences",
}
MODEL_MAKERS = {"quickstart", "polarity"}  # tasks that write base/
BY_TOKENS = {"imdb"}  # tasks that cut texts with a tokenizer


def load(task: str) -> Any:
    """Return the function of a task, which takes a TaskRequest and returns Files."""
    return getattr(importlib.import_module(f"exo.experiments.tasks.{TASKS[task]}"), task)
