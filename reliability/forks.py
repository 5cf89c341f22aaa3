"""Work in a forked process, which may fail or be killed there. The process that forks must not have started JAX."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any


def in_child(work: Callable[[], Any]) -> tuple[int, Any]:
    """How a forked process that does the work ended, and what it gave."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(work(), pipe)
            code = 0
        except OSError:
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code, pickle.loads(data) if code == 0 else None  # our own child wrote it


def must(ended: tuple[int, Any]) -> Any:
    """What a process gave that has to end well."""
    if ended[0] != 0:
        raise RuntimeError(f"a process without faults ended with {ended[0]}")
    return ended[1]
