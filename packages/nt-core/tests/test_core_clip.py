"""Functions that are polynomials between bounds, against their definition: one integral over one of the variables."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_core import _native
from nt_core.activations import ABRelu, Clip, ClipGate, Polynomial
from nt_core.backends.cpu.duals import encode_activation
from scipy.special import ndtr

FUNCTIONS = {
    "hard tanh": Clip(1.0, -1.0, 1.0, 0.0),
    "hard sigmoid": Clip(1 / 6, -3.0, 3.0, 0.5),
    "relu 6": Clip(-0.8, 0.0, 6.0, 0.3),
    "hard silu": ClipGate(1 / 6, 3.0, 0.5),
    "nearly even": ClipGate(-0.8, 2.0, 0.1),
}
VARIANCES = [
    *((1.0, 1.0), (0.01, 0.012), (1.0, 1.001), (10.0, 3.0), (1e-3, 1e3)),
    *((1e3, 1e3), (1e3, 1.00001e3), (1e6, 1e6), (1e4, 1e6)),
]
CORRELATIONS = [-1.0, -0.999999, -0.9, -0.3, 0.0, 0.5, 0.99, 1 - 1e-7, 1.0]


def pieces(activation):
    """Returns the bounds, and the coefficients of polynomials below, between and above them."""
    match activation:
        case Clip(a, low, high, c):
            return (low, high), [(a * low + c, 0, 0), (c, a, 0), (a * high + c, 0, 0)]
        case ClipGate(a, bound, c):
            return (-bound, bound), [(0, c - a * bound, 0), (0, c, a), (0, c + a * bound, 0)]


def slopes(polynomials):
    return [(linear, 2 * square, 0) for _, linear, square in polynomials]


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


def values(bounds, polynomials, x):
    c0, c1, c2 = np.array(polynomials)[np.searchsorted(bounds, x)].T
    return c0 + c1 * x + c2 * x * x


def mean_of_normal(bounds, polynomials, mean, std):
    """The mean of the function of a normal variable, in closed form."""
    begin, end = (np.subtract.outer(edges, mean) / std for edges in ((-1e9, *bounds), (*bounds, 1e9)))
    inside, first = ndtr(end) - ndtr(begin), normal(begin) - normal(end)
    second = inside + begin * normal(begin) - end * normal(end)
    c0, c1, c2 = np.array(polynomials).T[:, :, None]
    return np.sum(
        (c0 + (c1 + c2 * mean) * mean) * inside + (c1 + 2 * c2 * mean) * std * first + c2 * std**2 * second, 0
    )


def expectations(activation, var1, var2, correlation):
    """Returns `E f(u) f(v)` and `E f'(u) f'(v)`: of `v` given `u` in closed form, over `u` by quadrature."""
    bounds, polynomials = pieces(activation)
    std1, std2 = math.sqrt(var1), math.sqrt(var2)
    rest = max(std2 * math.sqrt((1 - correlation) * (1 + correlation)), 1e-12)
    slope = std2 * correlation
    changes = [(t / std1, 0.0) for t in bounds]
    changes += [(t / slope, rest / abs(slope)) for t in bounds if slope]
    z, weights = points(changes)
    return [
        weights @ (values(bounds, of, std1 * z) * mean_of_normal(bounds, of, slope * z, rest))
        for of in (polynomials, slopes(polynomials))
    ]


def in_jax(activation, arguments):
    """Returns the variances after, the deficit and the factor."""
    return *map(activation.variance, arguments[:2]), *jax.jit(activation.dual)(*arguments)


def in_c(activation, arguments):
    arguments = [np.asarray(x) for x in arguments]
    number, coefficients = encode_activation(activation, arguments[0].dtype.name)
    coefficients = np.array(coefficients, arguments[0].dtype)
    variance, deficit, factor = _native.dual(number, coefficients, *arguments)
    return variance, _native.dual(number, coefficients, *arguments[1::-1], arguments[2])[0], deficit, factor


both = pytest.mark.parametrize("dual", [in_jax, in_c])


each_function = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.mark.sample(6)
@both
@each_function
def test_dual_is_its_definition(dual, name, dtype):
    activation = FUNCTIONS[name]
    pairs = [(v1, v2, c) for v1, v2 in VARIANCES for c in CORRELATIONS]
    var1, var2, correlation = (np.array(x) for x in zip(*pairs, strict=True))
    deficit = 0.5 * (np.sqrt(var1) - np.sqrt(var2)) ** 2 + np.sqrt(var1 * var2) * (1 - correlation)
    arguments = [jnp.asarray(x, dtype) for x in (var1, var2, deficit)]
    *variances, found, factor = (np.asarray(x, float) for x in dual(activation, arguments))
    (own1, slope1), (own2, slope2) = (
        np.array([expectations(activation, v, v, 1.0) for v in var]).T for var in (var1, var2)
    )
    value, dot = np.array([expectations(activation, *pair) for pair in pairs]).T
    tolerance = 4e-6 if dtype == "float32" else 3e-12 if isinstance(activation, Clip) else 2e-11
    # What is beyond the bounds cancels.
    growth = np.maximum(1, np.maximum(var1, var2) / 10)
    lost = tolerance * (np.sqrt(growth) if dtype == "float32" else growth)
    np.testing.assert_allclose(variances, [own1, own2], rtol=tolerance)
    np.testing.assert_array_less(np.abs(found - 0.5 * (own1 + own2) + value), lost * np.maximum(own1, own2))
    # Where the factor is steep, arguments that are rounded tell nothing of its last digits.
    settled = (np.abs(correlation) < 0.9999) & (np.abs(np.log(var1 / var2)) < 3)
    np.testing.assert_array_less(np.abs(factor - dot)[settled], (lost * np.sqrt(slope1 * slope2))[settled])
    steep = 2e-3 if dtype == "float32" else 1e-6
    np.testing.assert_allclose(factor, dot, rtol=0, atol=steep)


@both
@each_function
def test_nearly_equal_inputs_keep_the_relative_accuracy_of_the_deficit(dual, name):
    correlation, ratio = (x.ravel() for x in np.meshgrid(1 - np.logspace(-12, -2, 11), 1 + np.logspace(-6, -2, 5)))
    var1 = np.full(ratio.shape, 1.5)
    var2 = ratio * var1
    deficit = 0.5 * (np.sqrt(var1) - np.sqrt(var2)) ** 2 + np.sqrt(var1 * var2) * (1 - correlation)
    results = {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            rounded = [jnp.asarray(np.float32(x), dtype) for x in (var1, var2, deficit)]
            results[dtype] = np.asarray(dual(FUNCTIONS[name], rounded)[2], float)
    np.testing.assert_allclose(results["float32"], results["float64"], rtol=1e-5)


def test_bounds_are_on_either_side_of_zero():
    with pytest.raises(ValueError, match=r"got low=0\.5 and high=1\.0"):
        Clip(1.0, 0.5, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"positive bound, got -1\.0"):
        ClipGate(1.0, -1.0, 0.0)


FAR = {
    "straight": (Clip(1.0, -1e20, 1e25, 0.0), ABRelu(1.0, 1.0)),
    "relu": (Clip(1.0, 0.0, np.inf, 0.0), ABRelu(0.0, 1.0)),
    "square": (ClipGate(0.3, np.inf, 0.5), Polynomial((0.0, 0.5, 0.3))),
    "straight, huge": (ClipGate(0.3, 1e15, 0.5), Polynomial((0.0, 0.5, 0.3))),
}


@both
@pytest.mark.parametrize("name", FAR)
def test_far_bounds_are_none(dual, name, dtype):
    """And bounds at 0 are those of a ReLU."""
    arguments = [jnp.array(x, dtype) for x in ([1.0, 0.3, 2.0], [1.0, 0.4, 1.0], [0.3, 0.05, 2.5])]
    activation, same = FAR[name]
    for found, expected in zip(dual(activation, arguments), in_jax(same, arguments), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("activation", [Clip(1.0, -1.0, 2.0, 0.1), ClipGate(0.4, 2.0, 0.3)], ids=["clip", "gate"])
def test_degenerate_inputs(activation, dtype):
    """No deficit of equal inputs, and derivatives are finite: of equal, opposite and zero inputs."""
    var1 = jnp.array([1.0, 1.0, 2.0, 0.0, 0.0, 1e-12], dtype)
    var2 = jnp.array([1.0, 1.0, 0.5, 0.0, 1.0, 1e-12], dtype)
    deficit = jnp.array([0.0, 2.0, 0.25, 0.0, 0.5, 0.0], dtype)
    found, factor = activation.dual(var1, var2, deficit)
    natively = in_c(activation, (var1, var2, deficit))
    for value in (found, natively[2]):
        np.testing.assert_array_equal(np.asarray(value)[[0, 3, 5]], 0)
    tolerance = 1e-6 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(natively[2:], [found, factor], rtol=tolerance, atol=tolerance)

    def at(*arguments):
        def first(*arguments):
            return (jax.jacrev(lambda *x: jnp.stack(activation.dual(*x)), (0, 1, 2))(*arguments),) * 2

        return jax.jacfwd(first, (0, 1, 2), has_aux=True)(*arguments)

    second, derivatives = jax.jit(jax.vmap(at))(var1, var2, deficit)
    assert all(np.isfinite(d).all() for d in jax.tree.leaves((derivatives, second)))
    of_deficit = derivatives[2][:, 0]
    np.testing.assert_allclose(of_deficit, np.where(var1 * var2 > 0, factor, of_deficit), rtol=1e-5)


@pytest.mark.parametrize("deficit", [0.6, 1.7])
@pytest.mark.parametrize(
    ("kind", "coefficients"), [(Clip, (1.0, -0.7, 1.2, 0.2)), (ClipGate, (-0.6, 1.2, 0.4))], ids=["clip", "gate"]
)
def test_derivatives(kind, coefficients, deficit):
    """In variances and coefficients, against differences."""
    with jax.enable_x64(True):
        arguments = (*coefficients, 0.8, 1.3, deficit)

        def dual(*arguments):
            activation, (var1, var2, deficit) = kind(*arguments[:-3]), map(jnp.asarray, arguments[-3:])
            value, factor = activation.dual(var1, var2, deficit)
            return value + 0.7 * factor + 0.3 * activation.variance(var1)

        for i, found in enumerate(jax.grad(dual, tuple(range(len(arguments))))(*arguments)):
            up, down = (dual(*(x + s * 1e-5 * (i == k) for k, x in enumerate(arguments))) for s in (1, -1))
            np.testing.assert_allclose(found, (up - down) / 2e-5, rtol=1e-6, atol=1e-9)
