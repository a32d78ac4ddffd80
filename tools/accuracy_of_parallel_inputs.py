"""Float32 tangent kernels of inputs that differ by a factor, against float64: the figures of docs/cpu-engine.md.

    .venv/bin/python tools/accuracy_of_parallel_inputs.py

Errors are of entries, over the roots of the two diagonal ones. Factors are 0.3 to 2.5, and negative ones; three layers
without bias.
"""

import jax
import numpy as np
from neural_tangents import stax

FACTORS = np.array([0.3, 0.7, 1.0, 1.6, 2.5, -1.2, -0.4])


def network(linear, readout):
    """Three hidden layers with ReLU."""
    return stax.serial(*[layer for _ in range(3) for layer in (linear, stax.Relu())], *readout, stax.Dense(1))


def error(net, x, implementation):
    """The largest error of the tangent kernel of float32 inputs."""
    kernels = {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            kernel = net[2](x.astype("float32").astype(dtype), None, "ntk", implementation=implementation)
            kernels[dtype] = np.asarray(kernel, float)
    roots = np.sqrt(np.diag(kernels["float64"]))
    return np.max(np.abs(kernels["float32"] - kernels["float64"]) / np.outer(roots, roots))


def main():
    """Prints the errors, for vectors and for images."""
    conv = stax.Conv(1, (3, 3), padding="SAME", W_std=1.5)
    cases = {
        "vectors of 20": (network(stax.Dense(1, 1.5), ()), (20,)),
        "8 x 8, Flatten": (network(conv, (stax.Flatten(),)), (8, 8, 3)),
        "8 x 8, GlobalAvgPool": (network(conv, (stax.GlobalAvgPool(),)), (8, 8, 3)),
    }
    for name, (net, shape) in cases.items():
        x = np.multiply.outer(FACTORS, np.random.default_rng(0).standard_normal(shape))
        errors = ", ".join(f"{backend} {error(net, x, backend):.1e}" for backend in ("cpu", "xla"))
        print(f"{name:22} {errors}")


if __name__ == "__main__":
    main()
