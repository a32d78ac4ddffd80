"""Functions that are constant beyond two bounds, against their definition: one integral over one of the variables."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_core import _native
from nt_core.activations import ABRelu, Clip
from nt_core.backends.cpu.duals import encode_activation
from scipy.special import ndtr

CLIPS = {"hard tanh": (1.0, -1.0, 1.0, 0.0), "hard sigmoid": (1 / 6, -3.0, 3.0, 0.5), "relu 6": (-0.8, 0.0, 6.0, 0.3)}
VARIANCES = [(1.0, 1.0), (0.01, 0.012), (1.0, 1.001), (10.0, 3.0), (1e-3, 1e3), (1e3, 1e3), (1e6, 1e6), (1e4, 1e6)]
CORRELATIONS = [-1.0, -0.999999, -0.9, -0.3, 0.0, 0.5, 0.99, 1 - 1e-7, 1.0]


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    """Runs a test in both precisions, each with JAX's default types to match."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def normal(x):
    return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def points(widths):
    """Nodes and weights for means over a normal variable, dense at the points of `widths`, on the scale there."""
    steps = np.array([0, 0.5, 1, 2, 3, 4.5, 6, 8, 12])
    borders = [np.linspace(-12, 12, 49), *(at + sign * width * steps for at, width in widths for sign in (-1, 1))]
    borders = np.unique(np.clip(np.concatenate(borders), -12, 12))
    nodes, weights = np.polynomial.legendre.leggauss(16)
    half, middle = 0.5 * np.diff(borders)[:, None], 0.5 * (borders[1:] + borders[:-1])[:, None]
    at = (middle + half * nodes).ravel()
    return at, (half * weights).ravel() * normal(at)


def expectations(clip, var1, var2, correlation):
    """Returns `E f(u) f(v)` and `E f'(u) f'(v)`: of `v` given `u` in closed form, over `u` by quadrature."""
    a, low, high, c = clip
    std1, std2 = math.sqrt(var1), math.sqrt(var2)
    rest = max(std2 * math.sqrt((1 - correlation) * (1 + correlation)), 1e-12)
    slope = std2 * correlation
    bounds = [(t / std1, 0.0) for t in (low, high)]
    bounds += [(t / slope, rest / abs(slope)) for t in (low, high) if slope]
    z, weights = points(bounds)
    begin, end = (low - slope * z) / rest, (high - slope * z) / rest
    inside = ndtr(end) - ndtr(begin)
    given = slope * z * inside + rest * (normal(begin) - normal(end)) + low * ndtr(begin) + high * ndtr(-end)
    u = std1 * z
    value = weights @ ((a * np.clip(u, low, high) + c) * (a * given + c))
    return value, a * a * (weights @ (((u > low) & (u < high)) * inside))


def in_jax(clip, arguments):
    """Returns the variances after, the deficit and the factor."""
    activation = Clip(*clip)
    return *map(activation.variance, arguments[:2]), *jax.jit(activation.dual)(*arguments)


def in_c(clip, arguments):
    arguments = [np.asarray(x) for x in arguments]
    activation, coefficients = encode_activation(Clip(*clip), arguments[0].dtype.name)
    coefficients = np.array(coefficients, arguments[0].dtype)
    variance, deficit, factor = _native.dual(activation, coefficients, *arguments)
    return variance, _native.dual(activation, coefficients, *arguments[1::-1], arguments[2])[0], deficit, factor


both = pytest.mark.parametrize("dual", [in_jax, in_c])


@pytest.mark.sample(4)
@both
@pytest.mark.parametrize("name", CLIPS)
def test_dual_is_its_definition(dual, name, dtype):
    clip = CLIPS[name]
    pairs = [(v1, v2, c) for v1, v2 in VARIANCES for c in CORRELATIONS]
    var1, var2, correlation = (np.array(x) for x in zip(*pairs, strict=True))
    deficit = 0.5 * (np.sqrt(var1) - np.sqrt(var2)) ** 2 + np.sqrt(var1 * var2) * (1 - correlation)
    arguments = [jnp.asarray(x, dtype) for x in (var1, var2, deficit)]
    *variances, found, factor = (np.asarray(x, float) for x in dual(clip, arguments))
    own1, own2 = (np.array([expectations(clip, v, v, 1.0)[0] for v in var]) for var in (var1, var2))
    value, dot = np.array([expectations(clip, *pair) for pair in pairs]).T
    tolerance = 4e-6 if dtype == "float32" else 3e-12
    # What is beyond the bounds cancels.
    growth = np.maximum(1, np.maximum(var1, var2) / 10)
    lost = tolerance * (np.sqrt(growth) if dtype == "float32" else growth)
    np.testing.assert_allclose(variances, [own1, own2], rtol=tolerance)
    np.testing.assert_array_less(np.abs(found - 0.5 * (own1 + own2) + value), lost * np.maximum(own1, own2))
    # Where the factor is steep, arguments that are rounded tell nothing of its last digits.
    settled = (np.abs(correlation) < 0.9999) & (np.abs(np.log(var1 / var2)) < 3)
    np.testing.assert_allclose(factor[settled], dot[settled], rtol=0, atol=tolerance)
    steep = 2e-3 if dtype == "float32" else 1e-6
    np.testing.assert_allclose(factor, dot, rtol=0, atol=steep)


@both
@pytest.mark.parametrize("name", CLIPS)
def test_nearly_equal_inputs_keep_the_relative_accuracy_of_the_deficit(dual, name):
    correlation, ratio = (x.ravel() for x in np.meshgrid(1 - np.logspace(-12, -2, 11), 1 + np.logspace(-6, -2, 5)))
    var1 = np.full(ratio.shape, 1.5)
    var2 = ratio * var1
    deficit = 0.5 * (np.sqrt(var1) - np.sqrt(var2)) ** 2 + np.sqrt(var1 * var2) * (1 - correlation)
    results = {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            rounded = [jnp.asarray(np.float32(x), dtype) for x in (var1, var2, deficit)]
            results[dtype] = np.asarray(dual(CLIPS[name], rounded)[2], float)
    np.testing.assert_allclose(results["float32"], results["float64"], rtol=1e-5)


def test_bounds_are_on_either_side_of_zero():
    with pytest.raises(ValueError, match=r"got low=0\.5 and high=1\.0"):
        Clip(1.0, 0.5, 1.0, 0.0)


def test_far_bounds_are_none(dtype):
    """And bounds at 0 are those of a ReLU."""
    var1, var2, deficit = (jnp.array(x, dtype) for x in ([1.0, 0.3, 2.0], [1.0, 0.4, 1.0], [0.3, 0.05, 2.5]))
    for bounds, relu in (((-1e20, 1e25), ABRelu(1.0, 1.0)), ((0.0, np.inf), ABRelu(0.0, 1.0))):
        clip = Clip(1.0, *bounds, 0.0)
        np.testing.assert_allclose(in_c((1.0, *bounds, 0.0), (var1, var2, deficit))[0], relu.variance(var1), rtol=1e-6)
        np.testing.assert_allclose(clip.variance(var1), relu.variance(var1), rtol=1e-6)
        for found, expected in zip(clip.dual(var1, var2, deficit), relu.dual(var1, var2, deficit), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6 if dtype == "float32" else 1e-12)


def test_degenerate_inputs(dtype):
    """No deficit of equal inputs, and derivatives are finite: of equal, opposite and zero inputs."""
    var1 = jnp.array([1.0, 1.0, 2.0, 0.0, 0.0, 1e-30], dtype)
    var2 = jnp.array([1.0, 1.0, 0.5, 0.0, 1.0, 1e-30], dtype)
    deficit = jnp.array([0.0, 2.0, 0.25, 0.0, 0.5, 0.0], dtype)
    clip = Clip(1.0, -1.0, 2.0, 0.1)
    found, factor = clip.dual(var1, var2, deficit)
    natively = in_c((1.0, -1.0, 2.0, 0.1), (var1, var2, deficit))
    for value in (found, natively[2]):
        np.testing.assert_array_equal(np.asarray(value)[[0, 3, 5]], 0)
    tolerance = 1e-6 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(natively[2:], [found, factor], rtol=tolerance, atol=tolerance)
    for output in range(2):
        derivatives = jax.grad(lambda *x, output=output: jnp.sum(clip.dual(*x)[output]), (0, 1, 2))(var1, var2, deficit)
        assert all(np.isfinite(d).all() for d in derivatives)
        if output == 0:
            np.testing.assert_allclose(derivatives[2], np.where(var1 * var2 > 0, factor, derivatives[2]), rtol=1e-5)


def test_derivatives():
    """In variances and coefficients, against differences."""
    with jax.enable_x64(True):
        arguments = (1.0, -0.7, 1.2, 0.2, 0.8, 1.3, 0.6)

        def dual(a, low, high, c, var1, var2, deficit):
            clip = Clip(a, low, high, c)
            value, factor = clip.dual(*(jnp.asarray(x) for x in (var1, var2, deficit)))
            return value + 0.7 * factor + 0.3 * clip.variance(jnp.asarray(var1))

        for i, found in enumerate(jax.grad(dual, tuple(range(7)))(*arguments)):
            up, down = (dual(*(x + s * 1e-5 * (i == k) for k, x in enumerate(arguments))) for s in (1, -1))
            np.testing.assert_allclose(found, (up - down) / 2e-5, rtol=1e-6, atol=1e-9)
