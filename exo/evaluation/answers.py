"""What several systems answered to the same prompts: read from a file each, joined by prompt, chosen by seed.

A system is a file of samples, or of texts or preferences, whose completion or chosen text is its one answer. Rows join
by prompt and occurrence number, since a file may ask the same thing twice. What is chosen depends on the seed and the
prompt alone: the same system shows the same answer in every comparison, and a larger limit adds prompts to those of a
smaller one. Left out: joining by anything but the prompt's exact text.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from exo import data
from exo.cli import console
from exo.runs import inputs as run_inputs

Key = tuple[str, int]  # a prompt and its occurrence number, from 0
Answers = dict[Key, data.Example]


def source(option: str, path: str) -> str:
    """The file an option names; the directory of a stage that samples stands for its samples."""
    found = run_inputs.source(option, path, "sample", "best_of_n", "score")
    if not Path(found).is_file():
        raise ValueError(f"--{option} {path}: no such file; python -m exo.sample makes one")
    return found


def read(path: str) -> Answers:
    """A system's answers, several to a prompt or one."""
    _, first = next(data.read_jsonl(path), (0, {}))
    purpose: data.Purpose = "samples" if "completions" in first else "texts"
    return _keyed(data.read(path, purpose=purpose, ignore_columns=("all",)))  # joined by the prompt alone


def read_references(path: str) -> tuple[Answers, dict[Key, str]]:
    """The texts to compare with, and the category of each prompt that has one."""
    answers = _keyed(data.read(path, purpose="texts", ignore_columns=("all",)))
    categories = {}
    for number, row in data.read_jsonl(path):
        if not isinstance(row.get("category", ""), str):
            raise data.DataError(f"{path}:{number}: category must be a string")
        categories[number] = row.get("category", "")
    return answers, {key: categories[example.line] for key, example in answers.items() if categories[example.line]}


def _keyed(dataset: data.Dataset) -> Answers:
    console.log(dataset.summary())
    seen: Counter[str] = Counter()
    answers: Answers = {}
    for example in dataset.examples:
        answers[example.prompt, seen[example.prompt]] = example
        seen[example.prompt] += 1
    return answers


def shared(systems: Mapping[str, Answers], limit: int | None, seed: int) -> list[Key]:
    """The prompts that all systems answered, or `limit` of them, in the first one's order; says what is left out."""
    first = next(iter(systems.values()))
    common = [key for key in first if all(key in answers for answers in systems.values())]
    for name, answers in systems.items():
        if left_out := len(answers) - len(common):
            console.log(
                f"  {name}: {left_out:,} of {len(answers):,} prompts left out, which another file does not have"
            )
    if not common:
        raise data.DataError(f"{', '.join(systems)}: no prompt is in all of these files; prompts must be equal to join")
    chosen = set(sorted(common, key=lambda key: random.Random(f"{seed}/prompt/{key}").random())[:limit])
    console.log(f"{len(chosen):,} of {len(common):,} shared prompts")
    return [key for key in common if key in chosen]


def choose(answers: Answers, key: Key, number: int, *, seed: int, name: str) -> Sequence[str]:
    """`number` of a system's completions of a prompt. One answer stands for as many as are wanted."""
    texts = answers[key].completions
    if len(texts) == 1:
        return texts * number
    if len(texts) < number:
        raise data.DataError(
            f"{name}: row {answers[key].line} holds {len(texts)} completions; expected at least {number}, or one"
        )
    return random.Random(f"{seed}/completions/{key}").sample(texts, number)
