"""Mean and covariance of an ensemble of networks at many times, against the archived neural-tangents 0.6.5.

    .venv/bin/python benchmarks/ensemble.py                # n = 5000, 10 outputs, 100 times, 100 test points
    .venv/bin/python benchmarks/ensemble.py --n 1000

Each library runs in a process of its own, which says first what the function costs that is returned to predict (the
kernel of the training points), then three times what 100 times cost, mean and covariance, with the first of them
compiling. The network has three ReLU layers, in float32. The processes run one after the other, ours first.
"""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
from peer import LIBRARIES, make_peer_environment

FEATURES, OUTPUTS, TIMES, TEST, DIAG_REG = 64, 10, 100, 100, 1e-3


def work(n):
    """One library: prints a line of JSON with its times and some results."""
    import neural_tangents as nt
    from neural_tangents import stax

    hidden = [layer for _ in range(3) for layer in (stax.Dense(512, 2**0.5, 0.1), stax.Relu())]
    kernel_fn = stax.serial(*hidden, stax.Dense(OUTPUTS))[2]
    random = np.random.default_rng(0)
    x, x_test = (random.normal(size=(size, FEATURES)).astype(np.float32) for size in (n, TEST))
    y = np.sin(x @ random.normal(size=(FEATURES, OUTPUTS)) / FEATURES**0.5).astype(np.float32)
    t = np.geomspace(1, 1e6, TIMES).astype(np.float32)

    def seconds(function):
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        return time.perf_counter() - start, result

    made, predict_fn = seconds(lambda: nt.predict.gradient_descent_mse_ensemble(kernel_fn, x, y, diag_reg=DIAG_REG))
    runs = []
    for _ in range(3):
        took, predicted = seconds(lambda: predict_fn(t, x_test, "ntk", compute_cov=True))
        runs.append(took)
    corner = [np.asarray(predicted.mean)[:, :2, :2], np.asarray(predicted.covariance)[:, :2, :2]]
    print(json.dumps({"made": made, "runs": runs, "corner": [c.tolist() for c in corner]}))


def main():
    """Runs both libraries, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.n)
    make_peer_environment()
    print(f"n = {options.n}, {OUTPUTS} outputs, {TIMES} times, {TEST} test points\n")
    print("| library | to begin, s | first call, s | second, s | third, s |\n|---|---|---|---|---|")
    corners = {}
    for name, python in LIBRARIES.items():
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
        command = [python, "-W", "ignore", Path(__file__).resolve(), "--work", "--n", str(options.n)]
        out = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True).stdout
        reply = json.loads(out.splitlines()[-1])
        corners[name] = [np.array(c) for c in reply["corner"]]
        print(f"| {name} | {reply['made']:.2f} | " + " | ".join(f"{s:.2f}" for s in reply["runs"]) + " |", flush=True)
    ours, theirs = corners["ours"], corners["peer"]
    differences = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True)]
    print("\nlargest relative difference: mean {:.1e}, covariance {:.1e}".format(*differences))


if __name__ == "__main__":
    main()
