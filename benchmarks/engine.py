"""Scaling of the CPU engine on the 21-layer pooling network: cores, symmetry, memory; and where the time of a fully
connected one goes. One or two minutes.

.venv/bin/python benchmarks/engine.py
"""

import os
import resource
import subprocess
import sys
import time

import jax
import numpy as np
from networks import NETWORKS
from neural_tangents import stax


def images(n, size):
    """Random images."""
    return jax.device_put(np.random.default_rng(n).standard_normal((n, size, size, 3)).astype(np.float32))


def seconds(kernel_fn, x1, x2, repeats=3):
    """The fastest of some calls, without compilation."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(kernel_fn(x1, x2, "ntk"))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def peak_bytes():
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fully_connected():
    """Prints the time of networks of some depths and of the product of their inputs, 4000 x 4000."""
    x1, x2 = (np.random.default_rng(i).standard_normal((4000, 784)).astype(np.float32) for i in (1, 2))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        x1 @ x2.T
        times.append(time.perf_counter() - start)
    print(f"fully connected, 784 inputs, 4000 x 4000: product of the inputs by NumPy {1e3 * min(times):.0f} ms")
    for n_inputs, depth in ((784, 1), (784, 5), (784, 10), (8, 5)):
        layers = [layer for _ in range(depth) for layer in (stax.Dense(1), stax.Relu())]
        kernel_fn = jax.jit(stax.serial(*layers, stax.Dense(1))[2], static_argnames="get")
        cut1, cut2 = jax.device_put((x1[:, :n_inputs], x2[:, :n_inputs]))
        print(f"  {n_inputs} inputs, {depth} layers: {1e3 * seconds(kernel_fn, cut1, cut2, 5):.0f} ms")


def main():
    """Prints all figures; with numbers of cores as argument, the time per entry on these."""
    if len(sys.argv) > 1:
        os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
    kernel_fn = jax.jit(NETWORKS["cnn21-pool"](stax)[2], static_argnames="get")
    if len(sys.argv) > 1:
        print(1e3 * seconds(kernel_fn, images(4, 32), images(16, 32)) / 64)
        return
    jax.block_until_ready(images(64, 32))
    idle = peak_bytes()
    jax.block_until_ready(kernel_fn(images(64, 32), images(63, 32), "ntk"))
    print(f"64 x 63 images of 32 x 32: {(peak_bytes() - idle) / 1e9:.2f} GB above {idle / 1e9:.2f} GB")
    x = images(32, 16)
    half, whole = seconds(kernel_fn, x, None), seconds(kernel_fn, x, x + 0)
    print(f"a batch of 32 images of 16 x 16 with itself: {half / whole:.2f} of the time of the full block")
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        per_entry = []
        for used in (cores[:1], cores[:2]):
            command = [sys.executable, __file__, ",".join(map(str, used))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            per_entry.append(float(done.stdout))
        one, two = per_entry
        print(f"one core {one:.2f} ms per entry, two {two:.2f}: {one / two:.2f} times as fast")
    fully_connected()


if __name__ == "__main__":
    main()
