"""Fuzz cases: a few of every class in each test run, and many in the slow tests."""

import fuzz
import fuzz_cases
import pytest

FEW = {"valid-calls": 12, "hostile-calls": 60, "data": 60, "models": 6}
FEW |= {"yaml": 20, "recipes": 2, "records": 40, "faults": 30}


@pytest.mark.parametrize("name", FEW)
def test_a_sample_of_fuzz_cases(name):
    outcomes, failures = fuzz.run(name, fuzz_cases.CLASSES[name].case, 1, range(FEW[name]))
    assert not failures, failures
    assert outcomes.total() == FEW[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz_cases.CLASSES)
def test_many_fuzz_cases(name):
    entry = fuzz_cases.CLASSES[name]
    outcomes, failures = fuzz.run(name, entry.case, 2, range(50 * entry.share))
    assert not failures, failures[:5]
    print(name, dict(outcomes))
