"""Several adapters of one base in one folder, as PEFT keeps them: `default` at the root, each other in its own.

A name is the name of a folder and a key of a dict; it is no part of any tensor's name, so no name can change what
another adapter's file holds. Names are letters, digits, `_` and `-`, at most 64 of them; a folder of others with
another name is refused, and not passed over.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jpeft
from jpeft.atomic import write_folder
from jpeft.errors import AdapterError
from jpeft.shared import is_shared, write_once
from jpeft_interop.adapter_files import MOST, NAME, adapter_file, require_apart
from jpeft_interop.layout import Layout
from jpeft_interop.load_peft import CONFIG, WEIGHTS, load_peft
from jpeft_interop.save_peft import OTHERS, peft_files

DEFAULT = "default"
EXPECTED = f"expected {NAME.pattern}"


def save_adapters(
    folder: str | os.PathLike[str],
    adapters: Mapping[str, jpeft.Adapter],
    *,
    params: Any,
    layout: Layout | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes adapters by name into one folder, all or none: PEFT's `load_adapter(folder/name, name)` reads each.

    Args:
      folder: made if need be; of what it holds, adapters of these names are replaced, and anything else is refused.
      adapters: by name, at most 256; `default` lies at the root, as PEFT has it.
      params: the base they are for.
      layout: where each path of the params lies in torch, for params with other names or shapes.
      base_model: the name or path of the base that PEFT is to know it by.
      task_type: `CAUSAL_LM`, `SEQ_CLS`, … as PEFT has them.

    Raises:
      AdapterError: a name that can be no folder's, before anything is written; or what `save_peft` raises.
    """
    for name in adapters:
        _check_name(name)
    if len(adapters) > MOST:
        raise AdapterError(f"a folder holds at most {MOST} adapters, found {len(adapters)}; nothing was written")
    options: Any = {"params": params, "layout": layout, "base_model": base_model, "task_type": task_type}
    files = {name: peft_files(adapter, **options) for name, adapter in adapters.items()}

    def fill(new: Path) -> None:
        for name, held in files.items():
            place = new if name == DEFAULT else new / name
            place.mkdir(exist_ok=True)
            held.fill(place)

    old = Path(folder)
    replaceable = lambda name: name in OTHERS or (name in adapters and _holds_one(old / name))
    write_once(is_shared((dict(adapters), params)), lambda: write_folder(folder, fill, replaceable))


def load_adapters(
    folder: str | os.PathLike[str], params: Any, *, layout: Layout | None = None
) -> dict[str, jpeft.Adapter]:
    """The adapters of a folder, by name: of `save_adapters`, or of a PEFT model that held several.

    Raises:
      AdapterError: there are none, or what `load_peft` raises.
    """
    folder = Path(folder)
    try:
        below = sorted(one for one in folder.iterdir() if one.is_dir() and os.path.lexists(one / CONFIG))
    except OSError as error:
        raise AdapterError(f"{folder}: can't be read: {error.strerror}") from None
    for one in below:
        if NAME.fullmatch(one.name) is None:
            raise AdapterError(f"{folder}: {one.name!r:.200} is no adapter's name: {EXPECTED}; rename the folder")
    places = {DEFAULT: folder} if os.path.lexists(folder / CONFIG) else {}
    if places and any(one.name == DEFAULT for one in below):
        raise AdapterError(f"{folder}: holds {DEFAULT!r} twice: at the root, and in the folder of that name")
    places |= {one.name: adapter_file(folder, one.name) for one in below}
    require_apart(folder, places)
    if not places:
        raise AdapterError(f"{folder}: no {CONFIG} there, nor in a folder below")
    return {name: load_peft(place, params, layout=layout) for name, place in places.items()}


def _holds_one(folder: Path) -> bool:
    """Whether there is an adapter, and nothing else."""
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    return CONFIG in names and names <= {CONFIG, WEIGHTS, *OTHERS}


def _check_name(name: str) -> None:
    if NAME.fullmatch(name) is None:
        raise AdapterError(f"an adapter can't be saved under the name {name!r:.200}: {EXPECTED}; nothing was written")
