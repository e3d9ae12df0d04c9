"""Where the time of a training step goes, and how fast that is: a table, and a trace for chrome://tracing or Perfetto.

Sections are timed where they are named, the innermost alone; a device is waited for at each border, so that a profiled
step is a little slower than others. The rate is held against a matrix product of the same dtype, measured on the spot.
Left out: steps that are not profiled, which run without any of it.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from exo import console

FROM = 2  # steps before the first that is profiled: compilation and first touches of memory are not of interest
SIZE = 2048  # of the matrices that the rate is held against, at most
PATIENCE = 0.02  # seconds of a product, after which no larger one is tried

_now: "_Profile | None" = None


class _Profile:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.stack: list[str] = ["other"]
        self.since = self._time()
        self.operations = 0.0

    def _time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def switch(self, *stack: str) -> None:
        now = self._time()
        self.seconds[self.stack[-1]] += now - self.since
        self.stack, self.since = [*stack], now


@contextmanager
def section(name: str) -> Iterator[None]:
    """Time spent here is that of `name`, if a step is being profiled."""
    if _now is None:
        yield
        return
    before = _now.stack
    _now.switch(*before, name)
    with torch.profiler.record_function(name):
        yield
    _now.switch(*before)


def border(hidden: Tensor, rows: int, model: nn.Module, head: Tensor) -> None:
    """Behind `hidden` the backward pass is in the body; of its tokens so many rows go through the head."""
    if _now is None or not hidden.requires_grad:
        return
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    body = sum(_operations(p) for p in model.parameters() if p is not head and p is not embedding)
    _now.operations += body * hidden[..., 0].numel() + _operations(head) * rows

    def reached(gradient: Tensor) -> None:
        if _now is not None:
            _now.switch("other", "body")

    hidden.register_hook(reached)


def _operations(parameter: Tensor) -> float:
    """A token: two forward, two for the gradient in its input, and two for its own where it has one."""
    a_byte = 2 if parameter.dtype == torch.uint8 else 1  # numbers in it, where they have 4 bits
    return (6.0 if parameter.requires_grad else 4.0) * a_byte * parameter.numel()


@contextmanager
def activations(module: nn.Module, tokens: int) -> Iterator[None]:
    """Say how much memory the forward pass in it keeps for the backward pass, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield
    console.say(f"  activations: {sum(kept.values()) / 2**20:,.0f} MiB for a micro-batch of {tokens:,} tokens")


class Profiler:
    """Profiles `steps` steps of a run and then says what it found; of 0 it does nothing."""

    def __init__(self, steps: int, directory: Path, accelerator: Accelerator, dtype: torch.dtype) -> None:
        self.steps, self.directory, self.device = steps, directory, accelerator.device
        self.dtype = dtype
        self.tells = accelerator.is_main_process
        self.trace: Any = None
        self.began = self.tokens = 0.0

    def step(self, number: int) -> None:
        """Called when a step begins, counted from 1; profiling begins with step FROM + 1."""
        global _now
        if not self.steps or number != FROM + 1:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self.trace = torch.profiler.profile(activities=activities)
        self.trace.start()
        _now = _Profile(self.device)
        self.began = time.perf_counter()

    def done(self, number: int, tokens: float, last: bool) -> None:
        """Called when a step has ended, which took in so many tokens."""
        global _now
        if _now is None:
            return
        self.tokens += tokens
        if number < FROM + self.steps and not last:
            return
        _now.switch("other")
        found, _now = _now, None
        seconds = time.perf_counter() - self.began
        self.trace.stop()
        if not self.tells:
            return
        place = self.directory / "profile"
        place.mkdir(exist_ok=True)
        self.trace.export_chrome_trace(str(place / "trace.json"))
        self._tell(found, seconds, number - FROM, place)

    def close(self) -> None:
        """A run that ends early leaves no profile going on."""
        global _now
        if _now is not None:
            _now = None
            self.trace.stop()
        elif self.steps and self.trace is None:
            console.say(f"  nothing was profiled: that begins with step {FROM + 1}")

    def _tell(self, found: _Profile, seconds: float, steps: int, place: Path) -> None:
        console.say(f"  where a step's time goes ({steps} steps, {seconds / steps:.3g} s each):")
        for name, spent in sorted(found.seconds.items(), key=lambda item: -item[1]):
            console.say(f"    {name:16s} {100 * spent / seconds:5.1f}%  {spent / steps:8.4f} s")
        rate, peak = found.operations / seconds, _matmul_rate(self.device, self.dtype)
        console.say(
            f"    {self.tokens / seconds:,.0f} tokens/s; {rate / 1e12:.3g} Tflop/s, {100 * rate / peak:.0f}% of a "
            f"matrix product's {peak / 1e12:.3g} (6 a trained parameter and token, 4 a frozen one; no attention)"
        )
        console.say(f"    trace: {place / 'trace.json'}")


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of square matrices, the best of five; of ones, so that nothing is drawn. They
    grow while that is quick: some dtypes have no fast product on some devices."""
    size, rate = 256, 0.0
    while size <= SIZE:
        a = torch.ones(size, size, device=device, dtype=dtype)
        best = min(_seconds(a) for _ in range(5))
        rate = max(rate, 2 * size**3 / best)
        if best > PATIENCE:
            break
        size *= 2
    return rate


def _seconds(a: Tensor) -> float:
    began = time.perf_counter()
    a @ a
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - began
