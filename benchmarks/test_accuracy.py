"""The error of every implementation's sequence log-ratios, against fp64 on the same operands."""

from benchmarks import accuracy as suite


def test_accuracy(case, run_case):
    assert case.suite == suite.SUITE
    run_case(case)
