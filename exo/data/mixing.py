"""Combine several datasets: one after another, or mixed by weights.

With weights, an epoch has as many rows as all files have usable rows, and each file has the share of its weight. A file
with fewer rows than its share is repeated: all rows as often as they fit, then a random part. A file with more rows
loses a random part. `seed` draws both; the account counts the rows that are repeated and left out.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from exo.data.dataset import Dataset, Example
from exo.data.errors import DataError, show
from exo.data.formats.messages import Chat


def mixed(datasets: Sequence[Dataset], path: str, weights: Sequence[float] | None, seed: int) -> Dataset:
    """Return several datasets as one, with lines counted through; DataError if their kinds differ."""
    parts = [dataset.examples for dataset in _to_one_kind(datasets, path)]
    skipped: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    for dataset in datasets:
        skipped.update(dataset.skipped)
        noted.update(dataset.noted)
    examples: list[Example] = []
    offset = repeated = 0
    sizes = [len(part) for part in parts] if weights is None else _sizes(sum(map(len, parts)), weights)
    for number, (part, size, dataset) in enumerate(zip(parts, sizes, datasets, strict=True)):
        name = show(dataset.path)
        placed = [replace(g, line=offset + g.line, source=g.source or f"{name}:{g.line}") for g in part]
        offset += max(dataset.rows, *(example.line for example in part))
        times, rest = divmod(size, len(placed))
        examples += placed * times
        examples += [placed[i] for i in sorted(random.Random(f"{seed}/{number}").sample(range(len(placed)), rest))]
        repeated += max(0, size - len(placed))
        if size < len(placed):
            skipped[f"{name}: left out by --data_weights"] = len(placed) - size
    formats = "; ".join(dict.fromkeys(dataset.format for dataset in datasets))
    has_chats = any(isinstance(example.prompt, Chat) for example in examples)
    return Dataset(
        examples,
        f"{len(datasets)} files of {formats}{', mixed' if weights else ''}",
        sum(dataset.rows for dataset in datasets),
        dict(skipped),
        dict(noted),
        path,
        not has_chats and all(dataset.conversational for dataset in datasets),
        tuple(dict.fromkeys(name for dataset in datasets for name in dataset.unread)),
        repeated,
        sum(dataset.merged for dataset in datasets),
    )


def _sizes(total: int, weights: Sequence[float]) -> list[int]:
    """Return the number of rows of each file, at least one, by the largest remainder."""
    shares = [total * weight / sum(weights) for weight in weights]
    sizes = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: sizes[i] - shares[i])
    for i in order[: total - sum(sizes)]:
        sizes[i] += 1
    return [max(1, size) for size in sizes]


def _to_one_kind(datasets: Sequence[Dataset], path: str) -> Sequence[Dataset]:
    """Return the datasets, questions as chats if others have chats; DataError if they differ in anything else."""
    first = datasets[0]
    for dataset in datasets[1:]:
        if (first.examples[0].rewards is None) != (dataset.examples[0].rewards is None):
            with_rewards, without = (dataset, first) if first.examples[0].rewards is None else (first, dataset)
            raise DataError(
                f"{show(path)}: {show(with_rewards.path)} has rewards and {show(without.path)} preferences; "
                "train on one kind at a time"
            )
    kinds = [_kind(dataset) for dataset in datasets]
    if len(set(kinds)) == 1:
        return datasets
    if "texts" in kinds:
        texts = datasets[kinds.index("texts")]
        chats = next(dataset for dataset, kind in zip(datasets, kinds, strict=True) if kind != "texts")
        raise DataError(
            f"{show(path)}: {show(texts.path)} has plain texts and {show(chats.path)} chats; expected one of the two"
        )
    return [replace(dataset, examples=[example.as_chat() for example in dataset.examples]) for dataset in datasets]


def _kind(dataset: Dataset) -> str:
    if isinstance(dataset.examples[0].prompt, Chat):
        return "chats"
    return "questions" if dataset.conversational else "texts"
