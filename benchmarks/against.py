"""Compare the working tree with another revision: did a change cost anything?

    python -m benchmarks.against REV [-k TEXT] [--rounds N] [--device cpu|cuda] [--full]

REV is checked out in a temporary worktree. Two processes, one for each version, stay warm and run the same case of this
tree's benchmarks in turn, round by round, so that noise meets both. A case that became slower is run again in two new
processes. The exit status is 1 if a case became slower, needs more memory or operators, or is less exact.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import guard, measure, table
from benchmarks.machine import ROOT

ROUNDS, LEAST_ROUNDS = 20, 6  # fewer have no 95% interval
SLOWER = 1.02  # the whole interval of the ratio of times must lie above it
SAME = 1.06  # it must end below it
RANKS = 0.98  # half-width, in ranks over sqrt(n), of the 95% interval of a median, from the binomial distribution


class Process:
    """A worker that imports exo_kernels and exo from `tree`, and benchmarks from here."""

    def __init__(self, tree: Path, here: Path, arguments: list[str]) -> None:
        environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{tree}"}
        self.log = tempfile.TemporaryFile("w+")
        self.pipe = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments], cwd=here, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def ask(self, do: str, *arguments: Any) -> Any:
        """Return the answer to a request. Raise RuntimeError with the worker's error."""
        assert self.pipe.stdin is not None and self.pipe.stdout is not None
        try:
            self.pipe.stdin.write(json.dumps({"do": do, "with": arguments}) + "\n")
            self.pipe.stdin.flush()
            answer = json.loads(self.pipe.stdout.readline())
        except (OSError, ValueError):  # it has died
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or [""])[-1]
            raise SystemExit(f"a process ended with status {self.pipe.wait()}: {last}") from None
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["ok"]

    def close(self) -> None:
        self.pipe.kill()
        self.pipe.wait()


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """Check out a revision in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"

        def git(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(["git", "worktree", *arguments], cwd=ROOT, capture_output=True, text=True)

        added = git("add", "--detach", "--quiet", str(tree), revision)
        if added.returncode:
            raise SystemExit(f"cannot check out {revision}: {added.stderr.strip().splitlines()[-1]}")
        try:
            yield tree
        finally:
            git("remove", "--force", str(tree))


@contextlib.contextmanager
def processes(tree: Path, arguments: list[str]) -> Iterator[tuple[Process, Process]]:
    """Start a process for this tree and one for the other."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "benchmarks").symlink_to(ROOT / "benchmarks")
        pair = Process(ROOT, here, arguments), Process(tree, here, arguments)
        try:
            yield pair
        finally:
            for process in pair:
                process.close()


class Comparison(NamedTuple):
    """A contender of ours in both versions."""

    name: str  # case and contender
    ratios: list[float]  # times of this tree over the other's, by round
    worse: list[str]  # of what needs no clock

    @property
    def interval(self) -> tuple[float, float, float]:
        """Return the 95% interval of the median ratio, by ranks: lower end, median, upper end."""
        ordered, n = sorted(self.ratios), len(self.ratios)
        low = max(0, int(n / 2 - RANKS * n**0.5))
        return ordered[low], statistics.median(ordered), ordered[n - 1 - low]

    @property
    def slower(self) -> bool:
        return bool(self.ratios) and self.interval[0] > SLOWER

    @property
    def regressions(self) -> list[str]:
        """Return what became worse: time, memory, operators, errors."""
        return ([f"{self.interval[1]:.2f} x the time"] if self.slower else []) + self.worse

    def __str__(self) -> str:
        times, verdict = f"{'-':>8}{'':16}", "same"
        if self.ratios:
            low, middle, high = self.interval
            times = f"{middle:8.3f} {f'({low:.3f}..{high:.3f})':>15}"
            if high > SAME:
                verdict = "unclear: the interval is wide, try more --rounds"
            elif high < 1 / SLOWER:
                verdict = "faster"
        return f"{self.name:68}{times}  {'; '.join(self.regressions) or verdict}"


def worse(new: dict[str, Any], old: dict[str, Any]) -> dict[str, list[str]]:
    """Return what became worse in two results of a case, by contender, as the guard judges it."""
    before = guard.metrics(old)
    found: dict[str, list[str]] = {}
    for label, metric in guard.metrics(new).items():
        contender, what = label.split(": ", 1)
        found.setdefault(contender, [])
        if metric.unit != "x" and label in before:
            value = before[label].value
            if not metric.value <= guard.allowed(metric, [value]):
                found[contender].append(f"{what} {metric.value:.4g}, {value:.4g} before")
    return found


def compare(case: str, new: Process, old: Process, rounds: int) -> list[Comparison]:
    """Run a case in both versions, in turn; which is first alternates. Raise LookupError if the other cannot run it."""
    result = new.ask("prepare", case)
    try:
        earlier = old.ask("prepare", case)
    except RuntimeError as error:
        new.ask("drop")
        raise LookupError(error) from None
    samples, busy = [], measure.Busy(new.pipe.pid, old.pipe.pid)
    for i in range(rounds if result["timed"] else 0):
        answers = {process: process.ask("round") for process in ((new, old) if i % 2 else (old, new))}
        samples.append((answers[new], answers[old]))
    neighbour = busy.share() > table.BUSY
    comparisons = []
    for contender, texts in worse(result, earlier).items():
        pairs = [(mine[contender], theirs[contender]) for mine, theirs in samples]
        # the CPU time of the threads does not count what a neighbour takes from one of the two
        key = "cpu_seconds" if neighbour and pairs and pairs[0][0]["cpu_seconds"] else "seconds"
        ratios = [mine[key] / theirs[key] for mine, theirs in pairs]
        comparisons.append(Comparison(f"{case} {contender}", ratios, texts))
    for process in (new, old):
        process.ask("drop")
    return comparisons


def report(tree: Path, arguments: list[str], options: argparse.Namespace) -> int:
    """Print a line for each comparison as it is made, and return the exit status."""
    print(f"{f'this tree over {options.revision}':68}{'time':>8} {'(95%)':>15}")
    regressed = compared = 0
    with processes(tree, arguments) as (new, old):
        for case in new.ask("names"):
            if options.k not in case:
                continue
            try:
                comparisons = compare(case, new, old, options.rounds)
                if any(comparison.slower for comparison in comparisons):
                    with processes(tree, arguments) as others:
                        comparisons = compare(case, *others, options.rounds)
            except LookupError as error:
                print(f"{case:68}  cannot run at {options.revision}: {error}", flush=True)
                continue
            except RuntimeError as error:
                raise SystemExit(f"{case}: {error}") from None
            for comparison in comparisons:
                compared += 1
                regressed += bool(comparison.regressions)
                print(comparison, flush=True)
    if not compared:
        raise SystemExit("no case was compared")
    print(f"{regressed} regressed" if regressed else "no regression")
    return 1 if regressed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against", description="Compare this tree with another revision, case by case."
    )
    parser.add_argument("revision", metavar="REV", help="a commit, tag or branch, such as HEAD~1")
    parser.add_argument("-k", default="", metavar="TEXT", help="only cases with this in their name, such as linear/EXO")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each case (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--full", action="store_true", help="all cases")
    options = parser.parse_args(argv)
    if options.rounds < LEAST_ROUNDS:
        parser.error(f"--rounds: expected at least {LEAST_ROUNDS}, which a 95% interval needs; got {options.rounds}")
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree is removed
    with worktree(options.revision) as tree:
        return report(tree, [options.device, "full" if options.full else "quick"], options)


if __name__ == "__main__":
    raise SystemExit(main())
