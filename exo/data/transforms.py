"""From scored completions to what is compared: the first K of a row, the best against the worst, rewards on one scale.

Pure functions on rows of data; each says what it leaves out, by reason. Left out: making the scores.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from exo.cli.options import Norm
from exo.data import Example
from exo.data.text.tokenize import TokenizedExample

R = TypeVar("R", Example, TokenizedExample)  # as texts, or as tokens


def take_first(examples: Sequence[R], k: int) -> tuple[list[R], Counter[str]]:
    """The first `k` completions of each row, where that leaves something to compare."""
    counts: Counter[str] = Counter()
    kept = []
    for example in examples:
        short = select(example, range(min(k, len(example.completions))))
        if len(set(short.completions)) == 1 and len(set(example.completions)) > 1:
            counts[f"rows skipped: the first {k} completions identical"] += 1
        else:
            kept.append(short)
    return kept, counts


def to_pairs(examples: Sequence[R]) -> tuple[list[R], Counter[str]]:
    """Preferences out of rewards: the completion of the highest reward is chosen, that of the lowest rejected."""
    counts: Counter[str] = Counter()
    pairs = []
    for example in examples:
        if example.rewards is None:
            pairs.append(example)
        elif min(example.rewards) == max(example.rewards):
            counts["rows skipped: all rewards equal, so no best and worst"] += 1
        else:
            best, worst = (example.rewards.index(extreme(example.rewards)) for extreme in (max, min))
            pairs.append(replace(select(example, (best, worst)), rewards=None))
    return pairs, counts


def normalize_rewards(examples: Sequence[R], how: Norm) -> list[R]:
    """Rewards less their mean, over their standard deviation: of the row ("prompt"), or of all of them ("global").

    Rewards without spread become 0. Preferences stay as they are.
    """
    if how == "none" or examples[0].rewards is None:
        return list(examples)
    if how == "prompt":
        return [replace(example, rewards=_scale(example.rewards or ())(example.rewards or ())) for example in examples]
    scaled = _scale([reward for example in examples for reward in example.rewards or ()])
    return [replace(example, rewards=scaled(example.rewards or ())) for example in examples]


def _scale(values: Sequence[float]) -> Callable[[Sequence[float]], tuple[float, ...]]:
    """Return what brings rewards to the mean and the standard deviation of `values`."""
    # a power of two brings them below 1/4, exactly: sums and differences of values near 1.8e308 would overflow
    shift = -math.frexp(max(map(abs, values)))[1] - 2
    small = [math.ldexp(value, shift) for value in values]
    mean, spread = statistics.fmean(small), statistics.pstdev(small)
    return lambda rewards: tuple((math.ldexp(r, shift) - mean) / spread if spread else 0.0 for r in rewards)


def select(example: R, places: Sequence[int]) -> R:
    """The row with these of its completions, in this order."""

    def of(values: Sequence | None) -> Any:
        return None if values is None else tuple(values[i] for i in places)

    changed: dict[str, Any] = {name: of(getattr(example, name)) for name in ("completions", "rewards", "ref_logps")}
    if isinstance(example, Example) and example.tokens is not None:
        tokens = example.tokens
        changed["tokens"] = tokens._replace(ids=of(tokens.ids), logprobs=of(tokens.logprobs), finish=of(tokens.finish))
    return replace(example, **changed)
