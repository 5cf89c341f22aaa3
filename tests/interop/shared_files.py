"""What `test_shared_files.py` runs in each of several processes: files written and read of arrays that they share.

python -m tests.interop.shared_files MODEL OUT [--coordinator HOST:PORT --processes N --process-id I]
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft import xlora
from jpeft.errors import AdapterError
from jpeft.shared import is_shared, values
from jpeft.tree import map_leaves
from jpeft_interop import load_adapters, load_model, load_peft, save_adapters, save_peft
from jpeft_interop.processes import joined
from jpeft_interop.provenance import provenance
from jpeft_interop.run_place import RunPlace

SPEC = jpeft.LoRA(rank=2, targets=["q_proj", "down_proj", "embed_tokens"])


def noise(adapter: jpeft.Adapter, seed: int) -> jpeft.Adapter:
    """The same values on any mesh, each where it was."""
    number = iter(range(10_000))
    key = jax.random.key(seed)

    @jax.jit
    def add(trained):
        return jax.tree.map(lambda x: x + jax.random.normal(jax.random.fold_in(key, next(number)), x.shape), trained)

    return adapter.replace(trained=add(adapter.trained))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    for flag, kind in (("--coordinator", str), ("--processes", int), ("--process-id", int)):
        parser.add_argument(flag, type=kind)
    options = parser.parse_args()
    with joined(options.coordinator, options.processes, options.process_id):
        several = jax.process_count() > 1
        mesh = jax.make_mesh((1, jax.device_count()), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        _, params = load_model(options.model)
        params = RunPlace(mesh).base(params)
        adapter = noise(jpeft.init(jax.random.key(0), SPEC, params), 1)
        assert is_shared(params) == is_shared(adapter) == several
        write(options.out, adapter, params)
        read(options.out, adapter, params)
        refuse(options.out, adapter, params, several)


def write(out: Path, adapter: jpeft.Adapter, params) -> None:
    jpeft.save(out / "native.safetensors", adapter, params=params)
    save_peft(out / "peft", adapter, params=params)
    save_adapters(out / "several", {"one": adapter, "default": adapter}, params=params)
    experts = {name: adapter for name in ("a", "b")}
    xlora.save(out / "mixture", xlora.init(jax.random.key(2), xlora.XLoRA(hidden=4, depth=1), experts, 8))


def read(out: Path, adapter: jpeft.Adapter, params) -> None:
    for found in (
        jpeft.load(out / "native.safetensors", params=params),
        load_peft(out / "peft", params),
        load_adapters(out / "several", params)["one"],
    ):
        jax.tree.map(np.testing.assert_array_equal, found.trained, jax.tree.map(values, adapter.trained))
    assert str(provenance(out / "peft", params).base) == "ok"


def refuse(out: Path, adapter: jpeft.Adapter, params, several: bool) -> None:
    other = map_leaves(lambda path, leaf: jnp.negative(leaf) if "down_proj" in path else leaf, params)
    for load in (lambda: load_peft(out / "peft", other), lambda: jpeft.load(out / "native.safetensors", params=other)):
        try:
            load()
        except AdapterError as error:
            assert "another base" in str(error), error
        else:
            raise AssertionError("the other base was taken")
    try:
        save_peft(out / "native.safetensors", adapter, params=params)  # which is a file
    except (jpeft.JpeftError, OSError) as error:
        expected = "process 0 could not write" if several and jax.process_index() else "is not a folder"
        assert expected in str(error), error
    else:
        raise AssertionError("a file was taken for a folder")


if __name__ == "__main__":
    main()
