"""Sample global batches from rows of data."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from exo.cli.errors import RunError
from exo.data.text.tokenize import TokenizedExample
from exo.training.checkpoint import Stateful

G = TypeVar("G", bound=TokenizedExample)


class BatchSource(Stateful, Protocol):
    """An iterator over global batches that can resume in the middle."""

    def __next__(self) -> list[Any]: ...


def steps_per_epoch(n_examples: int, batch_size: int) -> int:
    """Return the number of batches in an epoch.

    A last batch of less than half the size joins the one before, because its mean would be mostly noise.
    """
    return max(1, int(n_examples / batch_size + 0.5))


def total_steps(n_examples: int, batch_size: int, epochs: float, max_steps: int = -1) -> int:
    """Return `max_steps` if it is positive, else the steps of so many epochs."""
    return max_steps if max_steps > 0 else max(1, round(epochs * steps_per_epoch(n_examples, batch_size)))


class BatchSampler(Generic[G]):
    """Iterate over global batches. Each epoch is shuffled by a separate random generator."""

    def __init__(self, examples: Sequence[G], steps: int, batch_size: int, seed: int) -> None:
        self.examples, self.steps, self.batch_size, self.seed = examples, steps, batch_size, seed
        self.done = 0
        self.order: list[int] = []
        self.epoch = -1

    def __iter__(self) -> Iterator[list[G]]:
        return self

    def __next__(self) -> list[G]:
        if self.done == self.steps:
            raise StopIteration
        size, each = self.batch_size, steps_per_epoch(len(self.examples), self.batch_size)
        epoch, i = divmod(self.done, each)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = torch.randperm(len(self.examples), generator=generator).tolist()
            self.epoch = epoch
        self.done += 1
        return [self.examples[k] for k in self.order[i * size : len(self.order) if i == each - 1 else (i + 1) * size]]

    def state(self) -> dict[str, int]:
        return {"done": self.done, "batch_size": self.batch_size, "rows": len(self.examples)}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, value in self.state().items():
            if name != "done" and state[name] != value:
                raise RunError(f"the state's position counts batches: {name} was {state[name]}, and is {value} now")
        self.done = state["done"]
