"""Options, fixtures, and the tables at the end of the session."""

import gc
from typing import Any

import pytest
import torch

from benchmarks import (
    accuracy,
    linear_report,
    linear_scaling,
    linear_workload,
    logits_report,
    logits_workload,
    report,
    step_report,
    step_workload,
)

ROWS = pytest.StashKey[list]()
TABLES = {
    module.SUITE: module.block for module in (logits_report, linear_report, linear_scaling, accuracy, step_report)
}
CASES = {
    "work": logits_workload.workloads,
    "linear_work": linear_workload.workloads,
    "accuracy_case": accuracy.cases,
    "step_work": step_workload.workloads,
}


def pytest_addoption(parser):
    group = parser.getgroup("exo_kernels benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    group.addoption("--rounds", type=int, help="rounds of all contenders (default: see README.md)")
    group.addoption("--results", metavar="FILE", help="write all results as JSON")
    group.addoption("--strict-targets", action="store_true", help="fail if a target is missed")


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install 'exo-kernels[bench]'")
    config.stash[ROWS] = []
    gpu = torch.cuda.is_available()
    if config.option.device is None:
        config.option.device = "cuda" if gpu else "cpu"
    if config.option.device == "cuda" and not gpu and not config.option.collectonly:
        raise pytest.UsageError("--device cuda: torch finds no GPU")


def pytest_generate_tests(metafunc):
    for name, cases in CASES.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, cases(metafunc.config.getoption("device")), ids=str)


@pytest.fixture
def device(pytestconfig):
    return pytestconfig.getoption("device")


@pytest.fixture
def rows(pytestconfig):
    """Return the rows of the session, to which each test appends."""
    return pytestconfig.stash[ROWS]


@pytest.fixture
def verdict(pytestconfig):
    """Return a function of a test's targets; with --strict-targets it fails the test if one is missed."""

    def judge(targets: list[report.Target]) -> None:
        missed = [str(target) for target in targets if not target.met]
        if missed and pytestconfig.getoption("strict_targets"):
            pytest.fail(", ".join(missed), pytrace=False)

    return judge


@pytest.fixture(autouse=True)
def free_memory(device):
    """Free memory after each test, so that it does not count in the peak of the next one."""
    yield
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter, config):
    rows, device = config.stash[ROWS], config.getoption("device")
    if not rows:
        return
    terminalreporter.section("exo_kernels: time, memory and accuracy")
    for line in [report.heading(device), *_tables(rows)]:
        terminalreporter.write_line(line)
    path = config.getoption("results")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            file.write(report.as_json(device, rows))
        terminalreporter.write_line(f"\nwritten: {path}")


def _tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for suite, workload in dict.fromkeys((row["suite"], row["workload"]) for row in rows):
        lines += TABLES[suite]([row for row in rows if (row["suite"], row["workload"]) == (suite, workload)])
    return lines
