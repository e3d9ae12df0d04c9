"""The run of a training stage: a record and a log when it begins, a model when it ends.

Left out: what is trained (the stages) and how (loop).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from exo import artifacts, checkpoints, lineage, models, plots
from exo.artifacts import Metrics
from exo.lineage import Start


def begin(start: Start, accelerator: Accelerator, rows: Mapping[str, Any]) -> Metrics:
    """Make the run directory, or go on in it; once all that could be checked has been, for only now may an earlier run
    make room."""
    if accelerator.is_main_process:
        lineage.begin(start, keep=True, rows=rows)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("exo")
    return Metrics(Path(start.config.output_dir) / "metrics.jsonl")


def end(
    metrics: Metrics,
    model: Any,
    tokenizer: Any,
    accelerator: Accelerator,
    result: Mapping[str, float] | None = None,
) -> Path:
    """The run directory, which is now the model directory too, with its curves drawn."""
    directory = metrics.path.parent
    metrics.close()
    accelerator.end_training()
    if accelerator.is_main_process:
        with artifacts.staged_into(directory) as staging:
            models.save(model, tokenizer, staging)
        plots.training_curves(directory)
        lineage.finish(directory, **({} if result is None else {"result": result}))
        checkpoints.clear(directory)
    return directory
