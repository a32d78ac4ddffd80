"""The pooled network of 21 layers with other nonlinearities, against ReLU and against neural-tangents 0.6.5.

    .venv/bin/python benchmarks/activations.py           # images of 32 x 32, this library alone
    .venv/bin/python benchmarks/activations.py --peer    # 8 x 8, SiLU by ElementwiseNumerical(silu, 25) in both

Milliseconds for an entry of the NTK in float32, the fastest of three calls, and the seconds of the first one.
"""

import argparse
import json
import os
import subprocess
import time
import warnings
from pathlib import Path

import jax
import numpy as np
from neural_tangents import stax
from peer import LIBRARIES, make_peer_environment

DEPTH = 21


def silu(x):
    """As both libraries are given it."""
    return x * jax.nn.sigmoid(x)


def measure(layer, size, n1, n2):
    """Returns milliseconds for an entry, and seconds of the first call."""
    layers = []
    for _ in range(DEPTH):
        layers += [stax.Conv(1, (3, 3), padding="SAME", W_std=2**0.5, b_std=0.1), layer]
    kernel_fn = jax.jit(stax.serial(*layers, stax.GlobalAvgPool(), stax.Dense(1))[2], static_argnames="get")
    x1, x2 = (np.random.default_rng(n).normal(size=(n, size, size, 3)).astype(np.float32) for n in (n1, n2))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(kernel_fn(x1, x2, "ntk"))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:]) / (n1 * n2), times[0]


def numerical():
    """The layer that both libraries have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the derivative that is found
        return stax.ElementwiseNumerical(silu, 25)


def main():
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--size", type=int, default=32, help="pixels along an axis")
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(measure(numerical(), 8, *options.work)))
    elif options.peer:
        make_peer_environment()
        print("| library | ms for an entry | first call, s |\n|---|---|---|")
        for name, block in (("ours", (16, 16)), ("peer", (2, 2))):
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
            command = [LIBRARIES[name], "-W", "ignore", Path(__file__).resolve(), "--work", *map(str, block)]
            out = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True).stdout
            print("| {} | {:.4g} | {:.2f} |".format(name, *json.loads(out.splitlines()[-1])), flush=True)
    else:
        print("| nonlinearity | ms for an entry | of ReLU's | first call, s |\n|---|---|---|---|")
        of_relu = None
        for name in ("Relu", "Gelu", "Erf", "Silu", "Mish", "Sigmoid", "Tanh"):
            took, first = measure(getattr(stax, name)(), options.size, 4, 16)
            of_relu = of_relu or took
            print(f"| {name} | {took:.1f} | {took / of_relu:.1f} | {first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
