"""Read the source of a task, hold out a part of it, and write rows. All tasks share these functions."""

import random
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from exo import data, models
from exo.cli import console
from exo.cli.paths import DATA_SUFFIXES
from exo.data import Example, Purpose, split
from exo.data.sources.tables import hub_name
from exo.data.split import HasTexts

T = TypeVar("T")
R = TypeVar("R", bound=HasTexts)
Files = dict[str, Callable[[Path], int]]  # by name: a function that writes the file and returns the number of rows

HELD_OUT, MOST_HELD_OUT = 0.1, 1000  # share and number of prompts that are held out of a source without a test part


class TaskRequest(NamedTuple):
    """The arguments of a task."""

    source: str
    rows: int | None = None  # use at most this many rows of each part of the source
    seed: int = 0
    tokenizer: str | None = None  # the model whose tokenizer cuts the texts
    reading: Mapping[str, Any] = {}  # options of data.read


class Parts(NamedTuple):
    """The paths of a source, by part."""

    train: list[str]
    test: list[str]  # empty if the test rows must be held out of train


def lines(rows: Iterable[Mapping[str, object]]) -> Callable[[Path], int]:
    """Return a function that writes the rows to a JSONL file."""
    return partial(data.write_jsonl, rows=rows)


def model_files(model: Any, tokenizer: Any, directory: Path) -> int:
    """Write a model directory and return the number of parameters."""
    models.save(model, tokenizer, directory)
    return models.parameter_count(model)


def source_parts(source: str) -> Parts:
    """Return the parts of a source: files of a directory by name, or splits of a hub name. A file is all train."""
    path = Path(source)
    if train := files_named(path, "train"):
        return Parts(train, files_named(path, "test") or files_named(path, "valid"))
    if not path.exists() and (hub := hub_name(source)) and "@" not in source:
        return Parts([f"{source}@{hub.split}"], [f"{source}@test"])
    return Parts([source], [])


def files_named(directory: Path, prefix: str) -> list[str]:
    """Return the data files of a directory with a prefix: train.jsonl, or train-00000-of-00002.parquet."""
    files = directory.iterdir() if directory.is_dir() else ()
    return sorted(str(f) for f in files if f.name.startswith(prefix) and f.suffix in DATA_SUFFIXES and f.is_file())


def read(paths: Sequence[str], purpose: Purpose, request: TaskRequest) -> list[Example]:
    """Read the examples of all paths and print a summary of each path."""
    datasets = [data.read(path, purpose=purpose, **request.reading) for path in paths]
    for dataset in datasets:
        console.log(dataset.summary())
    return [example for dataset in datasets for example in dataset.examples]


def subsample(items: Iterable[T], request: TaskRequest) -> list[T]:
    """Shuffle the items, because files are sorted by label or date, and return at most the requested number."""
    shuffled = list(items)
    random.Random(request.seed).shuffle(shuffled)
    return shuffled[: request.rows]


def hold_out(rows: Sequence[R], seed: int) -> tuple[list[R], list[R]]:
    """Return the rows to train on and the held-out rows, which share no text."""
    if len(set(map(split.row_name, rows))) < 2:
        raise data.DataError("the source: expected two prompts at least, one to train on and one to hold out")
    chosen = split.hold_out(rows, HELD_OUT, seed, "the source", at_most=MOST_HELD_OUT, sort=False)
    train, test = ([row for i, row in enumerate(rows) if (i in chosen) == is_held_out] for is_held_out in (False, True))
    return train, test


def drop_seen(test: Iterable[T], train_prompts: Collection[Hashable], prompt: Callable[[T], Hashable]) -> list[T]:
    """Return the first test row of each prompt that is not trained on."""
    first: dict[Hashable, T] = {}
    rows = list(test)
    for row in rows:
        first.setdefault(prompt(row), row)
    if num_repeated := len(rows) - len(first):
        console.log(f"  {num_repeated:,} held-out rows left out: another row has the same prompt")
    unseen = [row for key, row in first.items() if key not in train_prompts]
    if num_seen := len(first) - len(unseen):
        console.log(f"  {num_seen:,} held-out prompts left out: they are trained on")
    if not unseen:
        raise data.DataError("the source: expected a held-out prompt that is not trained on; found none")
    return unseen
