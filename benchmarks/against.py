"""Compare the working tree with another revision: did a change cost anything?

    python -m benchmarks.against REV [-k TEXT] [--rounds N] [--device cpu|cuda] [--full]

REV is checked out in a temporary worktree. Two processes, one for each version, stay warm and run the same case of this
tree's benchmarks in turn, round by round, so that noise meets both. The exit status is 1 if a case became slower,
needs more memory or is less exact.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import guard, measure, table
from benchmarks.harness import MIB
from benchmarks.machine import ROOT

ROUNDS = 20
SLOWER = 1.02  # the whole interval of the ratio of times must lie above it
SAME = 1.06  # it must end below it
# half-width, in ranks, of the 95% interval of a median: 0.98 sqrt(n), from the binomial distribution
RANKS = 0.98
COUNTED = {"MiB": ("extra_bytes", MIB), "MiB allocated": ("allocated_bytes", MIB), "launches": ("launches", 1)}


class Process:
    """A worker that imports exo_kernels and exo from `tree`, and benchmarks from here."""

    def __init__(self, tree: Path, here: Path, arguments: list[str]) -> None:
        environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{tree}"}
        self.pipe = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments], cwd=here, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, do: str, *arguments: Any) -> Any:
        """Return the answer to a request. Raises RuntimeError with the worker's error."""
        assert self.pipe.stdin is not None and self.pipe.stdout is not None
        self.pipe.stdin.write(json.dumps({"do": do, "with": arguments}) + "\n")
        self.pipe.stdin.flush()
        line = self.pipe.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended with status {self.pipe.wait()}"}
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
        command = ["git", "worktree", "add", "--detach", "--quiet", str(tree), revision]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"cannot check out {revision}: {done.stderr.strip().splitlines()[-1]}")
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


class Comparison(NamedTuple):
    """A case in both versions: times by round, and what does not need a clock."""

    case: str
    new: dict[str, Any]
    old: dict[str, Any]
    ratios: list[float]  # new / old

    @property
    def interval(self) -> tuple[float, float, float]:
        """Return the 95% interval of the median ratio, by ranks: lower end, median, upper end."""
        ordered, n = sorted(self.ratios), len(self.ratios)
        low = max(0, int(n / 2 - RANKS * n**0.5))
        return ordered[low], statistics.median(ordered), ordered[n - 1 - low]

    @property
    def regressions(self) -> list[str]:
        """Return what became worse: time, memory, launches, errors."""
        found = []
        if self.ratios and self.interval[0] > SLOWER:
            found.append(f"{self.interval[1]:.2f} x the time")
        for label, (key, scale) in COUNTED.items():
            if self.new[key] is None:
                continue
            new, old = self.new[key] / scale, self.old[key] / scale
            if new > old * guard.MARGINS[label] + guard.SLACK[label]:
                found.append(f"{new:.4g} {label}, {old:.4g} before")
        for kind, error in self.new["errors"].items():
            old = self.old["errors"].get(kind, error)
            if not error <= old * guard.MARGINS["error"] + guard.SLACK["error"]:
                found.append(f"{kind} error {error:.1e}, {old:.1e} before")
        return found

    def __str__(self) -> str:
        times, high = f"{'-':>8}{'':16}", 1.0
        if self.ratios:
            low, middle, high = self.interval
            times = f"{middle:8.3f} {f'({low:.3f}..{high:.3f})':>15}"
        verdict = "; ".join(self.regressions) or "same"
        if self.ratios and not self.regressions and high > SAME:
            verdict = "unclear: the interval is wide, try more --rounds"
        elif self.ratios and not self.regressions and high < 1 / SLOWER:
            verdict = "faster"
        return f"{self.case:48}{times}  {verdict}"


def compare(case: str, new: Process, old: Process, rounds: int | None) -> Comparison:
    """Run a case in both versions, in turn; which is first alternates."""
    prepared = new.ask("prepare", case)
    try:
        ready = [prepared, old.ask("prepare", case)]
    except RuntimeError as error:
        new.ask("drop")
        raise LookupError(error) from None
    samples, busy = [], measure.Busy(new.pipe.pid, old.pipe.pid)
    for i in range((rounds or ROUNDS) if ready[0]["rounds"] else 0):
        in_turn = (new, old) if i % 2 else (old, new)
        answers = {process: process.ask("round") for process in in_turn}
        samples.append((answers[new], answers[old]))
    # the CPU time of the threads does not count what a neighbour takes from one of the two
    key = "cpu_seconds" if busy.share() > table.BUSY and samples and samples[0][0]["cpu_seconds"] else "seconds"
    ratios = [mine[key] / theirs[key] for mine, theirs in samples]
    for process in (new, old):
        process.ask("drop")
    return Comparison(case, *ready, ratios)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against", description="Compare this tree with another revision, case by case."
    )
    parser.add_argument("revision", metavar="REV", help="a commit, tag or branch, such as HEAD~1")
    parser.add_argument("-k", default="", metavar="TEXT", help="only cases with this in their name, such as linear/EXO")
    parser.add_argument("--rounds", type=int, help=f"rounds of each case (default: {ROUNDS})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: the GPU if there is one")
    parser.add_argument("--full", action="store_true", help="all cases")
    options = parser.parse_args(argv)
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    with worktree(options.revision) as tree, tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "benchmarks").symlink_to(ROOT / "benchmarks")
        arguments = [options.device, "full" if options.full else "quick"]
        new, old = Process(ROOT, here, arguments), Process(tree, here, arguments)
        try:
            return _report(new, old, options)
        finally:
            new.close()
            old.close()


def _report(new: Process, old: Process, options: argparse.Namespace) -> int:
    """Print a line for each case as it is measured, and return the exit status."""
    print(f"{f'this tree over {options.revision}':48}{'time':>8} {'(95%)':>15}")
    regressed = compared = 0
    for case in new.ask("names"):
        if options.k not in case:
            continue
        try:
            line = compare(case, new, old, options.rounds)
        except LookupError as error:
            print(f"{case:48}  cannot run at {options.revision}: {error}", flush=True)
            continue
        except RuntimeError as error:
            raise SystemExit(f"{case}: {error}") from None
        compared += 1
        regressed += bool(line.regressions)
        print(line, flush=True)
    if not compared:
        raise SystemExit("no case was compared")
    print(f"{regressed} regressed" if regressed else "no regression")
    return 1 if regressed else 0


if __name__ == "__main__":
    raise SystemExit(main())
