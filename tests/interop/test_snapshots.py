"""Going on after an interruption: bit for bit, and with nothing else."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft_interop import data, train
from jpeft_interop.models import Output
from jpeft_interop.snapshots import ResumeError, Snapshots, discard, fingerprint, fingerprint_of_rows

RUN = {"spec": {"rank": 2, "targets": ["a", "b"]}, "lr": 0.1}
ROWS = {
    "input_ids": np.random.default_rng(0).integers(0, 11, (9, 5)),
    "labels": np.random.default_rng(1).integers(0, 11, (9, 5)),
}


def forward(params, input_ids):
    hidden = jnp.tanh(params["embed"]["embedding"][input_ids] @ params["mid"]["kernel"])
    return Output(logits=hidden @ params["head"]["kernel"])


def noise(*shape):
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), jnp.float32)


PARAMS = {
    "embed": {"embedding": noise(11, 6)},
    "mid": {"kernel": noise(6, 8)},
    "head": {"kernel": noise(8, 11)},
}
OPTIMIZER = train.adamw(0.05, 9)
STEP = train.step(forward, OPTIMIZER)


def begin(**spec):
    spec = {"rank": 2, "targets": ["mid", "head"], "dropout": 0.3} | spec
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(**spec), PARAMS)
    return train.start(adapter, OPTIMIZER, jax.random.key(1)), data.shuffled(ROWS, 2, seed=3)


def go(state, batches, steps):
    for _ in range(steps):
        state, _ = STEP(state, PARAMS, next(batches))
    return state


def bits(state):
    plain = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(plain)]


@pytest.fixture(scope="module")
def whole():
    return bits(go(*begin(), 9))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A folder with the snapshots of steps 2 and 4 of a run that got to step 5."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    state, batches = begin()
    with Snapshots(folder, RUN) as snapshots:
        for number in range(1, 6):
            state = go(state, batches, 1)
            if number % 2 == 0:
                snapshots.save(state, batches)
    return folder


def test_a_resumed_run_is_bit_equal_to_one_without_interruption(interrupted, whole):
    start, batches = begin()
    with Snapshots(interrupted, RUN) as snapshots:
        state = snapshots.restore(start, batches)
    assert int(state.step) == 4
    assert bits(go(state, batches, 5)) == whole


def without(part, state):
    fresh, _ = begin()
    match part:
        case "optimizer":
            return dataclasses.replace(state, optimizer=fresh.optimizer)
        case "trained":
            return dataclasses.replace(state, adapter=fresh.adapter)
        case "step":
            return dataclasses.replace(state, step=fresh.step)
        case "key":
            return dataclasses.replace(state, key=jax.random.key(9))
    return state


@pytest.mark.parametrize("part", ["optimizer", "trained", "step", "key", "position"])
def test_each_part_of_a_snapshot_is_needed(part, interrupted, whole):
    start, batches = begin()
    with Snapshots(interrupted, RUN) as snapshots:
        state = without(part, snapshots.restore(start, batches))
    if part == "position":
        _, batches = begin()
    assert bits(go(state, batches, 5)) != whole


def test_the_state_may_be_given_away_while_it_is_written(tmp_path):
    state, batches = begin()
    state = go(state, batches, 1)
    expected = bits(state)
    with Snapshots(tmp_path, RUN) as snapshots:
        snapshots.save(state, batches)
        go(state, batches, 3)  # each step takes over the memory of the one before
    with Snapshots(tmp_path, RUN) as snapshots:
        assert bits(snapshots.restore(*begin())) == expected


def test_factors_of_rank_0_come_back_with_the_rest(tmp_path):
    spec = {"rank_pattern": {"mid": 0}, "dropout": 0.0}
    state, batches = begin(**spec)
    state = go(state, batches, 2)
    assert state.adapter.trained["mid/kernel"]["a"].shape == (6, 0)
    with Snapshots(tmp_path, RUN) as snapshots:
        snapshots.save(state, batches)
    with Snapshots(tmp_path, RUN) as snapshots:
        assert bits(snapshots.restore(*begin(**spec))) == bits(state)


def test_the_base_is_not_written(interrupted):
    size = sum(path.stat().st_size for path in (interrupted / "4").rglob("*") if path.is_file())
    names = (interrupted / "4" / "state" / "_METADATA").read_text()
    assert "embed" not in names and "trained" in names and size < 100_000


def test_without_snapshots_a_run_starts(tmp_path):
    start, batches = begin()
    with Snapshots(tmp_path / "new", RUN) as snapshots:
        assert snapshots.restore(start, batches) is start


@pytest.mark.parametrize(
    "run", [RUN | {"lr": 0.2}, {"spec": RUN["spec"]}, RUN | {"spec": {"rank": 4, "targets": []}}], ids=str
)
def test_another_run_is_refused(run, interrupted):
    name = next(name for name in ("lr", "spec") if run.get(name) != RUN[name])
    with (
        Snapshots(interrupted, run) as snapshots,
        pytest.raises(ResumeError, match=f"another {name}: expected .*found"),
    ):
        snapshots.restore(*begin())


@pytest.mark.parametrize("part", ["state", "beside"])
def test_a_broken_snapshot_is_named(part, interrupted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(interrupted, folder)
    for file in (folder / "4" / part).rglob("*"):
        if file.name in ("metadata", "_METADATA"):
            file.write_bytes(file.read_bytes()[:10])
    with Snapshots(folder, RUN) as snapshots, pytest.raises(ResumeError, match="/4 is broken"):
        snapshots.restore(*begin())


def test_snapshots_are_dropped(interrupted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(interrupted, folder)
    discard(folder)
    start, batches = begin()
    with Snapshots(folder, RUN) as snapshots:
        assert snapshots.restore(start, batches) is start


def test_a_fingerprint_sees_paths_shapes_and_values():
    base = {"a": {"kernel": noise(40, 30)}}
    others = [
        {"b": {"kernel": noise(40, 30)}},
        {"a": {"kernel": noise(40, 30).reshape(30, 40)}},
        {"a": {"kernel": noise(40, 30).astype(jnp.bfloat16)}},
        {"a": {"kernel": noise(40, 30) + 1e-6}},
    ]
    assert len({fingerprint(params) for params in (base, *others)}) == 5
    assert fingerprint(base) == fingerprint({"a": {"kernel": np.asarray(noise(40, 30))}})
    changed = ROWS | {"labels": ROWS["labels"] + (np.arange(45).reshape(9, 5) == 44)}
    assert fingerprint_of_rows(ROWS) != fingerprint_of_rows(changed)
