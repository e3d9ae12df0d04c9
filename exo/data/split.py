"""Hold out rows whose texts no other row shares.

Rows are connected if they share a prompt, a completion or their concatenation (rows with an implicit prompt split one
text in several places). Connected rows are held out together or not at all.
"""

import random
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from exo.cli import console
from exo.data.dataset import Dataset


class HasTexts(Protocol):
    """A row with texts, such as an Example."""

    @property
    def prompt(self) -> str: ...
    @property
    def completions(self) -> Sequence[str]: ...


class Split(NamedTuple):
    held_out: frozenset[int]  # indices of rows
    num_shared: int  # held-out rows that share a text with a training row


def row_name(row: HasTexts) -> str:
    """Return the prompt of a row, or its first completion without a prompt."""
    return row.prompt or row.completions[0]


def keys(row: HasTexts) -> Iterator[Hashable]:
    """Yield the keys that connected rows share. An empty completion connects nothing."""
    yield "name", row_name(row).strip()
    for completion in row.completions:
        if completion.strip():
            yield "completion", completion.strip()
            yield "concatenation", f"{row.prompt}{completion}".strip()


def count_shared(train: Iterable[HasTexts], held_out: Iterable[HasTexts]) -> int:
    """Return the number of held-out rows that are connected to a training row."""
    train_keys = {key for row in train for key in keys(row)}
    return sum(not train_keys.isdisjoint(keys(row)) for row in held_out)


def hold_out(
    rows: Sequence[HasTexts],
    fraction: float,
    seed: int,
    path: str,
    *,
    at_least: int = 1,
    at_most: int | None = None,
    sort: bool = True,
) -> frozenset[int]:
    """Return the indices of rows to hold out; warn if they share texts with the other rows.

    `fraction` is a share of the distinct prompts, whose number is between `at_least` and `at_most`; 0 holds out none.
    `seed` draws the prompts from their sorted order, or from the order of the rows if not `sort`. The warning names
    `path`.
    """
    if not fraction or not rows:
        return frozenset()
    names = dict.fromkeys(map(row_name, rows))
    number = max(at_least, round(fraction * len(names)))
    if at_most is not None:
        number = min(number, at_most)
    split = split_connected(rows, sorted(names) if sort else names, number, seed)
    if split.num_shared:
        console.warn(
            f"{path}: {split.num_shared:,} of {len(split.held_out):,} held-out rows share a completion with rows that "
            "are trained on, because too many rows are connected to set a part of them aside; the split is by prompt "
            "alone, and the held-out accuracy may be too high; keep held-out rows in a separate file"
        )
    return split.held_out


def warn_of_leaks(train: Dataset, held_out: Dataset) -> None:
    """Warn if rows of a held-out file share texts with training rows."""
    if count := count_shared(train.examples, held_out.examples):
        console.warn(
            f"{held_out.path}: {count:,} of {len(held_out.examples):,} held-out rows share a prompt or a completion "
            "with --data, so their accuracy may be too high"
        )


def split_connected(rows: Sequence[HasTexts], names: Iterable[str], number: int, seed: int) -> Split:
    """Hold out rows with about `number` of the names, which are distinct.

    Names are held out in shuffled order, each with all connected names, unless the number is nearer without them. Some
    rows always remain. If no component fits, rows are held out by name alone, and `num_shared` is not 0.
    """
    order = list(names)
    random.Random(seed).shuffle(order)
    component = dict(zip(map(row_name, rows), _components(rows), strict=True))
    connected: dict[int, set[str]] = {}
    for name in order:
        connected.setdefault(component[name], set()).add(name)
    chosen: set[str] = set()
    for name in order:
        members = connected[component[name]]
        size = len(chosen) + len(members)
        is_near = size <= number or size - number < number - len(chosen)
        if name not in chosen and is_near and size < len(order):
            chosen |= members
    if not chosen and number:
        chosen = set(order[: min(number, len(order) - 1)])
    held_out = frozenset(i for i, row in enumerate(rows) if row_name(row) in chosen)
    train = (row for i, row in enumerate(rows) if i not in held_out)
    return Split(held_out, count_shared(train, (rows[i] for i in held_out)))


def _components(rows: Sequence[HasTexts]) -> list[int]:
    """Return for each row the index of the first row of its connected component."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[Hashable, int] = {}
    for i, row in enumerate(rows):
        for key in keys(row):
            low, high = sorted((root(i), root(first.setdefault(key, i))))
            parent[high] = low
    return [root(i) for i in range(len(rows))]
