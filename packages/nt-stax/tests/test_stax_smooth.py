"""Smooth nonlinearities against quadrature in two dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_core import explain
from nt_stax import (
    Dense,
    ElementwiseNumerical,
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

pytestmark = pytest.mark.unoptimised

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
# The trapezoidal rule: what functions that are analytic near the real axis leave of its error is rounding.
NODES = np.linspace(-9, 9, 451)
WEIGHTS = np.exp(-(NODES**2) / 2) * (NODES[1] - NODES[0]) / np.sqrt(2 * np.pi)


def derivative(f, x, step=1e-3):
    """By differences of the sixth order."""
    return sum(c * (f(x + k * step) - f(x - k * step)) for k, c in ((1, 45), (2, -9), (3, 1))) / (60 * step)


def expected(f, var1, var2, correlation):
    """E f(u) f(v), by quadrature."""
    u = np.sqrt(var1) * NODES[:, None]
    v = np.sqrt(var2) * (correlation * NODES[:, None] + np.sqrt(1 - correlation**2) * NODES)
    return WEIGHTS @ (f(u) * f(v)) @ WEIGHTS


def points(var):
    """Inputs of some variance, and others of one and a half times as much, at all correlations to them."""
    x1 = np.sqrt(2 * var) * np.array([[1.0, 0.0]])
    c = np.array(CORRELATIONS)
    return x1, np.sqrt(3 * var) * np.stack([c, np.sqrt(1 - c**2)], 1)


# Relative to the kernel of parallel inputs; what their coefficients leave, for each precision by the variance.
TOLERANCES = {"float32": {0.01: 1e-6, 1.0: 1e-6, 10.0: 1e-6}, "float64": {0.01: 1e-12, 1.0: 1e-11, 10.0: 1e-6}}


@pytest.mark.sample(16)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("var", [0.01, 1.0, 10.0])
def test_kernels_are_expectations(name, var, dtype):
    layer, f = LAYERS[name]
    x1, x2 = points(var)
    kernel_fn = serial(Dense(1), layer())[2]
    kernel = kernel_fn(jnp.asarray(x1, dtype), jnp.asarray(x2, dtype), ("nngp", "ntk"))
    k = var * 1.5**0.5 * np.array(CORRELATIONS)
    nngp = np.array([expected(f, var, 1.5 * var, c) for c in CORRELATIONS])
    ntk = k * [expected(lambda x: derivative(f, x), var, 1.5 * var, c) for c in CORRELATIONS]
    tolerance = TOLERANCES[dtype][var]
    np.testing.assert_allclose(kernel.nngp[0], nngp, rtol=0, atol=tolerance * nngp[-1])
    np.testing.assert_allclose(kernel.ntk[0], ntk, rtol=0, atol=tolerance * ntk[-1])


def test_other_names():
    x = jnp.linspace(-2, 2, 9)
    np.testing.assert_array_equal(Swish()[1]((), x), Silu()[1]((), x))
    np.testing.assert_allclose(SquaredRelu()[1]((), x), jnp.maximum(x, 0) ** 2)


def test_derivatives(x64):
    """Of a kernel with respect to its inputs, by differences."""
    x1, x2 = points(1.0)
    kernel_fn = serial(Dense(1), Silu(), Dense(1))[2]

    def total(scale):
        return kernel_fn(scale * x1, jnp.asarray(x2), "ntk").sum()

    step = 1e-5
    np.testing.assert_allclose(jax.grad(total)(1.0), (total(1 + step) - total(1 - step)) / (2 * step), rtol=1e-6)


def test_explain_says_what_is_beyond_the_terms():
    """Of x^3 the mean square is 15 var^3, of which the first two coefficients have 9 var^3."""
    cube = ElementwiseNumerical(lambda x: x**3, 1, lambda x: 3 * x**2)
    plan = explain(serial(Dense(3), cube, Dense(1))[2], (2, 4))
    assert "%2: 2 Hermite coefficients, the rest of the mean square (4e-01 at variance 1, 4e-01 at variance 10)" in plan
    plan = explain(serial(Dense(3), Silu(), Dense(1))[2], (2, 4))
    assert "from a variance of 32 on, the orders up to 51199 in " in plan
    zero = ElementwiseNumerical(jnp.zeros_like, 1, jnp.zeros_like)
    assert "(0e+00 at variance 1," in explain(serial(Dense(3), zero, Dense(1))[2], (2, 4))
