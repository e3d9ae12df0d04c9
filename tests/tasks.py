"""A word-level task for tests of the stages: prompts are colours, and the reward is the number of "good"s."""

import json
from pathlib import Path
from typing import Any

from exo import data, models

WORDS = "red green blue round square good bad big small".split()
PROMPTS = [f"{a} {b}" for a in WORDS[:3] for b in WORDS[3:5]]


def reward(prompt: str, completion: str) -> float:
    return float(completion.split().count("good"))


def length(prompt: str, completion: str) -> float:
    return 1000.0 + len(completion)


def not_a_number(prompt: str, completion: str) -> float:
    return float("nan")


def write_model(directory: Path, *, seed: int = 0, scale: float = 1.0, words: list[str] = WORDS) -> str:
    """Write a small policy that samples every word and ends at random; return its directory."""
    model, tokenizer = models.word_level(words, hidden_size=32, seed=seed)
    for parameter in model.parameters():
        parameter.data.mul_(scale)
    models.save(model, tokenizer, directory)
    return str(directory)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    data.write_jsonl(path, rows)
    return str(path)


def lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
