"""`jpeft finetune` in several processes: what one comes to; `reliability/processes.py` tries more of it."""

import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open

from jpeft_interop.processes import ProcessesError, _who, in_cluster, joined
from jpeft_interop.run_place import PlaceError, arranged, make_run_place
from reliability.processes import AGREES_TO, Place, as_slurm_does, difference, put_examples, same_bits, signalled


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return Place(folder, put_examples(folder))


def base_named(out):
    with safe_open(out / "adapter" / "adapter_model.safetensors", "np") as file:
        found = re.search("base=([0-9a-f]{32})", file.metadata()["jpeft"])
    return found and found.group(1)


def test_two_train_as_one_and_go_on_as_one(place):
    alone = place.run("one", 1)
    assert difference(slurm := place.run("slurm", 2, flags=as_slurm_does(2)), alone) <= AGREES_TO
    assert base_named(slurm) == base_named(alone) is not None
    place.killed("killed", 2)
    assert difference(place.run("killed", 1), alone) <= AGREES_TO
    place.killed("alone", 1)
    assert same_bits(place.run("alone", 1), alone)


def test_one_that_is_asked_to_stop_stops_all(place):
    ended = signalled(place.arguments, place.folder / "asked", signal.SIGTERM, 1)
    assert ended.codes == [0, 0] and ended.step >= 5


def test_one_alone_ends_with_the_code_that_its_cluster_starts_again(place):
    ended = signalled([*place.arguments, "--stop-code", "42"], place.folder / "alone-asked", signal.SIGTERM, 0, count=1)
    assert ended.codes == [42] and ended.step >= 5


def test_flags_that_do_not_make_a_run():
    for flags, what in (
        (("here:1", None, None), "--processes, --process-id"),
        (("here", 2, 0), "HOST:PORT"),
        (("here:1", 2, 2), "expected 0 to 1"),
    ):
        with pytest.raises(ProcessesError, match=what), joined(*flags):
            pass


def test_open_mpi_5_says_less_than_jax_asks():
    variables = {"SIZE": "4", "RANK": "3", "LOCAL_SIZE": "2", "LOCAL_RANK": "1"}
    environment = {f"OMPI_COMM_WORLD_{name}": value for name, value in variables.items()}
    assert in_cluster(environment)
    with pytest.raises(ProcessesError, match=r"--coordinator HOST:PORT"):
        _who(environment, None, None, None)
    found = _who(environment, "first:1234", None, None)
    assert found == {
        "coordinator_address": "first:1234",
        "num_processes": 4,
        "process_id": 3,
        "local_device_ids": [1],
    }
    for broken in ({}, {"OMPI_COMM_WORLD_RANK": "first"}):
        less = {name: value for name, value in environment.items() if not name.endswith("_RANK")} | broken
        with pytest.raises(ProcessesError, match=r"OMPI_COMM_WORLD_RANK .*--processes N"):
            _who(less, "first:1234", None, None)
    on_one_host = environment | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-a-1@1"}
    assert _who(on_one_host, None, None, None)["coordinator_address"].startswith("127.0.0.1:6")


def test_who_is_in_a_cluster():
    assert not in_cluster({})
    assert not in_cluster({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"})  # an salloc shell
    assert in_cluster({"OMPI_COMM_WORLD_SIZE": "2"}) and in_cluster({"TPU_WORKER_HOSTNAMES": "a,b"})


def test_meshes_that_the_devices_do_not_make():
    assert make_run_place("data=1") is None
    for mesh, what in (
        ("data=2,fsdp=2", "there are 1"),
        ("tensor=1", "sizes by axis"),
        ("data=0", "sizes by axis"),
        ("data=1,data=1", "sizes by axis"),
    ):
        with pytest.raises(PlaceError, match=what):
            make_run_place(mesh)


def test_slices_have_whole_rows_of_the_mesh():
    gpus = [
        SimpleNamespace(id=n, platform="gpu", device_kind="H100", slice_index=n // 4, process_index=n) for n in range(8)
    ]
    slices = lambda data, fsdp: [[gpu.slice_index for gpu in row] for row in arranged(gpus, data, fsdp)]
    assert slices(2, 4) == [[0] * 4, [1] * 4]
    assert slices(4, 2) == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert slices(1, 8) == [[0] * 4 + [1] * 4]  # one row takes both
    assert sorted(gpu.id for gpu in arranged(gpus, 8, 1).flat) == list(range(8))


def test_parts_of_batches_are_the_batches():
    from jpeft_interop.data import shuffled

    rows = {"input_ids": np.arange(14).reshape(7, 2)}
    whole, parts = shuffled(rows, 4, 3), [shuffled(rows, 4, 3, here) for here in ([0, 1], [2, 3])]
    for _ in range(5):
        batch, pieces = next(whole), [next(part) for part in parts]
        np.testing.assert_array_equal(batch["input_ids"], np.concatenate([piece["input_ids"] for piece in pieces]))
    assert parts[0].get_state() == parts[1].get_state()
    parts[0].set_state(whole_position := parts[1].get_state())
    assert parts[0].get_state() == whole_position
    np.testing.assert_array_equal(next(whole)["input_ids"][:2], next(parts[0])["input_ids"])
