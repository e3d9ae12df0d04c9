"""A process of benchmarks.against: it keeps one case of one revision warm, and answers a line of JSON with another."""

import gc
import importlib
import json
import os
import sys
from typing import Any

import benchmarks  # noqa: F401  sets the environment before torch is imported
from benchmarks import harness, measure

SUITES = ("logits", "linear", "accuracy", "step")


class Worker:
    """Answer the requests names, prepare, round and drop."""

    def __init__(self, device: str, full: bool) -> None:
        self.options = harness.Options(device, full, ours_only=True, keep_memory=measure.keep_memory())
        self.run: harness.Run | None = None

    def names(self) -> list[str]:
        """Return the names of all cases."""
        return [f"{suite}/{case}" for suite in SUITES for case in self._cases(suite)]

    def _cases(self, suite: str) -> list[Any]:
        return importlib.import_module(f"benchmarks.{suite}").cases(self.options.device, self.options.full)

    def prepare(self, name: str) -> dict[str, Any]:
        """Gate and warm up ours; return the result of the case, without times."""
        suite = name.partition("/")[0]
        (case,) = (case for case in self._cases(suite) if f"{suite}/{case}" == name)
        self.run = harness.Run(case, self.options)
        if case.rounds:
            self.run.one_round(keep=False)
        return self.run.result() | {"timed": bool(case.rounds)}

    def round(self) -> dict[str, dict[str, float | None]]:
        """Return the times of a call of every contender of ours."""
        assert self.run is not None and self.run.clock is not None
        ours = {name: call for name, call in self.run.calls.items() if name.startswith(harness.OURS)}
        return {name: self.run.clock(call)._asdict() for name, call in ours.items()}

    def drop(self) -> None:
        """Free the case: the other process needs the memory."""
        self.run = None
        gc.collect()
        if self.options.device == "cuda":
            import torch

            torch.cuda.empty_cache()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # prints of the libraries must not be read as answers
    worker = Worker(sys.argv[1], sys.argv[2] == "full")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(worker, request["do"])(*request["with"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
