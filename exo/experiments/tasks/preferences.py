"""Prepare preferences and scored completions of any format; the texts to imitate are the chosen completions.

The source is a file, a hub name or a directory: of shards, or with train.*, and perhaps test.* (or valid.*) and
prompts.*. Without a test part, some prompts are held out. Without prompts.*, the prompts to sample for are those of the
preferences. In a row of scored completions, the best is chosen and the worst is rejected.
"""

from pathlib import Path

from exo.cli import console
from exo.data import DataError, Example, transforms
from exo.experiments.tasks import source
from exo.experiments.tasks.source import Files, TaskRequest, lines


def preferences(request: TaskRequest) -> Files:
    parts = source.source_parts(request.source)
    train, test = (source.subsample(_pairs(paths, request), request) for paths in parts)
    if not train:
        raise DataError(f"{request.source}: expected a row with a best and a worst completion; found none")
    if not parts.test:
        train, test = source.hold_out(train, request.seed)
    test = source.drop_seen(test, {pair.prompt for pair in train}, lambda pair: pair.prompt)
    test_prompts = {pair.prompt for pair in test}
    prompts = [prompt for prompt in _prompts(request, train) if prompt not in test_prompts]
    if not prompts:
        raise DataError(f"{request.source}: expected two prompts at least, one to train on and one to hold out")
    imitated = dict.fromkeys((pair.prompt, pair.completions[0]) for pair in train)
    return {
        "sft.jsonl": lines({"prompt": p, "completion": c} for p, c in imitated),
        "prompts.jsonl": lines({"prompt": p} for p in prompts),
        "test.jsonl": lines({"prompt": pair.prompt, "chosen": pair.completions[0]} for pair in test),
        "pairs.jsonl": lines(
            {"prompt": pair.prompt, "chosen": pair.completions[0], "rejected": pair.completions[1]} for pair in train
        ),
    }


def _pairs(paths: list[str], request: TaskRequest) -> list[Example]:
    pairs, counts = transforms.to_pairs(source.read(paths, "comparisons", request))
    console.counts(counts)
    return pairs


def _prompts(request: TaskRequest, train: list[Example]) -> list[str]:
    """Return the prompts to sample for, from prompts.* or else from the preferences."""
    paths = source.files_named(Path(request.source), "prompts")
    examples = source.subsample(source.read(paths, "prompts", request), request) if paths else train
    return list(dict.fromkeys(example.prompt for example in examples))
