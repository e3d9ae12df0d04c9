"""The task of the quickstart: made-up reviews from a grammar, and a small model that knows its words."""

from pathlib import Path

from exo import models
from exo.experiments.quickstart import corpus, prompts, vocabulary
from exo.experiments.tasks.source import Files, TaskRequest, lines


def quickstart(wanted: TaskRequest) -> Files:
    def base(directory: Path) -> int:
        model, tokenizer = models.word_level(vocabulary(), seed=wanted.seed)
        models.save(model, tokenizer, directory)
        return models.parameter_count(model)

    texts = corpus(wanted.rows or 8192, seed=wanted.seed)
    return {
        "sft.jsonl": lines({"prompt": p, "completion": f" {text}"} for p, text in texts),
        "prompts.jsonl": lines({"prompt": p} for p in prompts("train")),
        "test.jsonl": lines({"prompt": p} for p in prompts("test")),
        "base": base,
    }
