"""What a call of `kernel_fn` costs beside its arithmetic, on inputs that have next to none. Half a minute.

.venv/bin/python benchmarks/calls.py
"""

import time

import jax
import numpy as np
from networks import NETWORKS
from neural_tangents import stax

COMPILED = []
SHAPES = {"fcn3": (4,), "cnn21-flatten": (2, 2, 3), "cnn21-pool": (2, 2, 3)}


def record(event, duration, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(kwargs.get("fun_name"))


def fcn3(stax):
    """Three hidden layers."""
    return stax.serial(*[layer for _ in range(3) for layer in (stax.Dense(512), stax.Relu())], stax.Dense(1))


def seconds(function, *args):
    """The fastest of many calls."""
    times = []
    for _ in range(100):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def main():
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


if __name__ == "__main__":
    main()
