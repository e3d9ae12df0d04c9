"""Score completions with a reward model, a classifier or a Python function.

A scorer takes examples and returns a number for each completion. A sequence classifier with one output is a reward
model; with two, the reward is the log-odds of class 1, the paper's oracle for sentiment. A completion that its sampler
cut for length is scored without an end of sequence.
"""

import datetime
import importlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from exo import models
from exo.cli.errors import RunError
from exo.data import Example, transforms
from exo.data.collate import Collator
from exo.data.text import render, tokenize
from exo.data.text.limits import Limits
from exo.data.text.tokenize import TokenizedExample
from exo.distributed.accelerator import Accelerator
from exo.models.logps import map_micro_batches
from exo.models.reward_head import RewardHead
from exo.runs import inputs as run_inputs

CHUNK_SIZE = 1024  # examples that are scored together; a kill loses at most one chunk per rank
Scores = list[tuple[float, ...]]  # a tuple per example, a number per completion
Refused = tuple[frozenset[int], Counter[str]]  # of tokenize.refused


class Scorer(NamedTuple):
    """A function from examples to scores, and the checks of its inputs."""

    name: str  # to print
    score: Callable[[Sequence[Example]], Scores]
    counts: Counter[str]  # completions that were cut before they were scored, by reason; calls of score add to it
    refused: Callable[[Sequence[Example], str, bool], Refused]  # tokenize.refused with the scorer's tokenizer


def load(
    reward_model: str | None,
    oracle: str | None,
    accelerator: Accelerator,
    *,
    max_length: int,
    max_tokens_per_batch: int = 8192,
    max_prompt_length: int | None = None,
    chat_template: str = "auto",
    template_kwargs: str | None = None,
    date: datetime.date | None = None,
) -> Scorer:
    """Load the reward model, or import the oracle (module:function); one of them is None.

    `max_length` and `max_prompt_length` are those of `Limits`. A reward model renders chat messages with its template,
    and plain prompts too if `chat_template` is neither "auto" nor "none". Templates show `date` (default: today).
    ValueError if the oracle cannot be imported.
    """
    if oracle is not None:
        return Scorer(oracle, _import_oracle(oracle), Counter(), lambda *arguments: (frozenset(), Counter()))
    assert reward_model is not None
    name = run_inputs.source("reward_model", reward_model, "reward")
    model, tokenizer = models.load_classifier(name)
    model.to(accelerator.device).eval()
    head = RewardHead(model)
    render.configure(tokenizer, chat_template, template_kwargs, date)
    limits = Limits(max_length, None, "prompt-left", max_prompt_length)
    counts: Counter[str] = Counter()
    collator = Collator(tokenizer.pad_token_id, max_tokens_per_batch)

    def rendered(examples: Sequence[Example]) -> Sequence[Example]:
        return examples if chat_template in ("auto", "none") else [render.render(example) for example in examples]

    def refused(examples: Sequence[Example], path: str, skip_invalid: bool) -> Refused:
        return tokenize.refused(rendered(examples), tokenizer, path, skip_invalid=skip_invalid)

    def score(examples: Sequence[Example]) -> Scores:
        # One completion per row, because encode cuts all completions of a row as the longest requires, and drops those
        # that are then equal.
        rows = rendered(examples)
        single = [transforms.select(example, (i,)) for example in rows for i in range(len(example.completions))]
        encoded, cut = tokenize.encode(single, tokenizer, limits, "samples", retokenize=True, strict=False)
        for reason, count in cut.items():
            counts[reason.replace("rows", "completions scored")] += count
        models.check_fits(model, encoded)
        values = iter(value for (value,) in _classify(head, encoded, accelerator, collator))
        scores = [tuple(next(values) for _ in example.completions) for example in examples]
        for example, row in zip(examples, scores, strict=True):
            if not all(map(math.isfinite, row)):
                raise RunError(f"--reward_model {name}: expected finite rewards; got others in row {example.line}")
        return scores

    return Scorer(name, score, counts, refused)


def _import_oracle(name: str) -> Callable[[Sequence[Example]], Scores]:
    """Import module:function as a scoring function that names the row if the call fails or returns no number."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--oracle {name}: expected module:function that can be imported; {error}") from None

    def score(examples: Sequence[Example]) -> Scores:
        return [tuple(number(example, text) for text in example.completions) for example in examples]

    def number(example: Example, text: str) -> float:
        result = None
        try:
            result = function(example.prompt, text)
            value = float(result)
        except Exception as error:  # the user's function may raise anything
            got = f"{type(error).__name__}: {error}" if result is None else type(result).__name__
            raise ValueError(f"--oracle {name}: line {example.line}: expected a number; got {got}") from error
        if not math.isfinite(value):
            raise ValueError(f"--oracle {name}: line {example.line}: expected a finite number; got {value}")
        return value

    return score


@torch.no_grad()
def _classify(
    head: RewardHead, examples: Sequence[TokenizedExample], accelerator: Accelerator, collator: Collator
) -> Scores:
    def classify(micro_batch: Sequence[TokenizedExample]) -> Scores:
        batch = collator.collate(micro_batch).to(accelerator.device)
        with accelerator.autocast():
            rewards = head(batch)
        return [tuple(values.tolist()) for values in rewards.double().cpu().split(batch.group_size.tolist())]

    return map_micro_batches(examples, classify, collator)


def describe(rewards: Scores) -> dict[str, Any]:
    """Return mean and standard deviation of all rewards, and the counts of degenerate rows."""
    values = torch.tensor([value for row in rewards for value in row], dtype=torch.float64)
    return {
        "mean": float(values.mean()),
        "standard_deviation": float(values.std(correction=0)),
        "completions": len(values),
        "rows": len(rewards),
        "rows of one completion": sum(len(row) == 1 for row in rewards),
        "rows whose rewards are all equal": sum(len(row) > 1 and len(set(row)) == 1 for row in rewards),
    }
