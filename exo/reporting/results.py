"""The results of a recipe's run: its steps, evaluated checkpoints, and means over seeds.

A trial is one training run and its evaluation: a method with a K, a seed and values of the swept options. A setting is
a group of trials that differ only in the seed. A series is a method with its K or N.
"""

import json
import statistics
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from exo import data
from exo.reporting.statistics import Estimate, crossed_mean, mean_over_seeds

FAILED_BELOW = 3.0  # standard errors of the gain over SFT


class Step(NamedTuple):
    name: str
    stage: str
    facts: dict[str, Any]
    record: dict[str, Any]  # its run.json; empty before it starts
    missing: str  # why there is no result to read, or ""
    stale: str  # the options and inputs that changed after it ran, or ""

    @property
    def seconds(self) -> float:
        started, finished = (datetime.fromisoformat(self.record[name]) for name in ("started", "finished"))
        return (finished - started).total_seconds()


class Checkpoint(NamedTuple):
    name: str
    step: int | None
    reward: Estimate
    accuracy: Estimate
    win_rates: dict[str, Estimate]
    spread: float
    unfinished: float
    gain: Estimate | None = None  # over SFT; None for SFT itself
    kl: Estimate | None = None
    kl_k3: Estimate | None = None
    kl_bound: float | None = None  # of Best-of-N, which has no log-probs


@dataclass(frozen=True)
class Trial:
    name: str  # of the step that trained it
    method: str
    k: int | None
    n: int | None  # of Best-of-N
    seed: int | None
    varied: dict[str, Any]
    folder: Path  # of its evaluation
    arguments: dict[str, Any]  # of its training
    evaluation: dict[str, Any]  # its evaluation.json; empty until it is evaluated
    checkpoints: tuple[Checkpoint, ...]  # sorted by step; empty until it is evaluated

    @property
    def last(self) -> Checkpoint:
        return self.checkpoints[-1]

    @property
    def series(self) -> str:
        size = f" K={self.k}" if self.k else f" N={self.n}" if self.n else ""
        return self.method + size

    @property
    def setting(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.varied.items())

    @property
    def options(self) -> dict[str, Any]:
        """Return K and the values of the swept options."""
        return ({"K": self.k} if self.k else {}) | self.varied

    def samples(self, checkpoint: Checkpoint) -> list[data.Example]:
        return data.read(self.folder / "samples" / f"{checkpoint.name}.jsonl", purpose="samples").examples


@dataclass(frozen=True)
class Setting:
    trials: tuple[Trial, ...]
    start: Trial

    @property
    def first(self) -> Trial:
        return self.trials[0]

    def mean(self, metric: str) -> Estimate | None:
        """Return a metric of the last checkpoint over the seeds; None if a seed lacks it."""
        return mean_over_seeds([getattr(trial.last, metric) for trial in self.trials])

    def win_rate(self, opponent: str) -> Estimate | None:
        """Return the win rate of the last checkpoint over the seeds; None if a seed lacks it."""
        return mean_over_seeds([trial.last.win_rates.get(opponent) for trial in self.trials])

    @cached_property
    def gain(self) -> Estimate:
        """Return the gain of the last checkpoint over SFT, per prompt, from the rewards of the samples.

        ValueError if the two were evaluated on different prompts.
        """
        start = _mean_rewards(self.start)
        gains = []
        for trial in self.trials:
            end = _mean_rewards(trial)
            if [prompt for prompt, _ in end] != [prompt for prompt, _ in start]:
                raise ValueError(f"{trial.folder}: expected the prompts of {self.start.folder}; evaluate both again")
            gains.append([reward - sft for (_, reward), (_, sft) in zip(end, start, strict=True)])
        return crossed_mean(gains)

    @property
    def failed(self) -> bool:
        return not self.gain.mean > FAILED_BELOW * self.gain.standard_error


def _mean_rewards(trial: Trial) -> list[tuple[str, float]]:
    """Return (prompt, mean reward of its samples) at the last checkpoint."""
    examples = trial.samples(trial.last)
    return [(example.prompt, statistics.fmean(example.rewards or ())) for example in examples]


_mean_gain = attrgetter("gain.mean")  # of a setting


@dataclass(frozen=True)
class Results:
    directory: Path
    record: dict[str, Any]
    steps: list[Step]
    start: Trial | None  # the SFT model that every method starts from
    trials: list[Trial]

    @property
    def evaluated(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.checkpoints]

    @property
    def with_start(self) -> list[Trial]:
        """Return SFT, if it is evaluated, and all evaluated trials."""
        return [*([self.start] if self.start else []), *self.evaluated]

    @cached_property
    def settings(self) -> list[Setting]:
        if self.start is None:
            return []

        def key(trial: Trial) -> tuple[str, str]:
            return trial.series, json.dumps(trial.varied)

        groups = groupby(sorted(self.evaluated, key=key), key=key)
        return [Setting(tuple(trials), self.start) for _, trials in groups]

    @cached_property
    def best_per_series(self) -> list[Setting]:
        """Return the setting with the highest mean gain for each method and K, in the order of the plan."""
        names = dict.fromkeys(trial.series for trial in self.evaluated)
        return [max((s for s in self.settings if s.first.series == name), key=_mean_gain) for name in names]

    @cached_property
    def best_per_method(self) -> list[Setting]:
        """Return the setting with the highest mean gain for each method, in the order of the plan."""
        names = dict.fromkeys(trial.method for trial in self.evaluated)
        return [max((s for s in self.best_per_series if s.first.method == name), key=_mean_gain) for name in names]

    @cached_property
    def varied(self) -> list[str]:
        """Return the options, K included, that have several values in the evaluated trials."""
        values: dict[str, set[float]] = {}
        for trial in self.evaluated:
            for name, value in trial.options.items():
                values.setdefault(name, set()).add(value)
        return [name for name in values if len(values[name]) > 1]
