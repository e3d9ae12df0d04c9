"""The results of a recipe's run, read from its files: steps, evaluated checkpoints, and means over seeds.

A trial is one training run and its evaluation: a method with a K, a seed and values of the sweep. A setting is a group
of trials that differ only in the seed. Missing results are listed, never filled in.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from exo import data
from exo.evaluation import metrics as evaluation_metrics
from exo.runs import directory as run_directory
from exo.runs import inputs as run_inputs
from exo.runs import record as run_record

FAILED_BELOW = 3.0  # standard errors of the rise over the start


class Estimate(NamedTuple):
    """A mean over prompts as evaluation.json has it, with its 95% interval."""

    mean: float
    low: float
    high: float
    standard_error: float


class Step(NamedTuple):
    name: str
    stage: str
    facts: dict[str, Any]
    record: dict[str, Any]  # its run.json; empty before it begins
    missing: str  # why there is no result to read, or ""
    stale: str  # options, and what it read, that have changed since, or ""


class Checkpoint(NamedTuple):
    name: str
    step: int | None
    reward: Estimate
    accuracy: Estimate
    win_rates: dict[str, Estimate]
    spread: float
    unfinished: float
    rise: Estimate | None  # none for the start itself
    kl: Estimate | None
    kl_k3: Estimate | None
    kl_bound: float | None  # of Best-of-N, which has no log-probs of its own


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
    checkpoints: tuple[Checkpoint, ...]  # in order of their steps; empty until it is evaluated

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

    def samples(self, checkpoint: Checkpoint) -> list[data.Example]:
        return data.read(self.folder / "samples" / f"{checkpoint.name}.jsonl", purpose="samples").examples


@dataclass(frozen=True)
class Setting:
    trials: tuple[Trial, ...]
    start: Trial

    @property
    def first(self) -> Trial:
        return self.trials[0]

    def mean(self, name: str) -> Estimate | None:
        """Return a metric of the last checkpoint, such as "win_rates.chosen", over the seeds; None if it is missing."""
        return over_seeds([_value(trial.last, name) for trial in self.trials])

    @cached_property
    def rise(self) -> Estimate:
        """Return the rise of the last checkpoint over the start, per prompt, from the rewards of the samples."""
        before = _mean_rewards(self.start)
        rises = []
        for trial in self.trials:
            after = _mean_rewards(trial)
            if [prompt for prompt, _ in after] != [prompt for prompt, _ in before]:
                raise ValueError(f"{trial.folder}: expected the prompts of {self.start.folder}; evaluate both again")
            rises.append([a - b for (_, a), (_, b) in zip(after, before, strict=True)])
        return crossed(rises)

    @property
    def failed(self) -> bool:
        return not self.rise.mean > FAILED_BELOW * self.rise.standard_error


@dataclass(frozen=True)
class Results:
    directory: Path
    record: dict[str, Any]
    steps: list[Step]
    start: Trial | None  # the fine-tuned model that every method begins with
    trials: list[Trial]

    @property
    def evaluated(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.checkpoints]

    @cached_property
    def settings(self) -> list[Setting]:
        if self.start is None:
            return []
        alike = groupby(sorted(self.evaluated, key=_place), key=_place)
        return [Setting(tuple(trials), self.start) for _, trials in alike]

    @cached_property
    def best(self) -> list[Setting]:
        """Return the setting with the highest mean rise for each method and K, in the order of the plan."""
        found: dict[str, Setting] = {}
        for setting in self.settings:
            series = setting.first.series
            if series not in found or setting.rise.mean > found[series].rise.mean:
                found[series] = setting
        order = list(dict.fromkeys(trial.series for trial in self.trials))
        return sorted(found.values(), key=lambda setting: order.index(setting.first.series))

    @cached_property
    def best_of_method(self) -> list[Setting]:
        """Return the setting with the highest mean rise for each method."""
        best: dict[str, Setting] = {}
        for setting in self.best:
            method = setting.first.method
            if method not in best or setting.rise.mean > best[method].rise.mean:
                best[method] = setting
        return list(best.values())

    @cached_property
    def varied(self) -> dict[str, list[float]]:
        """Return the options that differ between trials, K included, with their values."""
        rows = [({"K": trial.k} if trial.k else {}) | trial.varied for trial in self.evaluated]
        names = dict.fromkeys(name for row in rows for name in row)
        values = {name: sorted({row[name] for row in rows if name in row}) for name in names}
        return {name: found for name, found in values.items() if len(found) > 1}


def read(directory: Path) -> Results:
    """Read the results that a recipe's run has so far."""
    if not run_directory.is_run(directory, "train"):
        raise ValueError(f"--run {directory}: expected the run of a recipe; python -m exo.train makes one")
    record = load(directory / run_record.RUN_FILE)
    if not {"plan", "recipe"} <= record.keys():
        raise ValueError(f"--run {directory}: its run.json has no plan; run python -m exo.train --recipe again")
    try:
        return _read(directory, record)
    except (LookupError, TypeError, AttributeError) as error:  # of JSON that no stage of ours wrote
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"--run {directory}: expected files as exo.train and its stages write them; {what}") from None


def _read(directory: Path, record: dict[str, Any]) -> Results:
    steps = _steps(directory, record["plan"])
    by_name = {step.name: step for step in steps}
    begins = next((step for step in steps if step.facts.get("method") == "sft"), None)
    start = _trial(directory, begins, by_name) if begins and not begins.missing else None
    trials = [
        _trial(directory, step, by_name, comparable=start is not None)
        for step in steps
        if step.facts.get("method") not in (None, "sft")
    ]
    return Results(directory, record, steps, start, trials)


def _steps(directory: Path, plan: Sequence[dict[str, Any]]) -> list[Step]:
    found = []
    for entry in plan:
        if entry["stage"] == "report":
            continue
        record = run_record.record(directory / entry["name"]) or {}
        missing = "" if "finished" in record else "did not finish" if record else "has not begun"
        facts = {key: value for key, value in entry.items() if key not in ("name", "stage", "needs", "options")}
        stale = "" if missing else ", ".join(_changed(directory, entry, record))
        found.append(Step(entry["name"], entry["stage"], facts, record, missing, stale))
    return found


def _changed(directory: Path, entry: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    """Yield what changed since a step ran: options, and outputs of other steps that it read."""
    yield from (f"--{name}" for name in run_record.changed(record, entry.get("options", record["arguments"])))
    # where the whole run was; it may have been moved since
    run = record["arguments"]["output_dir"].removesuffix(entry["name"])
    for option, known in record["inputs"].items():
        path = record["arguments"][option]
        if path.startswith(run) and run_inputs.fingerprint(str(directory / path.removeprefix(run))) != known:
            yield path.removeprefix(run)


def _trial(directory: Path, step: Step, steps: dict[str, Step], comparable: bool = True) -> Trial:
    name = step.name.removeprefix("evaluation/")
    trained = steps[name].record if name in steps else {}
    there = comparable and not step.missing
    facts = step.facts
    return Trial(
        name, facts["method"], facts.get("k"), facts.get("n"), facts.get("seed"), facts.get("varied", {}),
        directory / step.name, trained.get("arguments", {}), _checkpoints(directory / step.name) if there else (),
    )  # fmt: skip


def _checkpoints(folder: Path) -> tuple[Checkpoint, ...]:
    entries = evaluation(folder)["checkpoints"]
    return tuple(
        Checkpoint(
            entry["name"], entry["step"], _estimate(entry["reward"]), _estimate(entry["accuracy"]),
            {over: _estimate(rate) for over, rate in entry["win_rate"].items()}, entry["spread"], entry["unfinished"],
            _maybe(entry, "rise"), _maybe(entry, "kl"), _maybe(entry, "kl_k3"), entry.get("kl_bound"),
        )
        for entry in entries
    )  # fmt: skip


def _maybe(entry: Mapping[str, Any], name: str) -> Estimate | None:
    return _estimate(entry[name]) if name in entry else None


def _estimate(values: Mapping[str, float]) -> Estimate:
    if not all(isinstance(value, int | float) for value in values.values()):
        raise TypeError(f"expected numbers; got {', '.join(type(value).__name__ for value in values.values())}")
    return Estimate(**values)


def evaluation(folder: Path) -> dict[str, Any]:
    return load(folder / "evaluation.json")


def load(path: Path) -> dict[str, Any]:
    try:
        found = run_record.read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON; {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object in JSON; got a {type(found).__name__}")
    return found


def _place(trial: Trial) -> tuple[str, str]:
    return trial.series, json.dumps(trial.varied)


def _value(checkpoint: Checkpoint, name: str) -> Estimate | None:
    outer, _, inner = name.partition(".")
    value = getattr(checkpoint, outer)
    return value.get(inner) if inner else value


def _mean_rewards(trial: Trial) -> list[tuple[str, float]]:
    """Return (prompt, mean reward of its samples) at the last checkpoint."""
    examples = trial.samples(trial.last)
    return [(example.prompt, statistics.fmean(example.rewards or ())) for example in examples]


def over_seeds(values: Sequence[Estimate | None]) -> Estimate | None:
    """Return the mean over seeds of means over prompts; None if a seed lacks the metric.

    All seeds share the prompts, so the error of the prompts is counted in full, and the error of the seeds' means is
    added. The result is slightly too large, never too small.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    if len(known) == 1:
        return known[0]
    means = [value.mean for value in known]
    prompts = statistics.fmean(value.standard_error for value in known)
    return _normal(statistics.fmean(means), math.hypot(prompts, evaluation_metrics.standard_error(means)))


def crossed(values: Sequence[Sequence[float]]) -> Estimate:
    """Return the mean of a table with a row per seed and a column per prompt, both random.

    The errors of the prompts' means and of the seeds' means both contain the residual, so it is subtracted from the
    second: s_prompts^2 / P + max(0, s_seeds^2 / S - s_rest^2 / (P S)).
    """
    seeds = [statistics.fmean(row) for row in values]
    prompts = [statistics.fmean(column) for column in zip(*values, strict=True)]
    mean = statistics.fmean(seeds)
    variance = evaluation_metrics.standard_error(prompts) ** 2 if len(prompts) > 1 else 0.0
    if len(seeds) > 1 and len(prompts) > 1:
        rest = [
            x - s - p + mean for row, s in zip(values, seeds, strict=True) for x, p in zip(row, prompts, strict=True)
        ]
        square = sum(x * x for x in rest) / ((len(seeds) - 1) * (len(prompts) - 1))
        variance += max(0.0, evaluation_metrics.standard_error(seeds) ** 2 - square / (len(seeds) * len(prompts)))
    return _normal(mean, math.sqrt(variance))


def _normal(mean: float, error: float) -> Estimate:
    return Estimate(mean, mean - 1.96 * error, mean + 1.96 * error, error)


def envelope(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point with a smaller or equal x exceeds, sorted by x."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return kept
