"""Completions drawn from a model as rows of data, and back to lines of a file.

Left out: drawing them (generation), reading them (data).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from exo import models
from exo.cli import console
from exo.data import Example, Tokens
from exo.data.text import subwords, tokenize
from exo.rollouts import generate
from exo.rollouts.generate import Sample

MOST_CUT = 0.2  # share of completions cut for their length above which a run warns


class Settings(NamedTuple):
    """How completions are drawn. They are recorded in every row, since files are moved away from their runs."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0


def to_example(
    prompt: str,
    prompt_ids: list[int],
    drawn: Sequence[Sample],
    tokenizer: Any,
    tokenizer_hash: str,
    line: int,
    settings: Settings,
) -> Example:
    """Return a prompt with its samples; their texts are without special tokens and the token that ends them."""
    texts = tuple(
        subwords.decoded_after(prompt_ids, list(s.token_ids[: len(s.token_ids) - (s.finish == "eos")]), tokenizer)
        for s in drawn
    )
    ids, logprobs, finish = zip(*((s.token_ids, s.logprob, s.finish) for s in drawn), strict=True)
    return Example(prompt, texts, None, line, Tokens(tokenizer_hash, ids, logprobs, finish, **settings._asdict()))


def to_row(example: Example) -> dict[str, Any]:
    """A line of a file of samples, or of scored samples where the group has rewards."""
    found: dict[str, Any] = {"prompt": example.prompt, "completions": list(example.completions)}
    if example.rewards is not None:
        found["rewards"] = list(example.rewards)
    if example.tokens is not None:
        found |= {"tokenizer": example.tokens.tokenizer, "token_ids": [list(ids) for ids in example.tokens.ids]}
        found |= {"logprobs": list(example.tokens.logprobs), "finish": list(example.tokens.finish)}
        known = {name: getattr(example.tokens, name) for name in Settings._fields}
        found |= {name: value for name, value in known.items() if value is not None}
    return found


def draw(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: Settings,
    *,
    label: str = "",
    max_prompt_length: int,
    numbers: Sequence[int] | None = None,
    **options: Any,
) -> list[Example]:
    """`generation.sample` from texts to rows of data; a prompt over its limit loses its left. Quiet without a label."""
    ids, counts = tokenize.sampled_prompts(prompts, tokenizer, max_prompt_length)
    if label:
        console.counts(counts)
    total = len(ids) * options["k"]
    progress = console.Progress(label, total, every=max(1, total // 4), quiet=not label)
    drawn = generate.sample(
        model, models.stop_ids(model, tokenizer), ids, absent_ids=models.absent_ids(model, tokenizer),
        numbers=numbers, progress=progress.advance, **settings._asdict(), **options,
    )  # fmt: skip
    return to_examples(prompts, ids, drawn, tokenizer, settings, numbers)


def to_json(drawn: Sequence[Sample]) -> list[Any]:
    """As JSON has them."""
    return [[list(sample.token_ids), sample.logprob, sample.finish] for sample in drawn]


def from_json(rows: Sequence[Any]) -> list[Sample]:
    return [Sample(tuple(ids), logprob, finish) for ids, logprob, finish in rows]


def to_examples(
    prompts: Sequence[str],
    prompt_ids: Sequence[list[int]],
    drawn: Sequence[Sequence[Sample]],
    tokenizer: Any,
    settings: Settings,
    numbers: Sequence[int] | None = None,
) -> list[Example]:
    """Return a group for each prompt; its line is its number, counted from 1."""
    known = tokenize.tokenizer_hash(tokenizer)
    places = range(len(prompts)) if numbers is None else numbers
    rows = zip(prompts, prompt_ids, drawn, places, strict=True)
    return [to_example(prompt, ids, some, tokenizer, known, place + 1, settings) for prompt, ids, some, place in rows]


def describe(examples: Sequence[Example]) -> dict[str, float]:
    """How long the completions are, and which share of them did not end."""
    tokens = [example.tokens for example in examples if example.tokens is not None]
    lengths = [len(ids) for row in tokens for ids in row.ids]
    unfinished = sum(finish == "length" for row in tokens for finish in row.finish)
    return {
        "completions": len(lengths),
        "mean_tokens": sum(lengths) / max(1, len(lengths)),
        "unfinished": unfinished / max(1, len(lengths)),
    }


def log_cut(examples: Sequence[Example]) -> None:
    """Print the share of completions that were cut for their length, and warn if it is large."""
    if any(example.tokens is not None for example in examples):
        share = describe(examples)["unfinished"]
        console.log(f"  {100 * share:.1f}% of the completions were cut for their length")
        warn_of_cut(share)


def warn_of_cut(share: float) -> None:
    if share > MOST_CUT:
        console.warn(
            f"more than {100 * MOST_CUT:.0f}% of the completions were cut for their length: raise --max_new_tokens; if "
            "the model never ends, name its end of turn in eos_token_id of its generation_config.json"
        )


def check_temperature(option: str, path: str, examples: Sequence[Example], temperature: float) -> None:
    """ValueError if samples were drawn at another temperature; warn if they do not say, or were drawn with top-p."""
    sampled = [example.tokens for example in examples if example.tokens is not None]
    known = {tokens.temperature for tokens in sampled}
    for other in sorted(value for value in known if value is not None and value != temperature):
        raise ValueError(
            f"--{option} {path}: expected samples drawn at --temperature {temperature:g}; these were drawn at "
            f"{other:g}: pass that, or sample again"
        )
    if None in known:
        console.warn(f"{path}: the samples do not say their temperature; it must be --temperature {temperature:g}")
    truncated = sorted({tokens.top_p for tokens in sampled if tokens.top_p is not None and tokens.top_p < 1})
    if truncated:
        console.warn(
            f"{path}: the samples were drawn with top_p {truncated[0]:g}, so not from the whole distribution that they "
            "stand for here; sample with --top_p 1"
        )
