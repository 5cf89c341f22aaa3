"""PEFT's `target_parameters`: adapters of parameters that are no module's `weight`, as the stacked kernels of experts.

PEFT names such an adapter after the module that owns the parameter. Of several in one module it wraps one around the
other, in the order in which the module has registered them: the last is the outermost and has the module's name, each
one further in has `.base_layer` more. So the names of those that are targeted give each one's name in the file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from jpeft.errors import AdapterError

# The order in which transformers' modules register what they may have of these.
REGISTERED = ("gate_up_proj", "gate_proj", "w1", "up_proj", "w2", "down_proj", "w3")


def is_targeted(parameter: str, names: Collection[str]) -> bool:
    """Whether `target_parameters` means a parameter: its whole name, or its end from a dot on."""
    return any(parameter == name or parameter.endswith(f".{name}") for name in names)


def stored_names(parameters: Iterable[str]) -> dict[str, str]:
    """Under what module's name PEFT stores the adapter of each of these parameters, all of which are adapted.

    Raises:
      AdapterError: the order of several in one module is not known.

    Example:
      >>> stored_names(["mlp.experts.down_proj", "mlp.experts.gate_up_proj"])
      {'mlp.experts.down_proj': 'mlp.experts', 'mlp.experts.gate_up_proj': 'mlp.experts.base_layer'}
    """
    by_owner: dict[str, list[str]] = defaultdict(list)
    for parameter in parameters:
        owner, _, name = parameter.rpartition(".")
        by_owner[owner].append(name)
    return {f"{owner}.{name}": stored for owner, found in by_owner.items() for name, stored in _nested(owner, found)}


def _nested(owner: str, names: Sequence[str]) -> list[tuple[str, str]]:
    if len(names) > 1 and (unknown := sorted(set(names) - set(REGISTERED))):
        raise AdapterError(
            f"{owner!r} has several adapted parameters, whose order in the module names them in the file; it is not "
            f"known for {unknown[0]!r}, only among {', '.join(REGISTERED)}"
        )
    outermost_first = sorted(names, key=REGISTERED.index, reverse=True) if len(names) > 1 else names
    return [(name, owner + ".base_layer" * depth) for depth, name in enumerate(outermost_first)]


def shortest(parameters: Collection[str], known: Iterable[str]) -> list[str]:
    """The names for `target_parameters` that mean just these parameters: ends shared by all layers, or the whole."""
    others = set(known) - set(parameters)
    ends = sorted({".".join(parameter.split(".")[-2:]) for parameter in parameters})
    return sorted(parameters) if any(is_targeted(other, ends) for other in others) else ends
