"""The training loop, the only one: batches in, optimizer steps out.

Every stage hands over a module whose forward takes (batch, denominator) and returns a share of the step's loss, with
sums for the metrics. The denominator counts the whole step, over all micro-batches and processes, so that neither
changes the gradient. A run that was killed goes on from its last state, one that is told to stop leaves one. Left out:
what the loss is, and how a state is kept (checkpoints).
"""

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import nn

from exo import artifacts, checkpoints, console, profiling, sharding, signals, weights, zero
from exo.artifacts import Metrics, RunError
from exo.batches import Source
from exo.config import Compute, ConfigError, Training
from exo.packing import Packing
from exo.steps import COUNTERS, NotFinite, Step

PATIENCE = timedelta(hours=2)  # of processes with one that writes a large model; one that has ended ends them at once


def make_accelerator(config: Compute) -> Accelerator:
    """accelerate, set up as the options say. Without a GPU of CUDA's or ROCm's it is the CPU: sums need float64."""
    dtype = config.dtype
    if dtype == "auto":
        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if bf16 else "float32"
    tracker = config.report_to if isinstance(config, Training) else "none"
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        # accelerate would drop a tracker that is not installed
        raise ConfigError(f"--report_to {tracker}: not installed; pip install {tracker}")
    mixed = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    if sharding.asked(config):
        sharding.refuse(config, mixed)
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    zero.refuse(config, mixed)
    zero.choose_device(cpu)
    # accelerate would do it, but shards on GPUs alone, and DeepSpeed with a loop of its own
    names = [name for name in (sharding.LAUNCHER, zero.LAUNCHER) if name in os.environ]
    launchers = {name: os.environ.pop(name) for name in names}
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed,
        log_with=None if tracker == "none" else tracker,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    os.environ.update(launchers)
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ConfigError(f"accelerate: expected one process, DDP, FSDP or DeepSpeed, and no other; got {kind}")
    accelerator.gradient_accumulation_steps = 1  # the environment may say otherwise; the denominator is ours
    return accelerator


def placed(model: Any, config: Compute, accelerator: Accelerator, exact: Sequence[nn.Module] = ()) -> Any:
    """The model itself, on this process's device; in shards, where they are asked for (sharding.shard)."""
    return sharding.shard(model, accelerator, exact) if sharding.asked(config) else model.to(accelerator.device)


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def optimizer(module: nn.Module, config: Training, rates: Mapping[nn.Module, float] | None = None) -> torch.optim.AdamW:
    """AdamW; no decay on vectors (norms, biases), as everywhere in the field.

    `rates` gives parts of the module a peak learning rate of their own.
    """
    groups = []
    for part, peak in (rates or {module: config.learning_rate}).items():
        parameters = [p for p in part.parameters() if p.requires_grad]
        groups += [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay, "peak": peak},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "peak": peak},
        ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)


def train(
    module: nn.Module,
    source: Source,
    steps: int,
    config: Training,
    accelerator: Accelerator,
    metrics: Metrics,
    *,
    packing: Packing,
    denominator: Callable[[Sequence[Any]], int],
    shown: Mapping[str, str],
    collate: Callable[[Sequence[Any]], Any] | None = None,
    steps_an_epoch: int | None = None,
    rates: Mapping[nn.Module, float] | None = None,
    first: Callable[[float, Mapping[str, float]], None] | None = None,
    after: Callable[[int, bool], None] | None = None,
    before_update: Callable[[int, torch.optim.Optimizer], None] | None = None,
    parts: Mapping[str, checkpoints.Stateful] | None = None,
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
    if sharding.is_sharded(module):
        optim = accelerator.prepare(optimizer(module, config, rates))
    elif zero.asked():
        module, optim = zero.prepare(module, optimizer(module, config, rates), config, accelerator)
    else:
        module, optim = accelerator.prepare(module, optimizer(module, config, rates))
    if accelerator.num_processes > 1:
        set_seed(config.seed + accelerator.process_index)  # each drops out units of its own
    keeper = checkpoints.Keeper(
        Path(config.output_dir), module, optim, accelerator, metrics, {"data": source} | dict(parts or {}),
        allow_changes=config.allow_changes,
    )  # fmt: skip
    before = keeper.restore()
    if accelerator.is_main_process:
        artifacts.confirm(Path(config.output_dir))
    done, counters = (before.step, before.counters) if before else (0, dict.fromkeys(COUNTERS, 0.0))
    if done > steps:
        raise RunError(f"{keeper.directory}: holds the state of step {done:,}; expected --max_steps {done:,} at least")
    movement.begin()
    progress = console.Progress("step", steps, every=config.logging_steps, done=done)
    profiler = profiling.Profiler(config.profile, Path(config.output_dir), accelerator, compute_dtype(accelerator))
    taking = Step(
        module, optim, config, accelerator, denominator, collate or packing.collate, packing, steps, before_update
    )
    try:
        with signals.heeded(alone=accelerator.num_processes == 1):
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
                if config.checkpoint_steps and (step % config.checkpoint_steps == 0 or keeper.last and step == steps):
                    keeper.save()
                if after is not None:
                    after(step, step == steps)
    except NotFinite as error:
        if error.of_all:  # nothing has been updated since the last step
            _save(keeper)
        raise RunError(f"{error}{keeper.kept()}") from error
    except (RunError, OSError) as error:
        what = error if isinstance(error, RunError) else f"{error.strerror}: {error.filename}"
        raise RunError(f"{what}{keeper.kept()}") from error
    except signals.Stopped as stopped:
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
        every and step % every == 0 for every in (getattr(config, "save_steps", 0), getattr(config, "eval_steps", 0))
    )


def _save(keeper: checkpoints.Keeper) -> Path | None:
    """Save the last word of a run that ends early; an error names the checkpoint before it."""
    try:
        return keeper.save()
    except RunError as error:
        raise RunError(f"{error}{keeper.kept()}") from error


def _where(state: Path | None, steps: int) -> str:
    if state is None:
        return "before the first step; the same command begins again"
    return f"after step {int(state.name.partition('-')[2]):,} of {steps:,}, kept in {state}; the same command goes on"


def _conclude(config: Training, counters: Mapping[str, float], steps: int) -> None:
    share = 100 * counters["clipped"] / steps
    console.say(f"  the gradient's norm was clipped to {config.max_grad_norm:g} in {share:.0f}% of the steps")
    if counters["not_finite"]:
        console.say(f"  {counters['not_finite']:,.0f} updates were skipped: their loss or gradient was not finite")


def _spare(module: nn.Module, config: Training) -> None:
    """Checkpointing and compilation of the causal LMs in it, where they are asked for."""
    models: list[Any] = [child for child in module.children() if hasattr(child, "gradient_checkpointing_enable")]
    for model in models:
        if config.gradient_checkpointing:
            checkpoint_layers(model, config.dropout)
        if config.compile:
            below = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter
            below.base_model.compile(dynamic=True)


def checkpoint_layers(model: Any, dropout: bool) -> None:
    """Each layer makes its activations again in the backward pass; transformers does so only in training mode."""
    with warnings.catch_warnings():  # of another name to come, which the oldest transformers we take does not know
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if dropout:
        return
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False) is True and layer is not model:
            layer.training = True  # itself alone: what is below it stays in evaluation, and drops nothing out
            for name, value in vars(layer).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)
