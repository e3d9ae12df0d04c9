"""The rounds: every contender passes the gate on the data that is timed, then all run in turn, in one process.

Left out: who the contenders are (*_contenders.py), what an error is (theirs too), tables (*_report.py).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks import measure, report

OURS = "ours"


def first_results(contenders: Iterable[Any], problem: Any) -> tuple[dict[str, report.Result], dict[str, tuple]]:
    """Results still empty, and what each contender returns. A peer may fail to run, ours may not."""
    results, returned = {}, {}
    for contender in contenders:
        result = results[contender.name] = report.Result(contender.name, tolerance=contender.tolerance)
        try:
            returned[contender.name] = contender.gradient(problem)
        except Exception as error:  # no compiler, out of memory, another version than the one that was tried
            if contender.name.startswith(OURS):
                raise
            result.not_timed = described(error)
    return results, returned


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def gate(results: dict[str, report.Result], errors: dict[str, dict[str, float]]) -> None:
    """Name who computed something else, with the errors that say so."""
    for name, found in errors.items():
        result = results[name]
        result.errors = found
        if not all(error <= result.tolerance for error in found.values()):  # NaN never passes
            text = ", ".join(f"{what} {error:.1e}" for what, error in found.items())
            result.not_timed = f"gate: errors of {text}; allowed {result.tolerance:.0e}"


def timed(
    benchmark,
    results: dict[str, report.Result],
    calls: dict[str, Callable[[], Any]],
    device: str,
    rounds: int,
    warmup_rounds: int,
) -> None:
    """Fill in the times. pytest-benchmark's own line is the wall clock of ours."""
    clock, able = measure.Clock(device), dict(calls)
    for _ in range(warmup_rounds):
        for name, call in calls.items():
            try:
                clock(call)
            except torch.OutOfMemoryError as error:  # beside the others' buffers there may be too little left
                if name.startswith(OURS):
                    raise
                able.pop(name, None)
                results[name].not_timed = described(error)

    def one_round():
        for name, call in able.items():
            results[name].times.append(clock(call))

    def ours():
        calls[OURS]()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(ours, setup=one_round, rounds=rounds, iterations=1)
