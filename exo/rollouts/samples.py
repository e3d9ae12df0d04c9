"""Sample from prompts as text, and convert the completions to examples, rows of a file and JSON."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from exo import models
from exo.cli import console
from exo.data import Example, Tokens
from exo.data.text import subwords, tokenize
from exo.rollouts import generate
from exo.rollouts.generate import Sample

MOST_CUT = 0.2  # a run warns if a larger share of the completions is cut for length


class Settings(NamedTuple):
    """Options of sampling. Every row records them, because files are copied without their runs."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0


def to_row(example: Example) -> dict[str, Any]:
    """Return the row of a file of samples, or of scored samples if the example has rewards."""
    row: dict[str, Any] = {"prompt": example.prompt, "completions": list(example.completions)}
    if example.rewards is not None:
        row["rewards"] = list(example.rewards)
    if example.tokens is not None:
        row |= {"tokenizer": example.tokens.tokenizer, "token_ids": [list(ids) for ids in example.tokens.ids]}
        row |= {"logprobs": list(example.tokens.logprobs), "finish": list(example.tokens.finish)}
        settings = {name: getattr(example.tokens, name) for name in Settings._fields}
        row |= {name: value for name, value in settings.items() if value is not None}
    return row


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
    """Sample with `generate.sample`, which gets the `options`, from prompts as text, and return an example per prompt.

    A prompt that is too long is cut on the left. Prints progress and counts if there is a label.
    """
    ids, counts = tokenize.sampled_prompts(prompts, tokenizer, max_prompt_length)
    if label:
        console.counts(counts)
    total = len(ids) * options["k"]
    progress = console.Progress(label, total, every=max(1, total // 4), quiet=not label)
    options |= settings._asdict() | {"numbers": numbers, "progress": progress.advance}
    stop_ids, absent_ids = models.stop_ids(model, tokenizer), models.absent_ids(model, tokenizer)
    drawn = generate.sample(model, stop_ids, ids, absent_ids=absent_ids, **options)
    return to_examples(prompts, ids, drawn, tokenizer, settings, numbers)


def to_json(drawn: Sequence[Sample]) -> list[Any]:
    """Return samples as JSON values."""
    return [[list(sample.token_ids), sample.logprob, sample.finish] for sample in drawn]


def from_json(rows: Sequence[Any]) -> list[Sample]:
    """Return the samples of the values that `to_json` returned."""
    return [Sample(tuple(ids), logprob, finish) for ids, logprob, finish in rows]


def to_examples(
    prompts: Sequence[str],
    prompt_ids: Sequence[list[int]],
    drawn: Sequence[Sequence[Sample]],
    tokenizer: Any,
    settings: Settings,
    numbers: Sequence[int] | None = None,
) -> list[Example]:
    """Return an example per prompt; its line is the number of the prompt plus 1. The texts have no special tokens."""
    tokenizer_hash = tokenize.tokenizer_hash(tokenizer)
    numbers = range(len(prompts)) if numbers is None else numbers
    examples = []
    for prompt, context, row, number in zip(prompts, prompt_ids, drawn, numbers, strict=True):
        ids, logprobs, finish = zip(*((s.token_ids, s.logprob, s.finish) for s in row), strict=True)
        without_eos = [list(s.token_ids[:-1] if s.finish == "eos" else s.token_ids) for s in row]
        texts = tuple(subwords.decoded_after(context, completion, tokenizer) for completion in without_eos)
        tokens = Tokens(tokenizer_hash, ids, logprobs, finish, **settings._asdict())
        examples.append(Example(prompt, texts, None, number + 1, tokens))
    return examples


def describe(examples: Sequence[Example]) -> dict[str, float]:
    """Return the number of completions, their mean length in tokens and the share that was cut for length."""
    tokens = [example.tokens for example in examples if example.tokens is not None]
    lengths = [len(ids) for row in tokens for ids in row.ids]
    unfinished = sum(finish == "length" for row in tokens for finish in row.finish)
    return {
        "completions": len(lengths),
        "mean_tokens": sum(lengths) / max(1, len(lengths)),
        "unfinished": unfinished / max(1, len(lengths)),
    }


def log_cut(examples: Sequence[Example]) -> None:
    """Print the share of completions that were cut for length, and warn if it is large."""
    if any(example.tokens is not None for example in examples):
        share = describe(examples)["unfinished"]
        console.log(f"  {100 * share:.1f}% of the completions were cut for length")
        warn_of_cut(share)


def warn_of_cut(share: float) -> None:
    if share > MOST_CUT:
        console.warn(
            f"more than {100 * MOST_CUT:.0f}% of the completions were cut for length: raise --max_new_tokens; if "
            "the model never ends, set eos_token_id in its generation_config.json to its end of turn"
        )


def check_temperature(option: str, path: str, examples: Sequence[Example], temperature: float) -> None:
    """Raise ValueError if samples were drawn at another temperature; warn if it is unknown, or if top_p was below 1."""
    sampled = [example.tokens for example in examples if example.tokens is not None]
    temperatures = {tokens.temperature for tokens in sampled}
    for other in sorted(value for value in temperatures if value is not None and value != temperature):
        raise ValueError(
            f"--{option} {path}: expected samples drawn at --temperature {temperature:g}; these were drawn at "
            f"{other:g}: pass that, or sample again"
        )
    if None in temperatures:
        console.warn(f"{path}: the samples do not record their temperature; it must be --temperature {temperature:g}")
    top_ps = sorted({tokens.top_p for tokens in sampled if tokens.top_p is not None and tokens.top_p < 1})
    if top_ps:
        console.warn(
            f"{path}: the samples were drawn with top_p {top_ps[0]:g}, so they are not of the full distribution, which "
            "they represent here; sample with --top_p 1"
        )
