"""The linear path: loss and gradients from hidden states and the head, against bare matmuls and installed peers.

After the gate on the timed data, all contenders run in turn, round after round, in one process.
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
    """Return a result per contender, the calls of those that pass the gate, and the bare matmuls to compare with."""
    others, absent = linear_peers.contenders(work, device)
    contenders = {c.name: c for c in [*linear_contenders.contenders(work), *others]}
    arranged = {name: c.arrange(problem) for name, c in contenders.items()}
    results, calls, returned = {}, {}, {}
    for name, contender in contenders.items():
        new_results, gradients = harness.first_results([contender], arranged[name])
        results |= new_results
        for values in gradients.values():
            returned[name] = _in_first_order(arranged[name], values)
        calls[name] = lambda contender=contender, arranged=arranged[name]: contender.gradient(arranged)[1:]
    harness.gate(results, linear_contenders.errors(problem, returned))
    for name, reason in absent.items():
        results[name] = report.Result(name, not_timed=reason)
    calls = {name: call for name, call in calls.items() if not results[name].not_timed}
    return results, calls, {name: contender.bound for name, contender in contenders.items()}


def _in_first_order(arranged, values):
    """Return (loss, d_hidden, ...) with the sequences in their original order."""
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
    # the bare matmuls run right before ours, so that longer noise cancels in the ratio
    harness.timed(benchmark, results, bare | calls, device, rounds, WARMUP_ROUNDS)
    del bare
    for name, call in calls.items():
        if results[name].times:
            results[name].memory = measure.memory(call, device, RESIDENT_RUNS)

    new_rows = linear_report.rows(linear_work, list(results.values()), bounds)
    rows.extend(new_rows)
    benchmark.extra_info |= {"machine": report.machine(device), "versions": report.versions(), "rows": new_rows}
    verdict(linear_report.targets(linear_work, new_rows))
