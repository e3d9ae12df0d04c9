"""Begin and end a training run, on any number of ranks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from exo import models
from exo.cli.errors import RunError
from exo.distributed.gather import check_shared_directory
from exo.runs import directory as run_directory
from exo.runs import plots
from exo.runs import record as run_record
from exo.runs import stage as run_stage
from exo.runs.atomic import atomic_files
from exo.runs.jsonl import JsonlLog
from exo.runs.stage import Start
from exo.training import checkpoint_files


def begin(start: Start, accelerator: Accelerator, rows: Mapping[str, Any]) -> JsonlLog:
    """Make the run directory, or resume in it, and return its metrics log.

    Call it after all checks: this removes an earlier run if --overwrite_output_dir says so.
    """
    resume_from = start.config.resume_from_checkpoint
    if resume_from is not None and resume_from.lower() == "true" and not start.resumes:
        raise RunError(f"--resume_from_checkpoint {resume_from}: {start.config.output_dir} has no checkpoint")
    if accelerator.is_main_process:
        run_stage.begin(start, keep=True, rows=rows)
    check_shared_directory(start, accelerator)
    accelerator.init_trackers("exo")
    return JsonlLog(Path(start.config.output_dir) / "metrics.jsonl")


def end(
    metrics: JsonlLog,
    model: Any,
    tokenizer: Any,
    accelerator: Accelerator,
    result: Mapping[str, float] | None = None,
    dtypes: models.Dtypes | None = None,
) -> Path:
    """Save the model into the run directory, draw the curves, mark the run as finished, and return the directory."""
    directory = metrics.path.parent
    metrics.close()
    accelerator.end_training()
    if accelerator.is_main_process:
        try:
            with atomic_files(directory) as staging:
                models.save(model, tokenizer, staging, dtypes=dtypes)
        except (OSError, RunError) as error:
            newest = checkpoint_files.newest(directory / run_record.STATES)
            raise RunError(f"{error}{checkpoint_files.resume_hint(newest)}") from error
        plots.training_curves(directory)
        run_stage.finish(directory, **({} if result is None else {"result": result}))
        run_directory.remove_resume_files(directory)
    return directory
