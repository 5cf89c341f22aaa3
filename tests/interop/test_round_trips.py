"""Ten of the round trips that `python -m reliability.round_trips` makes by the hundred."""

from functools import lru_cache

import pytest

import jpeft
from jpeft.targets import frozen_mapping
from reliability.round_trip_bases import MAKERS, make
from reliability.round_trip_specs import drawn
from reliability.round_trips import taken

# What is in each is asserted below, all in all; PEFT has no form for some, whose saves may be refused.
COME_BACK = [("Llama, tied", 39), ("Llama, tied", 44), ("Llama", 2), ("Qwen2", 23), ("BERT", 58), ("Mixtral", 8)]
MAY_BE_REFUSED = [("GPT-2", 0), ("GPT-2", 17), ("BERT", 40), ("odd names", 7)]
base = lru_cache(make)


@pytest.mark.parametrize(("name", "seed"), COME_BACK + MAY_BE_REFUSED)
def test_there_and_back(name, seed, tmp_path):
    trip = drawn(base(name), seed)
    end = taken(base(name), trip, tmp_path)
    wanted = ("same",) if (name, seed) in COME_BACK else ("same", "refused")
    assert end.how in wanted, f"{trip}: {end.told}"


def test_the_ten_have_everything():
    trips = [drawn(base(name), seed) for name, seed in COME_BACK + MAY_BE_REFUSED]
    specs = [trip.spec for trip in trips]
    assert {name for name, _ in COME_BACK + MAY_BE_REFUSED} == set(MAKERS)
    assert {type(spec) for spec in specs} == {jpeft.LoRA, jpeft.DoRA, jpeft.AdaLoRA, jpeft.IA3}
    assert {spec.bias for spec in specs} == {"none", "all", "lora_only"}
    saved = {name for spec in specs for name in spec.modules_to_save}
    assert {"norm", "embed_tokens", "classifier", "input_layernorm"} <= saved
    low_rank = [spec for spec in specs if isinstance(spec, jpeft.LoRA)]
    assert sum(len(frozen_mapping(spec.rank_pattern)) > 1 for spec in low_rank) > 2
    assert sum(len(frozen_mapping(spec.alpha_pattern)) > 1 for spec in low_rank) > 2
    assert any(0 in dict(frozen_mapping(spec.rank_pattern)).values() for spec in low_rank)
    assert any(spec.rank_stabilized for spec in low_rank) and any(spec.factor_bias for spec in low_rank)
    assert any(spec.layers_to_transform for spec in specs) and any(spec.exclude for spec in specs)
    assert {type(spec.targets) for spec in specs} == {str, tuple}
    assert any(trip.dtype != "float32" for trip in trips) and any(trip.target == "vllm" for trip in trips)
    assert any(trip.prune for trip in trips) and {trip.task_type for trip in trips} >= {"CAUSAL_LM", "SEQ_CLS", None}
