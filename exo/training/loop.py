"""The training loop of every stage: global batches in, optimizer steps out.

A stage hands over a Task, whose module's forward takes (batch, denominator) and returns its share of the step's loss
and sums for the metrics. The denominator counts the whole step, over all micro-batches and ranks, so that neither
changes the gradient. An interrupted run resumes from its newest checkpoint.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from exo.cli import console, signals
from exo.cli.errors import RunError, describe
from exo.data.collate import Collator
from exo.distributed import deepspeed, fsdp
from exo.distributed.accelerator import compute_dtype, set_seed
from exo.models import weights
from exo.runs import record as run_record
from exo.runs.jsonl import JsonlLog
from exo.training import checkpoint, checkpoint_files
from exo.training.optimizer import OptimizerSettings, enable_gradient_checkpointing, optimizer
from exo.training.profiler import Profiler
from exo.training.sampler import BatchSampler, BatchSource, steps_per_epoch, total_steps
from exo.training.step import COUNTERS, NonFiniteError, TrainStep


class Settings(NamedTuple):
    """How to train; the fields have the names of the options."""

    optimizer: OptimizerSettings
    output_dir: str
    seed: int = 0
    dropout: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    profile: int = 0
    logging_steps: int = 10
    save_steps: int = 100
    save_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    allow_changes: bool = False
    on_nan: Literal["stop", "skip"] = "stop"


class Task(NamedTuple):
    """The module to train, its data, and what is called on the way.

    A batch is requested after the update before it, so `source` may sample from the policy.
    """

    module: nn.Module  # forward(batch, denominator) -> LossOutput
    source: BatchSource
    steps: int  # global batches
    collator: Collator  # splits a global batch into micro-batches
    denominator: Callable[[Sequence[Any]], int]  # counts a global batch in the loss's own unit
    shown: Mapping[str, str]  # metrics on the progress line, and their labels
    collate: Callable[[Sequence[Any]], Any] | None = None  # makes tensors of a micro-batch (None: the collator does)
    steps_per_epoch: int | None = None
    rates: Mapping[nn.Module, float] | None = None  # peak learning rates of parts of the module
    first: Callable[[float, Mapping[str, float]], None] | None = None  # sees the first loss and metrics; may raise
    before_update: Callable[[int, torch.optim.Optimizer], None] | None = None  # (step, optimizer) with gradients set
    after: Callable[[int, bool], None] | None = None  # (step, is_last) after an update, and after resuming at a step
    after_every: tuple[int, ...] = ()  # steps at which `after` reads the weights; 0: never
    parts: Mapping[str, checkpoint.Stateful] | None = None  # more state for the checkpoints

    @classmethod
    def over_epochs(
        cls,
        module: nn.Module,
        examples: Sequence[Any],
        collator: Collator,
        *,
        batch_size: int,
        epochs: float,
        max_steps: int,
        seed: int,
        **fields: Any,
    ) -> "Task":
        """Return the task of training on shuffled examples, for `max_steps` or, if that is -1, for `epochs`."""
        steps = total_steps(len(examples), batch_size, epochs, max_steps)
        source: BatchSampler[Any] = BatchSampler(examples, steps, batch_size, seed)
        per_epoch = steps_per_epoch(len(examples), batch_size)
        return cls(module, source, steps, collator, steps_per_epoch=per_epoch, **fields)


def train(task: Task, settings: Settings, accelerator: Accelerator, metrics: JsonlLog) -> nn.Module:
    """Train the task's module; return it as accelerate wrapped it.

    RunError if nothing can be trained, and at the end if no weight has changed or one is not finite.
    """
    movement = weights.Movement(task.module, accelerator)
    _save_memory(task.module, settings)
    module, optim = _prepare(task, settings, accelerator)
    if accelerator.num_processes > 1:
        set_seed(settings.seed + accelerator.process_index)  # ranks must not share dropout masks
    checkpointer = checkpoint.Checkpointer(
        Path(settings.output_dir), module, optim, accelerator, metrics,
        {"data": task.source} | dict(task.parts or {}), allow_changes=settings.allow_changes,
        limit=settings.save_total_limit, resume_from=settings.resume_from_checkpoint,
    )  # fmt: skip
    state = checkpointer.restore()
    if accelerator.is_main_process:
        run_record.confirm_resume(Path(settings.output_dir))
    done, counters = (state.step, state.counters) if state else (0, dict.fromkeys(COUNTERS, 0.0))
    if done > task.steps:
        raise RunError(
            f"{checkpointer.directory}: holds the checkpoint of step {done:,}; this run has {task.steps:,} "
            "steps: raise --max_steps or --num_train_epochs"
        )
    movement.begin()
    step = TrainStep(
        module, optim, settings.optimizer, accelerator, task.denominator, task.collate or task.collator.collate,
        task.collator, task.steps, task.before_update, settings.on_nan == "stop",
    )  # fmt: skip
    # also while the last checkpoint is saved: ranks receive their signals at different times
    with signals.graceful_shutdown():
        try:
            _steps(task, settings, step, done, counters, checkpointer, movement, metrics)
        except NonFiniteError as error:
            if error.of_all:  # nothing has been updated since the last step
                _save(checkpointer)
            raise RunError(f"{error}{checkpointer.hint()}") from error
        except (RunError, OSError) as error:
            message = error if isinstance(error, RunError) else describe(error)
            raise RunError(f"{message}{checkpointer.hint()}") from error
        except signals.Stopped as stopped:
            raise signals.Stopped(stopped.signum, _where(_save(checkpointer), task.steps)) from None
    weights.check_moved(counters, task.steps)
    _conclude(settings.optimizer.max_grad_norm, counters, task.steps)
    return module


def _save_memory(module: nn.Module, settings: Settings) -> None:
    """Checkpoint and compile the causal LMs in the module, if the options ask for it."""
    models: list[Any] = [child for child in module.children() if hasattr(child, "gradient_checkpointing_enable")]
    for model in models:
        if settings.gradient_checkpointing:
            enable_gradient_checkpointing(model, settings.dropout)
        if settings.compile:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model  # below an adapter
            base.base_model.compile(dynamic=True)


def _prepare(task: Task, settings: Settings, accelerator: Accelerator) -> tuple[nn.Module, Any]:
    """Return the module and its optimizer, wrapped for one rank, DDP, FSDP or DeepSpeed."""
    module, optim = task.module, optimizer(task.module, settings.optimizer, task.rates)
    if fsdp.is_sharded(module):
        return module, accelerator.prepare(optim)
    if deepspeed.is_requested():
        prepared: tuple[nn.Module, Any] = deepspeed.prepare(
            module, optim, settings.optimizer.max_grad_norm, accelerator
        )
        return prepared
    wrapped: tuple[nn.Module, Any] = accelerator.prepare(module, optim)
    return wrapped


def _steps(
    task: Task,
    settings: Settings,
    train_step: TrainStep,
    done: int,
    counters: dict[str, float],
    checkpointer: checkpoint.Checkpointer,
    movement: weights.Movement,
    metrics: JsonlLog,
) -> None:
    """Take the steps after `done`: log, check the weights, save checkpoints."""
    accelerator, steps, after = train_step.accelerator, task.steps, task.after
    progress = console.Progress("step", steps, every=settings.logging_steps, done=done)
    profiler = Profiler(
        settings.profile, Path(settings.output_dir), accelerator, compute_dtype(accelerator), train_step.module
    )
    try:
        if done and after is not None:
            after(done, done == steps)
        for step in range(done + 1, steps + 1):
            profiler.step(step - done)
            quiet = step > done + 1 or settings.compile
            line, signum = train_step(step, next(task.source), counters, quiet=quiet, first=task.first)
            if task.steps_per_epoch:
                line = {"step": step, "epoch": step / task.steps_per_epoch} | line
            if accelerator.is_main_process:
                metrics.write(**{name: v for name, v in line.items() if math.isfinite(v)})
                accelerator.log(line, step=step)
            progress.advance(1, {label: line[name] for name, label in task.shown.items() if name in line})
            profiler.done(step - done, line["tokens"], step == steps)
            movement.update(counters)
            if step == steps or any(every and step % every == 0 for every in task.after_every):
                consequence = f"no model is saved after step {step:,}"
                weights.refuse_not_finite(weights.named_tensors(task.module), consequence, accelerator)
            checkpointer.mark(step, counters)
            if signum:
                raise signals.Stopped(signum)
            every = settings.save_steps
            if every and (step % every == 0 or checkpointer.last and step == steps):
                checkpointer.save()
            if after is not None:
                after(step, step == steps)
    finally:
        progress.stop()
        profiler.close()


def _save(checkpointer: checkpoint.Checkpointer) -> Path | None:
    """Save a checkpoint of a run that ends early; an error names the checkpoint before it."""
    try:
        return checkpointer.save()
    except RunError as error:
        raise RunError(f"{error}{checkpointer.hint()}") from error


def _where(saved: Path | None, steps: int) -> str:
    if saved is None:
        return "before the first step; run the same command again to start over"
    return (
        f"after step {checkpoint_files.step_of(saved):,} of {steps:,}, saved in {saved}; run the same command again to "
        "resume"
    )


def _conclude(max_grad_norm: float, counters: Mapping[str, float], steps: int) -> None:
    if max_grad_norm:
        share = 100 * counters["clipped"] / steps
        console.log(f"  the gradient norm was clipped to {max_grad_norm:g} in {share:.0f}% of the steps")
    if counters["not_finite"]:
        console.log(f"  {counters['not_finite']:,.0f} updates were skipped: their loss or gradient was not finite")
