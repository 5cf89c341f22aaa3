"""Rules for programs within the program: the adapter goes in beside its weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from jpeft.rewrite.moves import batch_axis, lead_batch
from jpeft.rewrite.program import Program, plain_outputs
from jpeft.rewrite.weight import Weight, is_weight

Outs = Sequence[Any] | None


def jit(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """Inlined: the whole is compiled as one anyway."""
    closed = eqn.params["jaxpr"]
    return program.evaluate(closed.jaxpr, closed.consts, values)


def closed_call(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    closed = eqn.params["call_jaxpr"]
    if hasattr(closed, "jaxpr"):
        return program.evaluate(closed.jaxpr, closed.consts, values)
    return program.evaluate(closed, (), values)


def remat(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    body = lambda values: plain_outputs(program, program.evaluate(eqn.params["jaxpr"], (), values), "remat")
    again = jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])
    return again(list(values))


def cond(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    index, *operands = values
    branch = lambda closed: (
        lambda ops: plain_outputs(program, program.evaluate(closed.jaxpr, closed.consts, ops), "cond")
    )
    return jax.lax.switch(index, [branch(closed) for closed in eqn.params["branches"]], operands)


def while_(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """Weights that stay are closed over; one that is carried changes, so it goes in dense."""
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_jaxpr, body_jaxpr = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    carry = [program.as_array(v, "while", "carried through a loop") for v in values[n_cond + n_body :]]

    def test(carry: list[Any]) -> Any:
        outs = program.evaluate(cond_jaxpr.jaxpr, cond_jaxpr.consts, [*cond_consts, *carry])
        return plain_outputs(program, outs, "while")[0]

    def step(carry: list[Any]) -> list[Any]:
        outs = program.evaluate(body_jaxpr.jaxpr, body_jaxpr.consts, [*body_consts, *carry])
        return plain_outputs(program, outs, "while")

    return jax.lax.while_loop(test, step, carry)


def scan(program: Program, eqn: JaxprEqn, values: Sequence[Any]) -> Outs:
    """A stacked weight is scanned with its branches beside it, a shared one is closed over: no copy of the base."""
    n, m, body = eqn.params["num_consts"], eqn.params["num_carry"], eqn.params["jaxpr"]
    consts = values[:n]
    carry = [program.as_array(v, "scan", "carried through a scan") for v in values[n : n + m]]
    stacked = [_stacked(program, v) for v in values[n + m :]]

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        xs = [_slice_of(v, sliced) for v, sliced in zip(stacked, slices, strict=True)]
        outs = program.evaluate(body.jaxpr, body.consts, [*consts, *carry, *xs])
        outs = plain_outputs(program, outs, "scan")
        return outs[:m], outs[m:]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    scanned = [(v.value, lead_batch(v, _scan_axis(v)) if v.branches else []) if is_weight(v) else v for v in stacked]
    carry, ys = jax.lax.scan(step, carry, scanned, **options)
    return [*carry, *ys]


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
