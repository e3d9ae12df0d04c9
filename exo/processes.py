"""Work that is shared among processes: each does some of it, and all have the result, in the order of one process.

What is gathered goes as JSON, which holds every double exactly; nothing is pickled. Left out: gradients (steps).
"""

import datetime
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from exo import signals
from exo.artifacts import Pieces, RunError
from exo.encoding import TokenGroup
from exo.lineage import Start
from exo.packing import Packing

T = TypeVar("T")
G = TypeVar("G", bound=TokenGroup)
R = TypeVar("R")


def template_date(start: Start, accelerator: Accelerator) -> datetime.date:
    """Return the date that chat templates show, that of rank 0: ranks may start on two sides of midnight."""
    dates = gathered(start.template_date.isoformat(), accelerator)
    return datetime.date.fromisoformat(dates[0])


def shared(
    items: Sequence[T],
    of: Callable[[T], Any],
    accelerator: Accelerator,
    *,
    together: bool = False,
    heeding: bool = True,
) -> list[Any]:
    """`of` each item, which must give JSON; item i is for process i modulo their number.

    `together` has every process call `of` equally often, as a model in shards needs it: what one does more is dropped.
    `heeding`: between two items signals are heeded, where they are (signals.Stopped), by all processes at the same.
    RunError where processes bring other numbers of items: what they share must be the same for all.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    if len(set(gathered(len(items), accelerator))) > 1:
        raise RunError(f"rank {rank}: has {len(items)} items to share, and others have more or fewer")
    mine = []
    for first in range(0, len(items), world):
        if heeding:
            _stop_if_asked(accelerator)
        if first + rank < len(items):
            mine.append(of(items[first + rank]))
        elif together:
            of(items[-1])
    every = gathered(mine, accelerator)
    return [every[i % world][i // world] for i in range(len(items))]


def _stop_if_asked(accelerator: Accelerator) -> None:
    if accelerator.num_processes == 1 or not signals.are_heeded():
        return signals.stop_if_asked()
    asked = int(_gather(torch.tensor([signals.asked()], device=accelerator.device), accelerator).max())
    if asked:
        raise signals.Stopped(asked)


def each(
    groups: Sequence[G], of: Callable[[list[G]], Sequence[R]], packing: Packing, accelerator: Accelerator, **how: bool
) -> list[R]:
    """What `of` gives for each group, in JSON, asked a micro-batch at a time; in the order of the groups."""
    parts = packing.micro_batches(groups)
    found: dict[int, R] = {}
    for part, rows in zip(parts, shared(parts, of, accelerator, **how), strict=True):
        found |= zip(map(id, part), rows, strict=True)
    return [found[id(group)] for group in groups]


def in_pieces(jobs: Sequence[Callable[[], Any]], pieces: Pieces, accelerator: Accelerator) -> list[Any]:
    """What the jobs give, in their order; each is kept as soon as all processes have done theirs of a round."""
    found: list[Any] = []
    world = accelerator.num_processes
    for first in range(0, len(jobs), world):
        numbers = range(first, min(first + world, len(jobs)))

        def piece(number: int) -> Any:
            return pieces.known[number] if number in pieces.known else jobs[number]()

        values = shared(numbers, piece, accelerator)
        for number, value in zip(numbers, values, strict=True):
            pieces.keep(number, value)
        found += values
    return found


def gathered(value: Any, accelerator: Accelerator) -> list[Any]:
    """The value of every process, in their order."""
    if accelerator.num_processes == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(accelerator.device)
    sizes = [int(size) for size in _gather(torch.tensor([len(text)], device=accelerator.device), accelerator)]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=accelerator.device)
    padded[: len(text)] = text
    rows = _gather(padded[None], accelerator).cpu()
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]


def _gather(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    found: Tensor = accelerator.gather(tensor)
    return found
