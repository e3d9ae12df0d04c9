"""Run a stage that works in pieces on several ranks, and cache the pieces."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from exo import data
from exo.distributed.gather import check_shared_directory, map_over_ranks
from exo.runs import directory as run_directory
from exo.runs import record as run_record
from exo.runs import stage as run_stage
from exo.runs.atomic import atomic_file
from exo.runs.jsonl import JsonlCache
from exo.runs.stage import Start


def map_cached(jobs: Sequence[Callable[[], Any]], pieces: JsonlCache, accelerator: Accelerator) -> list[Any]:
    """What the jobs give, in their order; each is kept as soon as all processes have done theirs of a round."""
    found: list[Any] = []
    world = accelerator.num_processes
    for first in range(0, len(jobs), world):
        numbers = range(first, min(first + world, len(jobs)))

        def piece(number: int) -> Any:
            return pieces.known[number] if number in pieces.known else jobs[number]()

        values = map_over_ranks(numbers, piece, accelerator)
        for number, value in zip(numbers, values, strict=True):
            pieces.keep(number, value)
        found += values
    return found


def begin(start: Start, accelerator: Accelerator, rows: Mapping[str, Any]) -> JsonlCache:
    """The same for a stage that works in pieces; and those that an earlier run of it made."""
    if accelerator.is_main_process:
        run_stage.begin(start, keep=True, rows=rows)
    check_shared_directory(start, accelerator)
    found = JsonlCache(Path(start.config.output_dir) / run_record.PIECES, writes=accelerator.is_main_process)
    accelerator.wait_for_everyone()  # nobody writes before all have read
    return found


def end(
    pieces: JsonlCache, name: str, rows: Iterable[dict[str, Any]], accelerator: Accelerator, result: Mapping[str, Any]
) -> Path:
    """Write the stage's file of that name, and the run is complete."""
    directory = pieces.path.parent
    if accelerator.is_main_process:
        with atomic_file(directory / name) as file:
            data.write_jsonl(file, rows)
        pieces.close()
        run_stage.finish(directory, result=result)
        run_directory.remove_resume_files(directory)
    return directory
