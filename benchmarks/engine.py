"""Scaling of the CPU engine on the 21-layer pooling network: cores, symmetry, memory. One or two minutes.

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


if __name__ == "__main__":
    main()
