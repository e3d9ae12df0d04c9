"""What each task's data are made of. A task gives files by name, each as a function that writes it and counts its rows.

sft.jsonl       texts to imitate            {"prompt", "completion"}
prompts.jsonl   prompts to sample for       {"prompt"}
test.jsonl      held-out prompts            {"prompt"}, with "chosen" where a person wrote or chose an answer
pairs.jsonl     preferences                 {"prompt", "chosen", "rejected"}; none where an oracle labels samples
labelled.jsonl  what the oracle learns from {"text", "label"}; none where it is a function or nobody
base/           a model to begin with; none where the recipe names one
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from exo import data, models

Files = dict[str, Callable[[Path], int]]


def quickstart(source: str | None, rows: int | None, seed: int) -> Files:
    """Made-up reviews from a grammar, and a small model that knows its words."""
    from exo.quickstart import corpus, prompts, vocabulary

    def base(directory: Path) -> int:
        model, tokenizer = models.word_level(vocabulary(), seed=seed)
        models.save(model, tokenizer, directory)
        return models.parameter_count(model)

    return {
        "sft.jsonl": _lines({"prompt": p, "completion": text} for p, text in corpus(rows or 8192, seed=seed)),
        "prompts.jsonl": _lines({"prompt": p} for p in prompts("train")),
        "test.jsonl": _lines({"prompt": p} for p in prompts("test")),
        "base": base,
    }


def _lines(rows: Iterable[Mapping[str, object]]) -> Callable[[Path], int]:
    return partial(data.write_jsonl, rows=rows)


TASKS: dict[str, Callable[[str | None, int | None, int], Files]] = {"quickstart": quickstart}
