"""Losses from hidden states and the head: time and memory against the bare matmuls, and every peer."""

from benchmarks import linear as suite


def test_linear(case, run_case):
    assert case.suite == suite.SUITE
    run_case(case)
