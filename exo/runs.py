"""The run of a stage that several processes may do: what it begins and ends with, which one of them writes.

A training stage has a log, and ends with a model; one that samples or scores has pieces, and ends with a file. Left
out: what is done (the stages) and how (loop, processes).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from exo import artifacts, data, lineage, models, plots, processes, states
from exo.artifacts import Metrics, Pieces
from exo.lineage import Start


def begin(start: Start, accelerator: Accelerator, rows: Mapping[str, Any]) -> Metrics:
    """Make the run directory, or go on in it; once all that could be checked has been, for only now may an earlier run
    make room."""
    if accelerator.is_main_process:
        lineage.begin(start, keep=True, rows=rows)
    _check_seen(start, accelerator)
    accelerator.init_trackers("exo")
    return Metrics(Path(start.config.output_dir) / "metrics.jsonl")


def _check_seen(start: Start, accelerator: Accelerator) -> None:
    """RunError unless all processes see the directory that the first has made, before any work is done."""
    accelerator.wait_for_everyone()
    record = Path(start.config.output_dir) / artifacts.RUN_FILE
    own = record.read_text(encoding="utf-8") if record.exists() else ""
    if len(set(processes.gathered(own, accelerator))) > 1:
        raise artifacts.RunError(f"--output_dir {start.config.output_dir}: expected one that all processes see")


def begin_pieces(start: Start, accelerator: Accelerator, rows: Mapping[str, Any]) -> Pieces:
    """The same for a stage that works in pieces; and those that an earlier run of it made."""
    if accelerator.is_main_process:
        lineage.begin(start, keep=True, rows=rows)
    _check_seen(start, accelerator)
    found = Pieces(Path(start.config.output_dir) / artifacts.PIECES, writes=accelerator.is_main_process)
    accelerator.wait_for_everyone()  # nobody writes before all have read
    return found


def end_pieces(
    pieces: Pieces, name: str, rows: Iterable[dict[str, Any]], accelerator: Accelerator, result: Mapping[str, Any]
) -> Path:
    """Write the stage's file of that name, and the run is complete."""
    directory = pieces.path.parent
    if accelerator.is_main_process:
        with artifacts.staged_file(directory / name) as file:
            data.write_jsonl(file, rows)
        pieces.close()
        lineage.finish(directory, result=result)
        artifacts.clear(directory)
    return directory


def end(
    metrics: Metrics,
    model: Any,
    tokenizer: Any,
    accelerator: Accelerator,
    result: Mapping[str, float] | None = None,
    dtypes: models.Dtypes | None = None,
) -> Path:
    """The run directory, which is now the model directory too, with its curves drawn."""
    directory = metrics.path.parent
    metrics.close()
    accelerator.end_training()
    if accelerator.is_main_process:
        try:
            with artifacts.staged_into(directory) as staging:
                models.save(model, tokenizer, staging, dtypes=dtypes)
        except (OSError, artifacts.RunError) as error:
            state = states.newest(directory / artifacts.STATES)
            kept = f"; the last whole state is {state}, from which the same command goes on" if state else ""
            raise artifacts.RunError(f"{error}{kept}") from error
        plots.training_curves(directory)
        lineage.finish(directory, **({} if result is None else {"result": result}))
        artifacts.clear(directory)
    return directory
