"""Files of arrays that several processes share: as those of one process that has everything."""

import json
from pathlib import Path
from typing import Any

import pytest

from reliability.processes import start
from tests.interop.tiny_folder import write_folder

COMMAND = "from tests.interop.shared_files import main; main()"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    write_folder(folder / "llama")
    for name, count, devices in (("alone", 1, 1), ("shared", 2, 2)):
        arguments = [str(folder / "llama"), str(folder / name)]
        peers = start(arguments, folder / f"log-{name}", count, devices, command=COMMAND)
        assert peers.wait() == [0] * count, "\n".join(map(peers.said, range(count)))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def content(name: str, held: bytes) -> tuple[Any, bytes]:
    """A header's entries stand in any order."""
    if not name.endswith(".safetensors"):
        return None, held
    end = 8 + int.from_bytes(held[:8], "little")
    return json.loads(held[8:end]), held[end:]


def test_each_file_holds_the_same(written):
    alone, shared = files(written / "alone"), files(written / "shared")
    assert len(alone) == 10 and alone.keys() == shared.keys()
    assert [name for name in alone if content(name, alone[name]) != content(name, shared[name])] == []


def test_the_base_is_named(written):
    assert all(b"base=unknown" not in held for held in files(written / "shared").values())
