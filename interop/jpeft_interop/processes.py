"""Several processes of one run: who they are, what one of them alone does, and when all are asked to stop.

JAX does the work: `jax.distributed` finds the processes, beats their hearts and passes on the notice of a preemption.
What is here says when to begin that, and with which patience.

    with joined():
        here = first()            # process 0: the one that writes and prints
        agreed(x)                 # what process 0 says of x
        together("written")       # wait for all of them
"""

from __future__ import annotations

import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jpeft.errors import JpeftError

HEARTBEAT = 10  # seconds without a sign of life from a process, after which the others end
STARTING = 300  # seconds that processes may take to find each other
WAITING = 1800  # seconds that processes wait for the one that writes
NUMBERS = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")  # of OMPI_COMM_WORLD, as Open MPI tells each process


class ProcessesError(JpeftError):
    """Processes that can't be one run: flags that don't fit each other, or no cluster to be found."""


@contextmanager
def joined(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat: int = HEARTBEAT,
) -> Iterator[None]:
    """Makes this process one of several, as the flags or the cluster's environment variables say; else does nothing.

    Must be entered before JAX computes anything. At the end processes part as friends; where one has failed, it waits a
    heartbeat for the others and tears them down.

    Args:
      coordinator: where process 0 is reached, `host:port`; alone where a cluster says the rest.
      processes: how many there are. 1 means this one alone, whatever the environment says.
      process_id: which of them this is, from 0.
      heartbeat: seconds without a sign of life from a process, after which the others end, with a code that is not 0.

    Raises:
      ProcessesError: some flags without the others, or an environment that JAX can't read.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    clustered = in_cluster(os.environ)
    if processes == 1 or not (clustered or any(flag is not None for flag in given.values())):
        yield
        return
    _check(given, clustered)
    try:
        jax.distributed.initialize(
            **_who(os.environ, coordinator, processes, process_id),
            initialization_timeout=STARTING,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except (ValueError, RuntimeError) as error:
        raise ProcessesError(
            f"the processes don't find each other: {' '.join(str(error).split()):.300}; say who they are: "
            "--coordinator HOST:PORT --processes N --process-id I, or --processes 1 for this one alone"
        ) from error
    yield
    together("the end")
    jax.distributed.shutdown()


def _check(given: Mapping[str, Any], clustered: bool) -> None:
    missing = [flag for flag, value in given.items() if value is None]
    if missing and len(missing) < len(given) and not (clustered and missing == ["--processes", "--process-id"]):
        raise ProcessesError(f"--coordinator, --processes and --process-id go together; missing: {', '.join(missing)}")
    coordinator, processes, process_id = given.values()
    host, _, port = (coordinator or "").rpartition(":")
    if coordinator is not None and not (host and port.isdecimal()):
        raise ProcessesError(f"--coordinator: expected HOST:PORT, found {coordinator!r}")
    if process_id is not None and not 0 <= process_id < processes:
        raise ProcessesError(f"--process-id: expected 0 to {processes - 1}, found {process_id}")


def _who(
    environment: Mapping[str, str], coordinator: str | None, processes: int | None, process_id: int | None
) -> dict[str, Any]:
    """What JAX is to be told of who is who; where it finds that by itself, what was given."""
    found = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process_id}
    of_open_mpi_5 = "OMPI_COMM_WORLD_SIZE" in environment and "OMPI_MCA_orte_hnp_uri" not in environment
    if processes is not None or not of_open_mpi_5:
        return found
    number = {name: _number(environment, f"OMPI_COMM_WORLD_{name}") for name in NUMBERS}
    address = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None and number["LOCAL_SIZE"] < number["SIZE"]:
        raise ProcessesError(
            "Open MPI 5 does not say where process 0 is: mpirun ... jpeft finetune ... --coordinator HOST:PORT, with "
            "the first host's name and a free port of it"
        )
    here = f"127.0.0.1:{environment.get('JAX_COORDINATOR_PORT') or _port_of(environment.get('PMIX_NAMESPACE', ''))}"
    return {
        "coordinator_address": address or here,
        "num_processes": number["SIZE"],
        "process_id": number["RANK"],
        "local_device_ids": [number["LOCAL_RANK"]],  # a GPU for each, as JAX has it under Open MPI 4
    }


def _number(environment: Mapping[str, str], name: str) -> int:
    found = environment.get(name)
    if found is None or not found.isdecimal():
        raise ProcessesError(
            f"mpirun sets {name} to a number; found {found!r}: say who the processes are, --coordinator HOST:PORT "
            "--processes N --process-id I, or --processes 1 for this one alone"
        )
    return int(found)


def _port_of(job: str) -> int:
    """A port by the name of a job, among those that the system gives to nobody for long."""
    return 61440 + zlib.crc32(job.encode()) % 4096


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether a cluster's launcher started several of us, by the environment variables that it sets.

    SLURM's srun, Open MPI's mpirun, an indexed Job of Kubernetes, TPU pods of GKE and TPU VMs. Who is who is then for
    `jax.distributed` to read from them.

    Example:
      >>> in_cluster({"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}), in_cluster({})
      (True, False)
    """
    count = lambda name: int(text) if (text := environment.get(name, "")).isdecimal() else 0
    return (
        (count("SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environment)
        or count("OMPI_COMM_WORLD_SIZE") > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or "JOB_COMPLETION_INDEX" in environment
        or "JAX_COORDINATOR_ADDRESS" in environment
        or environment.get("TPU_ML_PLATFORM") == "JAX"  # set by JAX where it finds itself on a TPU VM
    )


def first() -> bool:
    """Whether this is process 0, which alone writes and prints."""
    return jax.process_index() == 0


def agreed(value: bool) -> bool:
    """What process 0 says: for what the others can't see, or see at another moment. All have to ask."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def together(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        ocp.multihost.sync_global_processes(f"jpeft: {name}", timeout=WAITING)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[int], bool]]:
    """Gives a function that tells after each step whether to save and stop there: somebody sent SIGTERM.

    Several processes get JAX's preemption notice: one that is told tells the others, and all stop after the same step.
    A process by itself has the signal's handler for as long as this lasts.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where signals can't be handled
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
