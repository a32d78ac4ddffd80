"""Which solver suits `gradient_descent` on an ill-conditioned kernel: explicit ones and an implicit one of diffrax.

Cross-entropy of smoothed labels, a kernel of condition 1e6, float64. Times are in units of that of the fastest
direction, to which steps of explicit solvers are bound. Seconds are those of all cores, of a second run; errors are
against Dopri8 at a tolerance of 1e-10.
"""

import argparse
import time

import diffrax
import jax
import jax.numpy as jnp
import nt_predict
import numpy as np

N_CLASSES = 3
SOLVERS = {
    "Tsit5": diffrax.Tsit5(),
    "Dopri5": diffrax.Dopri5(),
    "Dopri8": diffrax.Dopri8(),
    "Kvaerno5": diffrax.Kvaerno5(root_finder=diffrax.VeryChord(rtol=1e-9, atol=1e-11)),
}
# Steps that are more than enough for explicit solvers. One that is implicit should need far fewer.
MAX_STEPS, MAX_IMPLICIT_STEPS = 2**18, 2**11


def seconds_and_outputs(predict_fn, t):
    """Returns what a second run takes, and gives; None if the steps are not enough."""
    try:
        predict_fn(t)
    except RuntimeError:
        return None
    start = time.process_time()
    outputs = jax.block_until_ready(predict_fn(t))
    return time.process_time() - start, outputs


def cross_entropy(fx, y):
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(fx) * y, axis=-1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=30)
    parser.add_argument("--times", type=float, nargs="+", default=[1e2, 1e4, 1e5])
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    random = np.random.default_rng(0)
    vectors = np.linalg.qr(random.normal(size=(args.n, args.n)))[0]
    kernel = args.n * (vectors * np.logspace(-6, 0, args.n)) @ vectors.T  # the mean over points takes the factor away
    y = 0.9 * np.eye(N_CLASSES)[random.integers(N_CLASSES, size=args.n)] + 0.1 / N_CLASSES
    print("| solver | " + " | ".join(f"time {t:g}: s, error" for t in args.times) + " |")
    print("|---" * (1 + len(args.times)) + "|")

    def predict_fn(solver, tolerance, max_steps):
        return nt_predict.gradient_descent(
            cross_entropy, kernel, y, rtol=tolerance, atol=tolerance, max_steps=max_steps, solver=solver
        )

    exact = [predict_fn(SOLVERS["Dopri8"], 1e-10, MAX_STEPS)(t) for t in args.times]
    for name, solver in SOLVERS.items():
        implicit = isinstance(solver, diffrax.AbstractImplicitSolver)
        row = []
        for t, expected in zip(args.times, exact, strict=True):
            found = seconds_and_outputs(predict_fn(solver, 1e-6, MAX_IMPLICIT_STEPS if implicit else MAX_STEPS), t)
            row.append(
                "too many steps" if found is None else f"{found[0]:.3f}, {np.abs(found[1] - expected).max():.0e}"
            )
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
