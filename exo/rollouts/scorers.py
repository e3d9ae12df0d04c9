"""What a completion is worth: a reward model, a classifier's log-odds, or a function of one's own.

A scorer takes rows of data and gives a number a completion. A sequence classifier with one output is a reward model;
with two, the reward is the log-odds of class 1, the paper's oracle for sentiment. A completion that its sampler cut for
length is scored without an end of sequence. Left out: several scorers at once.
"""

import datetime
import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from exo import models
from exo.cli.errors import RunError
from exo.cli.fields import option, require
from exo.cli.options import Scoring
from exo.data import Example, transforms
from exo.data.collate import Collator
from exo.data.text import render, tokenize
from exo.data.text.limits import Limits
from exo.data.text.tokenize import TokenizedExample
from exo.models.reward_head import RewardHead
from exo.runs import inputs as run_inputs

AT_ONCE = 1024  # rows that are scored together; a kill may cost as many
Scores = list[tuple[float, ...]]  # a row a group, a number a completion


Refused = tuple[frozenset[int], Counter[str]]


class Scorer(NamedTuple):
    """`score(groups)`; `name` is for people, and `counts` says what was scored in part, of all calls together."""

    name: str
    score: Callable[[Sequence[Example]], Scores]
    counts: Counter[str]
    refused: Callable[[Sequence[Example], str, bool], Refused]  # encoding.refused


class Options(NamedTuple):
    """The two options by which a stage says who scores; one of them is set."""

    reward_model: str | None
    oracle: str | None


REWARD_MODEL = option(None, "a sequence classifier: one output is the reward, of two the log-odds of class 1")
ORACLE = option(None, "a function of your own, module:function, of (prompt, completion) to a number")


def check(options: Options) -> None:
    given = [name for name, value in options._asdict().items() if value]
    require(len(given) == 1, "reward_model", "this or --oracle, and not both", " and ".join(given) or "neither")


def load(
    options: Options,
    compute: Scoring,
    accelerator: Accelerator,
    max_length: int,
    max_prompt_length: int | None = None,
    *,
    template: str = "auto",
    arguments: str | None = None,
    date: datetime.date | None = None,
) -> Scorer:
    """Load the scorer that the options name.

    The limits are those of encoding.Limits. A reward model renders chat messages with its own template, and plain
    prompts too if `template` (the option --chat_template) is neither "auto" nor "none". `arguments` are those of the
    template, and `date` is what it shows, None for today.
    """
    if options.oracle is not None:
        return Scorer(options.oracle, _of_function(options.oracle), Counter(), _refuses_nothing)
    assert options.reward_model is not None
    name = run_inputs.source("reward_model", options.reward_model, "reward")
    model, tokenizer = models.load_classifier(name)
    model.to(accelerator.device).eval()
    head = RewardHead(model)
    render.configure(tokenizer, template, arguments, date)
    limits = Limits(max_length, None, "prompt-left", max_prompt_length)
    counts: Counter[str] = Counter()
    collator = Collator(tokenizer.pad_token_id, compute.max_tokens_per_batch)

    def rendered(examples: Sequence[Example]) -> Sequence[Example]:
        return examples if template in ("auto", "none") else [render.render(example) for example in examples]

    def refused(examples: Sequence[Example], path: str, skip_invalid: bool) -> Refused:
        return tokenize.refused(rendered(examples), tokenizer, path, skip_invalid=skip_invalid)

    def score(examples: Sequence[Example]) -> Scores:
        # each alone: together they would be cut as the longest of them needs, and dropped where that makes them alike
        rows = rendered(examples)
        alone = [transforms.select(example, (i,)) for example in rows for i in range(len(example.completions))]
        encoded, cut = tokenize.encode(alone, tokenizer, limits, "samples", foreign="text", strict=False)
        for reason, count in cut.items():
            counts[reason.replace("rows", "completions scored")] += count
        models.check_fits(model, encoded)
        values = iter(value for (value,) in _classify(head, encoded, accelerator, collator))
        scores = [tuple(next(values) for _ in example.completions) for example in examples]
        _check_finite(name, examples, scores)
        return scores

    return Scorer(name, score, counts, refused)


def _refuses_nothing(examples: Sequence[Example], path: str, skip_invalid: bool) -> Refused:
    return frozenset(), Counter()


def chunked(examples: Sequence[Example], rows: int = AT_ONCE) -> list[Sequence[Example]]:
    """As they are scored together, whatever the number of processes."""
    return [examples[first : first + rows] for first in range(0, len(examples), rows)]


def score_chunk(scorer: Scorer, examples: Sequence[Example]) -> tuple[Scores, dict[str, int]]:
    """And what the scorer remarked of these rows."""
    scorer.counts.clear()
    return scorer.score(examples), dict(scorer.counts)


def merge(found: Iterable[Sequence[Any]]) -> tuple[Scores, Counter[str]]:
    """The scores of all parts, and all that was remarked."""
    scores: Scores = []
    counts: Counter[str] = Counter()
    for some, remarks in found:
        scores += map(tuple, some)
        counts.update(remarks)
    return scores, counts


def _of_function(name: str) -> Callable[[Sequence[Example]], Scores]:
    module, _, function = name.partition(":")
    try:
        oracle = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--oracle {name}: expected module:function that can be imported; {error}") from None

    def score(examples: Sequence[Example]) -> Scores:
        return [tuple(number(example, text) for text in example.completions) for example in examples]

    def number(example: Example, text: str) -> float:
        found = None
        try:
            found = oracle(example.prompt, text)
            value = float(found)
        except Exception as error:  # someone else's code
            what = f"{type(error).__name__}: {error}" if found is None else type(found).__name__
            raise ValueError(f"--oracle {name}: line {example.line}: expected a number; got {what}") from error
        if not math.isfinite(value):
            raise ValueError(f"--oracle {name}: line {example.line}: expected a finite number; got {value}")
        return value

    return score


@torch.no_grad()
def _classify(
    head: RewardHead, examples: Sequence[TokenizedExample], accelerator: Accelerator, collator: Collator
) -> Scores:
    def of(part: Sequence[TokenizedExample]) -> Scores:
        batch = collator.collate(part).to(accelerator.device)
        with accelerator.autocast():
            rewards = head(batch)
        return [tuple(values.tolist()) for values in rewards.double().cpu().split(batch.group_size.tolist())]

    return collator.each(examples, of)


def _check_finite(name: str, examples: Sequence[Example], scores: Scores) -> None:
    for example, row in zip(examples, scores, strict=True):
        if not all(map(math.isfinite, row)):
            raise RunError(f"--reward_model {name}: expected finite rewards; got others in row {example.line}")


def describe(rewards: Scores) -> dict[str, Any]:
    """Mean and spread of all rewards, and what is degenerate among them."""
    values = torch.tensor([value for row in rewards for value in row], dtype=torch.float64)
    return {
        "mean": float(values.mean()),
        "standard_deviation": float(values.std(correction=0)),
        "completions": len(values),
        "rows": len(rewards),
        "rows of one completion": sum(len(row) == 1 for row in rewards),
        "rows whose rewards are all equal": sum(len(row) > 1 and len(set(row)) == 1 for row in rewards),
    }
