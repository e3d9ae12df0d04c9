"""Several files as one: one after another, or mixed with weights.

With weights an epoch has as many rows as the files have usable ones together, and each file the share of them that its
weight says. A file with fewer rows than its share is repeated: as a whole as often as it fits, then some of its rows;
of one with more some are left out. `seed` chooses them. What is repeated and what is left out is counted.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from exo.data.dataset import Dataset, Example
from exo.data.errors import DataError, show
from exo.data.formats.messages import Chat
from exo.data.formats.transcripts import answers_to, as_chat


def mixed(datasets: Sequence[Dataset], path: str, weights: Sequence[float] | None, seed: int) -> Dataset:
    """Return the rows of several datasets as one, their lines counted through."""
    parts = [list(dataset.examples) for dataset in _alike(datasets, path)]
    skipped: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    for dataset in datasets:
        skipped.update(dataset.skipped)
        noted.update(dataset.noted)
    examples: list[Example] = []
    before = repeated = 0
    sizes = [len(part) for part in parts] if weights is None else _sizes(sum(map(len, parts)), weights)
    for number, (part, size, dataset) in enumerate(zip(parts, sizes, datasets, strict=True)):
        name = show(dataset.path)
        placed = [replace(g, line=before + g.line, source=g.source or f"{name}:{g.line}") for g in part]
        before += max(dataset.rows, *(example.line for example in part))
        again, rest = divmod(size, len(placed))
        examples += placed * again
        kept = sorted(random.Random(f"{seed}/{number}").sample(range(len(placed)), rest))
        examples += [placed[i] for i in kept]
        repeated += max(0, size - len(placed))
        if size < len(placed):
            skipped[f"{name}: left out as its weight asks"] = len(placed) - size
    formats = list(dict.fromkeys(dataset.format for dataset in datasets))
    words = f"{len(datasets)} files of {'; '.join(formats)}" + (", mixed" if weights else "")
    unread = tuple(dict.fromkeys(name for dataset in datasets for name in dataset.unread))
    rows, merged = (sum(getattr(dataset, name) for dataset in datasets) for name in ("rows", "merged"))
    turns = all(dataset.conversational for dataset in datasets)
    chat = any(isinstance(example.prompt, Chat) for example in examples)
    return Dataset(
        examples, words, rows, dict(skipped), dict(noted), path, turns and not chat, unread, repeated, merged
    )


def _sizes(total: int, weights: Sequence[float]) -> list[int]:
    """Return how many rows each file gives, by the largest remainder; at least one."""
    shares = [total * weight / sum(weights) for weight in weights]
    sizes = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: sizes[i] - shares[i])
    for i in order[: total - sum(sizes)]:
        sizes[i] += 1
    return [max(1, size) for size in sizes]


def _alike(datasets: Sequence[Dataset], path: str) -> Sequence[Dataset]:
    """Return the datasets with prompts of one kind; DataError if they say different things."""
    first = datasets[0]
    for other in datasets[1:]:
        if (first.examples[0].rewards is None) != (other.examples[0].rewards is None):
            with_rewards, without = (other, first) if first.examples[0].rewards is None else (first, other)
            raise DataError(
                f"{show(path)}: {show(with_rewards.path)} has rewards and {show(without.path)} preferences; "
                "train on one kind at a time"
            )
    kinds = {_kind(dataset) for dataset in datasets}
    if len(kinds) == 1:
        return datasets
    if "texts" in kinds:
        texts = next(dataset for dataset in datasets if _kind(dataset) == "texts")
        others = next(dataset for dataset in datasets if _kind(dataset) != "texts")
        raise DataError(
            f"{show(path)}: {show(texts.path)} has plain texts and {show(others.path)} chats; expected one of the two"
        )
    return [replace(dataset, examples=as_chats(dataset.examples)) for dataset in datasets]


def as_chats(examples: Sequence[Example]) -> list[Example]:
    """Return the groups with every prompt that is a text as a chat: one turn of the user, or those of a transcript."""
    return [
        replace(example, prompt=as_chat(example.prompt), completions=answers_to(example.prompt, example.completions))
        for example in examples
    ]


def _kind(dataset: Dataset) -> str:
    if isinstance(dataset.examples[0].prompt, Chat):
        return "chats"
    return "questions" if dataset.conversational else "texts"
