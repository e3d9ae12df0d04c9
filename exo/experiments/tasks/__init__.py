"""What each task's data are made of. A task gives files by name, each as a function that writes it and counts its rows.

sft.jsonl       texts to imitate            {"prompt", "completion"}
prompts.jsonl   prompts to sample for       {"prompt"}
test.jsonl      held-out prompts            {"prompt"}, with "chosen" where a person wrote or chose an answer
pairs.jsonl     preferences                 {"prompt", "chosen", "rejected"}; none where an oracle labels samples
labelled.jsonl  what the oracle learns from {"text", "label"}; none where it is a function or nobody
base/           a model to begin with; none where the recipe names one

No prompt of test.jsonl is in another file.
"""

from collections.abc import Callable

from exo.experiments.tasks.preferences import preferences
from exo.experiments.tasks.quickstart import quickstart
from exo.experiments.tasks.reviews import imdb, polarity
from exo.experiments.tasks.source import Files, TaskRequest
from exo.experiments.tasks.tldr import tldr

__all__ = ["BY_TOKENS", "MODEL_MAKERS", "TASKS", "Files", "TaskRequest"]

TASKS: dict[str, Callable[[TaskRequest], Files]] = {
    "quickstart": quickstart,
    "polarity": polarity,
    "imdb": imdb,
    "tldr": tldr,
    "preferences": preferences,
}
MODEL_MAKERS = {"quickstart", "polarity"}  # those that write base/
BY_TOKENS = {"imdb"}  # those that cut texts by a tokenizer
