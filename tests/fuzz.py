"""A seeded fuzz harness: each of thousands of valid and hostile inputs must give the right result or a one-line error.

    python -m tests.fuzz --seed 0 --cases 2000             every class
    python -m tests.fuzz --seed 0 --only data --case 17    repeat one case, with its traceback

A case is a function of a random stream, which depends only on the seed, the class and the number of the case. It
returns its outcome ("right", "refused", ...) and raises if a result is wrong or an error is not a one-line message.
The classes are in tests/fuzz_cases.py.
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
SECONDS = 60  # time limit of a case


class Failure(NamedTuple):
    name: str
    case: int
    error: str


def run(name: str, case: Case, seed: int, numbers: Iterator[int] | range) -> tuple[Counter[str], list[Failure]]:
    """Run the numbered cases of a class; return the count of each outcome, and the failures."""
    outcomes: Counter[str] = Counter()
    failures = []
    for number in numbers:
        try:
            outcomes[once(name, case, seed, number)] += 1
        except Exception as error:  # every exception is a failure
            frame = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
            failures.append(Failure(name, number, " ".join(message.split())[:400]))
            outcomes["FAILED"] += 1
    return outcomes, failures


def once(name: str, case: Case, seed: int, number: int) -> str:
    with TemporaryDirectory(prefix="exo-fuzz-") as folder, warnings.catch_warnings(), _time_limit(SECONDS):
        warnings.simplefilter("ignore")
        return case(random.Random(f"{seed}/{name}/{number}"), Path(folder))


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def on_alarm(signum: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def main() -> int:
    import fuzz_cases

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cases", type=int, default=2000, help="number of cases of all classes together, shared by weight"
    )
    parser.add_argument("--only", choices=sorted(fuzz_cases.CLASSES), help="run one class")
    parser.add_argument("--case", type=int, help="run one case of that class")
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
        counts = ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(outcomes.items()))
        print(f"{name}: {number:,} cases: {counts}", flush=True)
        failed += failures
    for failure in failed:
        print(f"--only {failure.name} --case {failure.case}: {failure.error}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
