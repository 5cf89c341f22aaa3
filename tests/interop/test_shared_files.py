"""Files of arrays that several processes share: as those of one process that has everything."""

import json
from pathlib import Path
from typing import Any

from reliability.processes import start
from tests.interop.tiny_folder import write_folder

COMMAND = "from tests.interop.shared_files import main; main()"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def content(name: str, held: bytes) -> tuple[Any, bytes]:
    """A header's entries stand in any order."""
    if not name.endswith(".safetensors"):
        return None, held
    end = 8 + int.from_bytes(held[:8], "little")
    return json.loads(held[8:end]), held[end:]


def test_each_file_holds_the_same_and_names_the_base(tmp_path):
    write_folder(tmp_path / "llama")
    for name, count, devices in (("alone", 1, 1), ("shared", 2, 2)):
        arguments = [str(tmp_path / "llama"), str(tmp_path / name)]
        peers = start(arguments, tmp_path / f"log-{name}", count, devices, command=COMMAND)
        assert peers.wait() == [0] * count, "\n".join(map(peers.said, range(count)))
    alone, shared = files(tmp_path / "alone"), files(tmp_path / "shared")
    assert len(alone) == 10 and alone.keys() == shared.keys()
    assert [name for name in alone if content(name, alone[name]) != content(name, shared[name])] == []
    assert all(b"base=unknown" not in held for held in shared.values())
