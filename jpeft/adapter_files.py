"""The files of an adapter's folder, which may be a stranger's: in the folder, or in the cache that it belongs to."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from jpeft.errors import AdapterError

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
MOST = 256  # adapters or experts of one folder


def adapter_file(folder: str | os.PathLike[str], name: str) -> Path:
    """A file, or a folder, of an adapter's folder.

    A link is followed as far as it leads to somewhere in the folder, or, in a snapshot of the Hugging Face cache
    (`snapshots/<revision>/`), to the `blobs` beside, where that cache keeps its files.

    Raises:
      AdapterError: it leads elsewhere, or nowhere.
    """
    path = Path(folder) / name
    if not path.is_symlink():
        return path
    try:
        root, target = Path(folder).resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise AdapterError(f"{path}: a link that leads nowhere ({getattr(error, 'strerror', None) or error})") from None
    if any(target.is_relative_to(allowed) for allowed in (root, *_blobs(root))):
        return path
    raise AdapterError(f"{path}: a link out of the folder, to {target}; expected the file itself: copy it there")


def require_apart(folder: str | os.PathLike[str], places: Mapping[str, Path]) -> None:
    """Raises AdapterError for more than `MOST` adapters, or two that are one file or folder: links cost nothing."""
    if len(places) > MOST:
        raise AdapterError(f"{folder}: expected at most {MOST} adapters, found {len(places)}; load them one by one")
    real: dict[str, str] = {}
    for name, place in places.items():
        other = real.setdefault(os.path.realpath(place), name)
        if other != name:
            raise AdapterError(f"{folder}: {name!r:.100} and {other!r:.100} are links to one; expected each for itself")


def _blobs(root: Path) -> list[Path]:
    return [above.parents[1] / "blobs" for above in (root, *root.parents) if above.parent.name == "snapshots"]
