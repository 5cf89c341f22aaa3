"""What do many adapters cost: several trained together over one base, and a batch whose rows have one each?

    python benchmarks/adapters.py [--together 1 8] [--adapters 16] [--rows 32] [--layers 2] [--rounds 2]

Together: K runs of `train.step`, each with a state of its own, called one after the other; the same in one compiled
step, in a loop (`sweep.step`) and by `vmap` (`sweep.step(at_once=True)`). By row: a batch whose rows each have one of
several adapters, gathered out of `jpeft.stacked.stack` or by `attach(..., gates=)`, over one adapter for all rows.
"""

import argparse
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from llama_linen import LM
from tables import publish, table
from timing import compiled, in_turns, ratios

import jpeft
from jpeft.stacked import stack
from jpeft_interop import sweep, train

SPEC = jpeft.LoRA(rank=8, alpha=16)
FLOOR = "one adapter for all rows"


class Output(NamedTuple):
    """What `train.step` takes of a forward."""

    logits: Any


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--together", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    model = LM(layers=options.layers)
    parts = [together(model, options.together, options.rounds)]
    parts.append(by_row(model, options.adapters, options.rows, options.rounds))
    publish("adapters", "\n\n".join(parts))


def begun(model, tokens):
    """The params, and a function of a seed that makes an adapter which does something."""
    params = model.init(jax.random.key(1), tokens)["params"]
    kernels = jpeft.kernels(lambda params, ids: model.apply({"params": params}, ids), params, tokens)

    def adapter(seed):
        made = jpeft.init(jax.random.key(seed), SPEC, params, kernels=kernels)
        noise = lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(seed), leaf.shape)
        return made.replace(trained=jax.tree.map(noise, made.trained))

    return params, adapter


def together(model, counts, rounds) -> str:
    """K runs in one step, over K steps."""
    # 480 tokens: as many as no kernel has columns, so that no activation looks like a kernel.
    tokens = jax.random.randint(jax.random.key(0), (2, 240), 0, model.vocab)
    params, adapter = begun(model, tokens)
    batch = {"input_ids": tokens, "labels": jnp.roll(tokens, -1, 1)}
    header = ("adapters", "steps", "s", "× separate", "10th to 90th %", "temporary MiB", "copies of the base")
    return table(header, [line for k in counts for line in _lines(model, params, adapter, batch, k, rounds)])


def _lines(model, params, adapter, batch, count, rounds):
    """The table's rows for `count` adapters."""
    forward = lambda params, input_ids: Output(model.apply({"params": params}, input_ids))
    optimizer = sweep.at_rate(train.adamw(1.0, 100), 1e-3)
    start = lambda: [train.start(adapter(k), optimizer, jax.random.key(k)) for k in range(count)]
    alone, batches = train.step(forward, optimizer), sweep.stacked([batch] * count)
    steps = {"loop": sweep.step(forward, optimizer), "vmap": sweep.step(forward, optimizer, at_once=True)}
    program = lambda step, *args: step.lower(*args).compile()
    programs = {"separate": program(alone, start()[0], params, batch)}
    programs |= {name: program(step, sweep.stacked(start()), params, batches) for name, step in steps.items()}
    calls = {"separate": Trained(lambda states: [alone(one, params, batch)[0] for one in states], start())}
    for name, step in steps.items():
        advance = lambda states, step=step: step(states, params, batches)[0]
        calls[name] = Trained(advance, sweep.stacked(start()))
    times = in_turns(calls, rounds)
    for name, ratio in ratios(times, "separate").items():
        spread = f"{ratio.low:.2f} to {ratio.high:.2f}" if name != "separate" else ""
        memory = programs[name].memory_analysis().temp_size_in_bytes / 2**20
        copies = base_copies(programs[name], count, params)
        yield count, name, f"{np.median(times[name]):.2f}", f"{ratio.median:.2f}", spread, f"{memory:.0f}", copies


class Trained:
    """Step after step: a state is given away with each."""

    def __init__(self, advance, states):
        self.advance, self.states = advance, states

    def __call__(self):
        self.states = self.advance(self.states)
        return self.states


def base_copies(program, count, params):
    """How many arrays of a program are a kernel's with an axis for the adapters before it: 0 where the base is one."""
    kernels = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 2}
    found = re.findall(r"f32\[([\d,]+)\]", program.as_text())
    return sum(f"{count},{','.join(map(str, shape))}" in found for shape in kernels)


def by_row(model, adapters, rows, rounds) -> str:
    """An adapter a row, over one for all."""
    tokens = jax.random.randint(jax.random.key(0), (rows, 64), 0, model.vocab)
    params, adapter = begun(model, tokens)
    made = [adapter(seed) for seed in range(adapters)]
    ids, many = jnp.arange(rows) % adapters, stack(made)
    fast = jpeft.lift(lambda params, ids: model.apply({"params": params}, ids))

    def one(trained, params, ids):
        return fast(jpeft.attach(params, made[0].replace(trained=trained)), tokens)

    def gathered(trained, params, ids):
        each = jax.tree.map(lambda leaf: leaf[ids], many.replace(trained=trained))
        return jax.vmap(lambda adapter, row: fast(jpeft.attach(params, adapter), row[None])[0])(each, tokens)

    def gated(trained, params, ids):
        group = [adapter.replace(trained=leaves) for adapter, leaves in zip(made, trained, strict=True)]
        return fast(jpeft.attach(params, group, gates=ids), tokens)

    forwards = {
        FLOOR: (one, made[0].trained),
        "gathered": (gathered, many.trained),
        "gates": (gated, [adapter.trained for adapter in made]),
    }
    loss = lambda logits: train.cross_entropy(logits, jnp.roll(tokens, -1, 1)).loss
    lines = []
    for what in ("forward", "forward and backward"):
        programs = {}
        for name, (forward, trained) in forwards.items():
            backward = jax.grad(lambda *args, forward=forward: loss(forward(*args)))
            programs[name] = compiled(forward if what == "forward" else backward, trained, params, ids), trained
        calls = {name: lambda p=p, t=t: p.step(t, params, ids) for name, (p, t) in programs.items()}
        times = in_turns(calls, rounds)
        for name, ratio in ratios(times, FLOOR).items():
            program = programs[name][0]
            spread = "" if name == FLOOR else f"{ratio.low:.2f} to {ratio.high:.2f}"
            figures = (f"{np.median(times[name]):.2f}", f"{ratio.median:.2f}", spread)
            lines.append((what, name, *figures, f"{program.gflop:.0f}", f"{program.temp_mib:.0f}"))
    header = (f"{rows} rows, {adapters} adapters", "how", "s", "× one", "10th to 90th %", "GFLOP", "temporary MiB")
    return table(header, lines)


if __name__ == "__main__":
    main()
