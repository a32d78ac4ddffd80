"""Smooth nonlinearities against quadrature in two dimensions, on the xla backend and on the CPU's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_core import propagate
from nt_stax import (
    Dense,
    LogSigmoid,
    Mish,
    QuickGelu,
    Sigmoid,
    Silu,
    Softplus,
    SquaredRelu,
    Squareplus,
    Swish,
    Tanh,
    serial,
)

LAYERS = {
    "Tanh": (Tanh, np.tanh),
    "Sigmoid": (Sigmoid, lambda x: 0.5 + 0.5 * np.tanh(x / 2)),
    "LogSigmoid": (LogSigmoid, lambda x: -np.logaddexp(0, -x)),
    "Silu": (Silu, lambda x: x * (0.5 + 0.5 * np.tanh(x / 2))),
    "Softplus": (Softplus, lambda x: np.logaddexp(0, x)),
    "Mish": (Mish, lambda x: x * np.tanh(np.logaddexp(0, x))),
    "Squareplus": (Squareplus, lambda x: 0.5 * (x + np.sqrt(x * x + 4))),
    "QuickGelu": (QuickGelu, lambda x: x * (0.5 + 0.5 * np.tanh(0.851 * x))),
}
CORRELATIONS = (-1.0, -0.6, 0.0, 0.3, 0.9, 0.999, 1.0)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(220)


def derivative(f, x, step=1e-3):
    """By differences of the sixth order."""
    return sum(c * (f(x + k * step) - f(x - k * step)) for k, c in ((1, 45), (2, -9), (3, 1))) / (60 * step)


def expected(f, var1, var2, correlation):
    """E f(u) f(v), by quadrature."""
    u = np.sqrt(var1) * NODES[:, None]
    v = np.sqrt(var2) * (correlation * NODES[:, None] + np.sqrt(1 - correlation**2) * NODES)
    return WEIGHTS @ (f(u) * f(v)) @ WEIGHTS / (2 * np.pi)


def points(var):
    """Inputs of some variance, and others of one and a half times as much, at all correlations to them."""
    x1 = np.sqrt(2 * var) * np.array([[1.0, 0.0]])
    c = np.array(CORRELATIONS)
    return x1, np.sqrt(3 * var) * np.stack([c, np.sqrt(1 - c**2)], 1)


# The largest variance at which 100 coefficients are enough, for each precision: beyond, errors grow.
LARGEST = {
    "float32": {"Tanh": 1.0, "Squareplus": 1.0},
    "float64": {"Sigmoid": 1.0, "Softplus": 1.0, "LogSigmoid": 1.0, "Silu": 1.0},
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("var", [0.01, 1.0, 4.0])
def test_kernels_are_expectations(name, var, dtype):
    layer, f = LAYERS[name]
    x1, x2 = points(var)
    kernel = serial(Dense(1), layer())[2](jnp.asarray(x1, dtype), jnp.asarray(x2, dtype), ("nngp", "ntk"))
    k = var * 1.5**0.5 * np.array(CORRELATIONS)
    nngp = np.array([expected(f, var, 1.5 * var, c) for c in CORRELATIONS])
    ntk = k * [expected(lambda x: derivative(f, x), var, 1.5 * var, c) for c in CORRELATIONS]
    print(name, var, dtype, np.abs(kernel.nngp[0] - nngp).max() / nngp[-1], np.abs(kernel.ntk[0] - ntk).max() / ntk[-1])
