"""Describe, begin and end a training run, on any number of ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from exo import models
from exo.cli import console
from exo.cli.errors import RunError
from exo.data.text.tokenize import TokenizedExample
from exo.distributed.gather import check_shared_directory
from exo.runs import directory as run_directory
from exo.runs import plots
from exo.runs import record as run_record
from exo.runs import stage as run_stage
from exo.runs.atomic import atomic_files
from exo.runs.jsonl import JsonlLog
from exo.runs.stage import Start
from exo.training import checkpoint_files

HEAD_BUDGET = 2**29  # default memory_budget of the losses on hidden states, in bytes


def describe(
    model: Any,
    examples: Sequence[TokenizedExample],
    accelerator: Accelerator,
    *,
    loss: str,
    steps: int,
    batch_size: int,
    **memory: Any,
) -> None:
    """Print the model, the objective, the size of the data and the memory of a rank; `memory`: see estimate_memory."""
    kind = "preferences" if examples[0].rewards is None else "rewards"
    sizes = sorted({len(example.completions) for example in examples})
    lengths = sorted(example.longest for example in examples)
    console.log(
        f"{type(model).__name__}, {models.parameter_count(model) / 1e6:,.1f}M parameters, {accelerator.device}, "
        f"{accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'fp32'}\n"
        f"{loss.upper()} on {kind}, K {sizes[0]}{f' to {sizes[-1]}' if len(sizes) > 1 else ''}, "
        f"{len(examples):,} prompts for training, {steps:,} steps of {batch_size}\n"
        f"prompt and longest completion: median {lengths[len(lengths) // 2]} tokens, most {lengths[-1]}\n"
        f"memory: about {estimate_memory(model, examples, accelerator, **memory) / 2**30:.2f} GiB per process "
        "(weights, gradients, Adam, the head's working memory; activations come on top)"
    )


def estimate_memory(
    model: Any,
    examples: Sequence[TokenizedExample],
    accelerator: Accelerator,
    *,
    max_tokens: int,  # of a micro-batch
    adapter: bool,  # LoRA, whose gradients and moments are next to nothing
    second_model: bool,  # a reference that scores
    shards: int,  # ranks that share the weights
) -> int:
    """Return the bytes that a rank needs without activations.

    Weights, gradients and two moments; the larger of autocast's 16-bit weights and a second model; and the head's
    budget, or twice the logits of the largest micro-batch if that is less.
    """
    widest = max(example.longest * len(example.completions) for example in examples)
    total = sum(example.longest * len(example.completions) for example in examples)
    tokens = min(max(max_tokens, widest), total)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    autocast = 0 if accelerator.mixed_precision == "no" else 2
    per_parameter = (0 if adapter else 12) + (4 if second_model else autocast)
    weights = sum(p.numel() * (1 if p.dtype == torch.uint8 else 4) for p in model.parameters())
    model_bytes: int = weights + per_parameter * models.parameter_count(model)
    return model_bytes // shards + min(HEAD_BUDGET, 2 * 4 * tokens * vocabulary)


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
            newest = checkpoint_files.newest(directory / run_record.CHECKPOINTS)
            raise RunError(f"{error}{checkpoint_files.resume_hint(newest)}") from error
        plots.training_curves(directory)
        run_stage.finish(directory, **({} if result is None else {"result": result}))
        run_directory.remove_resume_files(directory)
    return directory
