"""Do what a stage does with its data up to the point where it would train or sample: read, tokenize, cut, split.

The stages' own functions do it, so that a dry run ends as the stage would. Weights are not read. Left out: options that
have nothing to do with the data (output_dir, devices, memory).
"""

import contextlib
import datetime
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exo import (
    adapter,
    align,
    batches,
    data_checks,
    encoding,
    examples,
    lineage,
    models,
    reward,
    sample,
    sft,
    templates,
)
from exo.data import DataError, Dataset, Group
from exo.encoding import TokenGroup
from exo.limits import Limits

UNLIMITED = Limits(sys.maxsize, None, "error")


class Stage(NamedTuple):
    module: Any  # its Config, `read` and more are used
    model_from: tuple[str, ...]  # stages whose directories --model may name
    scored: str  # what is done with the scored part of an example


POLICIES = ("sft", "align", "ppo")
STAGES = {
    "align": Stage(align, POLICIES, examples.LOSS_OF_DIFFERENCE),
    "sft": Stage(sft, ("sft",), examples.LOSS),
    "reward": Stage(reward, ("sft",), examples.SCORE),
    "sample": Stage(sample, POLICIES, ""),
}


class Plan(NamedTuple):
    """What would be trained on, or why nothing would be."""

    rows: list[TokenGroup]
    counts: Counter[str]  # rows cut, dropped or noted, by reason
    sentence: str
    error: ValueError | None


def read(name: str, options: Any) -> tuple[Dataset, Dataset | None]:
    """Read --data and --eval_data as the stage does; of its own, inspect reads --eval_data for any stage."""
    stage = STAGES[name].module
    dataset = stage.read(options)
    if not options.eval_data:
        return dataset, None
    try:
        held_out = stage.read(options, "eval_data")
    except DataError as error:
        if name == "align":
            raise
        with contextlib.suppress(DataError):  # test files may have prompts alone
            return dataset, sample.read(options, "eval_data")
        raise error
    if name == "align":
        data_checks.warn_of_trained_texts(dataset, held_out)
    return dataset, held_out


def load(name: str, options: Any, texts: Callable[[], Any]) -> tuple[Any, Any]:
    """Return --model on the meta device and its tokenizer."""
    trains_policy = name in ("align", "sft")
    if trains_policy:
        adapter.check(options, options.model)
    model = lineage.source("model", options.model, *STAGES[name].model_from)
    if trains_policy and not options.load_in_4bit:
        return models.load_or_tiny(model, texts, seed=options.seed, read=models.load_without_weights)
    if name == "reward":
        return models.classifier_without_weights(model)
    return models.load_without_weights(model)


def render(
    name: str, options: Any, tokenizer: Any, dataset: Dataset, held_out: Dataset | None
) -> tuple[Dataset, Dataset | None]:
    """Set up the chat template, and return the data that the stage reads with the prompts that it renders."""
    sampled: Any = "render" if name == "reward" else "keep"
    previous = None if options.overwrite_output_dir else lineage.record(Path(options.output_dir))
    inputs = lineage.inputs(options, name).values()
    date = datetime.date.fromisoformat(lineage.template_date(previous, inputs))
    others = [held_out] if held_out and name == "align" else []
    rendered, *others = templates.apply(options, tokenizer, date, dataset, *others, sampled=sampled)
    return rendered, others[0] if others else None


def plan(name: str, options: Any, dataset: Dataset, held_out: Dataset | None, tokenizer: Any, model: Any) -> Plan:
    """Tokenize, cut and split the rows as the stage does."""
    counts: Counter[str] = Counter()
    try:
        rows = _rows(name, options, dataset, held_out, tokenizer, model, counts)
    except ValueError as error:
        return Plan([], counts, "", error)
    if name == "sample":
        return Plan(rows, counts, f"{len(rows):,} prompts x {options.k} completions", None)
    each = f"{batches.total_steps(options, len(rows)):,} steps of {options.batch_size}"
    return Plan(rows, counts, f"{len(rows):,} rows, {each}", None)


def _rows(
    name: str, options: Any, dataset: Dataset, held_out: Dataset | None, tokenizer: Any, model: Any,
    counts: Counter[str],
) -> list[TokenGroup]:  # fmt: skip
    """Return the rows that are trained on, or the prompts that are sampled from."""
    if name == "sample":
        total = len(dataset.groups)
        chosen = [dataset.groups[i % total] for i in sample.chosen(options, total)]
        return _prompts(chosen, tokenizer, options.max_prompt_length, counts)
    others: list[TokenGroup] = []
    if name == "reward":
        rows, others = reward.tokens(options, dataset, tokenizer, counts)
    else:
        rows = STAGES[name].module.tokens(options, dataset, tokenizer, counts)
    if held_out:
        others = align.tokens(options, held_out, tokenizer, counts)
    models.check_fits(model, rows + others)
    if name != "align":
        return rows
    train = align.parted(options, dataset, rows, others, counts).train
    align.reference_model(options, rows + others, tokenizer, models.load_without_weights)
    return train


def _prompts(groups: Sequence[Group], tokenizer: Any, most: int, counts: Counter[str]) -> list[TokenGroup]:
    prompts, cut = encoding.sampled_prompts([group.prompt for group in groups], tokenizer, most)
    counts.update(cut)
    return [TokenGroup(tuple(ids), (), None, group.line) for ids, group in zip(prompts, groups, strict=True)]


def uncut(name: str, dataset: Dataset, tokenizer: Any) -> list[TokenGroup]:
    """Return the rows as tokens whatever the limits say, but those that the tokenizer or its template refuses."""
    groups = dataset.groups
    if name == "sample":
        with contextlib.suppress(DataError):
            return _prompts(groups, tokenizer, sys.maxsize, Counter())
        return []
    if groups[0].label is not None:
        groups = reward.texts_as_prompts(groups)
    foreign: Any = "text" if name == "reward" else "refuse"
    return encoding.encode(groups, tokenizer, UNLIMITED, dataset.path, foreign=foreign, skip_invalid=True)[0]
