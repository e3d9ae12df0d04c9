"""A training step: shared prompts against padded rows, and on pairs against TRL's DPO trainer."""

from benchmarks import step as suite


def test_step(case, run_case):
    assert case.suite == suite.SUITE
    run_case(case)
