"""A minute's worth of what `python -m reliability.fuzz --executions 1000000` does by the million."""

import time

import pytest

from reliability.fuzz import SLOWEST, Target, fuzz, targets, timed_apart

EXECUTIONS = {"header": 4_000, "config": 4_000, "keys": 1_500, "data": 4_000, "native": 1_500, "xlora": 1_500}
SLACK = 20  # of the time that is promised


@pytest.fixture(scope="module")
def known():
    return targets()


@pytest.mark.parametrize("name", EXECUTIONS)
def test_only_the_documented_error(known, name, seed):
    result = fuzz(known[name], EXECUTIONS[name], seed)
    assert not result.failures, result.failures[0]
    assert all(took < SLOWEST * SLACK for took in timed_apart(name, result.slow))
    assert result.executions == EXECUTIONS[name]
    assert result.ends["read"] > result.executions / 20, "what is changed has to be read, too, or nothing deep is met"
    assert len(result.ends) > 8


def test_what_is_slow_is_found_and_timed_apart(known):
    header = known["header"].seeds[0]

    def act(one):
        until = time.thread_time() + (2 * SLOWEST / 1e3 if one == "slow" else 0)
        while time.thread_time() < until:
            pass

    result = fuzz(Target(["quick"], lambda one, draw: draw.choice(["quick", "slow"]), act, ValueError), 10, seed=0)
    assert set(result.slow) == {"slow"} and result.slowest < SLOWEST
    assert [took < SLOWEST for took in timed_apart("header", [header, header])] == [True, True]
