"""Ten of the round trips that `python -m reliability.round_trips` makes by the hundred, which have all that matters."""

from functools import lru_cache

import pytest

from reliability.round_trip_bases import make
from reliability.round_trip_specs import drawn
from reliability.round_trips import taken

TRIPS = []
base = lru_cache(make)


@pytest.mark.parametrize(("name", "seed"), TRIPS)
def test_there_and_back_or_refused(name, seed, tmp_path):
    trip = drawn(base(name), seed)
    end = taken(base(name), trip, tmp_path)
    assert end.how in ("same", "refused"), f"{trip}: {end.told}"
