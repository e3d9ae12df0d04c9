"""Transforms of scored completions, and the metrics of samples."""

import math

import pytest
import torch

from exo.data import Example, Tokens, transforms
from exo.evaluation import metrics as evaluation_metrics


def example(rewards, texts="abcdefgh"):
    tokens = Tokens("t", tuple((i,) for i in range(len(rewards))), tuple(map(float, range(len(rewards)))),
                    ("eos",) * len(rewards))  # fmt: skip
    return Example("p", tuple(texts[: len(rewards)]), tuple(map(float, rewards)), 3, tokens)


def test_best_against_worst_takes_the_first_of_each_with_its_tokens():
    pairs, counts = transforms.to_pairs([example([1, 5, 0, 5, 0])])
    assert pairs == [Example("p", ("b", "c"), None, 3, Tokens("t", ((1,), (2,)), (1.0, 2.0), ("eos", "eos")))]
    assert not counts


def test_rows_with_equal_rewards_are_counted_and_preferences_are_unchanged():
    preference = Example("p", ("x", "y"), None, 1)
    pairs, counts = transforms.to_pairs([example([2, 2]), preference])
    assert pairs == [preference] and counts == {"rows skipped: all rewards equal, so no best and worst": 1}


def test_take_first():
    taken, counts = transforms.take_first([example([1, 2, 3]), example([1, 2, 3], "aab"), example([1])], 2)
    assert [g.completions for g in taken] == [("a", "b"), ("a",)]
    assert taken[0].tokens.ids == ((0,), (1,)) and taken[0].rewards == (1.0, 2.0)
    assert counts == {"rows skipped: the first 2 completions identical": 1}


def test_normalize_rewards():
    examples = [example([1, 3]), example([10, 10, 16])]
    by_prompt = transforms.normalize_rewards(examples, "prompt")
    assert by_prompt[0].rewards == (-1.0, 1.0)
    assert by_prompt[1].rewards == pytest.approx((-(0.5**0.5), -(0.5**0.5), 2**0.5))
    together = [x for g in transforms.normalize_rewards(examples, "global") for x in g.rewards]
    assert sum(together) == pytest.approx(0, abs=1e-12) and sum(x * x for x in together) / 5 == pytest.approx(1)
    assert transforms.normalize_rewards([example([2, 2])], "prompt")[0].rewards == (0.0, 0.0)
    assert transforms.normalize_rewards(examples, "none") == examples


@pytest.mark.parametrize("how", ["prompt", "global"])
@pytest.mark.parametrize("unit", [5e-324, 1e-300, 1e300, 1.7e308])
def test_the_largest_and_smallest_floats_are_normalized(how, unit):
    """Check (-1, 0, 1) in any unit, whose mean is 0 and whose standard deviation is sqrt(2/3)."""
    [scaled] = transforms.normalize_rewards([example([-unit, 0.0, unit])], how)
    assert scaled.rewards == pytest.approx((-(1.5**0.5), 0.0, 1.5**0.5))
    assert transforms.normalize_rewards([example([unit] * 3)], how)[0].rewards == (0.0, 0.0, 0.0)


# Metrics.


def test_win_rates_count_all_pairs_and_ties_half():
    assert evaluation_metrics.win_rates([[1, 2], [0.0]], [[1, 0, 3], [0.0]]) == [pytest.approx((1 + 0.5 + 2) / 6), 0.5]


def test_accuracy_is_the_mean_sigmoid_and_survives_large_log_odds():
    assert evaluation_metrics.accuracies([[0.0, math.log(3)], [1e4, -1e4]]) == [pytest.approx(0.625), 0.5]


def test_spread_is_within_prompts():
    assert evaluation_metrics.spread([[1.0, 3.0], [100.0, 100.0]]) == pytest.approx(0.5)


def test_summary_of_one_value_and_of_many():
    assert evaluation_metrics.summary([2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0, "standard_error": 0.0}
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    summary = evaluation_metrics.summary(values.tolist())
    error = float(values.std()) / 20
    assert summary["standard_error"] == pytest.approx(error)
    assert summary["mean"] - summary["low"] == pytest.approx(1.96 * error, rel=0.15)
    assert summary["high"] - summary["mean"] == pytest.approx(1.96 * error, rel=0.15)


def test_the_bootstrap_interval_has_its_nominal_coverage():
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for trial in range(200):
        sample = torch.rand(40, generator=generator, dtype=torch.float64).square()
        low, high = evaluation_metrics.bootstrap(sample.tolist(), seed=trial, resamples=400)
        covered += low <= 1 / 3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_both_estimators_of_the_kl_are_unbiased():
    """Compare with the sum over all completions of two tokens, the second of which depends on the first."""
    generator = torch.Generator().manual_seed(0)
    pi, ref = (torch.randn(3, generator=generator).double().log_softmax(0) for _ in range(2))
    pi2, ref2 = (torch.randn(3, 3, generator=generator).double().log_softmax(1) for _ in range(2))
    joint = pi[:, None] + pi2
    exact = float((joint.exp() * (joint - ref[:, None] - ref2)).sum())
    draws = torch.multinomial(joint.exp().flatten(), 20_000, replacement=True, generator=generator)
    first, second = draws // 3, draws % 3
    steps = torch.stack([pi[first] - ref[first], pi2[first, second] - ref2[first, second]], 1)
    samples = [[row] for row in steps]
    for estimator in (evaluation_metrics.kl_k1, evaluation_metrics.kl_k3):
        values = torch.tensor(estimator(samples)).double()
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / len(values) ** 0.5
    assert min(evaluation_metrics.kl_k3(samples)) >= 0 > min(evaluation_metrics.kl_k1(samples))
    assert torch.tensor(evaluation_metrics.kl_k3(samples)).std() < torch.tensor(evaluation_metrics.kl_k1(samples)).std()
