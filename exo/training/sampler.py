"""Global batches of a stage that trains on rows of data: how many there are, and which rows are in each.

Left out: what samples its own data (rollouts), micro-batches (packing).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from exo.cli.errors import RunError
from exo.cli.options import DataTraining
from exo.data.text.tokenize import TokenizedExample
from exo.training.checkpoint import Stateful

G = TypeVar("G", bound=TokenizedExample)


class BatchSource(Stateful, Protocol):
    """Global batches, one after another, that can go on in the middle."""

    def __next__(self) -> list[Any]: ...


def steps_per_epoch(config: DataTraining, n_examples: int) -> int:
    """Batches of an epoch. A last one of less than half the size joins the one before: its mean would be all noise."""
    return max(1, int(n_examples / config.batch_size + 0.5))


def total_steps(config: DataTraining, n_examples: int) -> int:
    if config.max_steps > 0:
        return config.max_steps
    return max(1, round(config.num_train_epochs * steps_per_epoch(config, n_examples)))


class BatchSampler(Generic[G]):
    """Global batches, each epoch in an order of its own. The generator is private: nothing else moves it."""

    def __init__(self, examples: Sequence[G], config: DataTraining, steps: int) -> None:
        self.examples, self.config, self.steps = examples, config, steps
        self.done = 0
        self.order: list[int] = []
        self.epoch = -1

    def __iter__(self) -> Iterator[list[G]]:
        return self

    def __next__(self) -> list[G]:
        if self.done == self.steps:
            raise StopIteration
        size, each = self.config.batch_size, steps_per_epoch(self.config, len(self.examples))
        epoch, i = divmod(self.done, each)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            self.order = torch.randperm(len(self.examples), generator=generator).tolist()
            self.epoch = epoch
        self.done += 1
        return [self.examples[k] for k in self.order[i * size : len(self.order) if i == each - 1 else (i + 1) * size]]

    def state(self) -> dict[str, int]:
        return {"done": self.done, "batch_size": self.config.batch_size, "rows": len(self.examples)}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, value in self.state().items():
            if name != "done" and state[name] != value:
                raise RunError(f"the state's position counts batches: {name} was {state[name]}, and is {value} now")
        self.done = state["done"]
