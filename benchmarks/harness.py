"""The one harness: gate the contenders of a case, measure their memory, then run all in turn, round after round.

A case is one table. Each suite (logits, linear, step, accuracy) lists its cases, and prepares the contenders
of one.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from benchmarks import measure

OURS, BOUND, EAGER, PADDED = "ours", "bound", "eager", "ours, padded"
BODY = "model body, padded"  # of a training step: what the loss and the update come on top of
IN_CACHE = "softmax in cache"  # from logits: the arithmetic without the memory, whose rate differs from run to run
UNITS = {"GB/s": 1e9, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "k tokens/s": 1e3}
MEMORY_RUNS = 2  # of ours; the smallest peak counts, because the C library adds to some
WARMUP_ROUNDS = 1  # after the gate's run and the measurement of memory
MIB = 2**20


class Options(NamedTuple):
    """Who takes part."""

    device: str
    full: bool = False  # more cases, more contenders written in plain PyTorch
    peers: bool = False  # other libraries that are installed, and torch.compile
    ours_only: bool = False
    keep_memory: bool = False  # see measure.keep_memory


class Contender(NamedTuple):
    """An implementation that is measured."""

    name: str
    call: Callable[[], Any]  # is timed; returns what the caller keeps
    outputs: Callable[[], tuple[Any, ...]] | None  # are compared with the oracle; None for a bound, which has none
    tolerance: float = float("inf")  # allowed for each error
    bound: str = BOUND


class Prepared(NamedTuple):
    """A case with its data."""

    contenders: list[Contender]  # a bound right before ours, so that noise longer than both cancels in the ratio
    absent: dict[str, str]  # the reason for everyone who cannot take part
    errors: Callable[[dict[str, tuple[Any, ...]]], dict[str, dict[str, float]]]  # by contender and kind


class Case(Protocol):
    """A row of a suite's list of cases."""

    suite: str
    rounds: int  # 0: nothing is timed
    work: float  # of one call, in bytes, operations or tokens
    unit: str  # of its rate, in UNITS

    def __str__(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def sizes(self) -> dict[str, Any]: ...

    def prepare(self, options: Options) -> Prepared: ...


@dataclass
class Row:
    """The figures of a contender; `reason` says why it has none."""

    contender: str
    reason: str = ""
    bound: str = BOUND
    errors: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # by round
    cpu_seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    allocated_bytes: int | None = None  # the part that torch's allocator counts, the same in every run
    launches: int | None = None
    moved_bytes: int | None = None


class Run:
    """A case that has passed the gate. `time()` may be called again, and adds rounds."""

    def __init__(self, case: Case, options: Options) -> None:
        self.case, self.options = case, options
        self.busy = 0.0  # share of the CPU that other processes used in the rounds
        self.clock = measure.Clock(options.device) if case.rounds else None
        prepared = case.prepare(options)
        self.rows: dict[str, Row] = {}
        self.calls: dict[str, Callable[[], Any]] = {}
        self._gate(prepared)
        for name, reason in prepared.absent.items():
            self.rows[name] = Row(name, reason)
        for name, call in list(self.calls.items()) if case.rounds else []:
            self._guarded(name, lambda name=name, call=call: self._count(name, call))

    def again(self, rounds: int) -> None:
        """Measure ours once more: the rounds are added to the others; of the peaks of memory the smallest counts."""
        for name, call in self.calls.items() if rounds else ():
            if name.startswith(OURS):
                self._count(name, call)
        self.time(rounds)

    def _gate(self, prepared: Prepared) -> None:
        """Exclude contenders that raise or exceed their tolerance. Raise if ours does."""
        outputs: dict[str, tuple[Any, ...]] = {}
        for contender in prepared.contenders:
            name = contender.name
            self.rows[name] = Row(name, bound=contender.bound)
            self.calls[name] = contender.call
            if contender.outputs is not None:
                self._guarded(name, lambda c=contender: outputs.update({c.name: c.outputs()}))
        for name in list(outputs):
            if _shapes(outputs[name]) != _shapes(outputs[OURS])[: len(outputs[name])]:
                self._exclude(name, f"wrong: results of shapes {_shapes(outputs.pop(name))}")
        tolerances = {contender.name: contender.tolerance for contender in prepared.contenders}
        for name, errors in prepared.errors(outputs).items():
            self.rows[name].errors = errors
            if not all(error <= tolerances[name] for error in errors.values()):  # NaN never passes
                text = ", ".join(f"{kind} {error:.1e}" for kind, error in errors.items())
                self._exclude(name, f"wrong: errors of {text}; allowed {tolerances[name]:.0e}")
                assert not name.startswith(OURS), f"{self.case}: {name}: {self.rows[name].reason}"

    def _guarded(self, name: str, action: Callable[[], Any]) -> None:
        """Run an action of a contender. A peer may fail: no compiler, out of memory, an untested version."""
        try:
            action()
        except Exception as error:
            if name.startswith((OURS, BOUND)):
                raise
            self._exclude(name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")

    def _exclude(self, name: str, reason: str) -> None:
        self.rows[name].reason = reason
        self.calls.pop(name, None)

    def _count(self, name: str, call: Callable[[], Any]) -> None:
        row, device = self.rows[name], self.options.device
        if name.startswith(BOUND):
            call()
            return
        call()  # an optimizer makes its state in the first call
        counts = measure.counts(call, device)
        row.allocated_bytes = counts.allocated
        runs = MEMORY_RUNS if name.startswith(OURS) else 1
        peaks = [measure.memory(call, device, counts.allocated) for _ in range(runs)]
        row.extra_bytes = min(peaks + ([row.extra_bytes] if row.extra_bytes is not None else []))
        if name.startswith(OURS):
            row.launches, row.moved_bytes = counts.launches, counts.moved_bytes

    def one_round(self, keep: bool = True) -> None:
        """Run every contender once."""
        assert self.clock is not None
        for name, call in list(self.calls.items()):

            def action(name: str = name, call: Callable[[], Any] = call) -> None:
                sample = self.clock(call)
                if keep:
                    self.rows[name].seconds.append(sample.seconds)
                    if sample.cpu_seconds is not None:
                        self.rows[name].cpu_seconds.append(sample.cpu_seconds)

            self._guarded(name, action)

    def time(self, rounds: int, benchmark: Any = None) -> None:
        """Run the rounds; given pytest-benchmark's fixture, it times ours once more in each, by the wall clock."""
        if not rounds:  # nothing is timed; the fixture must be used to carry the figures
            if benchmark is not None:
                benchmark.pedantic(self._ours, rounds=1, iterations=1)
            return
        for _ in range(WARMUP_ROUNDS):
            self.one_round(keep=False)
        busy = measure.Busy()
        if benchmark is None:
            for _ in range(rounds):
                self.one_round()
        else:
            benchmark.pedantic(self._ours, setup=self.one_round, rounds=rounds, iterations=1)
        self.busy = max(self.busy, busy.share())

    def _ours(self) -> None:
        self.calls[OURS]()
        if self.options.device == "cuda":
            torch.cuda.synchronize()

    def result(self) -> dict[str, Any]:
        """Return the case and its rows as JSON has them."""
        case = self.case
        return {
            "suite": case.suite, "case": str(case), "title": case.title, "sizes": case.sizes, "unit": case.unit,
            "work": case.work, "busy": self.busy, "keep_memory": self.options.keep_memory,
            "steady": self.options.keep_memory or self.options.device == "cuda",
            "rows": [vars(row) for row in self.rows.values()],
        }  # fmt: skip


def _shapes(outputs: tuple[Any, ...]) -> list[tuple[int, ...]]:
    return [tuple(getattr(x, "shape", ())) for x in outputs]


def ratios(row: dict[str, Any], over: dict[str, Any]) -> list[float]:
    """Return the times of row / over, round by round: calls close in time have the same noise."""
    return [a / b for a, b in zip(row["seconds"], over["seconds"], strict=False) if b]


def spread(values: Sequence[float]) -> float:
    """Return the distance from the smallest value to the median, relative to the median."""
    middle = statistics.median(values)
    return (middle - min(values)) / middle
