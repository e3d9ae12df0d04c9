"""The rounds of a benchmark: contenders must pass the gate on the timed data, then all run in turn in one process.

The contenders and their errors are in *_contenders.py, the tables in *_report.py.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks import measure, report

OURS = "ours"


def first_results(contenders: Iterable[Any], problem: Any) -> tuple[dict[str, report.Result], dict[str, tuple]]:
    """Return empty results, and the loss and gradients of each contender. A peer may fail to run, ours may not."""
    results, returned = {}, {}
    for contender in contenders:
        result = results[contender.name] = report.Result(contender.name, tolerance=contender.tolerance)
        try:
            returned[contender.name] = contender.gradient(problem)
        except Exception as error:  # no compiler, out of memory, an untested version
            if contender.name.startswith(OURS):
                raise
            result.not_timed = describe(error)
    return results, returned


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def gate(results: dict[str, report.Result], errors: dict[str, dict[str, float]]) -> None:
    """Record the errors of each contender, and exclude it from timing if one exceeds its tolerance."""
    for name, by_kind in errors.items():
        result = results[name]
        result.errors = by_kind
        if not all(error <= result.tolerance for error in by_kind.values()):  # NaN never passes
            text = ", ".join(f"{kind} {error:.1e}" for kind, error in by_kind.items())
            result.not_timed = f"gate: errors of {text}; allowed {result.tolerance:.0e}"


def timed(
    benchmark,
    results: dict[str, report.Result],
    calls: dict[str, Callable[[], Any]],
    device: str,
    rounds: int,
    warmup_rounds: int,
) -> None:
    """Add the times to the results. The line of pytest-benchmark is the wall clock of ours."""
    clock, runnable = measure.Clock(device), dict(calls)
    for _ in range(warmup_rounds):
        for name, call in calls.items():
            try:
                clock(call)
            except torch.OutOfMemoryError as error:  # the buffers of other contenders may leave too little
                if name.startswith(OURS):
                    raise
                runnable.pop(name, None)
                results[name].not_timed = describe(error)

    def one_round():
        for name, call in runnable.items():
            results[name].times.append(clock(call))

    def ours():
        calls[OURS]()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(ours, setup=one_round, rounds=rounds, iterations=1)
