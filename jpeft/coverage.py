"""What the fast path does with each adapted weight: factored, dense and why, or never read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jpeft.lift import Lifted, observe
from jpeft.rewrite.program import Program, Use, plain_outputs
from jpeft.rewrite.weight import is_weight
from jpeft.tree import nearest


@dataclass(frozen=True)
class Covered:
    """One adapted weight: `how` is `factored`, `dense` or `unread`; `uses` says what it met."""

    path: str
    how: str
    uses: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.how:9} {self.path}  {', '.join(self.uses)}"


@dataclass(frozen=True)
class Coverage:
    """Each adapted weight of a call; prints as a table."""

    rows: tuple[Covered, ...]

    def __getitem__(self, path: str) -> Covered:
        rows = {row.path: row for row in self.rows}
        if path not in rows:
            raise KeyError(f"{path!r} is no adapted weight of this call; nearest: {nearest(path, rows)}")
        return rows[path]

    def count(self, how: str) -> int:
        """How many weights are `factored`, `dense` or `unread`."""
        return sum(row.how == how for row in self.rows)

    def __str__(self) -> str:
        total = ", ".join(f"{self.count(how)} {how}" for how in ("factored", "dense", "unread"))
        return "\n".join([*map(str, self.rows), total])


def coverage(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Coverage:
    """How a lifted `fn` would treat each weight attached in its arguments. Abstract: nothing is computed.

    Args:
      fn: the function, lifted or not.
      *args: its arguments, with adapters attached; arrays or `jax.ShapeDtypeStruct`.
      **kwargs: its keyword arguments.

    Example:
      >>> import jax, jpeft, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> print(coverage(lambda p, x: jnp.sin(p["kernel"]).T @ x, jpeft.attach(params, adapter), jnp.ones(3)))
      dense     kernel  sin (no rule for this operation)
      0 factored, 1 dense, 0 unread
    """
    program = Program()
    fn = fn.fn if isinstance(fn, Lifted) else fn
    leaves = observe(fn, program, args, kwargs, lambda outs: plain_outputs(program, outs, "output"))
    paths = sorted({leaf.path for leaf in leaves if is_weight(leaf)})
    return Coverage(tuple(_row(path, [use for use in program.uses if use.path == path]) for path in paths))


def _row(path: str, uses: list[Use]) -> Covered:
    if not uses:
        return Covered(path, "unread", ())
    how = "dense" if any(use.how == "dense" for use in uses) else "factored"
    return Covered(
        path, how, tuple(dict.fromkeys(f"{use.equation} ({use.why})" if use.why else use.equation for use in uses))
    )
