"""Several processes of `jpeft finetune` on this machine: the same result, and what happens to the rest if one goes.

Each promise is tried on a tiny model with processes of the CPU (gloo); prints a table, and exits with 1 if one is
broken.

    python -m reliability.processes [--only train restore signals]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import Progress
from safetensors.numpy import load_file

from benchmarks.tables import publish, table
from tests.interop.tiny_folder import TEXT, write_folder

ROOT = Path(__file__).resolve().parent.parent
ENDS_WITHIN, STOPS_WITHIN, AGREES_TO = 15, 10, 1e-5  # seconds, seconds, relative
STEPS = 60
COMMAND = "from jpeft_interop.cli import main; main()"
OPTIONS = [
    *["--batch-size", "8", "--seq-len", "8", "--lr", "0.02", "--rank", "2", "--holdout", "0.2", "--save-every", "5"],
    *["--dropout", "0.1"],
]


@dataclass
class Peers:
    """Processes of one command."""

    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]
    ended: dict[int, float] = field(default_factory=dict)

    def wait(self, which: Sequence[int] | None = None, timeout: float = 240) -> list[int]:
        """Their exit codes."""
        deadline = time.monotonic() + timeout
        which = range(len(self.processes)) if which is None else which
        try:
            return [self.processes[number].wait(max(0.1, deadline - time.monotonic())) for number in which]
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends those that are left."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def said(self, number: int) -> str:
        """What a process has printed."""
        return self.logs[number].read_text(errors="replace")


def start(
    arguments: Sequence[str],
    log: Path,
    count: int,
    devices: int = 1,
    flags: Flags | None = None,
    command: str = COMMAND,
) -> Peers:
    """`count` processes of `jpeft ARGUMENTS`, each with so many devices.

    Args:
      arguments: of the command line.
      log: where what process i prints goes: `log` with its number.
      count: how many.
      devices: of each.
      flags: gives process i's own arguments and environment; by default those of a coordinator on a free port.
      command: Python that is `jpeft`.
    """
    flags = flags or by_flags(count)
    log.parent.mkdir(parents=True, exist_ok=True)
    logs = [log.with_name(f"{log.name}.{number}.log") for number in range(count)]
    processes = [one(arguments, logs[number], devices, *flags(number), command) for number in range(count)]
    return Peers(processes, logs)


Flags = Callable[[int], tuple[list[str], dict[str, str]]]


def one(
    arguments: Sequence[str], log: Path, devices: int, flags: list[str], environment: dict[str, str], command: str
) -> subprocess.Popen[bytes]:
    paths = [str(ROOT), str(ROOT / "interop")]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "JAX_"))}
    own = {
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        # After what the environment asks for: of two values of a flag, XLA takes the last.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(log.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    whole = [sys.executable, "-c", command, *arguments, *flags]
    with log.open("wb") as output:
        return subprocess.Popen(whole, stdout=output, stderr=subprocess.STDOUT, env=inherited | own | environment)


def by_flags(count: int) -> Flags:
    """Process i's flags, the coordinator on a free port of this machine."""
    if count == 1:
        return lambda number: ([], {})
    place = f"127.0.0.1:{free_port()}"
    return lambda number: (["--coordinator", place, "--processes", str(count), "--process-id", str(number)], {})


def as_slurm_does(count: int) -> Flags:
    """The variables that srun sets."""
    shared = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(count)}
    shared |= {"SLURM_STEP_NUM_NODES": "1", "JAX_COORDINATOR_PORT": str(free_port())}
    return lambda number: ([], shared | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)})


def as_open_mpi_does(count: int) -> Flags:
    """The variables that mpirun of Open MPI 4 sets."""
    shared = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": str(count)}
    shared |= {"JAX_COORDINATOR_PORT": str(free_port())}
    return lambda number: ([], shared | {f"OMPI_COMM_WORLD_{name}": str(number) for name in ("RANK", "LOCAL_RANK")})


def as_open_mpi_5_does(count: int) -> Flags:
    """The same, of Open MPI 5, which leaves out where the launcher is."""
    shared = {f"OMPI_COMM_WORLD_{name}": str(count) for name in ("SIZE", "LOCAL_SIZE")}
    shared |= {"PMIX_NAMESPACE": f"prterun-host-{os.getpid()}@1"}
    return lambda number: ([], shared | {f"OMPI_COMM_WORLD_{name}": str(number) for name in ("RANK", "LOCAL_RANK")})


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def put_examples(folder: Path) -> list[str]:
    """A tiny model and a file of examples; the arguments that name them."""
    write_folder(folder / "llama")
    words = TEXT.split()
    (folder / "notes.txt").write_text("\n\n".join(" ".join(words[n:] + words[:n]) for n in range(12)))
    return ["finetune", str(folder / "llama"), "--data", str(folder / "notes.txt"), *OPTIONS]


def losses(out: Path) -> np.ndarray:
    """Of each step, and those held out."""
    return np.array([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])


def tensors(out: Path) -> dict[str, np.ndarray]:
    """Of the adapter."""
    return load_file(out / "adapter" / "adapter_model.safetensors")


def difference(out: Path, other: Path) -> float:
    """The largest relative difference of two runs' losses."""
    ours, theirs = losses(out), losses(other)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours / theirs - 1).max())


def same_bits(out: Path, other: Path) -> bool:
    """Whether two runs ended in the same adapter and the same losses."""
    ours, theirs = tensors(out), tensors(other)
    return (
        ours.keys() == theirs.keys()
        and all(ours[key].tobytes() == theirs[key].tobytes() for key in ours)
        and losses(out).tolist() == losses(other).tolist()
    )


def last_step(out: Path) -> int:
    """Of the checkpoints that are whole."""
    return max((int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdecimal()), default=0)


def wait_for_step(peers: Peers, out: Path, step: int, timeout: float = 240) -> None:
    """Until a checkpoint of `step` is there and training goes on."""
    deadline = time.monotonic() + timeout
    while last_step(out) < step:
        if time.monotonic() > deadline or any(process.poll() is not None for process in peers.processes):
            peers.kill()
            raise RuntimeError("no checkpoint came:\n" + "\n".join(map(peers.said, range(len(peers.logs)))))
        time.sleep(0.02)


@dataclass(frozen=True)
class Ending:
    """How a run ended of which one process got a signal.

    Attributes:
      seconds: from the signal to the end of the last of the others (of all, where it was SIGTERM).
      codes: theirs.
      step: the last checkpoint that there is.
    """

    seconds: float
    codes: list[int]
    step: int


def signalled(arguments: Sequence[str], out: Path, what: signal.Signals, victim: int, count: int = 2) -> Ending:
    """A run of which one process gets a signal after its first checkpoint."""
    peers = start([*arguments, "--out", str(out), "--steps", "100000"], out.parent / f"log-{out.name}", count)
    wait_for_step(peers, out, 5)
    begun = time.monotonic()
    os.kill(peers.processes[victim].pid, what)
    others = [number for number in range(count) if number != victim or what is signal.SIGTERM]
    try:
        codes = [peers.processes[number].wait(120) for number in others]
        seconds = time.monotonic() - begun
    finally:
        peers.kill()
    return Ending(seconds, codes, last_step(out))


class Trial(NamedTuple):
    """A promise: what was asked, what was seen, and whether that will do."""

    promise: str
    asked: str
    seen: str
    kept: bool


@dataclass(frozen=True)
class Place:
    """A folder with a model and examples, and runs in it."""

    folder: Path
    arguments: list[str]
    steps: int = STEPS

    def run(self, name: str, count: int, devices: int = 1, mesh: str | None = None, flags: Flags | None = None) -> Path:
        """A run to its end, or on to its end; `name` is the folder's."""
        peers = self.begin(name, count, devices, mesh, flags)
        codes = peers.wait()
        if any(codes):
            raise RuntimeError("\n".join(map(peers.said, range(count))))
        return self.folder / name

    def begin(
        self,
        name: str,
        count: int,
        devices: int = 1,
        mesh: str | None = None,
        flags: Flags | None = None,
        command: str = COMMAND,
    ) -> Peers:
        """The same, not waited for."""
        more = [] if mesh is None else ["--mesh", mesh]
        arguments = [*self.arguments, "--out", str(self.folder / name), "--steps", str(self.steps), *more]
        return start(arguments, self.folder / f"log-{name}", count, devices, flags, command)

    def killed(self, name: str, count: int, devices: int = 1, mesh: str | None = None) -> Path:
        """A run whose processes are all killed after their first checkpoint."""
        peers = self.begin(name, count, devices, mesh)
        wait_for_step(peers, self.folder / name, 5)
        peers.kill()
        return self.folder / name


def training(place: Place) -> Iterator[Trial]:
    """Any number of processes comes to what one comes to."""
    alone = place.run("one", 1)
    ways: dict[str, tuple[int, int, str | None, Flags | None]] = {
        "2 processes": (2, 1, None, None),
        "4 processes": (4, 1, None, None),
        "2 processes with 2 devices each, data=2,fsdp=2": (2, 2, "data=2,fsdp=2", None),
        "2 processes that find each other by SLURM's variables": (2, 1, None, as_slurm_does(2)),
        "2 processes that find each other by Open MPI 4's variables": (2, 1, None, as_open_mpi_does(2)),
        "2 processes that find each other by Open MPI 5's variables": (2, 1, None, as_open_mpi_5_does(2)),
    }
    for name, how in ways.items():
        apart = difference(place.run(name.replace(" ", "-"), *how), alone)
        yield Trial(f"{name}: losses as of one", f"≤ {AGREES_TO:g}", f"{apart:.1e}", apart <= AGREES_TO)


def restoring(place: Place) -> Iterator[Trial]:
    """A run that was killed goes on: there, on another mesh, with another number of processes."""
    whole = place.run("whole", 2)
    place.killed("same", 2)
    kept = same_bits(place.run("same", 2), whole)
    yield Trial("2 processes killed, 2 go on", "the same bits", "the same bits" if kept else "others", kept)
    ways: dict[str, tuple[Any, Any]] = {
        "2 processes killed, 1 goes on": ((2, 1, None), (1, 1, None)),
        "1 process killed, 4 go on": ((1, 1, None), (4, 1, None)),
        "data=4 killed, data=2,fsdp=2 goes on": ((2, 2, "data=4"), (2, 2, "data=2,fsdp=2")),
    }
    for name, (before, after) in ways.items():
        folder = name.replace(" ", "-")
        place.killed(folder, *before)
        apart = difference(place.run(folder, *after), whole)
        yield Trial(f"{name}: losses", f"≤ {AGREES_TO:g}", f"{apart:.1e}", apart <= AGREES_TO)


def signals(place: Place) -> Iterator[Trial]:
    """What the others do when one process gets a signal."""
    for what, victim in itertools.product((signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP), (0, 1)):
        ended = signalled(place.arguments, place.folder / f"{what.name}-{victim}", what, victim)
        stops = what is signal.SIGTERM
        limit = STOPS_WITHIN if stops else ENDS_WITHIN
        right = all(code == 0 for code in ended.codes) if stops else all(ended.codes)
        who = "process 0, the coordinator" if victim == 0 else "process 1"
        asked = f"all exit 0 within {limit} s" if stops else f"the other exits not 0 within {limit} s"
        seen = f"{', '.join(map(str, ended.codes))} after {ended.seconds:.1f} s, step {ended.step} saved"
        kept = right and ended.seconds <= limit and ended.step >= 5
        yield Trial(f"{what.name} to {who} of 2", asked, seen, kept)


GROUPS = {"train": training, "restore": restoring, "signals": signals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="which promises to try")
    options = parser.parse_args()
    trials = []
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        place = Place(Path(folder), put_examples(Path(folder)))
        task = progress.add_task("trials", total=None)
        for group in options.only:
            for trial in GROUPS[group](place):
                trials.append(trial)
                progress.update(task, advance=1, description=trial.promise)
    rows = [[trial.promise, trial.asked, trial.seen, "yes" if trial.kept else "NO"] for trial in trials]
    publish("processes", table(["promise", "asked", "seen", "kept"], rows))
    raise SystemExit(not all(trial.kept for trial in trials))


if __name__ == "__main__":
    main()
