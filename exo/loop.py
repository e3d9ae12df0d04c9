"""The training loop, the only one: batches in, optimizer steps out.

Every stage hands over a module whose forward takes (batch, denominator) and returns a share of the step's loss, with
sums for the metrics. The denominator counts the whole step, over all micro-batches and processes, so that neither
changes the gradient. Left out: what the loss is, and resuming.
"""

import importlib.util
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from exo import console, profiling
from exo.artifacts import Metrics, RunError
from exo.config import Compute, ConfigError, DataTraining, Training
from exo.encoding import TokenGroup
from exo.packing import Packing
from exo.profiling import activations

G = TypeVar("G", bound=TokenGroup)
MOST_SKIPPED = 20  # updates lost to float16's overflow, in a row; the loss scale is then below 1


class Share(NamedTuple):
    """What one forward pass gives: its part of the step's mean loss, and sums with the counts to divide them by."""

    loss: Tensor
    sums: Mapping[str, tuple[Tensor | float, Tensor | float]]


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
    accelerator = Accelerator(
        cpu=config.device == "cpu" or not torch.cuda.is_available(),
        mixed_precision=mixed,
        log_with=None if tracker == "none" else tracker,
        project_dir=config.output_dir,
    )
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise ConfigError(f"accelerate: expected one process or DDP, which this version trains with; got {kind}")
    accelerator.gradient_accumulation_steps = 1  # the environment may say otherwise; the denominator is ours
    if not accelerator.is_main_process:
        console.mute()
    return accelerator


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def make_lone_accelerator(config: Compute) -> Accelerator:
    """The same for a stage whose work is not shared among processes, which would each do all of it."""
    accelerator = make_accelerator(config)
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"accelerate: expected one process, which this stage runs in; got {accelerator.num_processes}"
        )
    return accelerator


def epoch_steps(config: DataTraining, n_groups: int) -> int:
    """Batches of an epoch. A last one of less than half the size joins the one before: its mean would be all noise."""
    return max(1, int(n_groups / config.batch_size + 0.5))


def total_steps(config: DataTraining, n_groups: int) -> int:
    if config.max_steps > 0:
        return config.max_steps
    return max(1, round(config.num_train_epochs * epoch_steps(config, n_groups)))


def refuse_empty_shares(config: Training, n_groups: int, accelerator: Accelerator) -> None:
    """ConfigError where a process would get no prompt in some step; a last batch may be half the size."""
    world = accelerator.num_processes
    if world > 1 and min(n_groups, config.batch_size / 2) < world:
        raise ConfigError(f"--batch_size: expected at least 2 prompts for each of {world} processes, and as much data")


def batches(groups: Sequence[TokenGroup], config: DataTraining, steps: int) -> Iterator[list[TokenGroup]]:
    """Global batches, each epoch in an order of its own. The generator is private: nothing else moves it."""
    size, each = config.batch_size, epoch_steps(config, len(groups))
    for step in range(steps):
        epoch, i = divmod(step, each)
        if i == 0:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
            order = torch.randperm(len(groups), generator=generator).tolist()
        yield [groups[k] for k in order[i * size : len(order) if i == each - 1 else (i + 1) * size]]


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


def learning_rate_share(config: Training, steps: int, step: int) -> float:
    """Share of the peak learning rate at a step, counted from 0."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if config.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress if config.lr_scheduler_type == "linear" else 1.0


def train(
    module: nn.Module,
    source: Iterable[list[G]],
    steps: int,
    config: Training,
    accelerator: Accelerator,
    metrics: Metrics,
    *,
    packing: Packing,
    denominator: Callable[[Sequence[G]], int],
    shown: Mapping[str, str],
    collate: Callable[[Sequence[G]], Any] | None = None,
    steps_an_epoch: int | None = None,
    rates: Mapping[nn.Module, float] | None = None,
    first: Callable[[float, Mapping[str, float]], None] | None = None,
    after: Callable[[int, bool], None] | None = None,
) -> nn.Module:
    """Train `module` for `steps` global batches of `source`; return it as accelerate wrapped it.

    A batch is asked for after the update before it, so that `source` may sample from the policy. `packing` splits it
    into micro-batches, and makes tensors of each where `collate` does not. `denominator` counts a global batch in the
    loss's own unit. `first` sees the first loss and metrics before the first update and may raise.
    `after(step, last)` is called after each update, for evaluation and checkpoints. `shown` maps metrics to their
    labels on the progress line.
    """
    world = accelerator.num_processes
    collate = collate or packing.collate
    _spare(module, config)
    optim = optimizer(module, config, rates)
    module, optim = accelerator.prepare(module, optim)
    progress = console.Progress("step", steps, every=config.logging_steps)
    profiler = profiling.Profiler(config.profile, Path(config.output_dir), accelerator)
    skipped = clipped = 0
    try:
        for step, batch in enumerate(itertools.islice(source, steps), start=1):
            began = time.perf_counter()
            profiler.step(step)
            share = learning_rate_share(config, steps, step - 1)
            for group in optim.param_groups:
                group["lr"] = group["peak"] * share
            with profiling.section("data"):
                parts = packing.micro_batches(batch[accelerator.process_index :: world])
            told = step > 1 or config.compile
            loss, sums, tokens = _accumulate(module, parts, denominator(batch), accelerator, collate, step, told)
            with profiling.section("waiting"):
                loss, sums, tokens = _across_processes(accelerator, loss, sums, tokens)
            values = {name: total / count for name, (total, count) in sums.items() if count}
            if step == 1 and first is not None:
                first(loss, values)
            with profiling.section("optimizer"):
                norm = _update(module, optim, config, accelerator, step, batch)
            skipped = skipped + 1 if accelerator.optimizer_step_was_skipped else 0
            if skipped == MOST_SKIPPED:
                raise RunError(f"step {step}: {skipped} updates in a row overflowed float16; use bfloat16")
            line = {"step": step} | ({"epoch": step / steps_an_epoch} if steps_an_epoch else {}) | {"loss": loss}
            line |= values | {"learning_rate": config.learning_rate * share, "grad_norm": norm, "tokens": tokens}
            line["clipped"] = float(0 < config.max_grad_norm < norm)
            clipped += int(line["clipped"])
            line["tokens_per_second"] = tokens / (time.perf_counter() - began)
            if accelerator.is_main_process:
                metrics.write(**{name: v for name, v in line.items() if math.isfinite(v)})
                accelerator.log(line, step=step)
            progress.advance(1, {label: line[name] for name, label in shown.items() if name in line})
            profiler.done(step, tokens, step == steps)
            if after is not None:
                after(step, step == steps)
    finally:
        progress.stop()
        profiler.close()
    console.say(
        f"  the gradient's norm was clipped to {config.max_grad_norm:g} in {100 * clipped / steps:.0f}% of the steps"
    )
    return module


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


def _accumulate(
    module: nn.Module,
    parts: Sequence[Sequence[TokenGroup]],
    count: int,
    accelerator: Accelerator,
    collate: Callable[[Any], Any],
    step: int,
    told: bool = True,
) -> tuple[float, dict[str, tuple[float, float]], float]:
    """Forward and backward over one process's part of a step; what is kept between them is said unless it was."""
    loss, tokens, sums = 0.0, 0.0, dict[str, tuple[float, float]]()
    for i, part in enumerate(parts):
        with profiling.section("data"):
            batch = collate(part).to(accelerator.device)
        size = sum(len(g.prompt) + len(ids) for g in part for ids in g.completions)
        last = i == len(parts) - 1
        with nullcontext() if last else accelerator.no_sync(module):
            with profiling.section("head and loss"), nullcontext() if told or i else activations(module, size):
                share = module(batch, count)
            value = float(share.loss.detach())
            if not math.isfinite(value):
                lines = ", ".join(str(group.line) for group in part[:10])
                raise RunError(f"step {step}: the loss is {value}; stopped before the update; rows at lines {lines}")
            # processes are averaged by the wrapper, but the denominator already counts them all
            with profiling.section("head and loss"):  # and from its border on the body
                accelerator.backward(share.loss * accelerator.num_processes)
        loss += value
        tokens += size
        for name, (total, n) in share.sums.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + float(total), before[1] + float(n))
    return loss, sums, tokens


def _across_processes(
    accelerator: Accelerator, loss: float, sums: dict[str, tuple[float, float]], tokens: float
) -> tuple[float, dict[str, tuple[float, float]], float]:
    if accelerator.num_processes == 1:
        return loss, sums, tokens
    names = sorted(sums)
    flat = torch.tensor([loss, tokens, *(x for name in names for x in sums[name])], device=accelerator.device)
    loss, tokens, *rest = accelerator.reduce(flat, "sum").tolist()
    return loss, {name: (rest[2 * i], rest[2 * i + 1]) for i, name in enumerate(names)}, tokens


def _update(
    module: nn.Module,
    optim: Any,
    config: Training,
    accelerator: Accelerator,
    step: int,
    batch: Sequence[TokenGroup],
) -> float:
    """Clip, check, step. A gradient that is not finite stops the run, except where fp16's loss scaling handles it."""
    limit = config.max_grad_norm or math.inf
    norm = float(accelerator.clip_grad_norm_(module.parameters(), limit))
    if not math.isfinite(norm) and accelerator.scaler is None:
        lines = ", ".join(str(group.line) for group in batch[:10])
        raise RunError(f"step {step}: the gradient is not finite; stopped before the update; rows at lines {lines}")
    optim.step()
    optim.zero_grad(set_to_none=True)
    return norm
