"""A minute's worth of what `python -m reliability.fuzz --executions 1000000` does by the million."""

import pytest

from reliability.fuzz import SLOWEST, fuzz, targets

EXECUTIONS = {"header": 4_000, "config": 4_000, "keys": 1_500, "data": 4_000, "native": 1_500, "xlora": 1_500}
SLACK = 20  # of the time that is promised


@pytest.fixture(scope="module")
def known():
    return targets()


@pytest.mark.parametrize("name", EXECUTIONS)
def test_only_the_documented_error(known, name, seed):
    result = fuzz(known[name], EXECUTIONS[name], seed)
    assert not result.failures, result.failures[0]
    assert result.slowest < SLOWEST * SLACK
    assert result.executions == EXECUTIONS[name]
    assert result.ends["read"] > result.executions / 20, "what is changed has to be read, too, or nothing deep is met"
    assert len(result.ends) > 8
