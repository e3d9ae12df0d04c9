"""The logits path: the EXO loss and its gradient from given logits, against eager PyTorch and torch.compile.

All contenders run in turn, round after round, in one process, after passing the gate on the data that is timed.
What pytest-benchmark itself shows is the wall clock of ours. Left out: the matmul that makes the logits.
"""

import gc

import pytest
import torch

from benchmarks import contenders, measure, report, workload

ROUNDS = {"cpu": 15, "cuda": 50}
WARMUP_ROUNDS = 2


@pytest.fixture
def problem(work, device):
    yield workload.make(work, device)
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def gated(work, problem):
    """One result a contender and its call, for those that may be timed. A peer may fail, ours may not."""
    results, calls, gradients = {}, {}, {}
    for contender in contenders.contenders(work.dtype):
        name = contender.name
        results[name] = report.Result(name, tolerance=contender.tolerance)
        try:
            gradients[name] = contender.gradient(problem)
        except RuntimeError as error:  # no compiler, out of memory
            if name == contenders.OURS:
                raise
            results[name].not_timed = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        calls[name] = lambda contender=contender: contender.gradient(problem)[1]
    for name, errors in contenders.errors(problem, gradients).items():
        result = results[name]
        result.loss_error, result.gradient_error = errors
        if not max(errors) <= result.tolerance:  # NaN never passes
            result.not_timed = "gate: errors of loss and gradient {:.1e}, {:.1e}; allowed {:.0e}".format(
                *errors, result.tolerance
            )
            del calls[name]
    return results, calls


def test_exo_forward_backward(benchmark, pytestconfig, device, work, problem, rows):
    results, calls = gated(work, problem)
    assert contenders.OURS in calls, results[contenders.OURS].not_timed
    clock = measure.Clock(device)
    for _ in range(WARMUP_ROUNDS):
        for call in calls.values():
            clock(call)

    def one_round():
        for name, call in calls.items():
            results[name].times.append(clock(call))

    def ours():
        calls[contenders.OURS]()
        if device == "cuda":
            torch.cuda.synchronize()

    rounds = pytestconfig.getoption("rounds") or ROUNDS[device]
    benchmark.pedantic(ours, setup=one_round, rounds=rounds, iterations=1)
    for name, call in calls.items():
        results[name].memory = measure.memory(call, device)

    found = report.rows(work, list(results.values()))
    rows.extend(found)
    benchmark.extra_info |= {"machine": report.machine(device), "versions": report.versions(), "rows": found}
    missed = [str(target) for target in report.targets(found[0]) if not target.met]
    if missed and pytestconfig.getoption("strict_targets"):
        pytest.fail(", ".join(missed), pytrace=False)
