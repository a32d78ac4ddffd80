"""Gradients of kernels with respect to images, here and on the archived library: time, compilation, memory.

    make bench-gradient                                      # all cases
    make bench-gradient BENCH_ARGS="myrtle5 conv-pool"       # some of them

One fresh process per library and case, one after the other, float32: the value and the gradient (in the first batch) of
the sum of NNGP and NTK over a block of two batches, jitted. The block is smaller for the archived library where its
memory is short; times are per entry of the block. `compile` is the gradient's tracing, lowering and compilation; `GB`
is the peak of the process above what it held before. With `--only` also the CPU time of all threads, the least of the
repetitions, which other processes disturb less.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from networks import NETWORKS
from neural_tangents import stax
from peer import LIBRARIES, machine, make_peer_environment

REPEATS, LEAST_SECONDS = 3, 0.5  # of each measurement: short calls are repeated more often


@dataclass(frozen=True)
class Case:
    """A network on inputs of one shape, and a block of n1 x n2 for each library."""

    network: str
    shape: tuple[int, ...]
    ours: tuple[int, int]
    peer: tuple[int, int]


CASES = [
    Case("cnn21-pool", (32, 32, 3), ours=(4, 16), peer=(1, 1)),
    Case("cnn21-flatten", (32, 32, 3), ours=(16, 16), peer=(16, 16)),
    Case("myrtle5", (32, 32, 3), ours=(8, 16), peer=(2, 2)),
    Case("myrtle10", (32, 32, 3), ours=(8, 16), peer=(1, 2)),
    Case("wide-resnet", (32, 32, 3), ours=(8, 16), peer=(1, 1)),
    Case("conv-pool", (8, 8, 3), ours=(8, 8), peer=(8, 8)),
    Case("conv3-erf", (16, 16, 3), ours=(8, 16), peer=(2, 2)),
    Case("conv3-gelu", (16, 16, 3), ours=(8, 16), peer=(2, 2)),
    Case("conv3-silu", (16, 16, 3), ours=(8, 16), peer=(1, 1)),
    Case("fcn5", (784,), ours=(256, 256), peer=(256, 256)),
    Case("fcn3-gelu", (784,), ours=(256, 256), peer=(256, 256)),
]


def peak_bytes():
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(case, block):
    """Returns what the library of this process takes, as a dictionary."""
    # The first images of a batch are the same in blocks of all sizes.
    x1, x2 = (
        jnp.asarray(np.random.default_rng(seed).standard_normal((n, *case.shape)), jnp.float32)
        for seed, n in enumerate(block)
    )
    kernel_fn = NETWORKS[case.network](stax)[2]

    def total(x1, x2):
        kernels = kernel_fn(x1, x2, ("nngp", "ntk"))
        return jnp.sum(kernels.nngp) + jnp.sum(kernels.ntk)

    jax.block_until_ready(jax.jit(lambda x: x + 1)(x1))
    idle, figures = peak_bytes(), {}
    for name, fn in (("value", total), ("gradient", jax.grad(total))):
        start = time.perf_counter()
        compiled = jax.jit(fn).lower(x1, x2).compile()
        figures[f"{name}_compile_s"] = time.perf_counter() - start
        seconds, cpu_seconds = [], []
        while len(seconds) <= REPEATS or sum(seconds) < LEAST_SECONDS:
            start, cpu_start = time.perf_counter(), time.process_time()
            result = jax.block_until_ready(compiled(x1, x2))
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
        per_entry = 1e3 / (block[0] * block[1])
        figures[f"{name}_ms"] = statistics.median(seconds[1:]) * per_entry
        figures[f"{name}_cpu_ms"] = min(cpu_seconds[1:]) * per_entry
    # Of the first pair of images alone: blocks may differ.
    figures["norm"] = float(jnp.linalg.norm(jax.jit(jax.grad(total))(x1[:1], x2[:1])))
    assert jnp.isfinite(result).all()
    return figures | {"gb": (peak_bytes() - idle) / 1e9}


def in_process(library, case):
    """Measures in a fresh process with a library."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    command = [LIBRARIES[library], "-W", "ignore", __file__, "--only", library, case.network]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Measures the cases that were asked for, all by default."""
    names = [case.network for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=names, metavar="CASE", help=f"of {', '.join(names)}")
    parser.add_argument("--only", choices=LIBRARIES, help="one library in this process; prints JSON")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(names):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    cases = [case for case in CASES if case.network in arguments.cases]
    if arguments.only:
        for case in cases:
            print(json.dumps(measure(case, getattr(case, arguments.only))))
        return

    make_peer_environment()
    print("| network | library | block | value, ms | gradient, ms | compile, s | GB |\n|---|---|---|---|---|---|---|")
    disagree = []
    for case in cases:
        figures = {library: in_process(library, case) for library in LIBRARIES}
        for library, f in figures.items():
            n1, n2 = getattr(case, library)
            cells = [case.network, library, f"{n1} x {n2}", f"{f['value_ms']:.3g}", f"{f['gradient_ms']:.3g}"]
            print("| " + " | ".join([*cells, f"{f['gradient_compile_s']:.1f}", f"{f['gb']:.2f}"]) + " |", flush=True)
        if not abs(figures["ours"]["norm"] / figures["peer"]["norm"] - 1) < 1e-2:
            disagree.append(case.network)
    where = machine()
    print(f"\nOn {where['cores']} cores ({where['cpu']}, {where['architecture']}), float32, medians, times per entry.")
    if disagree:
        sys.exit(f"The two libraries disagree on {', '.join(disagree)}.")


if __name__ == "__main__":
    main()
