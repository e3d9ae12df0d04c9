"""The logits path: the EXO loss and its gradient from given logits, against eager PyTorch and torch.compile.

After the gate on the timed data, all contenders run in turn, round after round, in one process. The table of
pytest-benchmark shows the wall clock of ours.
"""

import pytest

from benchmarks import harness, logits_contenders, logits_report, logits_workload, measure, report

ROUNDS = {"cpu": 15, "cuda": 50}
WARMUP_ROUNDS = 2


@pytest.fixture
def problem(work, device):
    return logits_workload.make(work, device)


def gated(work, problem):
    """Return a result per contender, and the calls of those that pass the gate."""
    contenders = {c.name: c for c in logits_contenders.contenders(work.dtype)}
    results, returned = harness.first_results(contenders.values(), problem)
    harness.gate(results, logits_contenders.errors(problem, returned))
    calls = {
        name: lambda contender=contender: contender.gradient(problem)[1]
        for name, contender in contenders.items()
        if not results[name].not_timed
    }
    return results, calls


def test_exo_forward_backward(benchmark, pytestconfig, device, work, problem, rows, verdict):
    results, calls = gated(work, problem)
    assert harness.OURS in calls, results[harness.OURS].not_timed
    rounds = pytestconfig.getoption("rounds") or ROUNDS[device]
    harness.timed(benchmark, results, calls, device, rounds, WARMUP_ROUNDS)
    for name, call in calls.items():
        results[name].memory = measure.memory(call, device)

    new_rows = logits_report.rows(work, list(results.values()))
    rows.extend(new_rows)
    benchmark.extra_info |= {"machine": report.machine(device), "versions": report.versions(), "rows": new_rows}
    verdict(logits_report.targets(new_rows[0]))
