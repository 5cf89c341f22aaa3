"""What does a training step with an adapter cost, over the frozen model's own?

    python benchmarks/step.py [--rank 8] [--rounds 9] [--rows floor lora dora ...]

The floor is the frozen base: forward, and backward through the activations only. All rows are compiled by one
process and timed in turns; ratios are to the floor of the same round, their median and their 10th to 90th percentile.
Public API only.
"""

import argparse
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from llama_linen import LM

import jpeft


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", nargs="*", help="which rows beside the floor; all if not given")
    options = parser.parse_args()

    model = LM()
    tokens = jax.random.randint(jax.random.key(0), (4, 256), 0, model.vocab)
    params = model.init(jax.random.key(1), tokens)["params"]
    kernels = jpeft.kernels(model.apply, {"params": params}, tokens)
    noise = lambda leaf: leaf + 0.01 * jax.random.normal(jax.random.key(3), leaf.shape)

    def trained(spec):
        adapter = jpeft.init(jax.random.key(2), spec, params, kernels=kernels)
        return adapter.replace(trained=jax.tree.map(noise, adapter.trained))

    rank, alpha = options.rank, 2 * options.rank
    lora = trained(jpeft.LoRA(rank, alpha))
    dora = trained(jpeft.DoRA(rank, alpha))
    adalora = trained(jpeft.AdaLoRA(rank, rank // 2, alpha))
    ia3 = trained(jpeft.IA3())

    def loss(forward, params):
        logits = forward({"params": params}, tokens)[:, :-1]
        picked = jax.nn.one_hot(tokens[:, 1:], model.vocab, dtype=logits.dtype)
        return (jax.nn.logsumexp(logits, -1) - (logits * picked).sum(-1)).mean()

    def floor(shift, params):
        embed = {"embedding": params["embed"]["embedding"] + shift}
        return loss(model.apply, params | {"embed": embed})

    lifted, with_jvp = jpeft.lift(model.apply), jpeft.lift(model.apply, forward_mode=True)
    by = lambda forward, adapter: (
        lambda t, p: loss(forward, jpeft.attach(p, adapter.replace(trained=t))),
        adapter.trained,
    )
    rows = {
        "floor": (floor, jnp.zeros((1, model.d))),
        "lora": by(lifted, lora),
        "lora, forward mode": by(with_jvp, lora),
        "dora": by(lifted, dora),
        "adalora": by(lifted, adalora),
        "ia3": by(lifted, ia3),
        "lora, apply": (lambda t, p: loss(model.apply, jpeft.apply(p, lora.replace(trained=t))), lora.trained),
        "dora, apply": (lambda t, p: loss(model.apply, jpeft.apply(p, dora.replace(trained=t))), dora.trained),
    }
    rows = {name: row for name, row in rows.items() if name == "floor" or name in (options.rows or rows)}
    steps = {name: (compiled(function, theta, params), theta) for name, (function, theta) in rows.items()}
    times = measured(steps, params, options.rounds)
    print(f"{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}; {jpeft.count(params, lora)}")
    report(steps, times)


def compiled(function, theta, params):
    """The compiled step, and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    lowered = jax.jit(jax.value_and_grad(function)).lower(theta, params)
    traced = time.perf_counter()
    step = lowered.compile()
    return step, traced - start, time.perf_counter() - traced


def measured(steps, params, rounds):
    """Seconds of each step, the rows in turns."""
    times = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, ((step, _, _), theta) in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(theta, params))
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def report(steps, times) -> None:
    """One line a row."""
    floor = np.array(times["floor"])
    print(f"{'':20}{'s':>8}{'x floor':>9}{'spread':>14}{'GFLOP':>8}{'MiB':>7}{'trace s':>9}{'compile s':>10}")
    for name, ((step, trace, compile_), _) in steps.items():
        ratios = np.array(times[name]) / floor
        flops, memory = step.cost_analysis()["flops"] / 1e9, step.memory_analysis().temp_size_in_bytes / 2**20
        low, high = np.percentile(ratios, [10, 90])
        print(
            f"{name:20}{np.median(times[name]):8.3f}{np.median(ratios):9.2f}{low:8.2f}-{high:.2f}"
            f"{flops:10.0f}{memory:7.0f}{trace:9.1f}{compile_:10.1f}"
        )


if __name__ == "__main__":
    main()
