"""What several raters together say of items: counts, the majority's view, and how far they agree.

Fleiss (1971) has the same number of raters for every item; here an item counts with the raters it has, if two at least.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from exo import intervals

OUTCOMES = ("win", "tie", "lose")
_POINTS = {"win": 1.0, "tie": 0.5, "lose": 0.0, "split": 0.5}


def pooled(items: Sequence[Sequence[str]], seed: int) -> dict[str, Any]:
    """Every judgement counts. An item's share of the win rate is the mean over its raters."""
    counts = Counter(outcome for item in items for outcome in item)
    shares = [sum(_POINTS[outcome] for outcome in item) / len(item) for item in items]
    return {name: counts[name] for name in OUTCOMES} | {"win_rate": _rate(shares, seed)}


def majority(items: Sequence[Sequence[str]], seed: int) -> dict[str, Any]:
    """Every item counts once, with what more of its raters chose than anything else; else it is split."""
    outcomes = [_most(item) for item in items]
    counts = Counter(outcomes)
    rate = _rate([_POINTS[outcome] for outcome in outcomes], seed)
    return {name: counts[name] for name in (*OUTCOMES, "split")} | {"win_rate": rate}


def _most(item: Sequence[str]) -> str:
    (first, most), *rest = Counter(item).most_common(2)
    return "split" if rest and rest[0][1] == most else first


def _rate(values: Sequence[float], seed: int) -> dict[str, float]:
    low, high = intervals.bootstrap(values, seed)
    return {"mean": sum(values) / len(values), "low": low, "high": high}


def agreement(items: Sequence[Sequence[str]]) -> tuple[float | None, float | None]:
    """Share of the pairs of raters who say the same of an item, and Fleiss' kappa, which is what exceeds chance.

    None for both where no item has two raters; None for kappa where all say one thing, so that chance would agree too.
    """
    shared = [Counter(item) for item in items if len(item) > 1]
    pairs = sum(n * (n - 1) for n in (counts.total() for counts in shared))
    if not pairs:
        return None, None
    agreed = sum(n * (n - 1) for counts in shared for n in counts.values()) / pairs
    whole = sum(shared, Counter[str]())
    chance = sum((n / whole.total()) ** 2 for n in whole.values())
    return agreed, (agreed - chance) / (1 - chance) if len(whole) > 1 else None
