"""Programs without positions, of which backends carry 1 - |correlation|."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from closed_forms import relu_form
from conformance import RELU, chain, dense, run, spec_of
from nt_core import Builder, Request, activations, definition, propagate, steps
from nt_core.sources import Inputs

each_backend = pytest.mark.parametrize("backend", ["cpu", "xla"])

W_VAR = 2.25  # a number of either precision, as all others here are


def exact(x1, x2, depth, b_var, a, b):
    """The kernels of layers `Dense, ABRelu(a, b)` and a Dense layer, in 50 digits."""
    form, slope = relu_form(a, b), mp.mpf(a * a + b * b) / 2

    def mean_product(u, v):
        return mp.fsum(mp.mpf(float(p)) * mp.mpf(float(q)) for p, q in zip(u, v, strict=True)) / len(u)

    def pair(u, v):
        k, var1, var2, t = mean_product(u, v), mean_product(u, u), mean_product(v, v), mp.mpf(0)
        for layer in range(depth + 1):
            k, var1, var2 = (W_VAR * q + b_var for q in (k, var1, var2))
            t = W_VAR * t + k
            if layer < depth:
                k, dot = form(k, var1, var2)
                t, var1, var2 = t * dot, slope * var1, slope * var2
        return mp.re(k), mp.re(t)  # rounding may put a correlation beyond 1

    with mp.workdps(50):
        pairs = [[pair(u, v) for v in x2] for u in x1]
    return np.array([[[float(mp.re(k)) for k in entry] for entry in row] for row in pairs])


def on_a_line():
    return np.linspace(-1.5, 1.25, 7)[:, None] * np.ones((1, 3))


def nearly_parallel():
    random = np.random.default_rng(0)
    direction, other = random.normal(size=(2, 20))
    return np.stack([direction, 0.3 * direction + 1e-3 * other, -2 * direction, 1e-4 * other - direction, other])


@pytest.mark.sample(20)
@each_backend
@pytest.mark.parametrize("a, b", [(0, 1), (0.25, 1), (-1, 1), (1, 1)])
@pytest.mark.parametrize("b_var", [None, 0.25])
@pytest.mark.parametrize("points", [on_a_line, nearly_parallel])
def test_parallel_and_antiparallel_inputs(points, b_var, a, b, dtype, backend):
    x = points().astype(np.float32).astype(dtype)
    activation = steps.Dual(activations.ABRelu(a, b))
    layers = [layer for _ in range(3) for layer in (steps.Dense(W_VAR, b_var, 16), activation)]
    program = chain(spec_of(x, x), [*layers, steps.Dense(W_VAR, b_var, 16)])
    expected = exact(x, x, 3, 0 if b_var is None else b_var, a, b)
    kernel = run(program, x, None, Request(True, False), backend)
    for i, k in enumerate((kernel.nngp, kernel.ntk)):
        variance = np.diagonal(expected[..., i])
        error = np.abs(k - expected[..., i]) / np.sqrt(np.outer(variance, variance))
        assert error.max() < (1e-6 if dtype == "float32" else 1e-14)


def everything(spec, numbers1, numbers2):
    """A program of two sources with every primitive that needs no positions."""
    builder = Builder()
    x, y = builder.source(spec), builder.source(spec)
    erf, gelu = (steps.Dual(f) for f in (activations.Erf(1.0, 1.0, 0.0), activations.Gelu()))
    x = builder.add(RELU, builder.add(dense(None), x))
    y = builder.add(dense(), builder.add(erf, builder.add(dense(), y)))
    x = builder.add(dense(None), builder.add(steps.Combine((0.5, 2.0)), x, y))
    x = builder.add(steps.Dual(activations.ABRelu(-0.5, 1.0)), builder.add(steps.Scale(numbers1, numbers2), x))
    x = builder.add(dense(), builder.add(steps.Dropout(0.75), x))
    x = builder.add(steps.Multiply(), x, builder.add(gelu, builder.add(steps.Normalize(0.1, ()), x)))
    return builder.build(builder.add(dense(), builder.add(RELU, builder.add(dense(), x))))


@pytest.mark.sample(2)
@each_backend
@pytest.mark.parametrize("same", [False, True])
def test_every_primitive(same, dtype, backend):
    random = np.random.default_rng(0)
    x1, y1 = random.normal(size=(2, 5, 4)).astype(np.float32).astype(dtype)
    x2, y2 = random.normal(size=(2, 18, 4)).astype(np.float32).astype(dtype)
    x1[1], x1[2] = -2 * x1[0], 0
    x2[:3], y2[:3] = x1[:3], -y1[:3]
    if same:
        x2, y2 = x1.copy(), y1.copy()
    numbers1, numbers2 = (np.where(np.arange(len(x)) % 3 == 1, -0.5, 2.0) for x in (x1, x2))
    program = everything(spec_of(x1, x2), numbers1, numbers1 if same else numbers2)
    expected = definition.propagate(program, (x1, x2), (y1, y2))
    sources = [
        Inputs(jnp.asarray(first), jnp.asarray(second), spec_of(x1, x2)) for first, second in ((x1, x2), (y1, y2))
    ]
    (kernel,) = propagate(program, sources, Request(), backend)
    for name in ("nngp", "ntk", "cov1", "cov2"):
        wanted = getattr(expected, name)
        tolerance = 2e-6 if dtype == "float32" else 1e-7  # that of the definition, for equal inputs
        np.testing.assert_allclose(getattr(kernel, name), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@each_backend
def test_from_a_kernel(x64, backend):
    """A program may be cut anywhere."""
    x = nearly_parallel()
    layers = [dense(None), RELU, dense(), steps.Dual(activations.ABRelu(-1.0, 1.0)), dense(), RELU]
    whole = run(chain(spec_of(x, x), layers), x, x + 1.0, Request(), backend)
    first = run(chain(spec_of(x, x), layers[:3]), x, x + 1.0, Request(), backend)
    (second,) = propagate(chain(first.spec, layers[3:]), [first], Request(), backend)
    for name in ("nngp", "ntk", "cov1", "cov2"):
        np.testing.assert_allclose(getattr(second, name), getattr(whole, name), rtol=1e-8)


@each_backend
def test_derivatives(x64, backend):
    """Finite for zero and parallel inputs, and right where they exist."""
    x1, x2 = np.random.default_rng(0).normal(size=(2, 4, 20))
    x1[1], x1[2], x2[0] = 0, -2 * x1[0], x1[0]
    program = chain(spec_of(x1, x2), [dense(None), RELU, dense(None), RELU, dense(None)])

    def total(x):
        kernel = run(program, x, x2, Request(True, False), backend)
        return jnp.sum(kernel.nngp) + jnp.sum(kernel.ntk)

    gradient = jax.grad(total)(jnp.asarray(x1))
    assert np.isfinite(gradient).all()
    direction = np.where(np.arange(4) == 3, 1, 0)[:, None] * np.random.default_rng(1).normal(size=x1.shape)
    difference = (total(x1 + 1e-6 * direction) - total(x1 - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose(jnp.sum(gradient * direction), difference, rtol=1e-7)
