"""Map functions over ranks and gather the results, in the order of a single rank.

Results travel as JSON, which holds every double exactly; nothing is pickled.
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
    """Return rank 0's date for chat templates, because ranks may start on two sides of midnight."""
    dates = all_gather_json(start.template_date.isoformat(), accelerator)
    return datetime.date.fromisoformat(dates[0])


def map_over_ranks(
    items: Sequence[T],
    function: Callable[[T], Any],
    accelerator: Accelerator | None,
    *,
    together: bool = False,
    interruptible: bool = True,
) -> list[Any]:
    """Return function(item) for each item, a JSON value; rank i computes the items i, i + world, ...

    Without an accelerator this rank computes all of them. `together`: all ranks call the function equally often, as a
    sharded model needs; surplus results are dropped. `interruptible`: a signal stops all ranks before the same item
    (signals.Stopped). RunError if ranks have different numbers of items.
    """
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    if len(set(all_gather_json(len(items), accelerator))) > 1:
        raise RunError(f"rank {rank}: has {len(items)} items to share; other ranks have more or fewer")
    local = []
    for first in range(0, len(items), world):
        if interruptible:
            _stop_if_requested(accelerator)
        if first + rank < len(items):
            local.append(function(items[first + rank]))
        elif together:
            function(items[-1])
    results = all_gather_json(local, accelerator)
    return [results[i % world][i // world] for i in range(len(items))]


def _stop_if_requested(accelerator: Accelerator | None) -> None:
    if accelerator is None or accelerator.num_processes == 1 or not signals.is_graceful():
        return signals.raise_if_stop_requested()
    signum = int(_gather(torch.tensor([signals.stop_requested()], device=accelerator.device), accelerator).max())
    if signum:
        raise signals.Stopped(signum)


def all_gather_json(value: Any, accelerator: Accelerator | None) -> list[Any]:
    """Return the value of every rank, in their order."""
    if accelerator is None or accelerator.num_processes == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(accelerator.device)
    sizes = [int(size) for size in _gather(torch.tensor([len(text)], device=accelerator.device), accelerator)]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=accelerator.device)
    padded[: len(text)] = text
    rows = _gather(padded[None], accelerator).cpu()
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]


def _gather(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    gathered: Tensor = accelerator.gather(tensor)
    return gathered


def check_shared_directory(start: Start, accelerator: Accelerator) -> None:
    """Raise RunError unless all ranks see the directory that rank 0 made."""
    accelerator.wait_for_everyone()
    record = Path(start.config.output_dir) / run_record.RUN_FILE
    content = record.read_text(encoding="utf-8") if record.exists() else ""
    if len(set(all_gather_json(content, accelerator))) > 1:
        raise RunError(f"--output_dir {start.config.output_dir}: expected a directory that all ranks see")
