"""Select the completions that a loss compares, and split the rows into training and held-out rows."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from exo.cli.options import Norm
from exo.data import split, transforms
from exo.data.dataset import Dataset
from exo.data.errors import DataError
from exo.data.text.tokenize import TokenizedExample


class Comparison(NamedTuple):
    """The options on the completions to compare."""

    max_completions: int | None
    pairs: bool  # of rewards: the best completion and the worst
    reward_norm: Norm

    def select(self, rows: list[TokenizedExample], counts: Counter[str]) -> list[TokenizedExample]:
        """Return the rows with fewer completions, as pairs, or with normalized rewards; count what is skipped."""
        if self.max_completions is not None:
            rows, skipped = transforms.take_first(rows, self.max_completions)
            counts.update(skipped)
        if self.pairs:
            rows, skipped = transforms.to_pairs(rows)
            counts.update(skipped)
            return rows
        return transforms.normalize_rewards(rows, self.reward_norm) if rows else rows


class Split(NamedTuple):
    train: list[TokenizedExample]
    held_out: list[TokenizedExample]
    lines: frozenset[int]  # of held-out rows of --data


def split_rows(
    comparison: Comparison,
    dataset: Dataset,
    rows: list[TokenizedExample],
    eval_rows: list[TokenizedExample],
    counts: Counter[str],
    *,
    path: str,
    eval_path: str | None,  # a file of held-out rows, instead of a share of --data
    eval_fraction: float,
    seed: int,
) -> Split:
    """Select and split the rows. DataError if no row is left to train on, or, with `eval_path`, to evaluate on."""
    compared, eval_compared = comparison.select(rows, counts), comparison.select(eval_rows, counts)
    lines: frozenset[int] = frozenset()
    if eval_path is None:
        by_line = {example.line: example for example in dataset.examples}
        texts = [by_line[row.line] for row in compared]
        lines = frozenset(compared[i].line for i in split.hold_out(texts, eval_fraction, seed, path))
    result = _split(compared, eval_compared, lines)
    if not result.train:
        raise DataError(f"{path}: no row is left to train on")
    if eval_path and not result.held_out:
        raise DataError(f"{eval_path}: no held-out row is left to evaluate on")
    return result


def split_scored_rows(
    comparison: Comparison, lines: frozenset[int], rows: Sequence[TokenizedExample], eval_rows: list[TokenizedExample]
) -> Split:
    """Select and split the rows, which now have reference log-probs, by the held-out lines of `split_rows`."""
    skipped: Counter[str] = Counter()  # split_rows has counted them
    return _split(comparison.select(list(rows), skipped), comparison.select(eval_rows, skipped), lines)


def _split(rows: list[TokenizedExample], eval_rows: list[TokenizedExample], lines: frozenset[int]) -> Split:
    held_out = [row for row in rows if row.line in lines]
    return Split([row for row in rows if row.line not in lines], held_out or eval_rows, lines)
