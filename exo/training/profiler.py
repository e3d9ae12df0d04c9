"""Profile training steps: a table of where the time goes, and a trace for chrome://tracing or Perfetto.

The time of a section excludes the sections within it. The device is synchronized at each border, so a profiled step is
a little slower than others. The rate is compared with a matrix product of the same dtype, measured on the spot.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from exo.cli import console

WARMUP = 2  # steps that are not profiled: they compile, and touch memory for the first time
SIZE = 2048  # largest matrix that the rate is compared with
SLOW = 0.02  # seconds of a product, after which no larger one is tried

_now: "_Profile | None" = None


class _Profile:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.stack: list[str] = ["other"]
        self.since = self._time()
        self.ranges: list[torch.profiler.record_function] = []
        self.operations = self.per_row = 0.0
        self.rows = 0

    def _time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def switch(self, *stack: str) -> None:
        now = self._time()
        self.seconds[self.stack[-1]] += now - self.since
        self.stack, self.since = [*stack], now

    def enter(self, name: str) -> None:
        self.switch(*self.stack, name)
        self.ranges.append(torch.profiler.record_function(name).__enter__())

    def leave(self) -> None:
        self.ranges.pop().__exit__(None, None, None)
        self.switch(*self.stack[:-1])


@contextmanager
def section(name: str) -> Iterator[None]:
    """Count the time of the context as that of `name`, if a step is being profiled."""
    if _now is None:
        yield
        return
    _now.enter(name)
    yield
    _now.leave()


def count_rows(rows: int) -> None:
    """Count the rows of a batch that go through the head, if a step is being profiled."""
    if _now is not None:
        _now.rows += rows


def _enter_body(*_: Any) -> None:
    if _now is not None:
        _now.enter("body")


def _leave_body(*_: Any) -> None:
    if _now is not None:
        _now.leave()


def _watch(module: nn.Module) -> list[RemovableHandle]:
    """Time the body of each causal LM in the module: its forward pass, and its backward pass behind the head."""
    heads: dict[nn.Module, nn.Module] = {}  # a head and the outermost model that has it
    for model in module.modules():
        find: Any = getattr(model, "get_output_embeddings", None)
        head = find() if find is not None else None
        if isinstance(head, nn.Module):
            heads.setdefault(head, model)

    def behind_the_head(model: nn.Module, head: nn.Module, hidden: Tensor) -> None:
        if _now is None or not hidden.requires_grad:
            return
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        weight = head.weight
        body = sum(_operations(p) for p in model.parameters() if p is not weight and p is not embedding)
        _now.operations += body * hidden[..., 0].numel()
        _now.per_row = _operations(weight)  # type: ignore[arg-type]

        def reached(gradient: Tensor) -> None:
            if _now is not None:
                _now.switch("other", "body")

        hidden.register_hook(reached)

    handles: list[RemovableHandle] = []
    for head, model in heads.items():
        handles.append(model.register_forward_pre_hook(_enter_body))
        handles.append(model.register_forward_hook(_leave_body))
        watch = partial(behind_the_head, model, head)
        handles.append(head.register_forward_pre_hook(lambda _, inputs, watch=watch: watch(inputs[0])))
    return handles


def _operations(parameter: Tensor) -> float:
    """Return the operations per token: 2 forward, 2 for the input's gradient, 2 for its own gradient if it has one."""
    a_byte = 2 if parameter.dtype == torch.uint8 else 1  # packed 4-bit weights: two in a byte
    return (6.0 if parameter.requires_grad else 4.0) * a_byte * parameter.numel()


@contextmanager
def activations(module: nn.Module, tokens: int) -> Iterator[None]:
    """Log the memory that the forward pass saves for the backward pass, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, int] = {}  # bytes of a storage, by its address

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield
    console.log(f"  activations: {sum(saved.values()) / 2**20:,.0f} MiB for a micro-batch of {tokens:,} tokens")


class Profiler:
    """Profiles `steps` steps of a run and prints a table; does nothing if `steps` is 0."""

    def __init__(
        self, steps: int, directory: Path, accelerator: Accelerator, dtype: torch.dtype, module: nn.Module
    ) -> None:
        self.steps, self.directory, self.device = steps, directory, accelerator.device
        self.dtype, self.module = dtype, module
        self.handles: list[RemovableHandle] = []
        self.is_main = accelerator.is_main_process
        self.trace: Any = None
        self.began = self.tokens = 0.0

    def step(self, number: int) -> None:
        """Call it when a step begins, counted from 1; profiling begins with step WARMUP + 1."""
        global _now
        if not self.steps or number != WARMUP + 1:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self.trace = torch.profiler.profile(activities=activities)
        self.trace.start()
        self.handles = _watch(self.module)
        _now = _Profile(self.device)
        self.began = time.perf_counter()

    def done(self, number: int, tokens: float, last: bool) -> None:
        """Call it when a step of so many tokens has ended."""
        global _now
        if _now is None:
            return
        self.tokens += tokens
        if number < WARMUP + self.steps and not last:
            return
        _now.switch("other")
        profile, _now = _now, None
        self._unwatch()
        seconds = time.perf_counter() - self.began
        self.trace.stop()
        if not self.is_main:
            return
        place = self.directory / "profile"
        place.mkdir(exist_ok=True)
        self.trace.export_chrome_trace(str(place / "trace.json"))
        self._print(profile, seconds, number - WARMUP, place)

    def close(self) -> None:
        """Stop profiling if the run ends early."""
        global _now
        if _now is not None:
            _now = None
            self._unwatch()
            self.trace.stop()
        elif self.steps and self.trace is None:
            console.log(f"  nothing was profiled: profiling begins with step {WARMUP + 1}")

    def _unwatch(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _print(self, profile: _Profile, seconds: float, steps: int, place: Path) -> None:
        console.log(f"  where a step's time goes ({steps} steps, {seconds / steps:.3g} s each):")
        for name, duration in sorted(profile.seconds.items(), key=lambda item: -item[1]):
            console.log(f"    {name:16s} {100 * duration / seconds:5.1f}%  {duration / steps:8.4f} s")
        rate, peak = (
            (profile.operations + profile.per_row * profile.rows) / seconds,
            _matmul_rate(self.device, self.dtype),
        )
        console.log(
            f"    {self.tokens / seconds:,.0f} tokens/s; {rate / 1e12:.3g} Tflop/s, {100 * rate / peak:.0f}% of a "
            f"matrix product's {peak / 1e12:.3g} (per token, 6 a trained parameter and 4 a frozen one; no attention)"
        )
        console.log(f"    trace: {place / 'trace.json'}")


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of a product of square matrices of ones, the best of five.

    The size grows while products are quick, because some dtypes have no fast product on some devices.
    """
    size, rate = 256, 0.0
    while size <= SIZE:
        a = torch.ones(size, size, device=device, dtype=dtype)
        best = min(_seconds(a) for _ in range(5))
        rate = max(rate, 2 * size**3 / best)
        if best > SLOW:
            break
        size *= 2
    return rate


def _seconds(a: Tensor) -> float:
    began = time.perf_counter()
    a @ a
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - began
