"""`jpeft finetune`, killed at random moments and given again until it is done: the same bits as without any of that.

A resumption counts where it went on from a step after 0. Training saves every few steps, in the background, so that
many kills hit a save. Controls, which lose the PRNG key, the optimizer's state or the position in the data when they
go on, have to end in other bits; else equal bits would say nothing.

    python -m reliability.resume [--resumes 8]
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import tempfile
import time
from pathlib import Path

from rich.progress import Progress

from benchmarks.tables import publish, table
from reliability.processes import COMMAND, Peers, Place, last_step, put_examples, same_bits

STEPS = 120
CONTROL = """
import dataclasses
import jax
from jpeft_interop import snapshots

restore = snapshots.Snapshots.restore

def losing(self, start, batches):
    beginning = batches.get_state()
    state = restore(self, start, batches)
    {loses}
    return state

snapshots.Snapshots.restore = losing
"""
LOSES = {
    "nothing": "pass",
    "the key": "state = dataclasses.replace(state, key=jax.random.key(12345))",
    "the optimizer's state": "state = dataclasses.replace(state, optimizer=start.optimizer)",
    "the position in the data": "batches.set_state(beginning)",
}


def kill_later(peers: Peers, out: Path, draw: random.Random) -> None:
    """At a random moment after the next snapshot, unless it ends before."""
    begun = last_step(out)
    while last_step(out) == begun and peers.processes[0].poll() is None:
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.3))
    peers.kill()


def went_on(peers: Peers) -> bool:
    """Whether it went on from a step after 0."""
    return re.search(r"going on after step [1-9]", peers.said(0)) is not None


def until_done(place: Place, name: str, draw: random.Random, most: int) -> tuple[int, int]:
    """How often a run was killed, and went on, until it was done; the last of `most` resumptions is left alone."""
    kills = resumes = 0
    while True:
        peers = place.begin(name, 1)
        if resumes < most:
            kill_later(peers, place.folder / name, draw)
        done = peers.wait() == [0]
        resumes += went_on(peers)
        if done:
            return kills, resumes
        kills += 1


def losing(place: Place, what: str, killed: Path) -> Path:
    """A killed run that goes on, and loses something then."""
    name = f"loses {what}".replace(" ", "-")
    shutil.copytree(killed, place.folder / name)
    peers = place.begin(name, 1, command=CONTROL.format(loses=LOSES[what]) + COMMAND)
    if peers.wait() != [0] or not went_on(peers):
        raise RuntimeError(peers.said(0))
    return place.folder / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resumes", type=int, default=8, help="how many, over as many runs as it takes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw, runs, kills, resumes, equal = random.Random(options.seed), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        task = progress.add_task("resumptions", total=options.resumes + len(LOSES))
        place = Place(Path(folder), put_examples(Path(folder)), STEPS)
        whole = place.run("whole", 1)
        while resumes < options.resumes:
            killed, resumed = until_done(place, f"run-{runs}", draw, options.resumes - resumes)
            equal += same_bits(place.folder / f"run-{runs}", whole)
            runs, kills, resumes = runs + 1, kills + killed, resumes + resumed
            progress.update(task, completed=resumes)
        start = place.killed("killed", 1)
        ends = {}
        for what in LOSES:
            ends[what] = same_bits(losing(place, what, start), whole)
            progress.update(task, advance=1)
    told = (
        f"{runs} runs of {STEPS} steps, killed {kills} times, went on {resumes} times: {equal} ended in the same bits."
    )
    rows = [[what, "the same" if same else "others"] for what, same in ends.items()]
    publish("resume", f"{told}\n\n{table(['a run that goes on, and loses', 'bits at its end'], rows)}")
    raise SystemExit(equal != runs or [*ends.values()] != [True, False, False, False])


if __name__ == "__main__":
    main()
