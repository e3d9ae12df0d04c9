"""Show rows as a model is trained on them: their prompt, and the tokens that the loss is taken of.

align and sft print such examples before they train, and inspect without training.
"""

import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from exo.cli import console
from exo.data import statistics
from exo.data.text import subwords
from exo.data.text.tokenize import TokenGroup

Color = Literal["auto", "always", "never"]
PROMPT, COMPLETION = 240, 160  # characters of a text that are shown
LOSS = "the loss is taken of the tokens"
LOSS_OF_DIFFERENCE = f"what all completions begin with is in the prompt; {LOSS}"
SCORE = "the score is taken at the last of the tokens"
SCORED, PLAIN = "\x1b[1;32m", "\x1b[0m"  # ANSI: bold green, and back


class Example(NamedTuple):
    """A row, and why it is shown."""

    reason: str
    group: TokenGroup


def is_colored(color: Color) -> bool:
    """Return whether to write colors: under "auto" if a terminal reads them and NO_COLOR (no-color.org) is not set."""
    if color != "auto":
        return color == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def length(group: TokenGroup) -> int:
    """Return the tokens of a row: its prompt and its longest completion."""
    return len(group.prompt) + max(map(len, group.completions), default=0)


def choose(groups: Sequence[TokenGroup], count: int) -> list[Example]:
    """Return the first row and rows at evenly spaced quantiles of length, the last of them the longest.

    Of three rows the second has the median length. A row that is chosen twice appears once.
    """
    by_length = sorted(groups, key=length)
    examples = [Example("first row", groups[0])] if groups and count else []
    for i in range(1, count if groups else 0):
        share = i / (count - 1)
        reason = "longest" if share == 1 else "median length" if share == 0.5 else f"{share:.0%} of lengths below"
        examples.append(Example(reason, by_length[round(share * (len(groups) - 1))]))
    places = [id(example.group) for example in examples]
    return [example for i, example in enumerate(examples) if places.index(id(example.group)) == i]


def show(groups: Sequence[TokenGroup], tokenizer: Any, scored: str, *, count: int = 3, color: Color = "auto") -> None:
    """Print examples, with special tokens and the scored part in color, or between [[ and ]] without color.

    `scored` says what is done with that part: LOSS, LOSS_OF_DIFFERENCE or SCORE.
    """
    colored = is_colored(color)
    for example in choose(groups, count):
        for line in _lines(example, tokenizer, colored):
            console.say(line)
    if count and any(group.completions for group in groups):
        console.say(f"  ({scored} {'in green' if colored else 'between [[ and ]]'})")


def _lines(example: Example, tokenizer: Any, colored: bool) -> Iterator[str]:
    group = example.group
    yield f"  line {group.line} ({example.reason}, {length(group):,} tokens)"
    prompt = subwords.decode(list(group.prompt), tokenizer)
    yield from _wrapped("prompt", _shortened(prompt, PROMPT), False)
    for i, ids in enumerate(group.completions):
        added = subwords.decoded_after(list(group.prompt), list(ids), tokenizer, special=True)
        text = _shortened(added, COMPLETION)
        yield from _wrapped(_name(group, i), text if colored else f"[[{text}]]", colored)


def _name(group: TokenGroup, i: int) -> str:
    if group.rewards is not None:
        return f"{group.rewards[i]:.4g}"
    if len(group.completions) == 1:
        return "answer"
    return "rejected" if i else "chosen"


def _shortened(text: str, most: int) -> str:
    """Return a text as a literal, so that no character of it acts on the terminal; a long one without its middle."""
    if len(text) <= most:
        return repr(text)
    return f"{text[: most // 2]!r} ... {text[-(most // 2) :]!r}"


def _wrapped(name: str, text: str, colored: bool) -> Iterator[str]:
    for i, part in enumerate(textwrap.wrap(text, console.width() - 15, break_on_hyphens=False)):
        yield f"    {'' if i else name:<10}{f'{SCORED}{part}{PLAIN}' if colored else part}"


def length_lines(limits: Mapping[str, int | None], rows: Sequence[TokenGroup], *, labels: bool) -> list[str]:
    """Describe the lengths that the stage has limits for."""
    completions = [len(ids) for row in rows for ids in row.completions]
    lengths = {
        "max_prompt_length": ("prompt", [len(row.prompt) for row in rows]),
        "max_completion_length": ("completion, its end included", completions),
        "max_length": ("prompt and longest completion", [length(row) for row in rows if row.completions]),
    }
    if labels:  # a text is a prompt with an empty completion
        lengths = {"max_length": ("text, its end included", lengths["max_length"][1])}
    block = "█" if console.can_print("█") else "#"
    return [
        line
        for name, (what, values) in lengths.items()
        if values
        for line in statistics.length_lines(what, values, name, limits[name], block)
    ]
