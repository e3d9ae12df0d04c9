"""Print examples with the tokens that the loss covers: align and sft before training, inspect without training."""

import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from exo.cli import console
from exo.data import statistics
from exo.data.text import subwords
from exo.data.text.tokenize import TokenizedExample

Color = Literal["auto", "always", "never"]
PROMPT_LENGTH, COMPLETION_LENGTH = 240, 160  # characters that are printed
LOSS = "the loss covers the tokens"
LOSS_AFTER_PREFIX = f"tokens that all completions start with count as prompt; {LOSS}"
SCORE = "the score is computed at the last of the tokens"
SCORED, PLAIN = "\x1b[1;32m", "\x1b[0m"  # ANSI: bold green, and back


class Row(NamedTuple):
    reason: str  # for the choice
    example: TokenizedExample


def is_colored(color: Color) -> bool:
    """Return whether to write colors; "auto": on a terminal, unless NO_COLOR (no-color.org) is set."""
    if color != "auto":
        return color == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def choose(examples: Sequence[TokenizedExample], count: int) -> list[Row]:
    """Return the first row and rows at evenly spaced quantiles of length, up to the longest, without duplicates."""
    by_length = sorted(examples, key=lambda example: example.longest)
    rows = [Row("first row", examples[0])] if examples and count else []
    for i in range(1, count if examples else 0):
        share = i / (count - 1)
        reason = "longest" if share == 1 else "median length" if share == 0.5 else f"{share:.0%} of lengths below"
        rows.append(Row(reason, by_length[round(share * (len(examples) - 1))]))
    ids = [id(row.example) for row in rows]
    return [row for i, row in enumerate(rows) if ids.index(id(row.example)) == i]


def show(
    examples: Sequence[TokenizedExample], tokenizer: Any, scored: str, *, count: int = 3, color: Color = "auto"
) -> None:
    """Print examples, with special tokens and the scored part in color, or between [[ and ]] without color.

    `scored` explains the scored part: LOSS, LOSS_AFTER_PREFIX or SCORE.
    """
    colored = is_colored(color)
    for row in choose(examples, count):
        for line in _lines(row, tokenizer, colored):
            console.log(line)
    if count and any(example.completions for example in examples):
        console.log(f"  ({scored} {'in green' if colored else 'between [[ and ]]'})")


def _lines(row: Row, tokenizer: Any, colored: bool) -> Iterator[str]:
    example = row.example
    yield f"  line {example.line} ({row.reason}, {example.longest:,} tokens)"
    prompt = subwords.decode(list(example.prompt), tokenizer)
    yield from _wrap("prompt", _shorten(prompt, PROMPT_LENGTH), False)
    for i, ids in enumerate(example.completions):
        text = subwords.decoded_after(list(example.prompt), list(ids), tokenizer, special=True)
        text = _shorten(text, COMPLETION_LENGTH)
        yield from _wrap(_name(example, i), text if colored else f"[[{text}]]", colored)


def _name(example: TokenizedExample, i: int) -> str:
    if example.label is not None:
        return str(example.label)
    if example.rewards is not None:
        return f"{example.rewards[i]:.4g}"
    if len(example.completions) == 1:
        return "answer"
    return "rejected" if i else "chosen"


def _shorten(text: str, length: int) -> str:
    """Return a text as a literal, without control characters for the terminal; a long one without its middle."""
    if len(text) <= length:
        return repr(text)
    return f"{text[: length // 2]!r} ... {text[-(length // 2) :]!r}"


def _wrap(name: str, text: str, colored: bool) -> Iterator[str]:
    for i, part in enumerate(textwrap.wrap(text, console.width() - 15, break_on_hyphens=False)):
        yield f"    {'' if i else name:<10}{f'{SCORED}{part}{PLAIN}' if colored else part}"


def length_lines(limits: Mapping[str, int | None], rows: Sequence[TokenizedExample]) -> list[str]:
    """Describe the lengths that the stage limits; `limits` are its options by name."""
    totals = [row.longest for row in rows if row.completions]
    completions = [len(ids) for row in rows for ids in row.completions]
    lengths = {
        "max_prompt_length": ("prompt", [len(row.prompt) for row in rows]),
        "max_completion_length": ("completion, its end included", completions),
        "max_length": ("prompt and longest completion", totals),
    }
    if rows and rows[0].label is not None:
        lengths = {"max_length": ("text, its end included", totals)}
    block = "█" if console.can_print("█") else "#"
    return [
        line
        for name, (title, values) in lengths.items()
        if values
        for line in statistics.length_lines(title, values, name, limits[name], block)
    ]
