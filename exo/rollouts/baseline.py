"""How evaluated completions were drawn, and an earlier evaluation to compare with, which must have drawn alike.

Left out: the comparison (estimates).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exo import data
from exo.data import Example
from exo.rollouts import samples
from exo.runs import inputs as run_inputs
from exo.runs import record as run_record

Settings = dict[str, Any]  # k, temperature, top_p and max_new_tokens of what is evaluated; None where unknown


def settings_of(examples: Sequence[Example], path: str) -> Settings:
    """How a file's completions were drawn, by its rows or else by the record of its run."""
    run = run_record.record(Path(path)) or run_record.record(Path(path).parent) or {}
    asked = run.get("arguments", {}) if run.get("stage") == "sample" else {}
    found: Settings = {}
    for name in samples.Settings._fields:
        values = {getattr(example.tokens, name, None) for example in examples}
        if len(values) > 1:
            raise ValueError(f"--samples {path}: expected one {name} for all rows; got {sorted(map(str, values))}")
        (value,) = values
        found[name] = asked.get(name) if value is None else value
    sizes = {len(example.completions) for example in examples}
    return {"k": sizes.pop() if len(sizes) == 1 else None} | found


def read(
    name: str,
    prompts: Sequence[str],
    settings: Settings,
    scorer: Mapping[str, str | None],
    inputs: Mapping[str, str],
) -> list[tuple[float, ...]]:
    """The rewards of the completions of an earlier evaluation, a row a prompt.

    `scorer` has the options that name the scorer, and `inputs` the fingerprints of what this evaluation reads.
    ValueError, with the differences, unless the earlier one sampled and scored as this one does.
    """
    path = Path(run_inputs.source("baseline", name, "evaluate"))
    run = run_record.record(path.parent) or {}
    try:
        before = run_record.read_json(path)
        last = str(before["checkpoints"][-1]["name"])
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"--baseline {name}: {path} is not what python -m exo.evaluate writes") from None
    different = [
        f"{key} {before.get(key)!r}, here {value!r}"
        for key, value in settings.items()
        if None not in (value, before.get(key)) and value != before.get(key)
    ]
    different += [
        f"{option} {run.get('arguments', {}).get(option)!r}, here {value!r}"
        for option, value in scorer.items()
        if run.get("inputs", {}).get(option) != inputs.get(option)
    ]
    other = run.get("inputs", {}).get("model")
    if other is not None and "reference" in inputs and other != inputs["reference"]:
        different.append("another model than --reference")
    if different:
        raise ValueError(
            f"--baseline {name}: expected an evaluation like this one; it has {'; '.join(different)}; evaluate the "
            "reference again with the options of this run"
        )
    examples = data.read(path.parent / "samples" / f"{last}.jsonl", purpose="samples").examples
    if [example.prompt for example in examples] != list(prompts):
        raise ValueError(f"--baseline {name}: expected an evaluation on the same prompts; got others")
    return [example.rewards or () for example in examples]
