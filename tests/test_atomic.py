import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jpeft import atomic
from jpeft.atomic import write_file, write_folder
from jpeft.errors import JpeftError
from jpeft.exchange import exchange


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in Path(folder).rglob("*") if path.is_file()}


def filler(**files):
    def fill(folder):
        for name, text in files.items():
            (folder / name).write_text(text)

    return fill


def test_a_new_folder_and_its_parents(tmp_path):
    write_folder(tmp_path / "a" / "b", filler(x="1"))
    assert contents(tmp_path) == {"a/b/x": "1"}


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "out"
    write_folder(target, filler(x="1", shard="s"))
    write_folder(target, filler(x="2", y="3"), replaceable=lambda name: name == "shard")
    assert contents(tmp_path) == {"out/x": "2", "out/y": "3"}


def test_an_empty_folder_is_filled(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    write_folder(target, filler(x="1"))
    assert contents(tmp_path) == {"out/x": "1"}


@pytest.mark.parametrize("foreign", ["notes.txt", "sub/notes.txt"])
def test_what_would_be_lost_is_a_refusal(tmp_path, foreign):
    target = tmp_path / "out"
    write_folder(target, filler(x="1"))
    (target / foreign).parent.mkdir(exist_ok=True)
    (target / foreign).write_text("mine")
    with pytest.raises(JpeftError, match=foreign.split("/")[0]):
        write_folder(target, filler(x="2"))
    assert contents(tmp_path) == {"out/x": "1", f"out/{foreign}": "mine"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_fill_changes_nothing(tmp_path, error):
    def fail(place):
        (place / "x" if place.is_dir() else place).write_text("half")
        raise error

    write_folder(tmp_path / "out", filler(x="1"))
    write_file(tmp_path / "file", lambda path: path.write_text("old") and None)
    for write, name in ((write_folder, "out"), (write_file, "file"), (write_folder, "new"), (write_file, "newfile")):
        with pytest.raises(error):
            write(tmp_path / name, fail)
    assert contents(tmp_path) == {"out/x": "1", "file": "old"}
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


def test_files_keep_name_mode_and_links(tmp_path):
    target, link = tmp_path / "a.safetensors", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    seen = []
    write_file(link, lambda path: seen.append(path.name) or path.write_text("new") and None)
    assert seen == ["a.safetensors"] and link.is_symlink()
    assert target.read_text() == "new" and target.stat().st_mode & 0o777 == 0o640


def test_files_of_a_folder_keep_their_modes(tmp_path):
    target = tmp_path / "out"
    write_folder(target, filler(secret="1", open="1"))
    (target / "secret").chmod(0o600)
    write_folder(target, filler(secret="2", open="2", new="2"))
    modes = {path.name: path.stat().st_mode & 0o777 for path in target.iterdir()}
    assert modes["secret"] == 0o600 and modes["open"] == modes["new"] != 0o600


@pytest.mark.parametrize("suffix", [atomic.NEW, atomic.OLD])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_by_the_name_of_a_leftover_is_none(tmp_path, suffix, there):
    (tmp_path / "elsewhere").mkdir()
    for n, aim in enumerate(("nothing", "elsewhere")):
        (tmp_path / f".out.0000000{n}{suffix}").symlink_to(aim)
    if there:
        write_folder(tmp_path / "out", filler(x="1"))
    write_folder(tmp_path / "out", filler(x="2"))
    assert contents(tmp_path / "out") == {"x": "2"} and not (tmp_path / "out").is_symlink()
    assert len(os.listdir(tmp_path)) == 4 and (tmp_path / "elsewhere").exists()


def test_new_things_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").mkdir()
    write_folder(tmp_path / "out", filler(x="1"))
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_is_no_file_or_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("1")
    (tmp_path / "folder").mkdir()
    for write, name in (
        (write_file, "fifo"),
        (write_file, "folder"),
        (write_folder, "fifo"),
        (write_folder, "file"),
    ):
        with pytest.raises(JpeftError, match=name):
            write(tmp_path / name, lambda path: None)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "folder"]


def die_in(stage, target):
    """Kill this process while it fills, right after the exchange, or between the renames that stand in for it."""
    rename, die = os.rename, lambda: os.kill(os.getpid(), signal.SIGKILL)
    if stage == "fill":
        write_folder(target, lambda folder: die())
    if stage == "exchange":
        atomic.exchange = lambda a, b: exchange(a, b) and die()
    if stage == "renames":
        atomic.exchange = lambda a, b: False
        os.rename = lambda a, b: (rename(a, b), die())
    write_folder(target, filler(x="2"))


@pytest.mark.parametrize("stage", ["fill", "exchange", "renames"])
def test_a_killed_process_loses_nothing(tmp_path, stage):
    target = tmp_path / "out"
    write_folder(target, filler(x="1"))
    process = multiprocessing.get_context("spawn").Process(target=die_in, args=(stage, target))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert target.exists() == (stage != "renames") and len(os.listdir(tmp_path)) == 2
    with pytest.raises(RuntimeError):  # a next write puts the old one back, whatever becomes of itself
        write_folder(target, lambda folder: (_ for _ in ()).throw(RuntimeError))
    assert contents(tmp_path) == {"out/x": "2" if stage == "exchange" else "1"}
    write_folder(target, filler(x="3"))
    assert contents(tmp_path) == {"out/x": "3"} and os.listdir(tmp_path) == ["out"]


def test_two_folders_change_places(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("1")
    assert exchange(tmp_path / "a", tmp_path / "b")  # Linux and macOS, on the file systems that tests run on
    assert (tmp_path / "a").read_text() == "1" and (tmp_path / "b").is_dir()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")


@pytest.mark.parametrize("has", [("exchange", "link"), ("link",), ()])
@pytest.mark.parametrize("write", [write_folder, write_file])
def test_a_parent_that_does_not_sync_gets_the_old_one_back(tmp_path, monkeypatch, write, has):
    target, sync = tmp_path / "out", atomic._sync

    def fill(text):
        return (lambda path: (path / "x").write_text(text)) if write is write_folder else lambda p: p.write_text(text)

    def fails(path):
        if path == tmp_path:
            raise OSError(errno.EIO, "no such luck")
        sync(path)

    write(target, fill("1"))
    before = contents(tmp_path)
    if "exchange" not in has:
        monkeypatch.setattr(atomic, "exchange", lambda a, b: False)
    if "link" not in has:
        monkeypatch.setattr(os, "link", lambda a, b: fails(tmp_path))
    monkeypatch.setattr(atomic, "_sync", fails)
    with pytest.raises(OSError, match="no such luck"):
        write(target, fill("2"))
    kept = has or write is write_folder  # a file that can only be replaced is gone
    assert (contents(tmp_path) == before) == bool(kept) and os.listdir(tmp_path) == ["out"]


def test_a_living_writer_is_left_alone(tmp_path):
    target = tmp_path / "out"

    def fill(folder):
        (folder / "x").write_text("outer")
        write_folder(target, filler(x="inner"))

    write_folder(target, fill)
    assert contents(tmp_path) == {"out/x": "outer"} and os.listdir(tmp_path) == ["out"]


def test_what_a_write_within_left_does_not_stay(tmp_path, monkeypatch):
    target, remove = tmp_path / "out", shutil.rmtree
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda path, **options: options or remove(path))
    with monkeypatch.context() as patch:  # nothing is cleaned away at the end of a write
        patch.setattr(atomic, "_is_left", lambda path: False)
        write_folder(target, lambda new: write_folder(new / "inner", filler(x="1")))
    assert len(os.listdir(target)) == 2  # as a writer that was killed would leave it
    monkeypatch.setattr(atomic.shutil, "rmtree", remove)
    write_folder(
        target,
        lambda new: write_folder(new / "inner", filler(x="2")),
        replaceable=lambda name: name == "inner",
    )
    assert contents(tmp_path) == {"out/inner/x": "2"} and os.listdir(target) == ["inner"]


def write_often(target, text):
    for _ in range(40):
        write_folder(target, filler(**{name: text for name in "abc"}))


def test_writers_at_once_leave_one_whole_folder(tmp_path):
    with ThreadPoolExecutor() as pool:
        list(pool.map(write_often, [tmp_path / "out"] * 3, "123"))
    assert contents(tmp_path) and len(set(contents(tmp_path).values())) == 1
    assert os.listdir(tmp_path) == ["out"] and sorted(os.listdir(tmp_path / "out")) == ["a", "b", "c"]


FORKS = """
import os, signal, sys, time
from pathlib import Path
from jpeft.atomic import locked

with locked(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
try:
    with locked(Path(sys.argv[1]), wait=False) as held:
        print(held)
finally:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_a_process_forked_meanwhile_holds_no_lock(tmp_path):
    # in a process of its own: to fork one that has run JAX is a warning, and those are errors here
    done = subprocess.run([sys.executable, "-c", FORKS, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
