"""Preferences of people, and scored completions, whatever their format: texts to imitate are the chosen completions.

The source is a file, a hub name, or a directory: of shards, or with train.*, test.* (or valid.*) and prompts.*, the
last two if there are any. Without a test part some prompts are held out; without prompts.* the prompts of the
preferences are sampled for. Of scored completions the best of a row is chosen, the worst rejected.
"""

from pathlib import Path

from exo.cli import console
from exo.data import DataError, Example, transforms
from exo.data.split import Texts
from exo.experiments.tasks.source import (
    Files,
    TaskRequest,
    drop_seen,
    files_named,
    hold_out,
    lines,
    read,
    source_parts,
    subsample,
)


def preferences(wanted: TaskRequest) -> Files:
    found = source_parts(wanted.source)
    train, test = (subsample(_pairs(paths, wanted), wanted) for paths in found)
    if not train:
        raise DataError(f"{wanted.source}: expected a row with a best and a worst completion; found none")
    if not found.test:
        train, test = hold_out(train, _texts, wanted.seed)
    test = drop_seen(test, set(map(_prompt, train)), _prompt)
    held_out = set(map(_prompt, test))
    prompts = [prompt for prompt in _prompts(wanted, train) if prompt not in held_out]
    if not prompts:
        raise DataError(f"{wanted.source}: expected two prompts at least, one to train on and one to hold out")
    return {
        "sft.jsonl": lines({"prompt": p, "completion": c} for p, c in dict.fromkeys(map(_chosen, train))),
        "prompts.jsonl": lines({"prompt": p} for p in prompts),
        "test.jsonl": lines({"prompt": p, "chosen": c} for p, c in map(_chosen, test)),
        "pairs.jsonl": lines(
            {"prompt": g.prompt, "chosen": g.completions[0], "rejected": g.completions[1]} for g in train
        ),
    }


def _pairs(paths: list[str], wanted: TaskRequest) -> list[Example]:
    examples = [example for dataset in read(paths, "comparisons", wanted) for example in dataset.examples]
    pairs, counts = transforms.to_pairs(examples)
    console.counts(counts)
    return pairs


def _prompts(wanted: TaskRequest, train: list[Example]) -> list[str]:
    place = Path(wanted.source)
    own = files_named(place, "prompts") if place.is_dir() else []
    if not own:
        return list(dict.fromkeys(map(_prompt, train)))
    examples = [example for dataset in read(own, "prompts", wanted) for example in dataset.examples]
    return list(dict.fromkeys(map(_prompt, subsample(examples, wanted))))


def _prompt(example: Example) -> str:
    return example.prompt


def _texts(example: Example) -> Texts:
    return Texts(example.prompt, example.completions)


def _chosen(example: Example) -> tuple[str, str]:
    return example.prompt, example.completions[0]
