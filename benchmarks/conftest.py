"""Options, and the table at the end of the session."""

import pytest
import torch

from benchmarks import report, workload

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("exo_kernels benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    group.addoption("--rounds", type=int, help="rounds of all contenders (default: 15 on a CPU, 50 on a GPU)")
    group.addoption("--results", metavar="FILE", help="write every figure as JSON")
    group.addoption("--strict-targets", action="store_true", help="fail where a target is missed")


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install 'exo-kernels[bench]'")
    config.stash[ROWS] = []
    gpu = torch.cuda.is_available()
    if config.option.device is None:
        config.option.device = "cuda" if gpu else "cpu"
    if config.option.device == "cuda" and not gpu:
        raise pytest.UsageError("--device cuda: torch finds no GPU")


def pytest_generate_tests(metafunc):
    if "work" in metafunc.fixturenames:
        metafunc.parametrize("work", workload.workloads(metafunc.config.getoption("device")), ids=str)


@pytest.fixture
def device(pytestconfig):
    return pytestconfig.getoption("device")


@pytest.fixture
def rows(pytestconfig):
    """Every row of the session; a test appends its own."""
    return pytestconfig.stash[ROWS]


def pytest_terminal_summary(terminalreporter, config):
    found, device = config.stash[ROWS], config.getoption("device")
    if not found:
        return
    terminalreporter.section("exo_kernels: time and memory")
    for line in report.table(device, found):
        terminalreporter.write_line(line)
    path = config.getoption("results")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            file.write(report.as_json(device, found))
        terminalreporter.write_line(f"\nwritten: {path}")
