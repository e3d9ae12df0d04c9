"""Work that is shared among processes: each does some of it, and all have the result, in the order of one process.

What is gathered goes as JSON, which holds every double exactly; nothing is pickled. Left out: gradients (steps).
"""

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from exo.cli import signals
from exo.cli.errors import RunError
from exo.data.text.tokenize import TokenizedExample
from exo.runs import record as run_record
from exo.runs.stage import Start

T = TypeVar("T")
G = TypeVar("G", bound=TokenizedExample)
R = TypeVar("R")


def template_date(start: Start, accelerator: Accelerator) -> datetime.date:
    """Return the date that chat templates show, that of rank 0: ranks may start on two sides of midnight."""
    dates = all_gather_json(start.template_date.isoformat(), accelerator)
    return datetime.date.fromisoformat(dates[0])


def map_over_ranks(
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
    if len(set(all_gather_json(len(items), accelerator))) > 1:
        raise RunError(f"rank {rank}: has {len(items)} items to share, and others have more or fewer")
    mine = []
    for first in range(0, len(items), world):
        if heeding:
            _stop_if_asked(accelerator)
        if first + rank < len(items):
            mine.append(of(items[first + rank]))
        elif together:
            of(items[-1])
    every = all_gather_json(mine, accelerator)
    return [every[i % world][i // world] for i in range(len(items))]


def _stop_if_asked(accelerator: Accelerator) -> None:
    if accelerator.num_processes == 1 or not signals.is_graceful():
        return signals.raise_if_stop_requested()
    asked = int(_gather(torch.tensor([signals.stop_requested()], device=accelerator.device), accelerator).max())
    if asked:
        raise signals.Stopped(asked)


def all_gather_json(value: Any, accelerator: Accelerator) -> list[Any]:
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


def check_shared_directory(start: Start, accelerator: Accelerator) -> None:
    """RunError unless all processes see the directory that the first has made, before any work is done."""
    accelerator.wait_for_everyone()
    record = Path(start.config.output_dir) / run_record.RUN_FILE
    own = record.read_text(encoding="utf-8") if record.exists() else ""
    if len(set(all_gather_json(own, accelerator))) > 1:
        raise RunError(f"--output_dir {start.config.output_dir}: expected one that all processes see")
