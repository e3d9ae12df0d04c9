"""Read an earlier evaluation as a baseline. It must have sampled and scored in the same way."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exo import data
from exo.data import Example
from exo.data.formats.parsed_row import SETTINGS
from exo.runs import inputs as run_inputs
from exo.runs import record as run_record

Settings = dict[str, Any]  # k, temperature, max_new_tokens and top_p of the evaluated completions; None if unknown


def settings_of(examples: Sequence[Example], path: str) -> Settings:
    """Return the sampling settings of a file of completions, from its rows or else from the record of its run."""
    run = run_record.record(Path(path)) or run_record.record(Path(path).parent) or {}
    arguments = run.get("arguments", {}) if run.get("stage") == "sample" else {}
    sizes = {len(example.completions) for example in examples}
    settings: Settings = {"k": sizes.pop() if len(sizes) == 1 else None}
    for name in SETTINGS:
        values = {getattr(example.tokens, name, None) for example in examples}
        if len(values) > 1:
            raise ValueError(f"--samples {path}: expected one {name} for all rows; got {sorted(map(str, values))}")
        (value,) = values
        settings[name] = arguments.get(name) if value is None else value
    return settings


def read(
    name: str, prompts: Sequence[str], settings: Settings, scorer: Mapping[str, str | None], inputs: Mapping[str, str]
) -> list[tuple[float, ...]]:
    """Return the rewards of the completions of an earlier evaluation, a row per prompt.

    `scorer` has the options that name the scorer, and `inputs` the fingerprints of the files that this evaluation
    reads. ValueError, with the differences, if the earlier evaluation sampled or scored in another way.
    """
    path = Path(run_inputs.source("baseline", name, "evaluate"))
    run = run_record.record(path.parent) or {}
    try:
        evaluation = run_record.read_json(path)
        last = str(evaluation["checkpoints"][-1]["name"])
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"--baseline {name}: {path} is not a file of python -m exo.evaluate") from None
    differences = [
        f"{key} {evaluation.get(key)!r}, here {value!r}"
        for key, value in settings.items()
        if None not in (value, evaluation.get(key)) and value != evaluation.get(key)
    ]
    differences += [
        f"{option} {run.get('arguments', {}).get(option)!r}, here {value!r}"
        for option, value in scorer.items()
        if run.get("inputs", {}).get(option) != inputs.get(option)
    ]
    model = run.get("inputs", {}).get("model")
    if model is not None and "reference" in inputs and model != inputs["reference"]:
        differences.append("another model than --reference")
    if differences:
        raise ValueError(
            f"--baseline {name}: expected an evaluation like this one; it has {'; '.join(differences)}; evaluate the "
            "reference again with the options of this run"
        )
    examples = data.read(path.parent / "samples" / f"{last}.jsonl", purpose="samples").examples
    if [example.prompt for example in examples] != list(prompts):
        raise ValueError(f"--baseline {name}: expected an evaluation on the same prompts; got others")
    return [example.rewards or () for example in examples]
