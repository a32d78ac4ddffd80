"""Hermite coefficients at large variances, where orders beyond the terms stand for groups of others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import erf
from nt_core import _native
from nt_core.activations import ElementwiseNumerical, Erf
from nt_core.activations.coefficients import grade
from nt_core.activations.groups import order_groups
from nt_core.activations.tables import coefficient_table
from nt_core.backends.cpu.duals import encode_activation

TOLERANCES = {"float32": 1e-6, "float64": 1e-9}


def dual(backend, activation, arguments, dtype):
    """Returns the deficit and the factor."""
    arguments = [np.asarray(x, dtype) for x in arguments]
    if backend == "xla":
        return activation.dual(*map(jnp.asarray, arguments))
    code, coefficients = encode_activation(activation, np.dtype(dtype).name)
    with np.errstate(over="ignore"):  # at variances that nobody has
        return _native.dual(code, np.concatenate(coefficients).astype(dtype), *arguments)[1:]


def all_pairs(variances, correlations):
    var1, var2, c = (x.ravel() for x in np.meshgrid(variances, variances, correlations))
    return var1, var2, 0.5 * (np.sqrt(var1) - np.sqrt(var2)) ** 2 + np.sqrt(var1 * var2) * (1 - c)


@pytest.mark.parametrize("n_terms", [100, 130, 300])
@pytest.mark.parametrize(("per_octave", "tolerance"), [(6, 1e-6), (11, 1e-12)])
def test_groups_stand_for_all_orders(n_terms, per_octave, tolerance):
    groups = order_groups(n_terms, per_octave)
    for first, orders in enumerate((groups.even, groups.odd), n_terms):
        every = np.arange(first, groups.end, 2)
        for power in (0.5, 1.5, 3.5):
            for decay in (0, 1e-5, 1e-3, 3e-3):
                term = lambda k, power=power, decay=decay: k**-power * np.exp(-decay * k)  # noqa: E731
                np.testing.assert_allclose(groups.roots**2 @ term(orders), term(every).sum(), rtol=tolerance)


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_large_variances_of_a_closed_form(backend, dtype):
    """Equal ones, and, where rounding of their deficits does not turn the inputs, different ones."""
    arguments = all_pairs([5.0, 40.0, 300.0, 3000.0], [-1 + 1e-4, -0.9, 0, 0.5, 0.99, 1 - 1e-3, 1 - 1e-6, 1])
    is_meant = (arguments[0] == arguments[1]) & (arguments[2] < 1.95 * arguments[0]) | (dtype == "float64")
    arguments = [x[is_meant].astype(dtype) for x in arguments]
    activation, closed_form = ElementwiseNumerical(erf, None, 125), Erf(1.0, 1.0, 0.0)
    assert coefficient_table(activation, dtype).groups > 0
    found = [np.asarray(x, float) for x in dual(backend, activation, arguments, dtype)]
    with jax.enable_x64(True):
        exact = np.asarray(dual("xla", closed_form, arguments, "float64"))
        slopes = [np.asarray(dual("xla", closed_form, (x, x, 0 * x), "float64")[1]) for x in arguments[:2]]
    np.testing.assert_allclose(found[0], exact[0], rtol=0, atol=TOLERANCES[dtype])
    np.testing.assert_array_less(np.abs(found[1] - exact[1]) / np.sqrt(slopes[0] * slopes[1]), TOLERANCES[dtype])


def normal_nodes():
    """Nodes about 0 and their widths, many of them beside 0."""
    at, widths = np.polynomial.legendre.leggauss(12)
    edges = grade(9.0, 0.1)
    half = 0.5 * np.diff(edges)[:, None]
    x, w = (half * (at + 1) + edges[:-1, None]).ravel(), (half * widths).ravel()
    return np.concatenate([-x, x]), np.concatenate([w, w])


def expectation(fn, std1, std2, c):
    """`E f(u) f(v)`, by quadrature, for correlations that leave each other some freedom."""
    (x, w), sine = normal_nodes(), np.sqrt(1 - c * c)

    def density(x):
        return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)

    second = w * fn(std2 * x) / sine
    given = np.array([second @ density((x - c * u) / sine) for u in x])
    return (w * density(x) * fn(std1 * x)) @ given


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "xla"])
@pytest.mark.parametrize("name", ["tanh", "silu", "selu", "elu"])
def test_large_variances_against_quadrature(name, backend, dtype):
    """With a kink at 0 products of groups with the cusp are part of it."""
    fn = {"tanh": np.tanh, "silu": lambda x: x / (1 + np.exp(-x)), "elu": lambda x: np.where(x > 0, x, np.expm1(x))}
    activation = ElementwiseNumerical(getattr(jax.nn, name), None, 150 if name in ("elu", "selu") else 125)
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    fn["selu"] = lambda x: scale * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))
    for var1, var2, c in ((100.0, 100.0, 0.999), (30.0, 300.0, 0.9), (1000.0, 1000.0, -0.7), (2.0, 200.0, 0.99)):
        with np.errstate(over="ignore"):
            covariance = expectation(fn[name], np.sqrt(var1), np.sqrt(var2), c)
        arguments = [np.array([x]) for x in (var1, var2, (var1 + var2) / 2 - c * np.sqrt(var1 * var2))]
        with jax.enable_x64(True):
            halves = [float(activation.variance(jnp.asarray(var, jnp.float64))) / 2 for var in (var1, var2)]
        found = dual(backend, activation, arguments, dtype)[0][0]
        # Single precision loses digits of the mean squares where these are sums over nodes.
        tolerance = TOLERANCES[dtype] * (20 if backend == "xla" else 1) * sum(halves)
        np.testing.assert_allclose(sum(halves) - found, covariance, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("fn", "deg"),
    [
        (jnp.sign, 150),
        (lambda x: jnp.where(x > 1, 1.0, 0.0), 150),
        (lambda x: x**3 - x, 150),
        (jnp.abs, 150),
        (jnp.sin, 150),
        (jnp.tanh, 49),
    ],
    ids=["jump", "jump elsewhere", "polynomial", "cusp", "waves", "few terms"],
)
def test_functions_without_groups(fn, deg):
    """Where others do not follow from the orders of groups, nothing is beyond the terms, or few terms are wanted."""
    assert coefficient_table(ElementwiseNumerical(fn, None, deg), "float32").groups == 0


def test_derivatives_at_large_variances(x64):
    activation = ElementwiseNumerical(jax.nn.selu, None, 50)
    assert coefficient_table(activation, "float64").groups > 0
    point = jnp.asarray([200.0, 250.0, 3.0])

    @jax.jit
    def both(point):
        return jnp.stack(activation.dual(*point))

    step = 1e-5 * point
    jacobian = jax.jit(jax.jacfwd(both))(point)
    for k, found in enumerate(jacobian.T):
        move = step * (jnp.arange(3) == k)
        expected = (both(point + move) - both(point - move)) / (2 * step[k])
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.jacrev(both))(point), jacobian, rtol=1e-12)


def test_second_derivatives_at_large_variances():
    """Of what is nearly zero beyond the groups, too."""
    activation = ElementwiseNumerical(jnp.tanh, None, 50)

    def deficit(scale):
        return activation.dual(40 * scale, 50 * scale, 7 * scale)[0]

    np.testing.assert_allclose(jax.jit(jax.hessian(deficit))(jnp.float32(1)), -0.0528287, rtol=2e-3)


def test_derivatives_at_variances_of_zero():
    activation = ElementwiseNumerical(jnp.tanh, None, 10)
    jacobian = jax.jit(jax.jacfwd(lambda point: jnp.stack(activation.dual(*point))))
    for point in ((0.0, 0.0, 0.0), (0.0, 1.0, 0.5)):
        found = jacobian(jnp.array(point, jnp.float32))
        assert np.all(np.isfinite(found)) and np.all(found[:, 0] == 0)


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_large_variances_beside_small_ones(backend):
    """Pairs of which one sample alone wants groups."""
    closed_form, activation = Erf(1.0, 1.0, 0.0), ElementwiseNumerical(erf, None, 150)
    arguments = [np.array([x]) for x in (15.0, 1500.0, 757.5 - 0.999 * 150)]
    for found, exact in zip(
        dual(backend, activation, arguments, "float32"), dual("xla", closed_form, arguments, "float32"), strict=True
    ):
        np.testing.assert_allclose(found, exact, rtol=2e-5)


def test_large_variances_under_vmap():
    """What is a condition elsewhere."""
    activation = ElementwiseNumerical(jnp.tanh, None, 125)
    arguments = [jnp.asarray(x, jnp.float32) for x in all_pairs([1.0, 100.0], [0.3, 0.999])]
    for together, alone in zip(activation.dual(*arguments), jax.vmap(activation.dual)(*arguments), strict=True):
        np.testing.assert_allclose(alone, together, rtol=1e-6)
