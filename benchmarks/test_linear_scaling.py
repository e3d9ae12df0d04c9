"""Scaling of the linear path: time and memory over tokens, time over K, memory at a large vocabulary.

Only ours runs. Every round runs all sizes. The gate checks the first size, because only the sizes differ.
"""

import time

import torch

from benchmarks import harness, linear_contenders, linear_scaling, linear_workload, measure, report
from benchmarks.linear_contenders import MATMULS, Contender

ROUNDS = {"cpu": 3, "cuda": 20}
GROUP_ROUNDS = {"cpu": 7, "cuda": 20}  # over K; a second each on the CPU
RESIDENT_RUNS = 1  # of large calls; small ones have measure.RESIDENT_RUNS
LARGE_TOKENS = 8192


def ours(work):
    contender = linear_contenders.contenders(work)[0]
    assert contender.name == harness.OURS and contender.bound == MATMULS
    return contender


def assert_right(contender: Contender, problem: linear_workload.Problem) -> None:
    results, returned = harness.first_results([contender], problem)
    harness.gate(results, linear_contenders.errors(problem, returned))
    assert not results[harness.OURS].not_timed, results[harness.OURS].not_timed


def grow(cases, device, rounds):
    """Return the times of every case, with all cases in every round, and their calls."""
    problems = [linear_workload.make(work, device) for work in cases]
    contenders = [ours(work) for work in cases]
    assert_right(contenders[0], problems[0])
    calls = [lambda c=c, p=p: c.gradient(p)[1:] for c, p in zip(contenders, problems, strict=True)]
    clock, times = measure.Clock(device), [[] for _ in cases]
    for call in calls[:-1]:
        clock(call)
    for _ in range(rounds):
        for call, case_times in zip(calls, times, strict=True):
            case_times.append(clock(call))
    return times, calls


def test_memory_stays_within_the_budget(device, rows, verdict):
    """Count bytes in single calls, because they take long; the last call, without the profiler, gives the time."""
    work = linear_scaling.memory_case(device)
    problem, contender, times = linear_workload.make(work, device), ours(work), []

    def call():
        begin = time.perf_counter()
        gradients = contender.gradient(problem)[1:]
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        times.append(measure.Time(seconds, seconds, None))
        return gradients

    memory = measure.memory(call, device, RESIDENT_RUNS)
    row = linear_scaling.row(linear_scaling.MEMORY, work, times[-1:], memory)
    targets = linear_scaling.memory_targets(work, row)
    rows.extend(report.with_targets([row], targets))
    verdict(targets)


def test_time_is_linear_in_tokens_and_memory_flat(pytestconfig, device, rows, verdict):
    cases = linear_scaling.token_cases(device)
    times, calls = grow(cases, device, pytestconfig.getoption("rounds") or ROUNDS[device])
    new_rows = []
    for work, seconds, call in zip(cases, times, calls, strict=True):
        runs = RESIDENT_RUNS if work.rows > LARGE_TOKENS else measure.RESIDENT_RUNS
        memory = measure.memory(call, device, runs)
        new_rows.append(linear_scaling.row(linear_scaling.TOKENS, work, seconds, memory))
    targets = linear_scaling.token_targets(new_rows)
    rows.extend(report.with_targets(new_rows, targets))
    verdict(targets)


def test_time_does_not_depend_on_k(pytestconfig, device, rows, verdict):
    cases = linear_scaling.group_cases(device)
    times, _ = grow(cases, device, pytestconfig.getoption("rounds") or GROUP_ROUNDS[device])
    new_rows = [
        linear_scaling.row(linear_scaling.COMPLETIONS, work, seconds, None)
        for work, seconds in zip(cases, times, strict=True)
    ]
    targets = linear_scaling.group_targets(new_rows)
    rows.extend(report.with_targets(new_rows, targets))
    verdict(targets)
