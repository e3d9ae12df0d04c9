"""The EXO loss from given logits: time and memory against a copy of the same bytes, and eager PyTorch."""

from benchmarks import logits as suite


def test_logits(case, run_case):
    assert case.suite == suite.SUITE
    run_case(case)
