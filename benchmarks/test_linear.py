"""The linear path: loss and gradients from hidden states and the head, against bare matmuls and every peer at hand.

All contenders run in turn, round after round, in one process, after passing the gate on the data that is timed.
Left out: what grows with the tokens and with K, and the memory case (test_linear_scaling.py).
"""

import pytest

from benchmarks import harness, linear_contenders, linear_peers, linear_report, linear_workload, measure, report

ROUNDS = {"cpu": 5, "cuda": 20}
WARMUP_ROUNDS = 1  # after the gate's own run
RESIDENT_RUNS = 1  # hundreds of MiB are measured


@pytest.fixture
def problem(linear_work, device):
    return linear_workload.make(linear_work, device)


def gated(work, problem, device):
    """One result a contender and its call, for those that may be timed; and the matmuls each is held against."""
    others, absent = linear_peers.contenders(work, device)
    found = {c.name: c for c in [*linear_contenders.contenders(work), *others]}
    arranged = {name: c.arrange(problem) for name, c in found.items()}
    results, calls, returned = {}, {}, {}
    for name, contender in found.items():
        one, gradients = harness.first_results([contender], arranged[name])
        results |= one
        for values in gradients.values():
            returned[name] = _in_first_order(arranged[name], values)
        calls[name] = lambda contender=contender, own=arranged[name]: contender.gradient(own)[1:]
    harness.gate(results, linear_contenders.errors(problem, returned))
    for name, reason in absent.items():
        results[name] = report.Result(name, not_timed=reason)
    calls = {name: call for name, call in calls.items() if not results[name].not_timed}
    return results, calls, {name: contender.bound for name, contender in found.items()}


def _in_first_order(arranged, values):
    """(loss, d_hidden, ...) with the sequences as they were before they were arranged."""
    if arranged.order is None:
        return values
    loss, d_hidden, *rest = values
    return loss, d_hidden[arranged.order.argsort()], *rest


def test_linear_forward_backward(benchmark, pytestconfig, device, linear_work, problem, rows, verdict):
    results, calls, bounds = gated(linear_work, problem, device)
    assert harness.OURS in calls, results[harness.OURS].not_timed
    bare = linear_contenders.bare_matmuls(problem)
    results |= {name: report.Result(name) for name in bare}
    rounds = pytestconfig.getoption("rounds") or ROUNDS[device]
    # every contender's bound runs right before ours, so that noise which lasts longer cancels in their ratio
    harness.timed(benchmark, results, bare | calls, device, rounds, WARMUP_ROUNDS)
    del bare
    for name, call in calls.items():
        if results[name].times:
            results[name].memory = measure.memory(call, device, RESIDENT_RUNS)

    found = linear_report.rows(linear_work, list(results.values()), bounds)
    rows.extend(found)
    benchmark.extra_info |= {"machine": report.machine(device), "versions": report.versions(), "rows": found}
    verdict(linear_report.targets(linear_work, found))
