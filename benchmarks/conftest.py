"""Options, the fixture that runs a case and guards it, and the tables at the end of the session."""

import datetime
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import guard, harness, machine, measure, planted, table

RERUNS = 3
RESULTS = Path(__file__).parent / "results"
ALL_RESULTS = pytest.StashKey[list]()
BASELINE = pytest.StashKey[guard.Baseline]()
KEEP_MEMORY = pytest.StashKey[bool]()
NOTES = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("exo_kernels benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    group.addoption("--full", action="store_true", help="all cases, more contenders (45 minutes)")
    group.addoption("--peers", choices=("none", "installed"), help="default: none; with --full: installed")
    group.addoption(
        "--allocator",
        choices=("kept", "default"),
        default="kept",
        help="kept: freed memory stays in the process, so that the guard can compare times; see README.md",
    )
    group.addoption("--rounds", type=int, help="rounds of all contenders (default: by case)")
    group.addoption("--update-baseline", action="store_true", help="add this run; replace what regressed")
    group.addoption("--results", nargs="?", const="", metavar="FILE", help="write all figures as JSON")
    group.addoption("--plant", choices=sorted(planted.SLOWDOWNS), help="slow the kernels down, to see the guard fail")


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install 'exo-kernels[bench]'")
    options = config.option
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available() and not options.collectonly:
        raise pytest.UsageError("--device cuda: torch finds no GPU")
    config.stash[ALL_RESULTS], config.stash[NOTES] = [], []
    if options.collectonly:
        return
    try:
        config.stash[BASELINE] = guard.Baseline(machine.kind(options.device))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    kept = options.device == "cpu" and options.allocator == "kept" and measure.keep_memory()
    config.stash[KEEP_MEMORY] = kept
    if options.update_baseline and options.device == "cpu" and not kept:
        raise pytest.UsageError("--update-baseline: baselines need --allocator kept, which this system may lack")
    if options.rounds is not None and options.rounds < 1:
        raise pytest.UsageError(f"--rounds: expected a positive number; got {options.rounds}")
    if options.results is not None:
        _earlier_results(_results_path(config))
    if options.plant:
        if options.update_baseline:
            raise pytest.UsageError("--plant: a planted slowdown must not enter the baseline")
        if options.device == "cuda":
            raise pytest.UsageError("--plant: the slowdowns are those of the CPU's implementation; use --device cpu")
        planted.SLOWDOWNS[options.plant](setattr)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        options = metafunc.config.option
        metafunc.parametrize("case", metafunc.module.suite.cases(options.device, options.full), ids=str)


@pytest.fixture
def run_case(pytestconfig, benchmark) -> Callable[[harness.Case], None]:
    """Return a function that runs a case and fails if a figure of ours is worse than the baseline allows."""
    option, baseline = pytestconfig.option, pytestconfig.stash[BASELINE]
    peers = option.peers == "installed" if option.peers else option.full
    options = harness.Options(option.device, option.full, peers, keep_memory=pytestconfig.stash[KEEP_MEMORY])

    def run_and_compare(case: harness.Case) -> None:
        run = harness.Run(case, options)
        rounds = case.rounds and (option.rounds or case.rounds)
        run.time(rounds, benchmark)
        verdicts = baseline.compare(run.result())
        for _ in range(RERUNS):
            if not any(verdict.regressed and verdict.varies for verdict in verdicts):
                break
            run.again(rounds)
            verdicts = baseline.compare(run.result())
        result = run.result()
        benchmark.extra_info |= {"machine": machine.describe(option.device), "result": result}
        pytestconfig.stash[ALL_RESULTS].append(result)
        if option.results is not None:  # after every case, so that an interrupted run keeps what it has measured
            _write(_results_path(pytestconfig), pytestconfig.stash[ALL_RESULTS], option.device)
        regressed = [verdict for verdict in verdicts if verdict.regressed]
        if not option.plant:
            replaced = [verdict.name for verdict in regressed] if option.update_baseline else []
            added = baseline.add(result, option.update_baseline, replaced)
            pytestconfig.stash[NOTES] += [f"replaced in the baseline: {v}" for v in regressed if replaced]
            if added and not option.update_baseline:
                pytestconfig.stash[NOTES].append(f"{case.suite}/{case}: {len(added)} figures had no baseline")
        if regressed and not option.update_baseline:
            pytest.fail("\n".join(map(str, regressed)), pytrace=False)

    return run_and_compare


@pytest.fixture(autouse=True)
def free_memory(pytestconfig):
    """Free memory after each test, so that it does not count in the peak of the next one."""
    yield
    torch.compiler.reset()
    gc.collect()
    if pytestconfig.option.device == "cuda":
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter, config):
    results, option = config.stash[ALL_RESULTS], config.option
    if not results:
        return
    terminalreporter.section("exo_kernels: time, memory and accuracy")
    terminalreporter.write_line(machine.heading(option.device))
    for result in results:
        for line in table.lines(result):
            terminalreporter.write_line(line)
    for line in _closing_lines(config):
        terminalreporter.write_line(line)


def _closing_lines(config) -> list[str]:
    """Save the baseline, and return what is to be said about it and the results."""
    option, baseline, notes = config.option, config.stash[BASELINE], config.stash[NOTES]
    lines = ["", *notes]
    if option.update_baseline or notes:
        baseline.save()
        new = f"the first baseline for this kind of machine ({baseline.kind}); " if baseline.new else ""
        lines.append(f"written: {baseline.path}: {new}more runs with --update-baseline add their spread")
    if option.device == "cpu" and not config.stash[KEEP_MEMORY]:
        lines.append("times and resident memory were not compared: freed memory was not kept (--allocator)")
    if option.results is not None:
        lines.append(f"written: {_results_path(config)}; `python -m benchmarks.figures` draws it")
    return lines


def _results_path(config) -> Path:
    given = config.option.results
    return Path(given) if given else RESULTS / f"{config.stash[BASELINE].kind}.json"


def _write(path: Path, results: list[dict[str, Any]], device: str) -> None:
    """Write the results; cases of an earlier file of the same machine that did not run stay in it."""
    info = machine.describe(device)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    earlier = _earlier_results(path)
    by_case = {_key(r): r for r in earlier["results"]} if earlier else {}
    by_case |= {_key(r): r | {"date": date, "commit": info["commit"]} for r in results}
    content = {"machine": info, "date": date, "results": list(by_case.values())}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _earlier_results(path: Path) -> dict[str, Any] | None:
    """Return what the file of results holds. Raise UsageError if it is no such file, or of another kind of machine."""
    if not path.parent.is_dir():
        raise pytest.UsageError(f"--results: {path.parent} is no folder")
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content["machine"]["kind"]
    except (ValueError, LookupError, TypeError):
        raise pytest.UsageError(f"--results: {path} exists and holds no results of benchmarks") from None
    if kind != machine.kind(content["machine"]["device"]):
        raise pytest.UsageError(f"--results: {path} holds results of another machine ({kind})")
    return content


def _key(result: dict[str, Any]) -> tuple[str, str, bool]:
    return result["suite"], result["case"], result["keep_memory"]
