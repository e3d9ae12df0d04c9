"""Count what is worth knowing of preference data before training: lengths, ties, duplicates, length bias, leaks.

Pure functions of rows as texts (Group) or as tokens (TokenGroup), and the lines of text that say what they return.
"""

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from exo.data import Example, split, transforms
from exo.data.text.tokenize import TokenizedExample

SHOWN = 10  # rows that a line names
BAR = 24  # characters of the longest bar
Places = list[tuple[str, str]]  # a row, and the earlier row or the row of other data that has the same


class Bin(NamedTuple):
    low: int
    high: int  # inclusive
    rows: int


class Rewards(NamedTuple):
    low: float
    median: float
    high: float
    equal: int  # rows whose rewards are all equal
    best_tied: int  # other rows that have the highest reward several times


class Repeats(NamedTuple):
    rows: Places  # equal to an earlier row
    prompts: int  # that several rows have
    prompt_rows: int  # that have one of them
    within: int  # rows with a completion repeated
    reversed: Places  # that prefer what an earlier row rejects, given the same prompt


class Bias(NamedTuple):
    """Tokens of chosen completions against those of rejected ones."""

    chosen: float  # mean over the rows
    rejected: float  # mean over the rows of the mean of a row
    longer: int  # rows whose chosen completion is longer
    equal: int
    rows: int


class Leaks(NamedTuple):
    prompts: Places  # held-out rows whose prompt is in the data
    completions: Places  # held-out rows of which a completion, or it and its prompt as one text, is in the data


def place(example: Example) -> str:
    return example.source or f"line {example.line}"


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def histogram(lengths: Sequence[int], most: int = 6) -> list[Bin]:
    """Return at most `most` bins of a round width up to the 95th percentile, and one for what is longer.

    Empty bins before the first length are left out.
    """
    top = int(percentile(lengths, 0.95))
    width = next(digit * 10**power for power in range(20) for digit in (1, 2, 5) if digit * 10**power * most > top)
    last, rest = top // width, max(lengths)
    counts = Counter(min(length // width, last + 1) for length in lengths)
    bins = [Bin(i * width, (i + 1) * width - 1, counts[i]) for i in range(min(counts), last + 1)]
    return [*bins, Bin((last + 1) * width, rest, counts[last + 1])] if counts[last + 1] else bins


def rewards(examples: Iterable[Example]) -> Rewards | None:
    """Return statistics of the rewards; None without any."""
    rows = [example.rewards for example in examples if example.rewards]
    if not rows:
        return None
    values = [value for row in rows for value in row]
    equal = sum(min(row) == max(row) for row in rows)
    tied = sum(row.count(max(row)) > 1 for row in rows)
    return Rewards(min(values), statistics.median(values), max(values), equal, tied - equal)


def repeats(examples: Sequence[Example]) -> Repeats:
    first: dict[Hashable, str] = {}
    rows = [
        (place(example), first[key])
        for example in examples
        if first.setdefault(key := _identity(example), place(example)) != place(example)
    ]
    prompts = [
        count for prompt, count in Counter(example.prompt for example in examples).items() if prompt and count > 1
    ]
    within = sum(len(set(example.completions)) < len(example.completions) for example in examples)
    return Repeats(rows, len(prompts), sum(prompts), within, _reversed(examples))


def _identity(example: Example) -> Hashable:
    return example.prompt, example.completions, example.rewards, example.label


def _reversed(examples: Sequence[Example]) -> Places:
    preferred: dict[tuple[str, str, str], str] = {}
    rows = []
    for example in transforms.to_pairs(examples)[0]:
        chosen, rejected = example.completions[:1], example.completions[1:]
        pairs = [(example.prompt, a, b) for a in chosen for b in rejected]
        if earlier := [preferred[prompt, b, a] for prompt, a, b in pairs if (prompt, b, a) in preferred]:
            rows.append((place(example), earlier[0]))
        for pair in pairs:
            preferred.setdefault(pair, place(example))
    return rows


def length_bias(examples: Sequence[TokenizedExample]) -> Bias | None:
    """Return how long chosen completions are, of rewards the best of a row against its worst; None without pairs."""
    pairs = [example for example in transforms.to_pairs(examples)[0] if len(example.completions) > 1]
    if not pairs:
        return None
    chosen = [len(pair.completions[0]) for pair in pairs]
    rejected = [statistics.fmean(map(len, pair.completions[1:])) for pair in pairs]
    longer = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    equal = sum(a == b for a, b in zip(chosen, rejected, strict=True))
    return Bias(statistics.fmean(chosen), statistics.fmean(rejected), longer, equal, len(pairs))


def leaks(examples: Iterable[Example], held_out: Iterable[Example]) -> Leaks:
    """Find held-out rows that share a text with the data, as rows that must be held out together do (data.split)."""
    first: dict[Hashable, str] = {}
    for example in examples:
        for key in _keys(example):
            first.setdefault(key, place(example))
    leaked = Leaks([], [])
    for example in held_out:
        same = [key for key in _keys(example) if key in first]
        prompt = [key for key in same if key == ("name", example.prompt.strip())]
        if prompt:
            leaked.prompts.append((place(example), first[prompt[0]]))
        if others := [key for key in same if key not in prompt]:
            leaked.completions.append((place(example), first[others[0]]))
    return leaked


def _keys(example: Example) -> list[Hashable]:
    """Return what a row may share with others; nothing of a prompt without text to sample from."""
    return list(split.keys(example)) if example.prompt or example.completions else []


def spelling(examples: Iterable[Example], tokens: Sequence[str]) -> int:
    """Return how many rows have one of these control tokens in their texts."""
    return sum(any(token in text for text in (g.prompt, *g.completions) for token in tokens) for g in examples)


def length_lines(what: str, lengths: Sequence[int], limit_name: str, limit: int | None, block: str) -> list[str]:
    """Return a histogram with bars made of `block`; the bin that holds the limit is marked."""
    over = "" if limit is None else f"; {sum(n > limit for n in lengths):,} over --{limit_name} {limit}"
    bins = histogram(lengths)
    full = max(each.rows for each in bins)
    lines = [
        f"{what}: median {statistics.median(lengths):,.10g}, 95th percentile {percentile(lengths, 0.95):,}, longest "
        f"{max(lengths):,}{over}"
    ]
    for low, high, count in bins:
        bar = f"{block * math.ceil(BAR * count / full)} " if count else ""
        mark = f"  <- --{limit_name} {limit}" if limit is not None and low <= limit <= high else ""
        lines.append(f"  {low:>7,} -{high:>7,}  {bar}{count:,}{mark}")
    return lines


def comparison_lines(examples: Sequence[Example], tokens: Sequence[TokenizedExample]) -> list[str]:
    lines = []
    if sizes := Counter(len(example.completions) for example in examples if example.completions):
        listed = [f"{size} ({count:,} rows)" for size, count in sorted(sizes.items())]
        lines.append(f"completions of a row: {', '.join(listed)}")
    if scores := rewards(examples):
        lines += [
            f"rewards: {scores.low:.4g} to {scores.high:.4g}, median {scores.median:.4g}",
            f"ties: all rewards equal in {_share(scores.equal, len(examples))}; the best is a tie in "
            f"{scores.best_tied:,} more",
        ]
    if bias := length_bias(tokens):
        lines += [
            f"tokens: chosen {bias.chosen:,.1f}, rejected {bias.rejected:,.1f} on average",
            f"the chosen is longer in {_share(bias.longer, bias.rows)}, as long in {bias.equal:,}",
        ]
    return lines


def repeat_lines(examples: Sequence[Example]) -> list[str]:
    found = repeats(examples)
    lines = {
        f"rows equal to an earlier one: {len(found.rows):,}{_named(found.rows)}": bool(found.rows),
        f"prompts of several rows: {found.prompts:,}, in {found.prompt_rows:,} rows": bool(found.prompts),
        f"rows with a completion repeated: {found.within:,}": bool(found.within),
        f"rows that prefer what an earlier one rejects: {len(found.reversed):,}{_named(found.reversed)}": bool(
            found.reversed
        ),
    }
    return [line for line, true in lines.items() if true] or ["duplicates: none"]


def leak_lines(examples: Sequence[Example], held_out: Sequence[Example]) -> list[str]:
    found = leaks(examples, held_out)
    return [
        f"held-out rows with a {what} of --data: {len(places):,} of {len(held_out):,}{_named(places)}"
        for what, places in (("prompt", found.prompts), ("completion", found.completions))
    ]


def _named(places: Places) -> str:
    named = [f"{one} = {other}" for one, other in places[:SHOWN]] + ["..."] * (len(places) > SHOWN)
    return f" ({', '.join(named)})" if named else ""


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} rows ({count / total:.1%})"
