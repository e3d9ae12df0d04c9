"""A training step: ours with shared prompts against ours with padded rows, and on pairs against TRL's DPO trainer.

After the gate on losses and gradients, all contenders run in turn, round after round, in one process.
"""

import torch

from benchmarks import harness, measure, report, step_contenders, step_report, step_workload

ROUNDS = {"cpu": 7, "cuda": 15}
WARMUP_ROUNDS = 2
TOLERANCE = {"cpu": 1e-4, "cuda": 5e-2}  # relative; the layouts and TRL's sums round differently


def test_step(benchmark, pytestconfig, device, step_work, rows, verdict):
    problem = step_workload.make(step_work, device)
    contenders, absent = step_contenders.contenders(problem, device)
    results = {c.name: report.Result(c.name, tolerance=TOLERANCE[device]) for c in contenders}
    padded_loss, padded_gradient = contenders[1].first()
    errors = {}
    for contender in contenders:
        loss, gradient = contender.first()
        error = float((gradient - padded_gradient).norm() / padded_gradient.norm())
        errors[contender.name] = {"loss": abs(loss - padded_loss) / abs(padded_loss), "gradient": error}
        del gradient
    del padded_gradient
    harness.gate(results, errors)
    assert not results[harness.OURS].not_timed, results[harness.OURS].not_timed
    for name, reason in absent.items():
        results[name] = report.Result(name, not_timed=reason)
    calls = {c.name: c.step for c in contenders if not results[c.name].not_timed}
    rounds = pytestconfig.getoption("rounds") or ROUNDS[device]
    harness.timed(benchmark, results, calls, device, rounds, WARMUP_ROUNDS)
    for name, call in calls.items():
        if step_work.peers and results[name].times:
            results[name].memory = measure.memory(call, device)
    new_rows = step_report.rows(step_work, list(results.values()), device)
    rows.extend(new_rows)
    benchmark.extra_info |= {"machine": report.machine(device), "versions": report.versions(), "rows": new_rows}
    verdict(step_report.targets(step_work, new_rows, device))
    if device == "cuda":
        torch.cuda.empty_cache()
