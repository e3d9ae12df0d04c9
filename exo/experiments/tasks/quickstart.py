"""Prepare the quickstart: reviews from a grammar, and a small model that knows its words."""

from pathlib import Path

from exo import models
from exo.experiments.quickstart import corpus, prompts, vocabulary
from exo.experiments.tasks.source import Files, TaskRequest, lines, model_files


def quickstart(request: TaskRequest) -> Files:
    def base(directory: Path) -> int:
        return model_files(*models.word_level(vocabulary(), seed=request.seed), directory)

    texts = corpus(request.rows or 8192, seed=request.seed)
    return {
        "sft.jsonl": lines({"prompt": p, "completion": f" {text}"} for p, text in texts),
        "prompts.jsonl": lines({"prompt": p} for p in prompts("train")),
        "test.jsonl": lines({"prompt": p} for p in prompts("test")),
        "base": base,
    }
