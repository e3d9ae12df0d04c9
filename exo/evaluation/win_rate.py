"""Win rate of one system over another from verdicts on pairs of answers, each judged in both orders.

In each order a win counts half a point and a tie a quarter, so a pair whose two orders disagree is a tie. A pair counts
only if both orders were decided: a single one would bring the judge's preference for a position back.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from exo.evaluation import metrics
from exo.evaluation.judge_prompts import JudgeTemplate

ORDERS = ("ab", "ba")  # whose answer the judge sees first


class Pair(NamedTuple):
    """Two answers to one prompt."""

    prompt: int  # number of the prompt in this run, from 0
    line: int  # of file a
    sample: int
    category: str
    texts: dict[str, str]  # by placeholder of the template

    def question(self, template: JudgeTemplate, order: str) -> str:
        return template.fill(**(self.texts | {"a": self.texts[order[0]], "b": self.texts[order[1]]}))


class Judgement(NamedTuple):
    """The judge's answer for a pair in one order."""

    answer: str | None  # None if the server did not answer
    choice: str | None  # "A", "B" or "tie"; None if undecided
    reason: str = ""
    cached: bool = False
    truncated: bool = False  # the answer was cut off, so it decides nothing

    def points(self, order: str) -> float | None:
        """Return the points of system a: 1 for a win, 1/2 for a tie, None if undecided."""
        if self.choice is None:
            return None
        return 0.5 if self.choice == "tie" else float(order["AB".index(self.choice)] == "a")


Judged = dict[tuple[int, str], Judgement]  # by the number of the pair, and the order


def rows(pairs: Sequence[Pair], judged: Judged) -> Iterable[dict[str, Any]]:
    for (number, order), judgement in sorted(judged.items()):
        pair, choice = pairs[number], judgement.choice
        winner = order["AB".index(choice)] if choice in ("A", "B") else choice
        row = {"prompt": pair.prompt, "line": pair.line, "sample": pair.sample, "order": order}
        row |= {"answer": judgement.answer, "choice": choice, "winner": winner}
        yield row | ({"reason": judgement.reason} if judgement.reason else {})


def count(pairs: Sequence[Pair], judged: Judged, seed: int) -> dict[str, Any]:
    """Return the win rate of system a with its interval over prompts, and counts of undecided and inconsistent pairs.

    The pairs of one prompt are not independent, so a prompt counts with the mean of its pairs.
    """
    decided, points = [], []
    for number, pair in enumerate(pairs):
        both = [judged[number, order].points(order) for order in ORDERS]
        if None not in both:
            decided.append([judged[number, order].choice for order in ORDERS])
            points.append((pair, sum(filter(None, both)) / 2))
    choices = [choice for both in decided for choice in both if choice != "tie"]
    biased = sum(both in (["A", "A"], ["B", "B"]) for both in decided)
    unanswered = sum(judgement.answer is None for judgement in judged.values())
    undecided = sum(judgement.choice is None for judgement in judged.values())
    categories = sorted({pair.category for pair, _ in points} - {""})
    return {
        "prompts": len({pair.prompt for pair in pairs}),
        "win_rate": _win_rate(points, seed) if points else None,
        "wins": sum(value > 0.5 for _, value in points),
        "ties": sum(value == 0.5 for _, value in points),
        "losses": sum(value < 0.5 for _, value in points),
        "position_bias_rate": biased / len(decided) if decided else None,
        "first_position_share": choices.count("A") / len(choices) if choices else None,
        "cached": sum(judgement.cached for judgement in judged.values()),
        "truncated": sum(judgement.truncated for judgement in judged.values()),
        "identical": sum(pair.texts["a"].strip() == pair.texts["b"].strip() for pair in pairs),
        "undecided": {
            "unanswered": unanswered,
            "unreadable": undecided - unanswered,
            "pairs_left_out": len(pairs) - len(decided),
        },
        "by_category": {
            name: _win_rate([(pair, value) for pair, value in points if pair.category == name], seed)
            for name in categories
        },
    }


def _win_rate(points: Sequence[tuple[Pair, float]], seed: int) -> dict[str, float]:
    by_prompt: dict[int, list[float]] = {}
    for pair, value in points:
        by_prompt.setdefault(pair.prompt, []).append(value)
    means = [sum(values) / len(values) for values in by_prompt.values()]
    return metrics.interval(means, seed) | {"prompts": len(means)}
