"""Rules for programs within the program: the adapter goes in beside its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jpeft.rewrite.moves import batch_axis, lead_batch
from jpeft.rewrite.program import Program, plain_outputs
from jpeft.rewrite.weight import Weight, is_weight

Outs = Sequence[Any] | None


def jit(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """Inlined: the whole is compiled as one anyway."""
    closed = eqn.params["jaxpr"]
    return program.evaluate(closed.jaxpr, closed.consts, values)


def closed_call(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """Inlined, as `jit` is."""
    closed = eqn.params["call_jaxpr"]
    if hasattr(closed, "jaxpr"):
        return program.evaluate(closed.jaxpr, closed.consts, values)
    return program.evaluate(closed, (), values)


def remat(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """Weights may leave as they came (`nnx.remat` returns the module's whole state)."""
    body = lambda values: program.evaluate(eqn.params["jaxpr"], (), values)
    if program.watch:
        return body(values)
    again = jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])
    return again(list(values))


def shard_map(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """A weight that every device has whole keeps its branches; one that is split over devices goes in dense."""
    specs, options = eqn.params["in_specs"], eqn.params
    split = [is_weight(v) and any(axis is not None for axis in spec) for v, spec in zip(values, specs, strict=True)]
    arguments = [
        program.as_array(value, "shard_map", "split over devices") if parted and not program.watch else value
        for value, parted in zip(values, split, strict=True)
    ]

    def body(*arguments: Any) -> list[Any]:
        local = [
            value.as_shard() if parted and is_weight(value) else value
            for value, parted in zip(arguments, split, strict=True)
        ]
        return plain_outputs(program, program.evaluate(options["jaxpr"], (), local), "shard_map")

    mapped = jax.shard_map(
        body,
        mesh=options["mesh"],
        in_specs=specs,
        out_specs=list(options["out_specs"]),
        axis_names=options["newly_manual_axes"],
        check_vma=options["check_vma"],
    )
    return mapped(*arguments)


def opaque(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """A function with a derivative of its own keeps it, and gets dense weights. Only their geometry is read inside."""
    closed = eqn.params["call_jaxpr"]
    return program.evaluate(closed.jaxpr, closed.consts, values) if program.watch else None


def cond(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """What every branch hands back untouched (`nnx.cond`: the module's state) stays what it was."""
    index, *operands = values
    branches = eqn.params["branches"]
    same = set.intersection(*({*_passed_through(closed.jaxpr).items()} for closed in branches))

    def branch(closed: ClosedJaxpr) -> Callable[[list[Any]], list[Any]]:
        def run(operands: list[Any]) -> list[Any]:
            outs = program.evaluate(closed.jaxpr, closed.consts, operands)
            return plain_outputs(program, _without(outs, dict(same)), "cond")

        return run

    outs = jax.lax.switch(index, [branch(closed) for closed in branches], operands)
    return _with(outs, {out: operands[given] for out, given in same})


def while_(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """Weights that stay, or are carried unchanged, are closed over; one that changes goes in dense."""
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_jaxpr, body_jaxpr = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    cond_consts, body_consts, carry = values[:n_cond], values[n_cond : n_cond + n_body], values[n_cond + n_body :]
    same = {i: carry[i] for i, given in _passed_through(body_jaxpr.jaxpr).items() if given == n_body + i}
    changing = [program.as_array(v, "while", "carried through a loop") for v in _without(carry, same)]
    turn = 0 if _drop([*cond_consts, *body_consts, *same.values()]) else None

    def run(closed: ClosedJaxpr, consts: Sequence[Any], changing: list[Any], turn: Any) -> list[Any]:
        return program.evaluate(closed.jaxpr, closed.consts, _in_turn([*consts, *_with(changing, same)], turn))

    def test(state: tuple[list[Any], Any]) -> Any:
        return plain_outputs(program, run(cond_jaxpr, cond_consts, *state), "while")[0]

    def step(state: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
        outs = plain_outputs(program, _without(run(body_jaxpr, body_consts, *state), same), "while")
        return outs, None if state[1] is None else state[1] + 1

    return _with(jax.lax.while_loop(test, step, (changing, turn))[0], same)


def scan(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """A stacked weight is scanned with its branches beside it, a shared one is closed over: no copy of the base."""
    n, m, body = eqn.params["num_consts"], eqn.params["num_carry"], eqn.params["jaxpr"]
    consts, carry = values[:n], values[n : n + m]
    passed = _passed_through(body.jaxpr)
    same = {i: carry[i] for i in range(m) if passed.get(i) == n + i}
    back = {
        i: values[given] for i, given in passed.items() if i >= m and given >= n + m
    }  # scanned over and handed back
    changing = [program.as_array(v, "scan", "carried through a scan") for v in _without(carry, same)]
    stacked = [_stacked(program, v) for v in values[n + m :]]
    turns = jnp.arange(eqn.params["length"]) if _drop([*consts, *same.values()]) else None

    def step(changing: list[Any], sliced: tuple[list[Any], Any]) -> tuple[list[Any], list[Any]]:
        xs = [_slice_of(v, one) for v, one in zip(stacked, sliced[0], strict=True)]
        outs = program.evaluate(body.jaxpr, body.consts, [*_in_turn([*consts, *_with(changing, same)], sliced[1]), *xs])
        outs = plain_outputs(program, _without(outs, same | back), "scan")
        return outs[: len(changing)], outs[len(changing) :]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    scanned = [(v.value, lead_batch(v, _scan_axis(v)) if v.branches else []) if is_weight(v) else v for v in stacked]
    changed, ys = jax.lax.scan(step, changing, (scanned, turns), **options)
    return _with([*changed, *ys], same | back)


def _drop(values: Sequence[Any]) -> bool:
    return any(is_weight(v) and v.drops for v in values)


def _in_turn(values: Sequence[Any], turn: Any) -> list[Any]:
    """Weights with the masks of this turn of a loop; `turn` is None where nothing is dropped."""
    return [v.in_turn(turn) if is_weight(v) and turn is not None else v for v in values]


def _passed_through(jaxpr: Jaxpr) -> dict[int, int]:
    """Which outputs are an input, untouched: positions of outputs and inputs."""
    inputs = {var: i for i, var in enumerate(jaxpr.invars)}
    return {i: inputs[var] for i, var in enumerate(jaxpr.outvars) if not isinstance(var, Literal) and var in inputs}


def _without(items: Sequence[Any], at: Mapping[int, Any]) -> list[Any]:
    return [item for i, item in enumerate(items) if i not in at]


def _with(items: Sequence[Any], at: Mapping[int, Any]) -> list[Any]:
    """The inverse of `_without`: `at` holds what stands at which positions of the whole."""
    rest = iter(items)
    return [at[i] if i in at else next(rest) for i in range(len(items) + len(at))]


def _scan_axis(weight: Weight) -> int:
    axis = batch_axis(weight, 0)
    assert axis is not None
    return axis


def _stacked(program: Program, value: Any) -> Any:
    """What is scanned over: a weight whose first dimension is a batch axis, or an array."""
    if is_weight(value) and batch_axis(value, 0) is None:
        return program.as_array(value, "scan", "scanned along an axis that is not a batch axis of the kernel")
    return value


def _slice_of(value: Any, sliced: Any) -> Any:
    """The weight as the body of the scan sees it."""
    if not is_weight(value):
        return sliced
    array, branches = sliced
    axis = _scan_axis(value)
    rest = value.with_branches(tuple(branches), tuple(a for a in value.batch if a != axis))
    return rest.moved(array, value.view.drop((0,)))
