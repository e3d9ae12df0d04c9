"""The training loop, the only one: batches in, optimizer steps out.

Every stage hands over a module whose forward takes (batch, denominator) and returns a share of the step's loss, with
sums for the metrics. The denominator counts the whole step, over all micro-batches and processes, so that neither
changes the gradient. A run that was killed goes on from its last state, one that is told to stop leaves one. Left out:
what the loss is, and how a state is kept (checkpoints).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from exo.cli import console, signals
from exo.cli.errors import RunError
from exo.cli.options import Training
from exo.data.collate import Collator
from exo.distributed import deepspeed, fsdp
from exo.distributed.accelerator import compute_dtype
from exo.models import weights
from exo.runs import record as run_record
from exo.runs.jsonl import JsonlLog
from exo.training import checkpoint, checkpoint_files
from exo.training import profiler as training_profiler
from exo.training.optimizer import _spare, optimizer
from exo.training.sampler import BatchSource
from exo.training.step import COUNTERS, NonFiniteError, TrainStep


def train(
    module: nn.Module,
    source: BatchSource,
    steps: int,
    config: Training,
    accelerator: Accelerator,
    metrics: JsonlLog,
    *,
    collator: Collator,
    denominator: Callable[[Sequence[Any]], int],
    shown: Mapping[str, str],
    collate: Callable[[Sequence[Any]], Any] | None = None,
    steps_an_epoch: int | None = None,
    rates: Mapping[nn.Module, float] | None = None,
    first: Callable[[float, Mapping[str, float]], None] | None = None,
    after: Callable[[int, bool], None] | None = None,
    before_update: Callable[[int, torch.optim.Optimizer], None] | None = None,
    parts: Mapping[str, checkpoint.Stateful] | None = None,
) -> nn.Module:
    """Train `module` for `steps` global batches of `source`; return it as accelerate wrapped it.

    A batch is asked for after the update before it, so that `source` may sample from the policy. `packing` splits it
    into micro-batches, and makes tensors of each where `collate` does not. `denominator` counts a global batch in the
    loss's own unit. `first` sees the first loss and metrics before the first update and may raise.
    `before_update(step, optimizer)` is called when the gradients are there. `after(step, last)` is called after each
    update, for evaluation and checkpoints; a run that goes on calls it again
    for the step it goes on after. `parts` have a state of their own. `shown` maps metrics to their labels on the
    progress line. RunError if nothing can be trained, and at the end if no weight has changed or one is not finite.
    """
    movement, trained = weights.Movement(module, accelerator), module
    _spare(module, config)
    if fsdp.is_sharded(module):
        optim = accelerator.prepare(optimizer(module, config, rates))
    elif deepspeed.is_requested():
        module, optim = deepspeed.prepare(module, optimizer(module, config, rates), config, accelerator)
    else:
        module, optim = accelerator.prepare(module, optimizer(module, config, rates))
    if accelerator.num_processes > 1:
        set_seed(config.seed + accelerator.process_index)  # each drops out units of its own
    keeper = checkpoint.Checkpointer(
        Path(config.output_dir), module, optim, accelerator, metrics, {"data": source} | dict(parts or {}),
        allow_changes=config.allow_changes, limit=config.save_total_limit, resume_from=config.resume_from_checkpoint,
    )  # fmt: skip
    before = keeper.restore()
    if accelerator.is_main_process:
        run_record.confirm(Path(config.output_dir))
    done, counters = (before.step, before.counters) if before else (0, dict.fromkeys(COUNTERS, 0.0))
    if done > steps:
        raise RunError(f"{keeper.directory}: holds the state of step {done:,}; expected --max_steps {done:,} at least")
    movement.begin()
    progress = console.Progress("step", steps, every=config.logging_steps, done=done)
    profiler = training_profiler.Profiler(
        config.profile, Path(config.output_dir), accelerator, compute_dtype(accelerator), module
    )
    taking = TrainStep(
        module, optim, config, accelerator, denominator, collate or collator.collate, collator, steps, before_update
    )
    try:
        with signals.graceful_shutdown():
            if done and after is not None:
                after(done, done == steps)
            for step in range(done + 1, steps + 1):
                profiler.step(step - done)
                line, asked = taking(step, next(source), counters, told=step > done + 1 or config.compile, first=first)
                if steps_an_epoch:
                    line = {"step": step, "epoch": step / steps_an_epoch} | line
                if accelerator.is_main_process:
                    metrics.write(**{name: v for name, v in line.items() if math.isfinite(v)})
                    accelerator.log(line, step=step)
                progress.advance(1, {label: line[name] for name, label in shown.items() if name in line})
                profiler.done(step - done, line["tokens"], step == steps)
                movement.update(counters)
                if step == steps or _exports(config, step):
                    nothing = f"no model is saved after step {step:,}"
                    weights.refuse_not_finite(weights.stored(trained), nothing, accelerator)
                keeper.mark(step, counters)
                if asked:
                    raise signals.Stopped(asked)
                if config.save_steps and (step % config.save_steps == 0 or keeper.last and step == steps):
                    keeper.save()
                if after is not None:
                    after(step, step == steps)
    except NonFiniteError as error:
        if error.of_all:  # nothing has been updated since the last step
            _save(keeper)
        raise RunError(f"{error}{keeper.kept()}") from error
    except (RunError, OSError) as error:
        what = error if isinstance(error, RunError) else f"{error.strerror}: {error.filename}"
        raise RunError(f"{what}{keeper.kept()}") from error
    except signals.Stopped as stopped:
        with signals.graceful_shutdown():  # several ranks get the same signal at different times
            raise signals.Stopped(stopped.signum, _where(_save(keeper), steps)) from None
    finally:
        progress.stop()
        profiler.close()
    weights.check_moved(counters, steps)
    _conclude(config, counters, steps)
    return module


def _exports(config: Training, step: int) -> bool:
    """Return whether a stage may evaluate or export the model after this step."""
    return any(
        every and step % every == 0 for every in (getattr(config, "export_steps", 0), getattr(config, "eval_steps", 0))
    )


def _save(keeper: checkpoint.Checkpointer) -> Path | None:
    """Save the last word of a run that ends early; an error names the checkpoint before it."""
    try:
        return keeper.save()
    except RunError as error:
        raise RunError(f"{error}{keeper.kept()}") from error


def _where(state: Path | None, steps: int) -> str:
    if state is None:
        return "before the first step; the same command begins again"
    return f"after step {checkpoint_files.step_of(state):,} of {steps:,}, kept in {state}; the same command goes on"


def _conclude(config: Training, counters: Mapping[str, float], steps: int) -> None:
    share = 100 * counters["clipped"] / steps
    console.log(f"  the gradient's norm was clipped to {config.max_grad_norm:g} in {share:.0f}% of the steps")
    if counters["not_finite"]:
        console.log(f"  {counters['not_finite']:,.0f} updates were skipped: their loss or gradient was not finite")
