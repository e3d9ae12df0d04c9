"""A seeded fuzz harness: thousands of valid and hostile inputs, each of which must give the right result or one line.

    python -m tests.fuzz --seed 0 --cases 2000             every class
    python -m tests.fuzz --seed 0 --only data --case 17    one case again, with its traceback

A case is a function of a random stream that depends on the seed, the class and the case's number alone. It returns what
became of it ("right", "refused", ...) and raises for everything else: a wrong number, a traceback, a message of several
lines. The classes are in tests/fuzz_cases.py.
"""

import argparse
import random
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # the tests import each other by name

Case = Callable[[random.Random, Path], str]
SECONDS = 60  # that a case may take


class Failure(NamedTuple):
    name: str
    case: int
    error: str


def run(name: str, case: Case, seed: int, numbers: Iterator[int] | range) -> tuple[Counter[str], list[Failure]]:
    """Run cases of a class; return how many came out which way, and those that failed."""
    outcomes: Counter[str] = Counter()
    failures = []
    for number in numbers:
        try:
            outcomes[once(name, case, seed, number)] += 1
        except Exception as error:  # every one of them is a finding
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            failures.append(Failure(name, number, " ".join(what.split())[:400]))
            outcomes["FAILED"] += 1
    return outcomes, failures


def once(name: str, case: Case, seed: int, number: int) -> str:
    with TemporaryDirectory(prefix="exo-fuzz-") as folder, warnings.catch_warnings(), _at_most(SECONDS):
        warnings.simplefilter("ignore")
        return case(random.Random(f"{seed}/{name}/{number}"), Path(folder))


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def late(signum: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    import fuzz_cases

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=2000, help="of all classes together, in their proportions")
    parser.add_argument("--only", choices=sorted(fuzz_cases.CLASSES), help="one class")
    parser.add_argument("--case", type=int, help="one case of it")
    options = parser.parse_args()
    names = [options.only] if options.only else list(fuzz_cases.CLASSES)
    if options.case is not None:
        print(once(names[0], fuzz_cases.CLASSES[names[0]].case, options.seed, options.case))
        return 0
    shares = sum(fuzz_cases.CLASSES[name].share for name in names)
    failed = []
    for name in names:
        entry = fuzz_cases.CLASSES[name]
        number = max(1, round(options.cases * entry.share / shares))
        outcomes, failures = run(name, entry.case, options.seed, range(number))
        counted = ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(outcomes.items()))
        print(f"{name}: {number:,} cases: {counted}", flush=True)
        failed += failures
    for failure in failed:
        print(f"--only {failure.name} --case {failure.case}: {failure.error}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
