"""A training step: ours with the prompt shared against ours with padded rows, and on pairs against TRL's DPO trainer.

All contenders run in turn, round after round, in one process, once their losses and gradients agree.
"""

import torch

from benchmarks import harness, measure, report, step_contenders, step_report, step_workload

ROUNDS = {"cpu": 7, "cuda": 15}
WARMUP_ROUNDS = 2
TOLERANCE = {"cpu": 1e-4, "cuda": 5e-2}  # relative: the layouts and TRL's own sums round differently


def test_step(benchmark, pytestconfig, device, step_work, rows, verdict):
    problem = step_workload.make(step_work, device)
    found, absent = step_contenders.contenders(problem, device)
    results = {c.name: report.Result(c.name, tolerance=TOLERANCE[device]) for c in found}
    loss, gradient = found[1].first()  # of padded rows
    errors = {}
    for contender in found:
        mine, own = contender.first()
        off = float((own - gradient).norm() / gradient.norm())
        errors[contender.name] = {"loss": abs(mine - loss) / abs(loss), "gradient": off}
        del own
    del gradient
    harness.gate(results, errors)
    assert not results[harness.OURS].not_timed, results[harness.OURS].not_timed
    for name, reason in absent.items():
        results[name] = report.Result(name, not_timed=reason)
    calls = {c.name: c.step for c in found if not results[c.name].not_timed}
    rounds = pytestconfig.getoption("rounds") or ROUNDS[device]
    harness.timed(benchmark, results, calls, device, rounds, WARMUP_ROUNDS)
    for name, call in calls.items():
        if step_work.peers and results[name].times:
            results[name].memory = measure.memory(call, device)
    made = step_report.rows(step_work, list(results.values()), device)
    rows.extend(made)
    benchmark.extra_info |= {"machine": report.machine(device), "versions": report.versions(), "rows": made}
    verdict(step_report.targets(step_work, made, device))
    if device == "cuda":
        torch.cuda.empty_cache()
