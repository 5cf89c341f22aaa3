"""Two files or folders change places at once, where the system can: nobody sees one of the names without either."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}  # an old kernel, or a file system that has none
HERE, EXCHANGE = -100, 2  # AT_FDCWD of Linux; RENAME_EXCHANGE of Linux, and RENAME_SWAP of macOS


def exchange(a: Path, b: Path) -> bool:
    """Each gets the other's name, in one step: Linux's renameat2(2), macOS' renamex_np(2).

    Args:
      a: a file or folder.
      b: another one, on the same file system.

    Returns:
      False where the system or the file system can't; then nothing has changed.

    Raises:
      OSError: it can, and it failed; nothing has changed.
    """
    call = _call()
    if call is None:
        return False
    ctypes.set_errno(0)
    if call(os.fsencode(a), os.fsencode(b)) == 0:
        return True
    if (number := ctypes.get_errno()) in CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(a), None, str(b))


def _call() -> Callable[[bytes, bytes], int] | None:
    if sys.platform not in ("linux", "darwin"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        swap = getattr(library, "renamex_np", None)
        return swap and (lambda a, b: swap(a, b, ctypes.c_uint(EXCHANGE)))
    swap = getattr(library, "renameat2", None)  # glibc has it since 2.28
    return swap and (lambda a, b: swap(HERE, a, HERE, b, ctypes.c_uint(EXCHANGE)))
