"""Count the verdicts of human raters: outcomes of each matchup, majorities, and how far the raters agree."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from exo.cli import console
from exo.evaluation import metrics
from exo.evaluation.sheets import Sheet

OUTCOMES = ("win", "tie", "lose")
_POINTS = {"win": 1.0, "tie": 0.5, "lose": 0.0, "split": 0.5}


def count(key: Mapping[str, Any], sheets: Mapping[str, Sheet], seed: int) -> dict[str, Any]:
    """Return the statistics of each matchup, and the missing and unreadable verdicts.

    `key` is the content of key.json, and `sheets` has the filled sheet of each rater. Outcomes are those of the first
    system of a matchup.
    """
    outcomes: dict[str, list[list[str]]] = {matchup: [] for matchup in key["matchups"]}
    for item, entry in key["items"].items():
        if judged := [_outcome(entry, sheet.verdicts[item]) for sheet in sheets.values() if item in sheet.verdicts]:
            outcomes[entry["matchup"]].append(judged)
    not_counted = [
        {"item": item, "rater": rater, "found": sheet.unreadable.get(item, "")}
        for rater, sheet in sheets.items()
        for item in key["items"]
        if item not in sheet.verdicts
    ]
    return {
        "raters": sorted(sheets),
        "matchups": {name: _statistics(items, seed) for name, items in outcomes.items()},
        "missing": [{"item": row["item"], "rater": row["rater"]} for row in not_counted if not row["found"]],
        "unreadable": [row for row in not_counted if row["found"]],
    }


def _outcome(entry: Mapping[str, str], verdict: str) -> str:
    if verdict == "tie":
        return "tie"
    return "win" if entry[f"answer {verdict}"] == entry["matchup"].split(":")[0] else "lose"


def _statistics(items: Sequence[Sequence[str]], seed: int) -> dict[str, Any]:
    agreed, kappa = agreement(items)
    return {
        "items": len(items),
        "pooled": pool(items, seed) if items else None,
        "majority": majority(items, seed) if items else None,
        "agreement": agreed,
        "kappa": kappa,
    }


def pool(items: Sequence[Sequence[str]], seed: int) -> dict[str, Any]:
    """Count every judgement. An item contributes the mean over its raters to the win rate."""
    counts = Counter(outcome for item in items for outcome in item)
    shares = [sum(_POINTS[outcome] for outcome in item) / len(item) for item in items]
    return {name: counts[name] for name in OUTCOMES} | {"win_rate": metrics.interval(shares, seed)}


def majority(items: Sequence[Sequence[str]], seed: int) -> dict[str, Any]:
    """Count every item once, with the verdict that most of its raters chose; without one it is split."""
    outcomes = [_most_frequent(item) for item in items]
    counts = Counter(outcomes)
    rate = metrics.interval([_POINTS[outcome] for outcome in outcomes], seed)
    return {name: counts[name] for name in (*OUTCOMES, "split")} | {"win_rate": rate}


def _most_frequent(item: Sequence[str]) -> str:
    (first, most), *rest = Counter(item).most_common(2)
    return "split" if rest and rest[0][1] == most else first


def agreement(items: Sequence[Sequence[str]]) -> tuple[float | None, float | None]:
    """Return the share of pairs of raters that agree on an item, and Fleiss' kappa, the agreement beyond chance.

    Both are None if no item has two raters; kappa is None if all verdicts are equal.
    """
    shared = [Counter(item) for item in items if len(item) > 1]
    pairs = sum(n * (n - 1) for n in (counts.total() for counts in shared))
    if not pairs:
        return None, None
    agreed = sum(n * (n - 1) for counts in shared for n in counts.values()) / pairs
    total = sum(shared, Counter[str]())
    chance = sum((n / total.total()) ** 2 for n in total.values())
    return agreed, (agreed - chance) / (1 - chance) if len(total) > 1 else None


def show(result: Mapping[str, Any], num_raters: int) -> None:
    """Print the result of `count` as a table; `num_raters` is the number of sheets that were exported."""
    console.log(f"{len(result['raters'])} sheets of {num_raters}: {', '.join(result['raters'])}\n")
    console.log(f"{'matchup':<24}{'':<10}{'win':>6}{'tie':>6}{'lose':>6}{'split':>6}  win rate, 95% interval")
    for name, statistics in result["matchups"].items():
        for view in ("pooled", "majority") if statistics["items"] else ():
            counts = statistics[view]
            numbers = "".join(f"{counts.get(outcome, ''):>6}" for outcome in (*OUTCOMES, "split"))
            rate = "{mean:.1%} [{low:.1%}, {high:.1%}]".format(**counts["win_rate"])
            console.log(f"{name if view == 'pooled' else '':<24}{view:<10}{numbers}  {rate}")
        console.log(f"{'':<24}{_describe_agreement(statistics)}")
    for kind in ("missing", "unreadable"):
        if rows := result[kind]:
            listed = ", ".join(f"{row['item']} of {row['rater']}" for row in rows[:10]) + ", ..." * (len(rows) > 10)
            console.log(f"{len(rows):,} {kind} verdicts, left out: {listed}")


def _describe_agreement(statistics: Mapping[str, Any]) -> str:
    if not statistics["items"]:
        return "no verdict"
    if statistics["agreement"] is None:
        return "agreement undefined: no item has two verdicts"
    kappa = "undefined: all verdicts are equal" if statistics["kappa"] is None else f"{statistics['kappa']:.2f}"
    return f"{statistics['items']:,} items; pairs of raters agree {statistics['agreement']:.1%}, Fleiss' kappa {kappa}"
