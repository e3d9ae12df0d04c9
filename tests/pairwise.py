"""Parametrize a test pairwise: the fast lane covers every pair of values of two axes; other combinations are slow."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest


def pairwise(axes: Mapping[str, Sequence[Any]]) -> pytest.MarkDecorator:
    """Return the parametrization of a test by the product of axes; combinations that add no new pair are slow."""
    sizes = [len(values) for values in axes.values()]
    fast = covering(sizes)
    params = []
    for places in itertools.product(*map(range, sizes)):
        values = [values[i] for values, i in zip(axes.values(), places, strict=True)]
        label = "-".join(str(value).removeprefix("torch.") for value in values)
        params.append(pytest.param(*values, marks=() if places in fast else pytest.mark.slow, id=label))
    return pytest.mark.parametrize(list(axes), params)


def covering(sizes: Sequence[int]) -> set[tuple[int, ...]]:
    """Return combinations that contain every pair of values of two axes, greedily by the number of new pairs."""
    product = list(itertools.product(*map(range, sizes)))
    missing = {pair for places in product for pair in _pairs(places)}
    chosen = set()
    while missing:
        best = max(product, key=lambda places: len(missing & _pairs(places)))
        chosen.add(best)
        missing -= _pairs(best)
    return chosen


def _pairs(places: tuple[int, ...]) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(enumerate(places), 2))
