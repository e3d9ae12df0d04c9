"""Read the answers of several systems, join them by prompt, and choose some by seed.

A system is a file of samples, or of texts or preferences, whose completion or chosen text is its one answer. Rows are
joined by prompt and occurrence number, since a file may have a prompt twice. The choice depends on the seed and the
prompt alone: a system shows the same answer in every comparison, and a larger limit adds prompts to those of a smaller.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from exo import data
from exo.cli import console
from exo.evaluation.win_rate import Pair
from exo.runs import inputs as run_inputs

Key = tuple[str, int]  # a prompt and its occurrence number, from 0
Answers = dict[Key, data.Example]


def source(option: str, path: str) -> str:
    """Return the file that an option names; for the run directory of a sampling stage, its file of samples."""
    file = run_inputs.source(option, path, "sample", "best_of_n", "score")
    if not Path(file).is_file():
        raise ValueError(f"--{option} {path}: no such file; python -m exo.sample makes one")
    return file


def read(path: str) -> Answers:
    """Read a system's answers, one or several per prompt."""
    _, first = next(data.read_jsonl(path), (0, {}))
    purpose: data.Purpose = "samples" if "completions" in first else "texts"
    return _by_key(data.read(path, purpose=purpose, ignore_columns=("all",)))


def read_references(path: str) -> tuple[Answers, dict[Key, str]]:
    """Read reference texts, and the category of each prompt that has one."""
    answers = _by_key(data.read(path, purpose="texts", ignore_columns=("all",)))
    categories = {}
    for number, row in data.read_jsonl(path):
        if not isinstance(row.get("category", ""), str):
            raise data.DataError(f"{path}:{number}: category must be a string")
        categories[number] = row.get("category", "")
    return answers, {key: categories[example.line] for key, example in answers.items() if categories[example.line]}


def _by_key(dataset: data.Dataset) -> Answers:
    console.log(dataset.summary())
    occurrences: Counter[str] = Counter()
    answers: Answers = {}
    for example in dataset.examples:
        answers[example.prompt, occurrences[example.prompt]] = example
        occurrences[example.prompt] += 1
    return answers


def shared(systems: Mapping[str, Answers], limit: int | None, seed: int) -> list[Key]:
    """Return the prompts that all systems answered, or `limit` of them, in the order of the first system."""
    first = next(iter(systems.values()))
    common = [key for key in first if all(key in answers for answers in systems.values())]
    for name, answers in systems.items():
        if left_out := len(answers) - len(common):
            console.log(f"  {name}: {left_out:,} of {len(answers):,} prompts left out: another file lacks them")
    if not common:
        raise data.DataError(f"{', '.join(systems)}: expected prompts that all files share; found none")
    chosen = set(sorted(common, key=lambda key: random.Random(f"{seed}/prompt/{key}").random())[:limit])
    console.log(f"{len(chosen):,} of {len(common):,} shared prompts")
    return [key for key in common if key in chosen]


def choose(answers: Answers, key: Key, number: int, *, seed: int, name: str) -> Sequence[str]:
    """Choose `number` of a system's completions of a prompt. A single answer is repeated."""
    texts = answers[key].completions
    if len(texts) == 1:
        return texts * number
    if len(texts) < number:
        raise data.DataError(
            f"{answers[key].place(name)}: expected one completion, or at least {number}; got {len(texts)}"
        )
    return random.Random(f"{seed}/completions/{key}").sample(texts, number)


def pairs(a: str, b: str, references: str | None, *, limit: int | None, per_prompt: int, seed: int) -> list[Pair]:
    """Read two systems' answers and pair them, `per_prompt` pairs for each of `limit` shared prompts."""
    answers_a, answers_b = read(a), read(b)
    reference_of, categories = read_references(references) if references else ({}, {})
    systems = {"a": answers_a, "b": answers_b} | ({"references": reference_of} if reference_of else {})
    paired = []
    for number, key in enumerate(shared(systems, limit, seed)):
        reference = reference_of[key].completions[0] if reference_of else ""
        texts_a = choose(answers_a, key, per_prompt, seed=seed, name=a)
        texts_b = choose(answers_b, key, per_prompt, seed=seed, name=b)
        for sample, (text_a, text_b) in enumerate(zip(texts_a, texts_b, strict=True)):
            texts = {"prompt": key[0], "a": text_a, "b": text_b, "reference": reference}
            paired.append(Pair(number, answers_a[key].line, sample, categories.get(key, ""), texts))
    return paired
