"""What a call of `kernel_fn` costs beside its arithmetic, and what masks cost where nothing is masked. A minute.

.venv/bin/python benchmarks/calls.py
"""

import functools
import time

import jax
import numpy as np
from networks import NETWORKS, cnn
from neural_tangents import stax

COMPILED = []
SHAPES = {"fcn3": (4,), "cnn21-flatten": (2, 2, 3), "cnn21-pool": (2, 2, 3)}


def record(event, duration, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(kwargs.get("fun_name"))


def fcn3(stax):
    """Three hidden layers."""
    return stax.serial(*[layer for _ in range(3) for layer in (stax.Dense(512), stax.Relu())], stax.Dense(1))


def seconds(function, *args, n_calls=100):
    """The fastest of many calls."""
    times = []
    for _ in range(n_calls):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def text(stax):
    """Two convolutions over words, and their mean."""
    layers = [layer for _ in range(2) for layer in (stax.Conv(1, (5,), padding="SAME"), stax.Relu())]
    return stax.serial(*layers, stax.GlobalAvgPool(), stax.Dense(1))


def calls():
    """Prints, for each network, the first call, and later ones with and without `jax.jit`."""
    jax.monitoring.register_event_duration_secs_listener(record)
    print("network         first call, s   compilations   eager, ms   jitted, ms   difference, ms")
    for name, shape in SHAPES.items():
        network = {"fcn3": fcn3, **NETWORKS}[name]
        x = jax.device_put(np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32))
        COMPILED.clear()
        start = time.perf_counter()
        kernel_fn = network(stax)[2]
        jax.block_until_ready(kernel_fn(x, None, "ntk"))
        first, n_compiled = time.perf_counter() - start, len(COMPILED)
        jitted = jax.jit(kernel_fn, static_argnames="get")
        eager, compiled = (1e3 * seconds(f, x, None, "ntk") for f in (kernel_fn, jitted))
        print(f"{name:15} {first:13.2f} {n_compiled:14} {eager:11.3f} {compiled:12.3f} {eager - compiled:16.3f}")


def jitted_call():
    """Prints what a jitted call costs over one of the same network on batches of no samples, which computes nothing."""
    kernel_fn = jax.jit(fcn3(stax)[2], static_argnames="get")
    some, none = (np.zeros((n, 4), np.float32) for n in (1, 0))
    least, empty = (1e6 * seconds(kernel_fn, x, x, "ntk") for x in map(jax.device_put, (some, none)))
    print(f"\njitted fcn3, one sample: {least:.0f} us; no samples: {empty:.0f} us; difference {least - empty:.0f} us")


def masks():
    """Prints what `mask_constant` costs where nothing equals it."""
    print("\nnetwork         block    eager, ms: without, with masks; ratio    jitted, ms: without, with; ratio")
    cases = {
        "cnn5-pool": (cnn(stax, "GlobalAvgPool", 5), (16, 16, 3), (8, 32)),
        "cnn5-flatten": (cnn(stax, "Flatten", 5), (32, 32, 3), (32, 64)),
        "text": (text(stax), (100, 50), (16, 32)),
        "fcn3": (fcn3(stax), (100,), (500, 500)),
    }
    random = np.random.default_rng(0)
    for name, ((_, _, kernel_fn), shape, sizes) in cases.items():
        x1, x2 = (jax.device_put(random.standard_normal((n, *shape)).astype(np.float32)) for n in sizes)
        line = f"{name:15} {sizes[0]:3} x {sizes[1]:3}"
        for fn in (kernel_fn, jax.jit(kernel_fn, static_argnames="get")):
            calls_of = [functools.partial(fn, x1, x2, get="ntk", mask_constant=c) for c in (None, 9.0)]
            without, with_masks = (1e3 * seconds(call, n_calls=15) for call in calls_of)
            line += f"    {without:8.2f} {with_masks:8.2f} {with_masks / without:5.2f}"
        print(line)


if __name__ == "__main__":
    calls()
    jitted_call()
    masks()
