"""Read the results of a recipe's run from its files. Missing results are listed, never filled in."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from exo.reporting.results import Checkpoint, Results, Step, Trial
from exo.reporting.statistics import Estimate
from exo.runs import directory as run_directory
from exo.runs import inputs as run_inputs
from exo.runs import record as run_record

ESTIMATES = {"reward": "reward", "accuracy": "accuracy", "gain": "rise", "kl": "kl", "kl_k3": "kl_k3"}  # field -> key


def read(directory: Path) -> Results:
    """Read the results that a recipe's run has so far. ValueError if it is no such run or a file is damaged."""
    if not run_directory.is_run(directory, "train"):
        raise ValueError(f"--run {directory}: expected the run of a recipe; python -m exo.train makes one")
    record = load_json(directory / run_record.RUN_FILE)
    if not {"plan", "recipe"} <= record.keys():
        raise ValueError(f"--run {directory}: its run.json has no plan; run python -m exo.train --recipe again")
    try:
        steps = _steps(directory, record["plan"])
        by_name = {step.name: step for step in steps}
        sft = next((step for step in steps if step.facts.get("method") == "sft"), None)
        start = _trial(directory, sft, by_name) if sft and not sft.missing else None
        others = [step for step in steps if step.facts.get("method") not in (None, "sft")]
        trials = [_trial(directory, step, by_name, comparable=start is not None) for step in others]
    except (LookupError, TypeError, AttributeError) as error:  # of JSON that no stage wrote
        text = f"expected files as exo.train and its stages write them; {type(error).__name__}: {error}"
        raise ValueError(f"--run {directory}: {text}") from None
    return Results(directory, record, steps, start, trials)


def load_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file. ValueError with the path if it has none."""
    try:
        content = run_record.read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON; {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object in JSON; got a {type(content).__name__}")
    return content


def _steps(directory: Path, plan: Sequence[dict[str, Any]]) -> list[Step]:
    steps = []
    for entry in plan:
        if entry["stage"] == "report":
            continue
        record = run_record.record(directory / entry["name"]) or {}
        missing = "" if "finished" in record else "did not finish" if record else "has not started"
        facts = {key: value for key, value in entry.items() if key not in ("name", "stage", "needs", "options")}
        stale = "" if missing else ", ".join(_changed(directory, entry, record))
        steps.append(Step(entry["name"], entry["stage"], facts, record, missing, stale))
    return steps


def _changed(directory: Path, entry: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    """Yield what changed since a step ran: options, and outputs of other steps that it read."""
    yield from (f"--{name}" for name in run_record.changed(record, entry.get("options", record["arguments"])))
    # the directory of the recipe's run when the step ran; it may have been moved since
    original = record["arguments"]["output_dir"].removesuffix(entry["name"])
    for option, recorded in record["inputs"].items():
        path = record["arguments"][option]
        if path.startswith(original):
            path = path.removeprefix(original)
            if run_inputs.fingerprint(str(directory / path)) != recorded:
                yield path


def _trial(directory: Path, step: Step, steps: dict[str, Step], comparable: bool = True) -> Trial:
    name = step.name.removeprefix("evaluation/")
    folder = directory / step.name
    is_evaluated = comparable and not step.missing
    evaluation = load_json(folder / "evaluation.json") if is_evaluated else {}
    return Trial(
        name=name,
        method=step.facts["method"],
        k=step.facts.get("k"),
        n=step.facts.get("n"),
        seed=step.facts.get("seed"),
        varied=step.facts.get("varied", {}),
        folder=folder,
        arguments=steps[name].record.get("arguments", {}) if name in steps else {},
        evaluation=evaluation,
        checkpoints=tuple(map(_checkpoint, evaluation["checkpoints"])) if is_evaluated else (),
    )


def _checkpoint(entry: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(
        entry["name"],
        entry["step"],
        win_rates={opponent: _estimate(rate) for opponent, rate in entry["win_rate"].items()},
        spread=entry["spread"],
        unfinished=entry["unfinished"],
        kl_bound=entry.get("kl_bound"),
        **{name: _estimate(entry[key]) for name, key in ESTIMATES.items() if key in entry},
    )


def _estimate(values: Mapping[str, float]) -> Estimate:
    if not all(isinstance(value, int | float) for value in values.values()):
        raise TypeError(f"expected numbers; got {', '.join(type(value).__name__ for value in values.values())}")
    return Estimate(**values)
