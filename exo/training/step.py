"""One training step: forward and backward over micro-batches, sums over ranks, the update."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from exo.cli import signals
from exo.cli.errors import RunError
from exo.data.collate import Collator
from exo.data.text.tokenize import TokenizedExample
from exo.distributed import deepspeed, fsdp, gather
from exo.training import profiler
from exo.training.optimizer import OptimizerSettings, learning_rate_share
from exo.training.profiler import activations

R = TypeVar("R")
COUNTERS = ("lost", "not_finite", "clipped")  # numbers of updates; lost: those that overflowed float16, in a row
MOST_SKIPPED = 20  # updates that may overflow float16 in a row; the loss scale is then below 1


class NonFiniteError(RunError):
    """Raised for a non-finite loss or gradient, before the optimizer step."""

    of_all = True  # all ranks raise it at the same step


class LossOutput(NamedTuple):
    """The output of a forward pass: its share of the step's mean loss, and (sum, count) of each metric."""

    loss: Tensor
    sums: Mapping[str, tuple[Tensor | float, Tensor | float]]


class TrainStep(NamedTuple):
    """Takes one optimizer step; the fields are the same for all steps."""

    module: nn.Module
    optim: Any
    settings: OptimizerSettings
    accelerator: Accelerator
    denominator: Callable[[Sequence[Any]], int]
    collate: Callable[[Sequence[Any]], Any]
    collator: Collator
    steps: int
    before_update: Callable[[int, Any], None] | None = None
    stop_on_nan: bool = True

    def __call__(
        self,
        step: int,
        batch: list[Any],
        counters: dict[str, float],
        *,
        quiet: bool,
        first: Callable[[float, Mapping[str, float]], None] | None,
    ) -> tuple[dict[str, float], int]:
        """Update on a global batch; return a line of metrics, and the signal that a rank received, or 0."""
        settings, accelerator, began = self.settings, self.accelerator, time.perf_counter()
        share = learning_rate_share(settings, self.steps, step - 1)
        for group in self.optim.param_groups:
            group["lr"] = group["peak"] * share
        with profiler.section("data"):
            parts, n_padding = self._parts(batch)
        loss, sums, tokens = accumulate(
            self.module,
            parts,
            self.denominator(batch),
            accelerator,
            self.collate,
            step,
            self.stop_on_nan,
            quiet,
            n_padding,
        )
        with profiler.section("waiting"):
            loss, sums, tokens, signum = _across_processes(accelerator, loss, sums, tokens)
        values = {name: total / count for name, (total, count) in sums.items() if count}
        if step == 1 and first is not None:
            first(loss, values)
        if self.before_update is not None:
            self.before_update(step, self.optim)
        with profiler.section("optimizer"):
            norm = update(
                self.module, self.optim, settings.max_grad_norm, accelerator, step, batch, loss, self.stop_on_nan
            )
        finite = math.isfinite(loss) and math.isfinite(norm)
        lost = accelerator.optimizer_step_was_skipped
        counters["lost"] = counters["lost"] + 1 if lost else 0
        if counters["lost"] == MOST_SKIPPED:
            raise RunError(f"step {step}: {MOST_SKIPPED} updates in a row overflowed float16; use bfloat16")
        counters["not_finite"] += not finite and not lost
        clipped = float(finite and 0 < settings.max_grad_norm < norm)
        counters["clipped"] += clipped
        line = {"step": step, "loss": loss} | values
        line |= {"learning_rate": settings.learning_rate * share, "grad_norm": norm, "tokens": tokens}
        line |= {"clipped": clipped, "tokens_per_second": tokens / (time.perf_counter() - began)}
        return line | ({} if finite or lost else {"skipped": 1.0}), signum

    def _parts(self, batch: list[Any]) -> tuple[list[list[Any]], int]:
        """Return this rank's micro-batches, and how many at the end are padding.

        Ranks that gather shards or reduce gradients wait for each other, so all have as many.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        local = self.collator.micro_batches(batch[rank::world])
        if world == 1:
            return local, 0
        most = max(1, len(local))
        if fsdp.is_sharded(self.module) or deepspeed.stage(self.optim) == 2:
            most = max(len(self.collator.micro_batches(batch[i::world])) for i in range(world))
        return local + [[batch[0]]] * (most - len(local)), most - len(local)


def accumulate(
    module: nn.Module,
    parts: Sequence[Sequence[TokenizedExample]],
    count: int,
    accelerator: Accelerator,
    collate: Callable[[Any], Any],
    step: int,
    stop_on_nan: bool = True,
    quiet: bool = True,
    n_padding: int = 0,
) -> tuple[float, dict[str, tuple[float, float]], float]:
    """Run forward and backward passes over this rank's micro-batches; return the sums of loss, metrics and tokens.

    The last `n_padding` parts count nothing. Unless `quiet`, the memory of the first part's activations is logged.
    """
    sharded, engine = fsdp.is_sharded(module), deepspeed.is_engine(module)
    loss, tokens, sums = 0.0, 0.0, dict[str, tuple[float, float]]()
    for i, part in enumerate(parts):
        signals.raise_if_stop_requested()
        with profiler.section("data"):
            batch = collate(part).to(accelerator.device)
        profiler.count_rows(len(batch.rows))
        size = sum(len(g.prompt) + len(ids) for g in part for ids in g.completions)
        counts, last = i < len(parts) - n_padding, i == len(parts) - 1
        # a sharded model reduces gradients at once: unsharded ones would need the memory that sharding saves
        with nullcontext() if sharded or engine or last else accelerator.no_sync(module):
            with (
                profiler.section("head and loss"),
                nullcontext() if quiet or i or sharded else activations(module, size),
            ):
                with accelerator.autocast():
                    share = fsdp.run_unsharded_root(module, partial(module, batch, count))
            value = float(share.loss.detach())
            if not math.isfinite(value) and stop_on_nan:
                raise _not_finite(step, f"the loss is {value}", part, accelerator)
            # the wrapper averages over ranks, but the denominator already counts them all
            with profiler.section("head and loss"):  # the profiler's hook switches to the body
                scaled = share.loss * (accelerator.num_processes * counts)
                deepspeed.backward(module, scaled, last) if engine else accelerator.backward(scaled)
        for name, (total, n) in share.sums.items():  # all ranks have the same names
            total_sum, count_sum = sums.get(name, (0.0, 0.0))
            sums[name] = (total_sum + float(total), count_sum + float(n)) if counts else (total_sum, count_sum)
        if counts:
            loss += value
            tokens += size
    return loss, sums, tokens


def _not_finite(
    step: int, what: str, rows: Sequence[TokenizedExample], accelerator: Accelerator | None = None
) -> NonFiniteError:
    lines = ", ".join(str(example.line) for example in rows[:10]) + ", ..." * (len(rows) > 10)
    where = f", rank {accelerator.process_index}" if accelerator and accelerator.num_processes > 1 else ""
    error = NonFiniteError(f"step {step}{where}: {what}; stopped before the update; rows at lines {lines}")
    error.of_all = not where
    return error


def _across_processes(
    accelerator: Accelerator, loss: float, sums: dict[str, tuple[float, float]], tokens: float
) -> tuple[float, dict[str, tuple[float, float]], float, int]:
    """Return the sums over all ranks, and the signal that any of them received, so that all stop at the same step."""
    if accelerator.num_processes == 1:
        return loss, sums, tokens, signals.stop_requested()
    names, world = sorted(sums), accelerator.num_processes
    received = [float(signals.stop_requested()) if i == accelerator.process_index else 0.0 for i in range(world)]
    local = [loss, tokens, *received, *(x for name in names for x in sums[name])]
    flat = torch.tensor(local, dtype=torch.float64, device=accelerator.device)
    loss, tokens, *rest = accelerator.reduce(flat, "sum").tolist()
    received, rest = rest[:world], rest[world:]
    return loss, {name: (rest[2 * i], rest[2 * i + 1]) for i, name in enumerate(names)}, tokens, int(max(received))


def update(
    module: nn.Module,
    optim: Any,
    max_grad_norm: float,
    accelerator: Accelerator,
    step: int,
    batch: Sequence[TokenizedExample],
    loss: float,
    stop_on_nan: bool = True,
) -> float:
    """Clip, check and step; return the gradient norm. A non-finite one raises NonFiniteError or skips the update.

    Under fp16 the loss scaler skips the update.
    """
    limit, engine = max_grad_norm or math.inf, deepspeed.is_engine(module)
    if engine:  # DeepSpeed checks before its step, too
        norm = deepspeed.update(module, math.isfinite(loss))
    else:
        norm = float(fsdp.full_tensor(accelerator.clip_grad_norm_(module.parameters(), limit)))
    finite = math.isfinite(norm) and math.isfinite(loss)
    if not finite and accelerator.scaler is None and stop_on_nan:
        raise _not_finite(step, "the gradient norm is NaN or Inf", batch)
    if not engine and (finite or accelerator.scaler is not None):
        optim.step()
    optim.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def forward(
    module: nn.Module, part: Sequence[TokenizedExample], accelerator: Accelerator, collator: Collator, *arguments: Any
) -> Any:
    """Return what the module's forward returns for a micro-batch, without gradients; all ranks call if sharded."""
    batch = collator.collate(part).to(accelerator.device)
    with accelerator.autocast():
        return fsdp.run_unsharded_root(module, partial(module, batch, *arguments))


def evaluate_batches(
    module: nn.Module,
    examples: Sequence[TokenizedExample],
    accelerator: Accelerator,
    collator: Collator,
    reduce: Callable[[Any, Sequence[TokenizedExample]], R],
) -> list[R]:
    """Evaluate a module on micro-batches that the ranks share; return reduce(output, examples) of each, as JSON."""

    def evaluate(part: Sequence[TokenizedExample]) -> R:
        return reduce(forward(module, part, accelerator, collator, None), part)

    parts = collator.micro_batches(examples)
    return gather.map_over_ranks(parts, evaluate, accelerator, together=fsdp.is_sharded(module))
