"""Do what a stage does with its data up to the point where it would train or sample: read, tokenize, cut, split.

The stages' own functions do it, so that a dry run ends as the stage would. Weights are not read. Left out: options that
have nothing to do with the data (output_dir, devices, memory).
"""

import contextlib
import datetime
import io
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from exo import adapter, align, batches, data, encoding, examples, lineage, models, reward, sample, sft, templates
from exo.data import DataError, Dataset, Group
from exo.encoding import TokenGroup
from exo.limits import Limits

UNLIMITED = Limits(sys.maxsize, None, "error")


class Stage(NamedTuple):
    config: type[Any]
    purpose: data.Purpose
    prepared: str  # file of a directory of prepare
    data_from: tuple[str, ...]  # stages whose directories --data may name
    model_from: tuple[str, ...]
    scored: str  # what is done with the scored part of an example


POLICIES = ("sft", "align", "ppo")
STAGES = {
    "align": Stage(
        align.Config, "comparisons", "pairs.jsonl", ("score", "prepare"), POLICIES, examples.LOSS_OF_DIFFERENCE
    ),
    "sft": Stage(sft.Config, "texts", "sft.jsonl", ("prepare",), ("sft",), examples.LOSS),
    "reward": Stage(reward.Config, "comparisons", "pairs.jsonl", ("prepare", "score"), ("sft",), examples.SCORE),
    "sample": Stage(sample.Config, "prompts", "prompts.jsonl", ("prepare",), POLICIES, ""),
}


class Plan(NamedTuple):
    """What would be trained on, or why nothing would be."""

    rows: list[TokenGroup]
    counts: Counter[str]  # rows cut, dropped or noted, by reason
    sentence: str
    error: ValueError | None


def read(name: str, options: Any) -> tuple[Dataset, Dataset | None]:
    """Read --data and --eval_data as the stage does; of its own, inspect reads --eval_data for any stage."""
    if name == "align":
        dataset = align._read(options, options.data, **options.mixing())
        return dataset, align._read(options, options.eval_data) if options.eval_data else None
    stage, labels = STAGES[name], getattr(options, "labels", False)
    prepared = "labelled.jsonl" if labels else stage.prepared

    def of(option: str, purpose: data.Purpose, **mixing: Any) -> Dataset:
        path = lineage.source(option, getattr(options, option), *stage.data_from, prepared=prepared)
        return data.read(path, purpose=purpose, **options.reading(), **mixing)

    purpose: data.Purpose = "labels" if labels else stage.purpose
    dataset = of("data", purpose, **options.mixing())
    if not options.eval_data:
        return dataset, None
    try:
        return dataset, of("eval_data", purpose)
    except DataError as error:
        with contextlib.suppress(DataError):  # test files may have prompts alone
            return dataset, of("eval_data", "prompts")
        raise error


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
    others = [held_out] if held_out and name == "align" else []
    rendered, *others = templates.apply(options, tokenizer, datetime.date.today(), dataset, *others, sampled=sampled)
    return rendered, others[0] if others else None


def plan(name: str, options: Any, dataset: Dataset, held_out: Dataset | None, tokenizer: Any, model: Any) -> Plan:
    """Tokenize, cut and split the rows as the stage does."""
    rows: list[TokenGroup] = []
    counts: Counter[str] = Counter()
    steps = {"align": _align, "sft": _sft, "reward": _reward, "sample": _sample}
    try:
        rows = steps[name](options, dataset, held_out, tokenizer, model, counts)
    except ValueError as error:
        return Plan(rows, counts, "", error)
    if name == "sample":
        return Plan(rows, counts, f"{len(rows):,} prompts x {options.k} completions", None)
    each = f"{batches.total_steps(options, len(rows)):,} steps of {options.batch_size}"
    return Plan(rows, counts, f"{len(rows):,} rows, {each}", None)


def _align(
    options: Any, dataset: Dataset, held_out: Dataset | None, tokenizer: Any, model: Any, counts: Counter[str]
) -> list[TokenGroup]:
    groups = align._encode(options, dataset, tokenizer, counts)
    others = align._encode(options, held_out, tokenizer, Counter()) if held_out else []  # the counts are of --data
    models.check_fits(model, groups + others)
    return align._parted(options, dataset, groups, others, counts)[0]


def _sft(
    options: Any, dataset: Dataset, _: Dataset | None, tokenizer: Any, model: Any, counts: Counter[str]
) -> list[TokenGroup]:
    limits = Limits(options.max_length, options.max_completion_length, options.truncate, options.max_prompt_length)
    groups, cut = encoding.encode(dataset.groups, tokenizer, limits, dataset.path, skip_invalid=options.skip_invalid)
    counts.update(cut)
    if not groups:
        raise DataError(f"{options.data}: no row is left to train on")
    models.check_fits(model, groups)
    return groups


def _reward(
    options: Any, dataset: Dataset, _: Dataset | None, tokenizer: Any, model: Any, counts: Counter[str]
) -> list[TokenGroup]:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the counts
        train, held_out, cut = reward._encode(options, dataset, tokenizer)
    counts.update(cut)
    models.check_fits(model, train + held_out)
    return train


def _sample(
    options: Any, dataset: Dataset, _: Dataset | None, tokenizer: Any, model: Any, counts: Counter[str]
) -> list[TokenGroup]:
    groups = [dataset.groups[i % len(dataset.groups)] for i in sample._chosen(options, len(dataset.groups))]
    prompts, cut = encoding.sampled_prompts([g.prompt for g in groups], tokenizer, options.max_prompt_length)
    counts.update(cut)
    return [TokenGroup(tuple(ids), (), None, g.line) for ids, g in zip(prompts, groups, strict=True)]


def uncut(name: str, dataset: Dataset, tokenizer: Any) -> list[TokenGroup]:
    """Return the rows as tokens whatever the limits say, but those that the tokenizer or its template refuses."""
    groups = dataset.groups
    if name == "sample":
        try:
            prompts, _ = encoding.sampled_prompts([g.prompt for g in groups], tokenizer, sys.maxsize)
        except DataError:
            return []
        return [TokenGroup(tuple(ids), (), None, g.line) for ids, g in zip(prompts, groups, strict=True)]
    if groups[0].label is not None:  # read as exo.reward reads it
        groups = [Group(g.completions[0], ("",), (float(g.label or 0),), g.line) for g in groups]
    foreign: Any = "text" if name == "reward" else "refuse"
    return encoding.encode(groups, tokenizer, UNLIMITED, dataset.path, foreign=foreign, skip_invalid=True)[0]
