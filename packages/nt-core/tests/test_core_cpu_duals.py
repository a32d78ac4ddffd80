"""The nonlinearities of the native engine by themselves, against closed forms in 50 digits over the whole range."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from closed_forms import CLOSED_FORMS, any_ratio, check_backward_error, equal, exact_dual, nearly_equal, samples
from conformance import chain, run, spec_of
from nt_core import Request, _native, steps
from nt_core.activations import ABRelu, ElementwiseNumerical, Erf, Gelu, Polynomial, Sin, Step
from nt_core.backends.base import Refused
from nt_core.backends.cpu.duals import encode_activation

LEVELS = ["baseline", "avx2", "avx512"]  # those that the machine does not have are the best one that it has


@pytest.fixture(params=LEVELS)
def level(request):
    _native.choose_level(request.param)
    yield
    _native.choose_level("")


def native_dual(name, arguments, dtype):
    """Returns the variance, the deficit and the factor after an activation."""
    activation, coefficients = encode_activation(CLOSED_FORMS[name][0], np.dtype(dtype).name)
    return _native.dual(activation, np.array(coefficients, dtype), *(np.asarray(x, dtype) for x in arguments))


each_closed_form = pytest.mark.parametrize("name", CLOSED_FORMS)


@each_closed_form
@pytest.mark.parametrize("variance_ratio", [equal, nearly_equal])
def test_nearly_equal_inputs_keep_the_relative_accuracy_of_the_deficit(name, variance_ratio, dtype, level):
    _, form, max_variance = CLOSED_FORMS[name]
    arguments = samples(100, dtype, max_variance, variance_ratio, [1])
    _, deficit, _ = native_dual(name, arguments, dtype)
    exact = [exact_dual(form, *row)[0] for row in zip(*arguments, strict=True)]
    errors = [abs(mp.mpf(float(x)) / y - 1) for x, y in zip(deficit, exact, strict=True)]
    assert max(errors) < 8 * np.finfo(dtype).eps


@pytest.mark.sample(66)
@each_closed_form
@pytest.mark.parametrize("variance_ratio", [equal, nearly_equal, any_ratio])
def test_dual_is_exact_for_inputs_changed_in_the_last_places(name, variance_ratio, dtype, level):
    """No formula can do better, but for a rounding error in proportion to the result's own variance or slope."""
    _, form, max_variance = CLOSED_FORMS[name]
    arguments = samples(40, dtype, max_variance, variance_ratio, [1, -1], seed=1)
    results = [np.asarray(x, np.float64) for x in native_dual(name, arguments, dtype)[1:]]
    check_backward_error(form, arguments, results, float(np.finfo(dtype).eps))


@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_parallel_variables_keep_their_angle(backend, dtype):
    """A position with one channel: equal or opposite up to a number. Rounding of the deficit must not turn them."""
    x, y = np.random.default_rng(0).normal(size=(2, 1000)).astype(dtype)
    ratios = np.abs(x / y)
    x, y = (a[(x * y < 0) | (ratios > 5) | (ratios < 0.2)] for a in (x, y))
    variance = np.dtype(dtype).type(1.7)
    arguments = variance * x**2, variance * y**2, variance * (x - y) ** 2 / 2
    if backend == "cpu":
        _, deficit, factor = native_dual("relu", arguments, dtype)
    else:
        deficit, factor = ABRelu(0.0, 1.0).dual(*map(jnp.asarray, arguments))
    np.testing.assert_array_equal(factor, np.where(x * y > 0, 0.5, 0.0))
    expected = variance * np.where(x * y > 0, (x - y) ** 2, x**2 + y**2) / 4
    np.testing.assert_allclose(deficit, expected, rtol=0, atol=4 * np.finfo(dtype).eps * arguments[2].max())


@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_covariances_of_polynomials_that_are_small_beside_a_variance(backend):
    """They are summed by themselves: as a difference from the mean of the variances they would have half the digits."""
    coefficients = (0.5, 0.0, -0.2, 0.6)
    x1, x2 = np.array([[[20.0]], [[-15.0]]], "float32"), np.array([[[0.7]], [[0.5]]], "float32")
    conv = steps.Conv(1.0, None, 8, (1,), (1,), "VALID", (1,))
    layers = [conv, steps.Dual(Polynomial(coefficients)), steps.Flatten()]
    kernel = run(chain(spec_of(x1, x2), layers), x1, x2, Request(ntk=False, covariances=False), backend)
    nodes, weights = np.polynomial.hermite_e.hermegauss(10)
    f1, f2 = (np.polynomial.polynomial.polyval(x.astype(float).reshape(2, 1) * nodes, coefficients) for x in (x1, x2))
    np.testing.assert_allclose(kernel.nngp, f1 * weights @ f2.T / weights.sum(), rtol=1e-5)


@each_closed_form
def test_variance_is_accurate(name, dtype, level):
    _, form, max_variance = CLOSED_FORMS[name]
    var = (max_variance * 10 ** np.random.default_rng(2).uniform(-12, 0, 100)).astype(dtype)
    variance, _, _ = native_dual(name, (var, var, np.zeros_like(var)), dtype)
    with mp.workdps(50):
        exact = [form(x, x, x)[0] for x in map(mp.mpf, map(float, var))]
    errors = [abs(mp.mpf(float(x)) / y - 1) for x, y in zip(variance, exact, strict=True)]
    assert max(errors) < 4 * np.finfo(dtype).eps


@each_closed_form
def test_equal_inputs_have_exactly_no_deficit(name, dtype, level):
    var = np.array([0.0, 1e-12, 0.1, 1.0, 3.7], dtype)
    np.testing.assert_array_equal(native_dual(name, (var, var, np.zeros_like(var)), dtype)[1], 0)


@pytest.mark.parametrize("name", ["erf", "erf of a multiple", "gelu"])
def test_error_functions_are_exact_beside_zeros(name, dtype, level):
    """However large the other variance: nothing of a zero is lost in it."""
    form = CLOSED_FORMS[name][1]
    var = np.array([1, 1e2, 1e4, 1e6], dtype)
    _, deficit, factor = native_dual(name, (0 * var, var, var / 2), dtype)
    with mp.workdps(50):
        variances = [form(x, x, x)[0] for x in map(mp.mpf, map(float, var))]
        factors = [form(mp.mpf(0), mp.mpf(0), x)[1] for x in map(mp.mpf, map(float, var))]
    np.testing.assert_allclose(deficit, np.array(variances, float) / 2, rtol=8 * np.finfo(dtype).eps)
    np.testing.assert_allclose(factor, np.array(factors, float), rtol=8 * np.finfo(dtype).eps)


def test_error_functions_of_huge_variances(level):
    """The right number, or none."""
    var = np.array([1e18, 1e20, 1e30], np.float32)
    for deficit, exact in ((0, 0), (var, 1), (2 * var, 2)):  # equal, uncorrelated, opposite
        after = native_dual("erf", (var, var, deficit + 0 * var), np.float32)[1]
        np.testing.assert_allclose(after[np.isfinite(after)], exact, rtol=1e-6)
        assert np.isfinite(after[0])


@each_closed_form
def test_nan_stays_nan(name, dtype, level):
    one, bad = np.ones(1, dtype), np.full(1, np.nan, dtype)
    for arguments in ((bad, one, bad), (one, bad, bad), (one, one, bad)):
        assert np.isnan(native_dual(name, arguments, dtype)[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_tables_keep_what_is_not_a_number(bad, dtype, level):
    for arguments in ((bad, 1.0, bad), (1.0, bad, bad), (1.0, 1.0, np.nan)):
        deficit = tabulated(jnp.tanh, [np.full(1, x, dtype) for x in arguments], dtype)[1]
        assert np.isnan(deficit)


# --- Tables of Hermite coefficients

FUNCTIONS = {
    "erf": (jax.scipy.special.erf, Erf(1.0, 1.0, 0.0)),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False), Gelu()),
    "sin": (lambda x: jnp.sin(x + 0.3), Sin(1.0, 1.0, 0.3)),
    "polynomial": (lambda x: x**5 - x**2, Polynomial((0.0, 0.0, -1.0, 0.0, 0.0, 1.0))),
}
VARIANCES = [0.0, 1e-26, 1e-9, 1e-7, 0.013, 0.3, 1.0, 2.1, 7.9]
CORRELATIONS = [-1.0, -0.9, -0.3, 0.0, 0.1, 0.7, 1 - 1e-3, 1 - 1e-7, 1.0]


def pairs(dtype, largest=10):
    """Variances and deficits of all pairs of the variances, for all correlations."""
    variances = [var for var in VARIANCES if var <= largest]
    var1, var2, correlation = (x.ravel() for x in np.meshgrid(variances, variances, CORRELATIONS))
    deficit = 0.5 * (np.sqrt(var1) - np.sqrt(var2)) ** 2 + np.sqrt(var1 * var2) * (1 - correlation)
    return [x.astype(dtype) for x in (var1, var2, deficit)]


def tabulated(fn, arguments, dtype, deg=60):
    activation, coefficients = encode_activation(ElementwiseNumerical(fn, None, deg), np.dtype(dtype).name)
    with np.errstate(over="ignore"):  # at variances that nobody has
        return _native.dual(activation, np.concatenate(coefficients).astype(dtype), *arguments)


def closed_form(activation, arguments):
    with jax.enable_x64(True):
        var1, var2, deficit = (jnp.asarray(x, jnp.float64) for x in arguments)
        variances = [np.asarray(activation.variance(var)) for var in (var1, var2)]
        return variances, *map(np.asarray, activation.dual(var1, var2, deficit))


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tables_give_closed_forms(name, dtype, level):
    """Everywhere: also of zeros, of variances below the first octave, and of nearly equal inputs."""
    fn, activation = FUNCTIONS[name]
    # 120 terms are as many as double precision asks for at a variance of 1.
    arguments = pairs(dtype, 10 if dtype == "float32" else 1)
    variance, deficit, factor = tabulated(fn, arguments, dtype)
    (exact1, exact2), exact, exact_factor = closed_form(activation, arguments)
    eps = 64 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(variance, exact1, rtol=eps, atol=1e-32)
    np.testing.assert_array_less(np.abs(deficit - exact), eps * (exact1 + exact2) + 1e-30)
    var1, var2 = (x.astype(float) for x in arguments[:2])
    slopes = [closed_form(activation, (var, var, 0 * var))[2] for var in (var1, var2)]
    # Where variances differ, the deficit says little of the correlation. Nothing is left of slopes of 0.
    digits = 1 + (var1 + var2) / np.sqrt(np.maximum(var1 * var2, 1e-100))
    np.testing.assert_array_less(np.abs(factor - exact_factor), eps * digits * np.sqrt(slopes[0] * slopes[1]) + 2e-16)


@pytest.mark.parametrize("deg", [1, 25])
def test_tables_of_kinks_at_zero_are_closed_forms(deg, dtype, level):
    """That much of |x| as makes the kink is split off: of a ReLU a straight line is left."""
    arguments = pairs(dtype)
    eps = 32 * float(np.finfo(dtype).eps)
    variance, deficit, factor = tabulated(jax.nn.relu, arguments, dtype, deg)
    expected = native_dual("relu", arguments, dtype)
    np.testing.assert_allclose(variance, expected[0], rtol=eps, atol=1e-30)
    np.testing.assert_array_less(np.abs(deficit - expected[1]), eps * (arguments[0] + arguments[1]) + 1e-30)
    is_equal = arguments[0] == arguments[1]  # elsewhere rounding of the deficit turns parallel inputs
    np.testing.assert_allclose(factor[is_equal], expected[2][is_equal], atol=eps)


def test_tables_of_functions_with_kinks_of_tiny_inputs(dtype):
    """Each side is a straight line, though its bend adds to the slope in proportion to the deviation."""
    var = np.array([1e-12, 1e-16, 1e-24], dtype)
    for slopes in ((1.0, 1.0), (0.5, 1.0)):  # without a kink, and with one
        closed = ABRelu(*slopes)

        def bent(x, left=slopes[0], right=slopes[1]):
            return jnp.where(x > 0, right * x, left * jnp.expm1(x))

        variance, deficit, factor = tabulated(bent, (var, var, var / 2), dtype)
        expected = closed_form(closed, (var, var, var / 2))
        for x, y in zip((variance, deficit, factor), (expected[0][0], *expected[1:]), strict=True):
            np.testing.assert_allclose(x, y, rtol=4e-6)


# --- Hermite coefficients of functions that are not smooth, in tables and without


def numerical_dual(backend, fn, arguments, dtype, deg):
    """Returns the deficit and the factor, of Hermite coefficients."""
    arguments = [np.asarray(x, dtype) for x in arguments]
    if backend == "cpu":
        return tabulated(fn, arguments, dtype, deg)[1:]
    return ElementwiseNumerical(fn, None, deg).dual(*map(jnp.asarray, arguments))


STEPS = {
    "sign": (jnp.sign, Step(-1.0, 1.0, 0.0)),
    "integers": (lambda x: jnp.where(x > 0, 1, 0), Step(0.0, 1.0, 0.0)),
    "booleans": (lambda x: x > 0, Step(0.0, 1.0, 0.0)),
    "bfloat16": (lambda x: jnp.where(x > 0, 1, 0).astype(jnp.bfloat16), Step(0.0, 1.0, 0.0)),
}


@pytest.mark.parametrize("backend", ["xla", "cpu"])
@pytest.mark.parametrize("name", STEPS)
def test_hermite_coefficients_of_jumps(name, backend, dtype):
    """A derivative of 0 says nothing of the function, whose values may be of any type."""
    fn, activation = STEPS[name]
    var = np.ones(3, dtype)
    arguments = (var, var, np.array([0.1, 0.5, 1.5], dtype))
    deficit, factor = numerical_dual(backend, fn, arguments, dtype, 50)
    np.testing.assert_allclose(deficit, closed_form(activation, arguments)[1], rtol=1e-5)
    if backend == "xla":
        np.testing.assert_allclose(factor, 0, atol=1e-3)


def normal_mean(fn, kinks):
    """The mean of a function of a standard normal variable, with kinks at some points."""
    edges = np.union1d(np.linspace(-8, 8, 33), np.clip(kinks, -8, 8))
    at, weights = np.polynomial.legendre.leggauss(16)
    half = np.diff(edges)[:, None] / 2
    x = edges[:-1, None] + half * (at + 1)
    return (half * weights * np.exp(-(x**2) / 2) * fn(x)).sum() / np.sqrt(2 * np.pi)


@pytest.mark.parametrize("backend", ["xla", "cpu"])
@pytest.mark.parametrize(
    ("fn", "kink", "var"),
    [(lambda x: 10 + abs(x - 1), 1.0, 1.0), (lambda x: 3 + (x > 0.5) * (x - 0.5), 0.5, 0.2)],
    ids=["abs", "relu"],
)
def test_hermite_coefficients_of_kinks_in_functions_that_hardly_vary(fn, kink, var, backend, dtype):
    std, correlations = np.sqrt(var), np.array([0.9, 0.5, -0.5])

    def covariance(c):
        sine, values = np.sqrt(1 - c * c), lambda x: np.asarray(fn(x * std))

        def given(x):
            return normal_mean(lambda y: values(c * x + sine * y), [(kink / std - c * x) / sine])

        return normal_mean(lambda x: values(x) * np.vectorize(given)(x), [kink / std])

    with jax.enable_x64(True):
        square = normal_mean(lambda x: np.asarray(fn(x * std)) ** 2, [kink / std])
        exact = square - np.array([covariance(c) for c in correlations])
    deficit = numerical_dual(backend, fn, (np.full(3, var), np.full(3, var), var * (1 - correlations)), dtype, 25)[0]
    np.testing.assert_allclose(deficit, exact, rtol=1e-2)


def test_tables_keep_the_relative_accuracy_of_nearly_equal_inputs(dtype, level):
    var = np.full(4, 1.3, dtype)
    deficit = np.array([1e-2, 1e-5, 1e-8, 1e-12], dtype)
    got = tabulated(FUNCTIONS["sin"][0], (var, var, deficit), dtype)[1]
    np.testing.assert_allclose(got, closed_form(FUNCTIONS["sin"][1], (var, var, deficit))[1], rtol=1e-6)


def test_tables_do_not_mix_pairs(dtype, level):
    """How many terms are added depends on all pairs that are side by side, what they add up to does not."""
    arguments = pairs(dtype)
    together = tabulated(jnp.tanh, arguments, dtype)
    for i in range(0, len(arguments[0]), 37):
        alone = tabulated(jnp.tanh, [x[i : i + 1] for x in arguments], dtype)
        np.testing.assert_array_equal([x[0] for x in alone], [x[i] for x in together])


@pytest.mark.parametrize("fn", [jnp.tanh, jax.nn.softplus], ids=["tanh", "softplus"])
def test_tables_are_what_they_stand_for(fn, dtype):
    """The coefficients at each variance, as the xla backend computes them."""
    arguments = pairs(dtype, 3)
    deficit, factor = tabulated(fn, arguments, dtype)[1:]
    with jax.enable_x64(True):
        activation = ElementwiseNumerical(fn, None, 60)
        exact = [np.asarray(x) for x in jax.jit(activation.dual)(*(jnp.asarray(x, "float64") for x in arguments))]
    is_positive = np.minimum(arguments[0], arguments[1]) > 1e-5
    tolerance = 1e-6 if dtype == "float32" else 1e-11
    np.testing.assert_allclose(deficit, exact[0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(factor[is_positive], exact[1][is_positive], rtol=0, atol=10 * tolerance)


def test_tables_end_in_nan(dtype):
    """Not in a wrong number: what is a variance of 2^31 to a function of which 120 coefficients are known?"""
    arguments = [np.array([x], dtype) for x in (2.0**31, 1.0, 2.0**30)]
    assert np.isnan(tabulated(jnp.tanh, arguments, dtype)).all()


def test_functions_that_depend_on_what_is_traced_have_no_table():
    def encoded(slope):
        with pytest.raises(Refused, match="depends on values that are traced"):
            encode_activation(ElementwiseNumerical(lambda x: jnp.tanh(slope * x), None, 20), "float32")
        return slope

    jax.jit(encoded)(2.0)
