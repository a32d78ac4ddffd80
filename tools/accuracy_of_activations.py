"""Prints the table of docs/numerics.md of activations that are known by their Hermite coefficients, and of hard SiLU.

    .venv/bin/python tools/accuracy_of_activations.py [--variances Q ...] [--ratios R ...] [--] [NAME ...]

The largest errors of the kernels after one layer, NNGP and NTK, relative to those of parallel inputs: for inputs of
variance q, and others of q or 1.5 q, at correlations from -1 to 1 - 1e-7, and parallel. Expectations are integrals by
quadrature in double precision, cut where functions are not smooth.
"""

import argparse

import jax
import jax.numpy as jnp
import nt_stax
import numpy as np
from nt_stax import Dense, serial

VARIANCES = (0.01, 0.1, 1.0, 4.0, 10.0)
RATIOS = (1.0, 1.5)
CORRELATIONS = np.array([-1, -0.9, -0.5, 0, 0.3, 0.9, 0.99, 0.9999, 1 - 1e-7, 1])
# The functions, and where they are not smooth.
SMOOTH = {
    "Tanh": jnp.tanh,
    "Sigmoid": jax.nn.sigmoid,
    "LogSigmoid": jax.nn.log_sigmoid,
    "Silu": jax.nn.silu,
    "Softplus": jax.nn.softplus,
    "Mish": jax.nn.mish,
    "Squareplus": jax.nn.squareplus,
    "QuickGelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
KINKED = {
    "Elu": (jax.nn.elu, (0.0,)),
    "Selu": (jax.nn.selu, (0.0,)),
    "Celu": (jax.nn.celu, (0.0,)),
    "HardSilu": (jax.nn.hard_silu, (-3.0, 3.0)),
}
FUNCTIONS = {name: (f, ()) for name, f in SMOOTH.items()} | KINKED
END = 9.0  # in standard deviations
BESIDE = np.array([-20, -6, -2, 0, 2, 6, 20])  # of a kink, in units of the function


def nodes(cuts, steps):
    """Returns nodes and weights for a normal variable, by Gauss-Legendre quadrature between cuts, `(cuts, ...)`."""
    at, weights = np.polynomial.legendre.leggauss(24)
    even = np.linspace(-END, END, steps + 1)
    ends = np.sort(
        np.concatenate([np.broadcast_to(even[:, None], (len(even), cuts.shape[1])), cuts.clip(-END, END)]), 0
    )
    half = 0.5 * np.diff(ends, axis=0)[:, None]
    z = half * (at[:, None] + 1) + ends[:-1, None]
    w = half * weights[:, None] * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    return z.reshape(-1, cuts.shape[1]), w.reshape(-1, cuts.shape[1])


def expectation(f, kinks, var1, var2, c):
    """E f(u) f(v), for variances and a correlation."""
    s1, s2, across = var1**0.5, var2**0.5, (1 - c * c) ** 0.5
    # Large variances compress what the function does near its kinks, or near 0.
    points = np.add.outer(np.array(kinks or (0.0,)), BESIDE).ravel()
    cuts = [points / s1]
    if c:
        # The mean over v, for a given u, changes within some `across` where that of v is there.
        cuts += [(points / s2 + sign * across * far) / c for far in (0, 1, 3, 9) for sign in (-1, 1)]
    z1, w1 = (x[:, 0] for x in nodes(np.concatenate(cuts)[:, None], 24))
    if not across:
        return w1 @ (f(s1 * z1) * f(c * s2 * z1))
    z2, w2 = nodes((points[:, None] / s2 - c * z1) / across, 16)
    return w1 @ (f(s1 * z1) * (w2 * f(s2 * (c * z1 + across * z2))).sum(0))


def errors(name, var, ratio, dtype, implementation):
    """Returns the largest errors of the NNGP and of the NTK."""
    f, kinks = FUNCTIONS[name]
    slope = jax.vmap(jax.grad(f))
    x1 = np.sqrt(2 * var) * np.array([[1.0, 0.0]])
    x2 = np.sqrt(2 * ratio * var) * np.stack([CORRELATIONS, np.sqrt(1 - CORRELATIONS**2)], 1)
    x1, x2 = (x.astype(dtype).astype(float) for x in (x1, x2))
    kernel_fn = serial(Dense(1), getattr(nt_stax, name)())[2]
    with jax.enable_x64(dtype == "float64"):  # kernels are in JAX's default precision, whatever that of the inputs is
        kernel = kernel_fn(x1.astype(dtype), x2.astype(dtype), ("nngp", "ntk"), implementation=implementation)
    assert kernel.nngp.dtype == dtype
    var1, var2 = (0.5 * (x**2).sum(1) for x in (x1, x2))
    dot = 0.5 * (x1 * x2).sum(1)
    correlations = np.where(x2[:, 1] == 0, np.sign(dot), dot / np.sqrt(var1 * var2))

    def exact(g):
        def of(x):
            return np.asarray(g(jnp.asarray(x).ravel())).reshape(x.shape)

        return np.array([expectation(of, kinks, var1[0], *pair) for pair in zip(var2, correlations, strict=True)])

    found = ((kernel.nngp[0], exact(f)), (kernel.ntk[0], dot * exact(slope)))
    return [np.max(np.abs(np.asarray(k, float) - e)) / e[-1] for k, e in found]


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FUNCTIONS)}; all by default")
    parser.add_argument("--variances", nargs="+", type=float, default=VARIANCES)
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="of the variances of both inputs")
    parser.add_argument("--implementation", help="a backend; by default that of the device")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(FUNCTIONS):
        parser.error(f"no activation {', '.join(sorted(unknown))}; there are {', '.join(FUNCTIONS)}")
    jax.config.update("jax_enable_x64", True)
    heads = "".join(f" q = {var:g} |" for var in arguments.variances)
    print(f"| | precision |{heads}\n" + "|---" * (2 + len(arguments.variances)) + "|")
    for name in arguments.names or FUNCTIONS:
        for dtype in ("float32", "float64"):
            worst = [
                np.max([errors(name, var, ratio, dtype, arguments.implementation) for ratio in arguments.ratios], 0)
                for var in arguments.variances
            ]
            cells = " | ".join(f"{nngp:.0e}, {ntk:.0e}" for nngp, ntk in worst)
            print(f"| {name} | {dtype} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
