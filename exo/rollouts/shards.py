"""Run a stage that works in pieces on several ranks, and cache the pieces."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from exo import data
from exo.distributed.gather import check_seen, shared
from exo.runs import directory as run_directory
from exo.runs import record as run_record
from exo.runs import stage as run_stage
from exo.runs.atomic import staged_file
from exo.runs.jsonl import Pieces
from exo.runs.stage import Start


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


def begin_pieces(start: Start, accelerator: Accelerator, rows: Mapping[str, Any]) -> Pieces:
    """The same for a stage that works in pieces; and those that an earlier run of it made."""
    if accelerator.is_main_process:
        run_stage.begin(start, keep=True, rows=rows)
    check_seen(start, accelerator)
    found = Pieces(Path(start.config.output_dir) / run_record.PIECES, writes=accelerator.is_main_process)
    accelerator.wait_for_everyone()  # nobody writes before all have read
    return found


def end_pieces(
    pieces: Pieces, name: str, rows: Iterable[dict[str, Any]], accelerator: Accelerator, result: Mapping[str, Any]
) -> Path:
    """Write the stage's file of that name, and the run is complete."""
    directory = pieces.path.parent
    if accelerator.is_main_process:
        with staged_file(directory / name) as file:
            data.write_jsonl(file, rows)
        pieces.close()
        run_stage.finish(directory, result=result)
        run_directory.clear(directory)
    return directory
