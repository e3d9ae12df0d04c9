"""Rows held out of training, so that no text of theirs is trained on.

Rows are connected if they share a prompt, a completion or a whole text (a prompt with a completion: of rows with an
implicit prompt one text begins in several ways). Connected rows are held out together or not at all.
"""

import random
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple


class Texts(NamedTuple):
    """What a row may share with others."""

    prompt: str
    completions: Sequence[str]

    @property
    def name(self) -> str:
        """The prompt; of rows without one, the first completion."""
        return self.prompt or self.completions[0]

    def keys(self) -> Iterable[Hashable]:
        """Keys that connected rows have in common. An empty completion connects nothing."""
        yield "name", self.name.strip()
        for completion in self.completions:
            if completion.strip():
                yield "completion", completion.strip()
                yield "whole", f"{self.prompt}{completion}".strip()


class Split(NamedTuple):
    """`held_out` has the places of rows; of these `shared` share a text with rows that are trained on."""

    held_out: frozenset[int]
    shared: int

    def warning(self, what: str) -> str:
        """What to print, or ""."""
        if not self.shared:
            return ""
        return (
            f"{self.shared:,} of {len(self.held_out):,} held-out rows of {what} share a completion with rows that are "
            "trained on: too many rows are connected to set a part of them aside, so the split is by prompt alone, and "
            "the held-out accuracy may be too high; keep held-out rows in a file of their own"
        )


def shared(trained: Iterable[Texts], held_out: Iterable[Texts]) -> int:
    """Count the held-out rows that are connected to a row that is trained on."""
    keys = {key for row in trained for key in row.keys()}
    return sum(not keys.isdisjoint(row.keys()) for row in held_out)


def hold_out(rows: Sequence[Texts], order: Iterable[str], number: int, seed: int) -> Split:
    """Hold out rows with about `number` of the names, as near as connected rows allow.

    `order` has each name once. It is shuffled by the seed, and names are held out from its beginning, each with what it
    is connected to, unless that goes further beyond the number than it falls short without. Some rows always stay.
    Where nothing can be held out so, rows are held out by name alone, and `shared` is not 0.
    """
    names = list(order)
    random.Random(seed).shuffle(names)
    component = dict(zip((row.name for row in rows), _components(rows), strict=True))
    connected: dict[int, set[str]] = {}
    for name in names:
        connected.setdefault(component[name], set()).add(name)
    chosen: set[str] = set()
    for name in names:
        example = connected[component[name]]
        size = len(chosen) + len(example)
        near = size <= number or size - number < number - len(chosen)
        if name not in chosen and near and size < len(names):
            chosen |= example
    if not chosen and number:
        chosen = set(names[: min(number, len(names) - 1)])
    held_out = frozenset(i for i, row in enumerate(rows) if row.name in chosen)
    trained = (row for i, row in enumerate(rows) if i not in held_out)
    return Split(held_out, shared(trained, (rows[i] for i in held_out)))


def _components(rows: Sequence[Texts]) -> list[int]:
    """For each row the first row that it is connected to, over others or directly."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[Hashable, int] = {}
    for i, row in enumerate(rows):
        for key in row.keys():
            one, other = sorted((root(i), root(first.setdefault(key, i))))
            parent[other] = one
    return [root(i) for i in range(len(rows))]
