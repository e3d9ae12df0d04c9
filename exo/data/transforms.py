"""From scored completions to what is compared: the first K of a row, the best against the worst, rewards on one scale.

Pure functions on rows of data; each says what it leaves out, by reason. Left out: making the scores.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from exo.data import Group
from exo.data.text.tokenize import TokenGroup

Norm = Literal["none", "prompt", "global"]
R = TypeVar("R", Group, TokenGroup)  # as texts, or as tokens


def first(groups: Sequence[R], k: int) -> tuple[list[R], Counter[str]]:
    """The first `k` completions of each row, where that leaves something to compare."""
    counts: Counter[str] = Counter()
    kept = []
    for group in groups:
        short = select(group, range(min(k, len(group.completions))))
        if len(set(short.completions)) == 1 and len(set(group.completions)) > 1:
            counts[f"rows skipped: the first {k} completions identical"] += 1
        else:
            kept.append(short)
    return kept, counts


def best_against_worst(groups: Sequence[R]) -> tuple[list[R], Counter[str]]:
    """Preferences out of rewards: the completion of the highest reward is chosen, that of the lowest rejected."""
    counts: Counter[str] = Counter()
    pairs = []
    for group in groups:
        if group.rewards is None:
            pairs.append(group)
        elif min(group.rewards) == max(group.rewards):
            counts["rows skipped: all rewards equal, so no best and worst"] += 1
        else:
            best, worst = (group.rewards.index(extreme(group.rewards)) for extreme in (max, min))
            pairs.append(replace(select(group, (best, worst)), rewards=None))
    return pairs, counts


def normalise(groups: Sequence[R], how: Norm) -> list[R]:
    """Rewards less their mean, over their standard deviation: of the row ("prompt"), or of all of them ("global").

    Rewards without spread become 0. Preferences stay as they are.
    """
    if how == "none" or groups[0].rewards is None:
        return list(groups)
    if how == "prompt":
        return [replace(group, rewards=_scale(group.rewards or ())(group.rewards or ())) for group in groups]
    scaled = _scale([reward for group in groups for reward in group.rewards or ()])
    return [replace(group, rewards=scaled(group.rewards or ())) for group in groups]


def _scale(values: Sequence[float]) -> Callable[[Sequence[float]], tuple[float, ...]]:
    """Return what brings rewards to the mean and the standard deviation of `values`."""
    # a power of two brings them below 1/4, exactly: sums and differences of values near 1.8e308 would overflow
    shift = -math.frexp(max(map(abs, values)))[1] - 2
    small = [math.ldexp(value, shift) for value in values]
    mean, spread = statistics.fmean(small), statistics.pstdev(small)
    return lambda rewards: tuple((math.ldexp(r, shift) - mean) / spread if spread else 0.0 for r in rewards)


def select(group: R, places: Sequence[int]) -> R:
    """The row with these of its completions, in this order."""

    def of(values: Sequence | None) -> Any:
        return None if values is None else tuple(values[i] for i in places)

    changed: dict[str, Any] = {name: of(getattr(group, name)) for name in ("completions", "rewards", "ref_logps")}
    if isinstance(group, Group) and group.tokens is not None:
        tokens = group.tokens
        changed["tokens"] = tokens._replace(ids=of(tokens.ids), logprobs=of(tokens.logprobs), finish=of(tokens.finish))
    return replace(group, **changed)
