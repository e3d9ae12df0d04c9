"""Split the rows of an alignment into those to train on and those held out, as the options compare them."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from exo import data
from exo.cli.options import Norm
from exo.data import split, transforms
from exo.data.text.tokenize import TokenizedExample


class Comparison(NamedTuple):
    """How the completions of a row are compared; the fields have the names of the options."""

    max_completions: int | None
    pairs: bool  # of rewards: the best completion and the worst
    reward_norm: Norm

    def of(self, rows: list[TokenizedExample], counts: Counter[str]) -> list[TokenizedExample]:
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
    """Compared rows."""

    train: list[TokenizedExample]
    held_out: list[TokenizedExample]
    lines: frozenset[int]  # of the rows of --data that are held out


def choose(
    comparison: Comparison,
    dataset: data.Dataset,
    rows: list[TokenizedExample],
    eval_rows: list[TokenizedExample],
    counts: Counter[str],
    *,
    path: str,
    eval_path: str | None,  # a file of held-out rows, instead of a share of the others
    eval_fraction: float,
    seed: int,
) -> Split:
    """Choose the rows to hold out. DataError if no row is left to train on, or to evaluate on with `eval_path`."""
    compared, eval_compared = comparison.of(rows, counts), comparison.of(eval_rows, counts)
    lines: frozenset[int] = frozenset()
    if eval_path is None:
        by_line = {example.line: example for example in dataset.examples}
        texts = [by_line[row.line] for row in compared]
        lines = frozenset(compared[i].line for i in split.hold_out(texts, eval_fraction, seed, path))
    result = _split(compared, eval_compared, lines)
    if not result.train:
        raise data.DataError(f"{path}: no row is left to train on")
    if eval_path and not result.held_out:
        raise data.DataError(f"{eval_path}: no held-out row is left to evaluate on")
    return result


def apply(
    comparison: Comparison, lines: frozenset[int], rows: Sequence[TokenizedExample], eval_rows: list[TokenizedExample]
) -> Split:
    """Split the same rows by lines that were chosen before, once the reference has scored them."""
    skipped: Counter[str] = Counter()  # counted before
    return _split(comparison.of(list(rows), skipped), comparison.of(eval_rows, skipped), lines)


def _split(rows: list[TokenizedExample], eval_rows: list[TokenizedExample], lines: frozenset[int]) -> Split:
    if not lines:
        return Split(rows, eval_rows, lines)
    return Split([row for row in rows if row.line not in lines], [row for row in rows if row.line in lines], lines)
