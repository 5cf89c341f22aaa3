"""Fuzzing what reads strangers' files: headers, configs, keys against a base, data files, jpeft's own files, mixtures.

Valid inputs are changed as trees, as text and as bytes; one that ends in a way not seen before is kept, to be changed
further, as are some that were read. Prints executions, how many were read, how many places refused the others, and
the slowest; exits with 1 if one raised anything but the documented error, or took too long; the input is kept then.

    python -m reliability.fuzz --executions 1000000
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
from rich.progress import Progress

import jpeft
from benchmarks.tables import publish, table
from jpeft.digest import digest
from jpeft.errors import AdapterError, JpeftError
from jpeft.safetensors_header import ADAPTER_HEADER_BYTES, Entry, parse_header, tensor_at
from jpeft.save import parse as parse_native
from jpeft.strict_json import parse_json_object
from jpeft.tree import flatten
from jpeft.xlora import XLoRA
from jpeft.xlora import init as init_mixture
from jpeft.xlora.save import Stored
from jpeft.xlora.save import parse as parse_mixture
from jpeft_interop import save_peft
from jpeft_interop.data import DataError
from jpeft_interop.data.read import parse as parse_data
from jpeft_interop.data.read import parse_labelled
from jpeft_interop.layout import default_layout
from jpeft_interop.load_peft import parse_peft
from jpeft_interop.load_xlora import PREFIX, parse_classifier
from jpeft_interop.peft_config import read_config
from jpeft_interop.provenance import CONFIG_DEPTH
from jpeft_interop.safetensors_file import Tensors
from jpeft_interop.xlora_config import FIELDS, read_xlora_config
from reliability.mutations import broken, dumped, tree

EXECUTIONS, SLOWEST, KEPT, COLLECT = 40_000, 50, 500, 5_000  # of each target; ms; inputs; executions
FRAMES = 6  # of a traceback, by which ways to end are told apart
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Input = tuple[Any, ...]


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
      seeds: valid inputs.
      change: another input from one.
      act: reads it.
      error: what it may raise.
    """

    seeds: Sequence[Input]
    change: Callable[[Input, Random], Input]
    act: Callable[[Input], Any]
    error: type[JpeftError]


@dataclass
class Result:
    """What came of a target.

    Attributes:
      executions: how many.
      slowest: of those that were in time, in ms of the thread's CPU time.
      ends: how many ended in which way; `read` are those without an error.
      failures: what ended as none may, and its input.
      slow: the inputs that were not in time.
      seconds: for all of them.
    """

    executions: int = 0
    slowest: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, Input]] = field(default_factory=list)
    slow: list[Input] = field(default_factory=list)
    seconds: float = 0.0


def fuzz(target: Target, executions: int, seed: int, on_step: Callable[[], Any] = lambda: None) -> Result:
    """Reads so many inputs; the same ones for the same seed, as long as what is read ends in the same ways."""
    draw, result = Random(seed), Result()
    valid, odd = list(target.seeds), list(target.seeds)  # what was read, and what ended in a new way
    begin = time.perf_counter()
    _prepare(target)
    try:
        for number in range(executions):
            one = target.change(draw.choice(valid if draw.random() < 0.7 else odd), draw)
            end, failure, took = _tried(target, one)
            if failure:
                result.failures.append((failure, one))
            if took > SLOWEST:
                result.slow.append(one)
            else:
                result.slowest = max(result.slowest, took)
            if end == "read" and len(valid) < KEPT:
                valid.append(one)
            if end not in result.ends and len(odd) < KEPT:
                odd.append(one)
            result.ends[end] += 1
            result.executions += 1
            if number % COLLECT == 0:
                gc.collect()
                on_step()
    finally:
        gc.enable()
    result.seconds = time.perf_counter() - begin
    return result


def _prepare(target: Target) -> None:
    for one in target.seeds:
        target.act(one)  # what is valid is read; and what is imported and compiled late is there
    gc.collect()
    gc.disable()  # its pauses are no reader's


def _tried(target: Target, one: Input) -> tuple[str, str, float]:
    """How an input ends, what is wrong with that if anything is, and the ms that it took."""
    end, failure = "read", ""
    start = time.thread_time()
    try:
        with warnings.catch_warnings():  # a config may say things without effect, which is told
            warnings.simplefilter("ignore", UserWarning)
            target.act(one)
    except target.error as error:
        end, failure = _kind(error), _told(error) if _is_unforeseen(error) else ""
    except Exception as error:  # any other is what this looks for
        end, failure = f"FAILURE {type(error).__name__}", _told(error)
    return end, failure, (time.thread_time() - start) * 1e3


def timed_apart(name: str, inputs: Sequence[Input]) -> list[float]:
    """The ms that inputs of a target take in another process, where nothing but the valid ones was read before.

    On a shared machine a thread's time has its neighbours' work in it now and then. What an input itself takes, it
    takes there, too, with all that is done the first time.
    """
    if not inputs:
        return []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        return apart.submit(_milliseconds, name, inputs).result()


def _milliseconds(name: str, inputs: Sequence[Input]) -> list[float]:
    target = targets()[name]
    _prepare(target)
    return [_tried(target, one)[2] for one in inputs]


def _kind(error: BaseException) -> str:
    """Where an error was raised, and from where that was called: what is new there is new code."""
    found, trace = [], error.__traceback__
    while trace is not None:
        found.append(f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(found[-FRAMES:])


def _is_unforeseen(error: BaseException) -> bool:
    """A typed error made of another one, that no check foresaw."""
    cause = error.__cause__
    return cause is not None and (not isinstance(cause, JpeftError) or _is_unforeseen(cause))


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-3000:]


def targets() -> dict[str, Target]:
    """Those that there are."""
    base = _params()
    with tempfile.TemporaryDirectory() as folder:
        read = [_folder(Path(folder) / str(n), spec, base) for n, spec in enumerate(_specs())]
        native = [_native(Path(folder) / "a.safetensors", spec, base) for spec in _specs()]
    flat, layout = flatten(base), default_layout(flatten(base))
    return {
        "header": Target([(header, data) for _, header, data in read], _change_header, _read_header, AdapterError),
        "config": Target([(config,) for config, _, _ in read], _change_config, _read_config, AdapterError),
        "keys": Target(read, _change_keys, lambda one: _read_keys(one, flat, layout), AdapterError),
        "data": Target(_data(), _change_data, _read_data, DataError),
        "native": Target(native, _change_native, _read_native, AdapterError),
        "xlora": Target(
            [*_mixtures(base, tuple(native[:2])), *_peft_mixtures()], _change_mixture, _read_mixture, AdapterError
        ),
    }


def _params() -> dict[str, Any]:
    weight = lambda n: {"kernel": jax.random.normal(jax.random.key(n), (4, 4))}
    return {"layers": {"0": {"q_proj": weight(0), "mlp": weight(1)}, "1": {"q_proj": weight(2), "mlp": weight(3)}}}


def _specs() -> list[Any]:
    names = ["q_proj", "mlp"]
    return [
        jpeft.LoRA(rank=2, targets=["q_proj"]),
        jpeft.LoRA(rank=2, targets=r".*\.(q_proj|mlp)", rank_pattern={"mlp": 1}, alpha_pattern={r"0\.mlp": 3}),
        jpeft.LoRA(rank=1, targets=names, layers_to_transform=[1], layers_pattern=["layers"], rank_stabilized=True),
        jpeft.DoRA(rank=2, targets=names, exclude=["0.mlp"]),
        jpeft.AdaLoRA(rank=2, target_rank=1, total_steps=100, targets=names),
        jpeft.IA3(targets=names, feedforward=["mlp"]),
    ]


def _split(data: bytes) -> tuple[Any, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _folder(folder: Path, spec: Any, base: Any) -> Input:
    save_peft(folder, jpeft.init(jax.random.key(0), spec, base), params=base)
    header, data = _split((folder / WEIGHTS).read_bytes())
    header.pop("__metadata__")
    return json.loads((folder / CONFIG).read_text()), header, data


def _native(file: Path, spec: Any, base: Any) -> Input:
    jpeft.save(file, jpeft.init(jax.random.key(0), spec, base))
    header, data = _split(file.read_bytes())
    return json.loads(header.pop("__metadata__")["meta"]), header, data


def _change_header(one: Input, draw: Random) -> Input:
    header, data = one
    if draw.random() < 0.6 and not isinstance(header, bytes):
        return _times(header, draw), data
    text = header if isinstance(header, bytes) else dumped(header, draw)
    return broken(text, draw), (broken(data, draw) if draw.random() < 0.1 else data)


def _times(found: Any, draw: Random) -> Any:
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = tree(found, draw)
    return found


def _file(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def _read_header(one: Input) -> Any:
    return parse_header(_file(*one), "f", AdapterError, ADAPTER_HEADER_BYTES)


def _change_config(one: Input, draw: Random) -> Input:
    (config,) = one
    if draw.random() < 0.8 and not isinstance(config, bytes):
        return (_times(config, draw),)
    return (broken(config if isinstance(config, bytes) else dumped(config, draw), draw),)


def _read_config(one: Input) -> Any:
    (config,) = one
    text = config if isinstance(config, bytes) else json.dumps(config).encode("utf-8", "surrogatepass")
    return read_config(parse_json_object(text, CONFIG, AdapterError, CONFIG_DEPTH), CONFIG)


def _change_keys(one: Input, draw: Random) -> Input:
    config, header, data = one
    if draw.random() < 0.4:
        return _times(config, draw), header, data
    if draw.random() < 0.2:
        values = np.frombuffer(data[: len(data) // 4 * 4], np.float32).copy()
        if values.size:
            values[draw.randrange(values.size)] = draw.choice([np.nan, np.inf, 1e30, -0.0])
        return config, header, values.tobytes()
    return (config, *_refitted(_times(header, draw), data))


def _refitted(header: Any, data: bytes) -> tuple[Any, bytes]:
    """Offsets as the shapes ask for, so that the header's own checks don't hide what comes after."""
    if not isinstance(header, dict):
        return header, data
    at, new = 0, {}
    for key, entry in header.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 100 for n in shape) or len(shape) > 4:
            return header, data
        wide = {"F64": 8, "F16": 2, "BF16": 2, "U8": 1}.get(str(entry.get("dtype")), 4)
        size = wide * int(np.prod(shape, dtype=np.int64))
        new[key] = entry | {"data_offsets": [at, at + size]}
        at += size
    return (new, (data + bytes(at))[:at]) if at < 100_000 else (header, data)


def _read_keys(one: Input, flat: Any, layout: Any) -> Any:
    config, header, data = one
    file = _file(header, data)
    entries, metadata = parse_header(file, WEIGHTS, AdapterError, ADAPTER_HEADER_BYTES)
    text = json.dumps(config).encode("utf-8", "surrogatepass")
    found = parse_json_object(text, CONFIG, AdapterError, CONFIG_DEPTH)
    return parse_peft(Path("f"), found, Tensors(WEIGHTS, entries, file), metadata, flat, layout)


def _data() -> list[Input]:
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "more": 1}]
    turns = [
        {"role": "user", "content": parts, "weight": 0.5},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"content": "1", "role": "tool", "name": "f", "tool_call_id": "c"},
        {"role": "assistant", "content": "b", "tool_calls": json.dumps([call])},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    called = [
        {"messages": turns, "tools": tools},
        {"messages": turns[:1], "tools": json.dumps(tools), "documents": [{}]},
    ]
    lines = [{"text": "one"}, {"text": "two", "label": "x"}, {"text": "three", "label": 3, "more": [1.5, None]}]
    return [
        (".txt", False, b"one\ntwo\n\nthree\n"),
        (".txt", True, b"one\r\n\r\n two"),
        (".jsonl", False, "\n".join(map(json.dumps, [*lines, talk])).encode()),
        (".jsonl", False, "\n".join(map(json.dumps, called)).encode()),
        (".jsonl", None, "\n".join(map(json.dumps, lines[1:])).encode()),
        (".csv", False, b'text,more\none,1\n"two, and\nthree",2\n'),
        (".csv", None, b'text,label\r\n"a ""b""",x\r\nc,y\r\n'),
    ]


def _change_data(one: Input, draw: Random) -> Input:
    ending, how, data = one
    if ending == ".jsonl" and draw.random() < 0.5:
        lines = data.split(b"\n")
        at = draw.randrange(len(lines))
        try:
            lines[at] = dumped(_times(json.loads(lines[at]), draw), draw)
            return ending, how, b"\n".join(lines)
        except (ValueError, RecursionError):
            pass
    return ending, how, broken(data, draw)


def _read_data(one: Input) -> Any:
    ending, how, data = one
    path = Path(f"f{ending}")
    return parse_labelled(data, path) if how is None else parse_data(data, path, how)


def _change_native(one: Input, draw: Random) -> Input:
    meta, header, data = one
    if draw.random() < 0.6:
        return _times(meta, draw), header, data
    return (meta, *_refitted(_times(header, draw), data))


def _read_native(one: Input) -> Any:
    return parse_native("f", *_stored(one))


def _stored(one: Input) -> Stored:
    """With the digest that it should have, so that what is behind it is met."""
    meta, header, data = one
    entries, _ = parse_header(file := _file(header, data), "f", AdapterError, ADAPTER_HEADER_BYTES)
    tensors = {key: tensor_at(file, Entry(*entry)) for key, entry in entries.items()}
    told = {"format": "jpeft-2", "meta": json.dumps(meta)}
    return tensors, told | {"digest": digest(tensors, told)}


def _mixtures(base: Any, experts: tuple[Input, ...]) -> list[Input]:
    """Metadata, with the numbers of experts in place of their digests; a classifier's tensors as lists; the experts."""
    adapters = {name: jpeft.init(jax.random.key(0), _specs()[n], base) for n, name in enumerate(("a", "b"))}
    described = {"names": list(adapters), "experts": list(range(len(adapters)))}
    found = []
    for spec in (XLoRA(), XLoRA(depth=2, hidden=3, bias=False), XLoRA(layerwise=True, top_k=1), XLoRA(dropout=0.0)):
        layers = init_mixture(jax.random.key(0), spec, adapters, features=4).classifier
        values = {f"{i}/{n}": np.asarray(leaf).tolist() for i, layer in enumerate(layers) for n, leaf in layer.items()}
        found.append((described | {"spec": asdict(spec)}, values, experts))
    return found


def _peft_mixtures() -> list[Input]:
    """A config, and a classifier's tensors as lists."""
    config = {"peft_type": "XLORA", "hidden_size": 4, "adapters": {"0": "x", "1": "y"}}
    found = []
    for spec in (XLoRA(), XLoRA(depth=2, hidden=3, dropout=0.0), XLoRA(depth=2, hidden=3, top_k=1)):
        values, sizes = {}, [4, *[3] * (spec.depth - 1), 2]
        for i in range(spec.depth):
            place = f"{PREFIX}{i * (3 if spec.dropout else 2)}"
            values[f"{place}.weight"] = np.ones((sizes[i + 1], sizes[i])).tolist()
            values[f"{place}.bias"] = [0.0] * sizes[i + 1]
        found.append((config | {theirs: getattr(spec, ours) for theirs, ours, _ in FIELDS}, values))
    return found


def _change_mixture(one: Input, draw: Random) -> Input:
    described, values, *experts = one
    kind = draw.random()
    if kind < 0.5:
        return _times(described, draw), values, *experts
    if kind < 0.7:
        return described, _times(values, draw), *experts
    if not experts or not isinstance(described, dict) or not described:
        return _respelt(described, draw), values, *experts
    if kind < 0.85:
        name = draw.choice(list(described))
        return described | {name: _respelt(described[name], draw)}, values, *experts
    changed = list(experts[0])
    number = draw.randrange(len(changed))
    changed[number] = _change_native(changed[number], draw)
    return described, values, tuple(changed)


def _respelt(found: Any, draw: Random) -> bytes:
    """JSON changed as text: broken, or one of its numbers with as many digits as none has."""
    text = found if isinstance(found, bytes) else dumped(found, draw)
    numbers = list(re.finditer(rb"\d+(\.\d+)?", text))
    if not numbers or draw.random() < 0.6:
        return broken(text, draw)
    begin, end = draw.choice(numbers).span()
    return text[:begin] + b"1" + b"0" * draw.choice((20, 50, 400, 5_000)) + text[end:]


def _read_mixture(one: Input) -> Any:
    """With the digests that it should have; tensors as lists, for what can be a tensor's value."""
    described, values, *experts = one
    tensors = {str(key): _tensor(value) for key, value in values.items()} if isinstance(values, dict) else {}
    if not experts:
        text = described if isinstance(described, bytes) else json.dumps(described).encode("utf-8", "surrogatepass")
        config = read_xlora_config(parse_json_object(text, CONFIG, AdapterError, CONFIG_DEPTH), CONFIG)
        return parse_classifier(Path(WEIGHTS), tensors, config)
    stored = [_stored(expert) for expert in experts[0]]
    told = {"format": "jpeft-xlora-3", **_texts(described, [metadata["digest"] for _, metadata in stored])}
    main = tensors, told | {"digest": digest(tensors, told)}
    return parse_mixture(Path("f"), main, lambda k: stored[k % len(stored)])


def _texts(described: Any, digests: list[str]) -> dict[str, str]:
    """The metadata of a mixture, with a digest for each number of an expert."""
    if not isinstance(described, dict):
        return {}
    numbers = described.get("experts")
    if isinstance(numbers, list):
        known = dict(enumerate(digests))
        stated = [known.get(one, one) if type(one) is int else one for one in numbers]
        described = described | {"experts": stated}
    as_text = lambda one: one.decode("utf-8", "replace") if isinstance(one, bytes) else json.dumps(one)
    return {str(name): as_text(one) for name, one in described.items() if name not in ("format", "digest")}


def _tensor(value: Any) -> np.ndarray:
    try:
        with np.errstate(all="ignore"):
            return np.asarray(value, np.float32)
    except (OverflowError, TypeError, ValueError):
        return np.zeros(3, np.int32)


def main() -> None:
    """Fuzzes, and prints what came of it."""
    names = ("header", "config", "keys", "data", "native", "xlora")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=EXECUTIONS, help="of each target (default: %(default)s)")
    parser.add_argument("--target", choices=names, action="append", help="only this; give it as often as you like")
    parser.add_argument("--seed", type=int, default=0, help="other inputs for another one (default: %(default)s)")
    parser.add_argument("--kept", type=Path, default=Path("fuzz-failures"), help="where inputs go that failed")
    options = parser.parse_args()
    known, results, again = targets(), {}, {}
    with Progress() as progress:
        for name in options.target or names:
            task = progress.add_task(name, total=options.executions)
            step = lambda task=task: progress.advance(task, COLLECT)
            results[name] = fuzz(known[name], options.executions, options.seed, step)
            again[name] = timed_apart(name, results[name].slow)
    rows = [
        [name, f"{one.executions:,}", f"{one.ends['read']:,}", len(one.ends) - 1]
        + [f"{max([one.slowest, *again[name]]):.0f}", len(one.slow), len(one.failures)]
        + [f"{one.executions / one.seconds:,.0f}"]
        for name, one in results.items()
    ]
    header = ["target", "executions", "read", "ways to be refused", "slowest, CPU ms", "timed again", "failures"]
    header += ["a second"]
    publish("fuzz", table(header, rows))
    failed = False
    for name, one in results.items():
        for number, (told, found) in enumerate(one.failures[:5]):
            options.kept.mkdir(exist_ok=True)
            (options.kept / f"{name}-{number}.txt").write_text(f"{found!r}\n\n{told}", errors="backslashreplace")
            print(f"FAILURE of {name}, kept in {options.kept}: {told[-600:]}", file=sys.stderr)
        took, slow = max(zip(again[name], range(len(one.slow)), strict=True), default=(0.0, 0))
        failed |= bool(one.failures) or took > SLOWEST
        if took > SLOWEST:
            options.kept.mkdir(exist_ok=True)
            (options.kept / f"{name}-slow.txt").write_text(repr(one.slow[slow]), errors="backslashreplace")
            told = f"one took {took:.0f} ms of the CPU; promised are {SLOWEST}"
            print(f"{name}: {told}; kept in {options.kept}", file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
