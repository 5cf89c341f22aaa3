"""`jpeft sweep`: what it leaves behind is what `jpeft finetune` would have, one run at a time."""

import json

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from jpeft_interop.base import load_adapted
from jpeft_interop.cli.app import app
from jpeft_interop.finetune import Settings, SettingsError
from jpeft_interop.sweep_plot import smoothed
from jpeft_interop.sweep_run import grid
from tiny_folder import TEXT, write_folder

OPTIONS = ["--steps", "3", "--batch-size", "2", "--seq-len", "8", "--targets", "q_proj,down_proj"]
RANKS = (2, 3)
NAMES = {f"rank{rank}-lr{lr}-seed{seed}" for rank in RANKS for lr in ("0.02", "1e+38") for seed in (0, 1)}


def run(command, *arguments):
    return CliRunner().invoke(app, [command, *map(str, arguments)])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_folder(folder / "llama")
    write_folder(folder / "bert", "bert")
    (folder / "notes.txt").write_text("\n\n".join(" ".join(TEXT.split()[n:]) for n in range(8)))
    rows = [f"{word} on the mat,{label}" for _ in range(4) for word, label in (("cat", "c"), ("dog", "d"))]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    return folder


@pytest.fixture(scope="module")
def swept(place):
    """Eight runs in one command, half of them at a rate that nothing survives."""
    result = run(
        *["sweep", place / "llama", place / "notes.txt", "--out", place / "out", *OPTIONS, "--holdout", "0.2"],
        *["--rank", "2,3", "--lr", "0.02,1e38", "--seed", "0,1"],
    )
    assert result.exit_code == 0, result.output
    return place / "out", result.output


def test_a_sweep_tells_every_run_and_the_best(swept):
    out, output = swept
    figures = json.loads((out / "sweep.json").read_text(), parse_constant=pytest.fail)
    runs = {row["name"]: row for row in figures["runs"]}
    assert runs.keys() == NAMES and "2 compiled steps" in output
    survived = {name for name, row in runs.items() if row["diverged at step"] is None}
    assert survived == {name for name in NAMES if "lr0.02" in name}
    assert {folder.name for folder in (out / "adapters").iterdir()} == survived
    best = min(survived, key=lambda name: runs[name]["held out"]["loss"])
    assert figures["best"] == best == figures["runs"][0]["name"]
    assert f"★  {best}" in output and output.count("diverged") == 4
    assert runs[best]["held out"]["loss"] < figures["held out before"]["loss"]
    log = [json.loads(line) for line in (out / "metrics" / f"{best}.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 3] and log[-1]["loss"] == runs[best]["held out"]["loss"]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_a_sweep_is_finetunes(place, swept):
    out, _ = swept
    one = run(
        *["finetune", place / "llama", "--data", place / "notes.txt", "--out", place / "one", *OPTIONS],
        *["--holdout", "0.2", "--rank", "3", "--lr", "0.02"],
    )
    assert one.exit_code == 0, one.output
    ours = load_adapted(place / "llama", out / "adapters" / "rank3-lr0.02-seed0")[1]
    theirs = load_adapted(place / "llama", place / "one" / "adapter")[1]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(abs(b).max()))


def test_a_classifier(place):
    out = place / "classes"
    result = run(
        *["sweep", place / "bert", place / "reviews.csv", "--task", "classification", "--out", out, "--steps", "2"],
        *["--batch-size", "2", "--seq-len", "8", "--lr", "0.01", "--seed", "0,1", "--targets", "query"],
    )
    assert result.exit_code == 0, result.output
    assert "accuracy" in result.output
    assert json.loads((out / "labels.json").read_text())["id2label"] == {"0": "c", "1": "d"}
    for seed in (0, 1):
        base, adapter = load_adapted(place / "bert", out / "adapters" / f"rank8-lr0.01-seed{seed}")
        assert base.labels == 2 and "classifier/kernel" in adapter.trained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "1e-3,fast"], "--lr takes numbers"),
        (["--seed", "0,0"], "--seed has a number twice"),
        (["--rank", "4;8"], "--rank takes numbers"),
        (["--method", "ia3"], "sweep trains lora"),
    ],
)
def test_what_means_nothing_is_refused(place, options, message):
    result = run("sweep", place / "llama", place / "notes.txt", "--out", place / "no", *options)
    assert result.exit_code != 0 and message in " ".join(result.output.split())


def test_a_grid_needs_runs():
    with pytest.raises(SettingsError, match="one learning rate or more"):
        grid(Settings(spec=None, lr=1.0), {}, [], [0])


def test_the_running_mean_is_over_what_lies_behind():
    np.testing.assert_allclose(smoothed(np.arange(50.0)), [max(0, n - 1.5) if n > 2 else n / 2 for n in range(50)])
