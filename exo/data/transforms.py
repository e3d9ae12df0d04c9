"""Select and normalize scored completions: the first K, the best and the worst, rewards on one scale.

The functions also return counts of the skipped rows by reason.
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

R = TypeVar("R", Example, TokenizedExample)


def take_first(examples: Sequence[R], k: int) -> tuple[list[R], Counter[str]]:
    """Return the first `k` completions of each row; skip rows whose completions become equal."""
    counts: Counter[str] = Counter()
    shortened = []
    for example in examples:
        short = select(example, range(min(k, len(example.completions))))
        if len(set(short.completions)) == 1 and len(set(example.completions)) > 1:
            counts[f"rows skipped: the first {k} completions identical"] += 1
        else:
            shortened.append(short)
    return shortened, counts


def to_pairs(examples: Sequence[R]) -> tuple[list[R], Counter[str]]:
    """Return the completions of the highest and the lowest reward as chosen and rejected; preferences unchanged."""
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


def normalize_rewards(examples: Sequence[R], norm: Norm) -> list[R]:
    """Subtract the mean from the rewards and divide by the standard deviation, of the row or of all rows ("global").

    Rewards without spread become 0. Preferences are returned unchanged.
    """
    if norm == "none" or examples[0].rewards is None:
        return list(examples)
    if norm == "prompt":
        return [replace(example, rewards=_scale(example.rewards or ())(example.rewards or ())) for example in examples]
    scale = _scale([reward for example in examples for reward in example.rewards or ()])
    return [replace(example, rewards=scale(example.rewards or ())) for example in examples]


def _scale(values: Sequence[float]) -> Callable[[Sequence[float]], tuple[float, ...]]:
    """Return a function that normalizes rewards by the mean and the standard deviation of `values`."""
    # scale exactly to below 1/4, because sums and differences of values near 1.8e308 overflow
    shift = -math.frexp(max(map(abs, values)))[1] - 2
    small = [math.ldexp(value, shift) for value in values]
    mean, spread = statistics.fmean(small), statistics.pstdev(small)
    return lambda rewards: tuple((math.ldexp(r, shift) - mean) / spread if spread else 0.0 for r in rewards)


def select(example: R, indices: Sequence[int]) -> R:
    """Return the row with these of its completions, in this order."""

    def take(values: Sequence | None) -> Any:
        return None if values is None else tuple(values[i] for i in indices)

    changed: dict[str, Any] = {name: take(getattr(example, name)) for name in ("completions", "rewards", "ref_logps")}
    if isinstance(example, Example) and example.tokens is not None:
        lists = {name: take(getattr(example.tokens, name)) for name in ("ids", "logprobs", "finish")}
        changed["tokens"] = example.tokens._replace(**lists)
    return replace(example, **changed)
