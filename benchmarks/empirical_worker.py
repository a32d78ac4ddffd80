"""The empirical NTK of one network by one implementation of one library, in this process: prints figures as JSON.

Started by empirical.py: `neural_tangents` is this library or the archived one, by the environment. With a third
argument, a bound in bytes: the kernel of one batch with itself within it, in one call, and the memory of the process.
"""

import json
import os
import resource
import sys
import time

import jax
import numpy as np
from empirical_networks import LARGE, NETWORKS
from neural_tangents import empirical_ntk_fn

CALLS = 20


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    """Computes, and prints."""
    network, implementation = sys.argv[1], int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not a reply
    figures = bounded(network, implementation, int(sys.argv[3])) if sys.argv[3:] else timed(network, implementation)
    print(json.dumps(figures), file=replies, flush=True)


def bounded(network, implementation, max_bytes):
    """Returns figures of a kernel that is computed within a bound on memory."""
    make, n = LARGE[network]
    f, params, shape = make()
    x = np.random.default_rng(1).normal(size=(n, *shape)).astype("float32")
    ntk_fn = empirical_ntk_fn(f, vmap_axes=0, implementation=implementation, max_bytes=max_bytes)
    start = time.perf_counter()
    kernel = np.asarray(ntk_fn(x, None, params))
    seconds = time.perf_counter() - start
    some = kernel[:: n // 10, :: n // 10].astype(float)
    return {"call_s": seconds, "peak_bytes": peak_bytes(), "kernel": some.tolist()}


def timed(network, implementation):
    """Returns figures of a kernel of two batches: compiles, and calls many times."""
    make, n = NETWORKS[network]
    f, params, shape = make()
    x1, x2 = (np.random.default_rng(seed).normal(size=(n, *shape)).astype("float32") for seed in (1, 2))
    ntk_fn = jax.jit(empirical_ntk_fn(f, vmap_axes=0, implementation=implementation))
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.float32(0)))
    before = peak_bytes()
    start = time.perf_counter()
    kernel = jax.block_until_ready(ntk_fn(x1, x2, params))
    first = time.perf_counter() - start
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(ntk_fn(x1, x2, params))
        seconds.append(time.perf_counter() - start)
    return {
        "jax": jax.__version__,
        "first_s": first,
        "call_s": min(seconds),
        "peak_bytes": peak_bytes() - before,
        "kernel": np.asarray(kernel).astype(float).tolist(),
    }


if __name__ == "__main__":
    main()
