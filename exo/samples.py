"""Completions drawn from a model as rows of data, and back to lines of a file.

Left out: drawing them (generation), reading them (data).
"""

from collections.abc import Sequence
from typing import Any

from exo import console, encoding, generation
from exo.data import Group, Tokens
from exo.generation import Sample


def group(prompt: str, drawn: Sequence[Sample], tokenizer: Any, tokenizer_hash: str, line: int) -> Group:
    """One prompt with what was drawn for it; texts are without special tokens."""
    texts = tuple(tokenizer.decode(sample.token_ids, skip_special_tokens=True) for sample in drawn)
    ids, logprobs, finish = zip(*((s.token_ids, s.logprob, s.finish) for s in drawn), strict=True)
    return Group(prompt, texts, None, line, Tokens(tokenizer_hash, ids, logprobs, finish))


def row(group: Group) -> dict[str, Any]:
    """A line of a file of samples, or of scored samples where the group has rewards."""
    found: dict[str, Any] = {"prompt": group.prompt, "completions": list(group.completions)}
    if group.rewards is not None:
        found["rewards"] = list(group.rewards)
    if group.tokens is not None:
        found |= {"tokenizer": group.tokens.tokenizer, "token_ids": [list(ids) for ids in group.tokens.ids]}
        found |= {"logprobs": list(group.tokens.logprobs), "finish": list(group.tokens.finish)}
    return found


def draw(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    label: str = "",
    max_prompt_length: int,
    numbers: Sequence[int] | None = None,
    **options: Any,
) -> list[Group]:
    """`generation.sample` from texts to rows of data; a prompt over its limit loses its left. Quiet without a label."""
    ids, counts = encoding.sampled_prompts(prompts, tokenizer, max_prompt_length)
    if label:
        console.counts(counts)
    total = len(ids) * options["k"]
    progress = console.Progress(label, total, every=max(1, total // 4), quiet=not label)
    drawn = generation.sample(model, tokenizer, ids, numbers=numbers, progress=progress.advance, **options)
    return groups(prompts, drawn, tokenizer, numbers)


def listed(drawn: Sequence[Sample]) -> list[Any]:
    """As JSON has them."""
    return [[list(sample.token_ids), sample.logprob, sample.finish] for sample in drawn]


def unlisted(rows: Sequence[Any]) -> list[Sample]:
    return [Sample(tuple(ids), logprob, finish) for ids, logprob, finish in rows]


def groups(
    prompts: Sequence[str], drawn: Sequence[Sequence[Sample]], tokenizer: Any, numbers: Sequence[int] | None = None
) -> list[Group]:
    """A group a prompt; its line is its number, counted from 1."""
    known = encoding.tokenizer_hash(tokenizer)
    places = range(len(prompts)) if numbers is None else numbers
    rows = zip(prompts, drawn, places, strict=True)
    return [group(prompt, samples, tokenizer, known, place + 1) for prompt, samples, place in rows]


def describe(groups: Sequence[Group]) -> dict[str, float]:
    """How long the completions are, and which share of them did not end."""
    tokens = [group.tokens for group in groups if group.tokens is not None]
    lengths = [len(ids) for row in tokens for ids in row.ids]
    unfinished = sum(finish == "length" for row in tokens for finish in row.finish)
    return {
        "completions": len(lengths),
        "mean_tokens": sum(lengths) / max(1, len(lengths)),
        "unfinished": unfinished / max(1, len(lengths)),
    }
