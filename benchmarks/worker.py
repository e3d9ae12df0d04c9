"""A process of benchmarks.against: it keeps one case of one revision warm, and answers a line of JSON with another."""

import importlib
import json
import os
import sys
from typing import Any

import benchmarks  # noqa: F401  sets the environment before torch is imported
from benchmarks import harness, measure

KEYS = ("errors", "extra_bytes", "allocated_bytes", "launches")
SUITES = ("logits", "linear", "accuracy", "step")


class Worker:
    """Answer requests about cases: names, prepare, round, drop."""

    def __init__(self, device: str, full: bool) -> None:
        self.options = harness.Options(device, full, ours_only=True)
        self.run: harness.Run | None = None

    def names(self) -> list[str]:
        """Return the cases of the suites that this revision can import, by their number in `case`."""
        return [f"{suite}/{case}" for suite in SUITES for case in self._cases(suite)]

    def _cases(self, suite: str) -> list[Any]:
        return importlib.import_module(f"benchmarks.{suite}").cases(self.options.device, self.options.full)

    def prepare(self, case: str) -> dict[str, Any]:
        """Gate and warm up ours; return what does not need a clock."""
        suite = case.partition("/")[0]
        (found,) = (c for c in self._cases(suite) if f"{suite}/{c}" == case)
        self.run = harness.Run(found, self.options)
        if found.rounds:
            self.run.one_round(keep=False)
        row = vars(self.run.rows[harness.OURS])
        return {"rounds": found.rounds} | {key: row[key] for key in KEYS}

    def round(self) -> dict[str, float | None]:
        assert self.run is not None and self.run.clock is not None
        return self.run.clock(self.run.calls[harness.OURS])._asdict()

    def drop(self) -> None:
        self.run = None


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    measure.keep_memory()
    os.dup2(2, 1)  # prints of the libraries must not be read as answers
    worker = Worker(sys.argv[1], sys.argv[2] == "full")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(worker, request["do"])(*request.get("with", ()))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
