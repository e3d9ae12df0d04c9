"""What tasks share: where the parts of a source are, what is held out where there is one part, how rows are written."""

import random
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from exo import data
from exo.cli import console
from exo.cli.paths import DATA_SUFFIXES
from exo.data import Dataset, Purpose, split
from exo.data.sources.tables import hub_name
from exo.data.split import Texts

T = TypeVar("T")
Files = dict[str, Callable[[Path], int]]

HELD_OUT, AT_MOST = 0.1, 1000  # prompts held out of a source that has no test part


class TaskRequest(NamedTuple):
    """What is asked of a task."""

    source: str
    rows: int | None = None  # at most so many of each part of the source
    seed: int = 0
    tokenizer: str | None = None  # a model's, where texts are cut by tokens
    reading: Mapping[str, Any] = {}  # options of data.read


class Parts(NamedTuple):
    """What to read of a source."""

    train: list[str]
    test: list[str]  # none: to be held out of train


def lines(rows: Iterable[Mapping[str, object]]) -> Callable[[Path], int]:
    return partial(data.write_jsonl, rows=rows)


def source_parts(source: str) -> Parts:
    """Of a directory, the files that are named for a part; of a hub name, its splits; a file has one part."""
    place = Path(source)
    if place.is_dir() and (train := files_named(place, "train")):
        return Parts(train, files_named(place, "test") or files_named(place, "valid"))
    if not place.exists() and (hub := hub_name(source)) and "@" not in source:
        return Parts([f"{source}@{hub.split}"], [f"{source}@test"])
    return Parts([source], [])


def files_named(directory: Path, beginning: str) -> list[str]:
    """The data files of a directory whose names begin so: train.jsonl, or train-00000-of-00002.parquet."""
    found = (
        f for f in directory.iterdir() if f.name.startswith(beginning) and f.suffix in DATA_SUFFIXES and f.is_file()
    )
    return sorted(map(str, found))


def read(paths: Sequence[str], purpose: Purpose, wanted: TaskRequest) -> list[Dataset]:
    """Each with its account of the rows printed."""
    found = [data.read(path, purpose=purpose, **wanted.reading) for path in paths]
    for dataset in found:
        console.log(dataset.summary())
    return found


def subsample(items: Iterable[T], wanted: TaskRequest) -> list[T]:
    """In an order of chance, since files are sorted by label or date; no more than are wanted."""
    shuffled = list(items)
    random.Random(wanted.seed).shuffle(shuffled)
    return shuffled[: wanted.rows]


def hold_out(items: Sequence[T], texts: Callable[[T], Texts], seed: int) -> tuple[list[T], list[T]]:
    """(to train on, held out): none of the texts held out is trained on."""
    rows = list(map(texts, items))
    if len(set(map(split.row_name, rows))) < 2:
        raise data.DataError("the source: expected two prompts at least, one to train on and one to hold out")
    chosen = split.hold_out(rows, HELD_OUT, seed, "the source", at_most=AT_MOST, sort=False)
    train, held_out = ([item for i, item in enumerate(items) if (i in chosen) == held] for held in (False, True))
    return train, held_out


def drop_seen(test: Iterable[T], trained: Collection[Hashable], prompt: Callable[[T], Hashable]) -> list[T]:
    """Held-out rows, the first of each prompt, but for prompts that are trained on."""
    found: dict[Hashable, T] = {}
    rows = list(test)
    for item in rows:
        found.setdefault(prompt(item), item)
    if more := len(rows) - len(found):
        console.log(f"  {more:,} held-out rows left out: their prompt is another row's as well")
    kept = [item for key, item in found.items() if key not in trained]
    if lost := len(found) - len(kept):
        console.log(f"  {lost:,} held-out prompts left out: they are trained on as well")
    if not kept:
        raise data.DataError("the source has no held-out prompt that is not trained on as well")
    return kept
