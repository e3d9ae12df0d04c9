"""Describe preference data before training: lengths, ties, duplicates, length bias, leaks."""

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from exo.data import Example, split, transforms
from exo.data.text.tokenize import TokenizedExample

MAX_LISTED = 10  # rows in a line
MAX_BINS = 6
BAR_LENGTH = 24  # characters of the longest bar
Places = list[tuple[str, str]]  # a row, and an earlier row or a row of other data with the same text


class Bin(NamedTuple):
    low: int
    high: int  # inclusive
    rows: int


class Leaks(NamedTuple):
    prompts: Places  # held-out rows whose prompt is in the data
    completions: Places  # held-out rows whose completion, alone or after its prompt, is in the data


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def histogram(lengths: Sequence[int]) -> list[Bin]:
    """Return at most MAX_BINS bins of a round width up to the 95th percentile, and one for longer rows.

    Empty bins before the first length are left out.
    """
    top = int(percentile(lengths, 0.95))
    width = next(digit * 10**power for power in range(20) for digit in (1, 2, 5) if digit * 10**power * MAX_BINS > top)
    last = top // width
    counts = Counter(min(length // width, last + 1) for length in lengths)
    bins = [Bin(i * width, (i + 1) * width - 1, counts[i]) for i in range(min(counts), last + 1)]
    return [*bins, Bin((last + 1) * width, max(lengths), counts[last + 1])] if counts[last + 1] else bins


def _place(example: Example) -> str:
    return example.source or f"line {example.line}"


def find_leaks(examples: Iterable[Example], held_out: Iterable[Example]) -> Leaks:
    """Find held-out rows that share a text with the data, by the keys of data.split."""
    first: dict[Hashable, str] = {}
    for example in examples:
        for key in _keys(example):
            first.setdefault(key, _place(example))
    leaks = Leaks([], [])
    for example in held_out:
        shared = [key for key in _keys(example) if key in first]
        prompt_key = ("name", example.prompt.strip())
        if prompt_key in shared:
            leaks.prompts.append((_place(example), first[prompt_key]))
        if completion_keys := [key for key in shared if key != prompt_key]:
            leaks.completions.append((_place(example), first[completion_keys[0]]))
    return leaks


def _keys(example: Example) -> list[Hashable]:
    """Return the keys of a row's texts; none without prompt and completion."""
    return list(split.keys(example)) if example.prompt or example.completions else []


def count_rows_with(tokens: Sequence[str], examples: Iterable[Example]) -> int:
    """Return the number of rows with one of these control tokens in their texts."""
    return sum(any(token in text for text in (g.prompt, *g.completions) for token in tokens) for g in examples)


def length_lines(title: str, lengths: Sequence[int], limit_name: str, limit: int | None, block: str) -> list[str]:
    """Return a histogram with bars made of `block`; the bin that holds the limit is marked."""
    over = "" if limit is None else f"; {sum(n > limit for n in lengths):,} over --{limit_name} {limit}"
    bins = histogram(lengths)
    most_rows = max(bin.rows for bin in bins)
    lines = [
        f"{title}: median {statistics.median(lengths):,.10g}, 95th percentile {percentile(lengths, 0.95):,}, longest "
        f"{max(lengths):,}{over}"
    ]
    for low, high, count in bins:
        bar = f"{block * math.ceil(BAR_LENGTH * count / most_rows)} " if count else ""
        mark = f"  <- --{limit_name} {limit}" if limit is not None and low <= limit <= high else ""
        lines.append(f"  {low:>7,} -{high:>7,}  {bar}{count:,}{mark}")
    return lines


def comparison_lines(examples: Sequence[Example], tokens: Sequence[TokenizedExample]) -> list[str]:
    """Describe the number of completions, the rewards, and the lengths of chosen and rejected completions."""
    lines = []
    if sizes := Counter(len(example.completions) for example in examples if example.completions):
        listed = [f"{size} ({count:,} rows)" for size, count in sorted(sizes.items())]
        lines.append(f"completions of a row: {', '.join(listed)}")
    if rows := [example.rewards for example in examples if example.rewards]:
        rewards = [reward for row in rows for reward in row]
        equal = sum(min(row) == max(row) for row in rows)
        tied = sum(row.count(max(row)) > 1 for row in rows)
        lines += [
            f"rewards: {min(rewards):.4g} to {max(rewards):.4g}, median {statistics.median(rewards):.4g}",
            f"ties: all rewards equal in {_share(equal, len(examples))}; the best is a tie in {tied - equal:,} more",
        ]
    if pairs := [pair.completions for pair in transforms.to_pairs(tokens)[0] if len(pair.completions) > 1]:
        chosen = [len(completions[0]) for completions in pairs]
        rejected = [statistics.fmean(map(len, completions[1:])) for completions in pairs]
        longer = sum(a > b for a, b in zip(chosen, rejected, strict=True))
        equal = sum(a == b for a, b in zip(chosen, rejected, strict=True))
        means = statistics.fmean(chosen), statistics.fmean(rejected)
        lines += [
            f"tokens: chosen {means[0]:,.1f}, rejected {means[1]:,.1f} on average",
            f"the chosen is longer in {_share(longer, len(pairs))}, as long in {equal:,}",
        ]
    return lines


def duplicate_lines(examples: Sequence[Example]) -> list[str]:
    """Describe repeated rows, prompts and completions, and rows that contradict an earlier one."""
    equal: Places = []
    contradicting: Places = []
    first: dict[Hashable, str] = {}
    preferred: dict[tuple[str, str, str], str] = {}
    for example in examples:
        content = (example.prompt, example.completions, example.rewards, example.label)
        if (earlier := first.setdefault(content, _place(example))) != _place(example):
            equal.append((_place(example), earlier))
    for example in transforms.to_pairs(examples)[0]:
        pairs = [(example.prompt, a, b) for a in example.completions[:1] for b in example.completions[1:]]
        if opposites := [preferred[prompt, b, a] for prompt, a, b in pairs if (prompt, b, a) in preferred]:
            contradicting.append((_place(example), opposites[0]))
        for pair in pairs:
            preferred.setdefault(pair, _place(example))
    prompts = Counter(example.prompt for example in examples if example.prompt)
    repeated = [count for count in prompts.values() if count > 1]
    within = sum(len(set(example.completions)) < len(example.completions) for example in examples)
    lines = {
        f"rows equal to an earlier one: {len(equal):,}{_listed(equal)}": equal,
        f"prompts of several rows: {len(repeated):,}, in {sum(repeated):,} rows": repeated,
        f"rows with a completion repeated: {within:,}": within,
        f"rows that prefer what an earlier one rejects: {len(contradicting):,}{_listed(contradicting)}": contradicting,
    }
    return [line for line, count in lines.items() if count] or ["duplicates: none"]


def leak_lines(examples: Sequence[Example], held_out: Sequence[Example]) -> list[str]:
    """Describe the held-out rows that share texts with the data."""
    leaks = find_leaks(examples, held_out)
    return [
        f"held-out rows with a {kind} of --data: {len(places):,} of {len(held_out):,}{_listed(places)}"
        for kind, places in (("prompt", leaks.prompts), ("completion", leaks.completions))
    ]


def _listed(places: Places) -> str:
    listed = [f"{row} = {other}" for row, other in places[:MAX_LISTED]] + ["..."] * (len(places) > MAX_LISTED)
    return f" ({', '.join(listed)})" if listed else ""


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} rows ({count / total:.1%})"
