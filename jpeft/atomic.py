"""Files and folders that appear whole or not at all.

`fill` writes into a hidden folder beside the target. Only when all is written and synced to the disk does it change
places with what is there, and the folder that it lies in is synced too. Guaranteed, on a local POSIX file system:

- when `fill` or a call of the system fails, or the process dies anywhere, the target is the old one or the new one,
  whole; after an error it is the old one;
- the target is never absent, where two folders can be exchanged in one step (Linux and macOS, on most file systems);
- after a return, new content survives a power cut;
- nothing is lost that the new content does not replace: a folder with other things in it is refused, and a file of the
  same name keeps its permissions;
- of two writers at once, the later one wins, whole. What a dead writer left goes with the next write, a living one's
  stays.

Not guaranteed: where nothing can be exchanged (NFS, for one), replacing a folder takes two renames, and in the instant
between them the target is absent. A process that dies just there leaves the old folder under a hidden name, and the
next write puts it back first. A file that replaces another stays after an error in the last step, the parent's sync,
where there are no hard links either. A reader that opens one file of a folder before and another one after the exchange
has files of both: jpeft's own carry a digest, by which its loaders notice.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from jpeft.errors import JpeftError
from jpeft.exchange import exchange

try:
    import fcntl
except ImportError:  # no POSIX: then what dead processes left stays
    fcntl = None

NEW, OLD = ".jpeft-new", ".jpeft-old"
OURS = re.compile(rf"\..+\.[0-9a-f]{{8}}({re.escape(NEW)}|{re.escape(OLD)})")


def write_folder(
    path: str | os.PathLike, fill: Callable[[Path], None], replaceable: Callable[[str], bool] = lambda name: False
) -> None:
    """Write a folder whole, in place of the one that is there.

    Args:
      path: the folder; missing parents are made, and a symbolic link is followed.
      fill: is given an empty folder to write into. What it raises passes through, and leaves everything as it was.
      replaceable: whether an entry of the old folder may go though the new one has none of that name (a weight shard,
        say). Any other such entry is a reason to refuse.

    Raises:
      JpeftError: there is something that is no folder, or a folder that holds other things too.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp()) / "adapter"
      >>> write_folder(folder, lambda new: (new / "a.txt").write_text("1") and None)
      >>> [entry.name for entry in folder.iterdir()]
      ['a.txt']
    """
    target = Path(os.path.realpath(path))
    if not stat.S_ISDIR(_mode(target, stat.S_IFDIR)):
        raise JpeftError(f"{path} is not a folder; choose another place, or remove it")
    with _room_beside(target) as room:
        fresh = room / target.name
        fresh.mkdir()
        fill(fresh)
        for left in [path for path in fresh.rglob(".*") if _is_left(path)]:  # by a write within this one
            shutil.rmtree(left)
        _sync_all(fresh)
        with locked(target.parent):
            _refuse_loss(target, fresh, replaceable)
            _swap_in(fresh, target)


def write_file(path: str | os.PathLike, fill: Callable[[Path], None]) -> None:
    """Write a file whole, in place of the one that is there.

    Args:
      path: the file; missing parents are made, and a symbolic link is followed.
      fill: is given a path of the same name to write at. What it raises passes through, and leaves all as it was.

    Raises:
      JpeftError: there is something that is no ordinary file.
    """
    target = Path(os.path.realpath(path))
    if not stat.S_ISREG(_mode(target, stat.S_IFREG)):
        raise JpeftError(f"{path} is not an ordinary file; choose another place, or remove it")
    with _room_beside(target) as room:
        fresh = room / target.name
        fill(fresh)
        _sync(fresh)
        with locked(target.parent):
            _swap_in(fresh, target)


def write_text(path: str | os.PathLike, text: str) -> None:
    """The same of a text, in UTF-8.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp(), "a.txt")
      >>> write_text(file, "one")
      >>> file.read_text()
      'one'
    """

    def fill(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    write_file(path, fill)


def _mode(target: Path, absent: int) -> int:
    try:
        return target.stat().st_mode
    except FileNotFoundError:
        return absent


@contextlib.contextmanager
def _room_beside(target: Path) -> Iterator[Path]:
    """A hidden folder on the target's file system, locked while this process lives, and removed at the end."""
    _make(target.parent)
    room = _hidden(target, NEW)
    with locked(target.parent):
        _recover(target)
        room.mkdir()
        alive = os.open(room, os.O_RDONLY)
        _try_lock(alive, wait=False)
    try:
        yield room
    finally:
        with contextlib.suppress(OSError), locked(target.parent):  # what stays, the next write removes
            shutil.rmtree(room, ignore_errors=True)
        os.close(alive)


def _make(folder: Path) -> None:
    """The folder and its parents, each entry on the disk."""
    if not folder.exists():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder, which ends with the process at the latest.

    Args:
      folder: exists; its parent is locked while one of these functions puts it into place.
      wait: until another writer lets go.

    Yields:
      Whether it is held: not where it is taken, or the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    held = _try_lock(descriptor, wait)
    try:
        yield held
    finally:
        if fcntl is not None and held:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile has the descriptor, too
        os.close(descriptor)


def _try_lock(descriptor: int, wait: bool) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # taken, or a file system without locks
        return False
    return True


def _hidden(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}{suffix}")


def _leftovers(target: Path, suffix: str) -> list[Path]:
    """What earlier writes to `target` left beside it, the latest last."""
    ours = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{8}" + re.escape(suffix))
    found = [entry for entry in os.scandir(target.parent) if ours.fullmatch(entry.name) and not entry.is_symlink()]
    return [Path(entry) for entry in sorted(found, key=lambda entry: entry.stat().st_ctime_ns)]


def _recover(target: Path) -> None:
    """Put back what a process moved away and did not replace, and remove what dead processes left."""
    olds = _leftovers(target, OLD)
    if olds and not target.exists():
        os.rename(olds.pop(), target)
    for old in olds:
        shutil.rmtree(old, ignore_errors=True)
    for room in _leftovers(target, NEW):
        if _is_left(room):
            shutil.rmtree(room, ignore_errors=True)


def _is_left(path: Path) -> bool:
    """Whether it is what a writer left that lives no more."""
    if not OURS.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    with locked(path, wait=False) as dead:
        return dead


def _refuse_loss(target: Path, fresh: Path, replaceable: Callable[[str], bool]) -> None:
    if not target.exists():
        return
    new = {entry.name for entry in os.scandir(fresh) if entry.is_file()}
    old = sorted(os.scandir(target), key=lambda entry: entry.name)
    goes = [entry.name for entry in old if entry.is_dir(follow_symlinks=False) or entry.name not in new]
    if lost := [name for name in goes if not replaceable(name) and not _is_left(target / name)]:
        raise JpeftError(
            f"{target} holds things that would be lost: {', '.join(lost[:5])}{', …' if len(lost) > 5 else ''}; the "
            "folder is replaced whole, so choose another one, or move these away"
        )


def _swap_in(fresh: Path, target: Path) -> None:
    """Puts the new one in place of the old one, on the disk too; where that fails, the old one again."""
    there = target.exists()
    if there:
        _keep_modes(target, fresh)
    back = _swap(fresh, target, there)
    try:
        _sync(target.parent)
    except OSError:
        back()
        raise


def _keep_modes(old: Path, new: Path) -> None:
    """The permissions of what was there, for what takes its place under the same name."""
    for path in (new, *new.rglob("*")):
        before = old / path.relative_to(new)
        if before.exists() and before.is_dir() == path.is_dir():
            shutil.copymode(before, path)


def _swap(fresh: Path, target: Path, there: bool) -> Callable[[], object]:
    """The new one takes the name, and the old one the new one's, if it can; gives what undoes that."""
    if not there:
        os.rename(fresh, target)
        return lambda: os.rename(target, fresh)
    if exchange(fresh, target):
        return lambda: exchange(fresh, target)
    if target.is_file():
        return _replace_file(fresh, target)
    _exchange_by_renames(fresh, target)
    return lambda: _exchange_by_renames(fresh, target)


def _replace_file(fresh: Path, target: Path) -> Callable[[], object]:
    """One step that puts the new file in place; the old one has another name meanwhile, where there are hard links."""
    kept = fresh.with_name(f"{fresh.name}{OLD}")
    try:
        os.link(target, kept)
    except OSError:
        kept = None
    os.replace(fresh, target)
    return lambda: kept and os.replace(kept, target)


def _exchange_by_renames(fresh: Path, target: Path) -> None:
    away, done = _hidden(target, OLD), []
    try:
        for move in ((target, away), (fresh, target), (away, fresh)):
            os.rename(*move)
            done.append(move)
    except OSError:
        for before, after in reversed(done):
            os.rename(after, before)
        raise


def _sync_all(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems can't sync a folder
            raise
    finally:
        os.close(descriptor)
