"""Preferences of people, and scored completions, whatever their format: texts to imitate are the chosen completions.

The source is a file, a hub name, or a directory: of shards, or with train.*, test.* (or valid.*) and prompts.*, the
last two if there are any. Without a test part some prompts are held out; without prompts.* the prompts of the
preferences are sampled for. Of scored completions the best of a row is chosen, the worst rejected.
"""

from pathlib import Path

from exo.cli import console
from exo.data import DataError, Group, transforms
from exo.data.split import Texts
from exo.experiments.tasks.source import Files, Wanted, drawn, hold_out, lines, named, parts, read, unseen


def preferences(wanted: Wanted) -> Files:
    found = parts(wanted.source)
    train, test = (drawn(_pairs(paths, wanted), wanted) for paths in found)
    if not train:
        raise DataError(f"{wanted.source}: expected a row with a best and a worst completion; found none")
    if not found.test:
        train, test = hold_out(train, _texts, wanted.seed)
    test = unseen(test, set(map(_prompt, train)), _prompt)
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


def _pairs(paths: list[str], wanted: Wanted) -> list[Group]:
    groups = [group for dataset in read(paths, "comparisons", wanted) for group in dataset.groups]
    pairs, counts = transforms.best_against_worst(groups)
    console.counts(counts)
    return pairs


def _prompts(wanted: Wanted, train: list[Group]) -> list[str]:
    place = Path(wanted.source)
    own = named(place, "prompts") if place.is_dir() else []
    if not own:
        return list(dict.fromkeys(map(_prompt, train)))
    groups = [group for dataset in read(own, "prompts", wanted) for group in dataset.groups]
    return list(dict.fromkeys(map(_prompt, drawn(groups, wanted))))


def _prompt(group: Group) -> str:
    return group.prompt


def _texts(group: Group) -> Texts:
    return Texts(group.prompt, group.completions)


def _chosen(group: Group) -> tuple[str, str]:
    return group.prompt, group.completions[0]
