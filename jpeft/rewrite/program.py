"""Evaluating a traced program, equation by equation: untouched ones re-bound as they were, others by a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, Literal

from jpeft.errors import LiftError
from jpeft.rewrite.weight import Branch, Weight, is_weight
from jpeft.view import View


@dataclass(frozen=True)
class Use:
    """One meeting of a weight with the program.

    Attributes:
      path: the weight's.
      equation: the primitive that takes it.
      how: `product`, `lookup` or `conv` where the adapter stays factored, else `dense`.
      why: of `dense`, the reason.
      view: of the weight as it arrived.
      shape: the whole weight's (under `shard_map`, a device's).
      roles: of a product, the weight's dimensions: contracted, output, batch.
    """

    path: str
    equation: str
    how: str
    why: str = ""
    view: View | None = None
    shape: tuple[int, ...] = ()
    roles: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
    groups: int = 1


@dataclass(frozen=True)
class Result:
    """The result of a product with a watched weight, as long as it is no more than cut, shifted and scaled.

    `squashed` by a tanh, it is a pooler's and no head's, unless a scale follows (a soft cap on logits).
    """

    value: Any
    path: str
    squashed: bool = False


@dataclass
class Program:
    """One evaluation: its options, and what it has seen.

    Attributes:
      forward_mode: use products that forward-mode autodiff can go through.
      watch: only observe weights: keep every equation, and follow products to the outputs (`jpeft.kernels`).
      uses: filled on the way.
      passed_on: paths of results that something other than the output has read.
    """

    forward_mode: bool = False
    watch: bool = False
    uses: list[Use] = field(default_factory=list)
    passed_on: set[str] = field(default_factory=set)

    def evaluate(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """The outputs of `jaxpr`; arguments and outputs may be `Weight`s."""
        env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        read = lambda v: v.val if isinstance(v, Literal) else env[v]
        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            tracked = any(isinstance(v, (Weight, Result)) for v in values)
            outs = self.rewrite(eqn, values) if tracked else bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def rewrite(self, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
        """The outputs of an equation that an adapted weight reaches."""
        from jpeft.rewrite.rules import RULES  # the rules evaluate programs in turn

        if any(isinstance(v, Result) for v in values) and eqn.primitive.name not in INLINED:
            return self._after_product(eqn, values)
        rule = RULES.get(eqn.primitive.name)
        outs = rule(self, eqn, values) if rule else None
        return self.dense(eqn, values, "no rule for this operation") if outs is None else outs

    def dense(self, eqn: JaxprEqn, values: Sequence[Any], why: str) -> Sequence[Any]:
        """The equation on the adapted weights themselves."""
        return bind(eqn, [self.as_array(v, eqn.primitive.name, why) for v in values])

    def as_array(self, value: Any, equation: str, why: str, biased: bool = False) -> Any:
        """A plain array, whatever came. `biased`: the caller adds the biases that the methods add to the result."""
        if isinstance(value, Result):
            self.passed_on.add(value.path)
            return value.value
        if not is_weight(value):
            return value
        self.uses.append(Use(value.path, equation, "dense", why))
        for branch in value.branches:
            _check_dense(value, branch, why, biased)
        return value.dense()

    def _after_product(self, eqn: JaxprEqn, values: list[Any]) -> Sequence[Any]:
        """Follows a product's result through what leaves it the head's: casts, shapes, a bias, a scale, a mask."""
        name, results = eqn.primitive.name, [v for v in values if isinstance(v, Result)]
        others = [(v, atom) for v, atom in zip(values, eqn.invars, strict=True) if not isinstance(v, Result)]
        constant = all(is_weight(v) or isinstance(atom, Literal) for v, atom in others)
        if len(results) == 1 and (name in HEAD_PICKS or (constant and name in HEAD_KEEPS)):
            plain = [v.value if isinstance(v, Result) else self.as_array(v, name, "") for v in values]
            squashed = name == "tanh" or (results[0].squashed and name != "mul")
            return [Result(bind(eqn, plain)[0], results[0].path, squashed)]
        self.passed_on.update(result.path for result in results)
        unwrapped = [v.value if isinstance(v, Result) else v for v in values]
        return self.rewrite(eqn, unwrapped) if any(map(is_weight, unwrapped)) else bind(eqn, unwrapped)


INLINED = {"jit", "pjit", "closed_call", "core_call"}
# What may happen to logits, all of one operand but constants and weights; and what picks some of them.
HEAD_KEEPS = {"convert_element_type", "reshape", "transpose", "squeeze", "slice", "broadcast_in_dim", "copy"}
HEAD_KEEPS |= {"sharding_constraint", "add", "mul", "div", "tanh"}
HEAD_PICKS = {"gather", "dynamic_slice", "select_n"}


def _check_dense(weight: Weight, branch: Branch, why: str, biased: bool) -> None:
    if branch.dropout:
        raise LiftError(f"{weight.path!r}: dropout acts on the branch's input, and this use has none ({why})")
    if branch.use is not None:
        raise LiftError(f"{weight.path!r}: the adapter acts on one use of a tied weight, and this use is dense ({why})")
    if branch.gates is not None:
        raise LiftError(f"{weight.path!r}: the gates differ from row to row, and this use has no rows ({why})")
    if branch.adds_bias and not biased:
        raise LiftError(
            f"{weight.path!r}: its {branch.method!r} adapter adds a bias to the layer's result, and this use is dense "
            f"({why}); run the function itself on jpeft.apply(params, adapter)"
        )


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
    """The equation as it was, on other values."""
    outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return outs if eqn.primitive.multiple_results else [outs]


def plain_outputs(program: Program, outs: Sequence[Any], where: str) -> list[Any]:
    """Outputs of a sub-program as arrays: a weight that leaves through one leaves dense."""
    return [program.as_array(out, where, "leaves a sub-program as a result") for out in outs]
