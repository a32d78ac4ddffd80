"""Activations against their definitions (quadrature), and against closed forms in 50 digits over the whole range."""

import math

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
import scipy.special
from closed_forms import CLOSED_FORMS, any_ratio, check_backward_error, equal, exact_dual, nearly_equal, samples
from nt_core.activations import (
    ABRelu,
    Elementwise,
    ElementwiseNumerical,
    Erf,
    Exp,
    Gabor,
    Gaussian,
    Gelu,
    Monomial,
    Polynomial,
    Rbf,
    RectifiedMonomial,
    Sin,
    Step,
    arcs,
    polynomials,
)

SIN_PHASE = 0.3
RBF_SCALE = math.sqrt(1.4)


def piecewise(a, b):
    return lambda x: np.where(x < 0, a * x, b * x), lambda x: np.where(x < 0, a, b)


def normal_density(x):
    return np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


# Each activation with its function and derivative. The first argument of a closed form is the covariance.
FUNCTIONS = {
    "relu": (ABRelu(0.0, 1.0), *piecewise(0.0, 1.0)),
    "abs": (ABRelu(-1.0, 1.0), *piecewise(-1.0, 1.0)),
    "abrelu": (ABRelu(0.7, -0.2), *piecewise(0.7, -0.2)),
    "linear": (ABRelu(1.0, 1.0), *piecewise(1.0, 1.0)),
    "erf": (
        Erf(1.2, 0.8, -0.4),
        lambda x: 1.2 * scipy.special.erf(0.8 * x) - 0.4,
        lambda x: 1.2 * 0.8 * 2 / math.sqrt(math.pi) * np.exp(-((0.8 * x) ** 2)),
    ),
    "sin": (
        Sin(0.9, 1.3, SIN_PHASE),
        lambda x: 0.9 * np.sin(1.3 * x + SIN_PHASE),
        lambda x: 0.9 * 1.3 * np.cos(1.3 * x + SIN_PHASE),
    ),
    "cos": (Sin(1.0, 1.0, math.pi / 2), np.cos, lambda x: -np.sin(x)),
    "rbf": (
        Rbf(0.7),
        lambda x: math.sqrt(2) * np.sin(RBF_SCALE * x + math.pi / 4),
        lambda x: math.sqrt(2) * RBF_SCALE * np.cos(RBF_SCALE * x + math.pi / 4),
    ),
    "gelu": (
        Gelu(),
        lambda x: x * scipy.special.ndtr(x),
        lambda x: scipy.special.ndtr(x) + x * normal_density(x),
    ),
    "exp": (Exp(0.8, 0.6), lambda x: 0.8 * np.exp(0.6 * x), lambda x: 0.48 * np.exp(0.6 * x)),
    "sign": (Step(-1.0, 1.0, 0.0), np.sign, np.zeros_like),
    "step": (Step(0.3, 1.2, 0.7), lambda x: np.where(x < 0, 0.3, 1.2), np.zeros_like),
    "gaussian": (
        Gaussian(0.8, -0.6),
        lambda x: 0.8 * np.exp(-0.6 * x * x),
        lambda x: -0.96 * x * np.exp(-0.6 * x * x),
    ),
    "gabor": (
        Gabor(),
        lambda x: np.exp(-x * x) * np.sin(x),
        lambda x: np.exp(-x * x) * (np.cos(x) - 2 * x * np.sin(x)),
    ),
    "monomial": (Monomial(4), lambda x: x**4, lambda x: 4 * x**3),
    "polynomial": (
        Polynomial((0.5, -1.0, 0.2, 0.3)),
        np.polynomial.Polynomial((0.5, -1.0, 0.2, 0.3)),
        np.polynomial.Polynomial((-1.0, 0.4, 0.9)),
    ),
    "rectified square": (RectifiedMonomial(2), lambda x: np.maximum(x, 0) ** 2, lambda x: 2 * np.maximum(x, 0)),
    "rectified power": (RectifiedMonomial(5), lambda x: np.maximum(x, 0) ** 5, lambda x: 5 * np.maximum(x, 0) ** 4),
    "elementwise": (Elementwise(lambda cov12, var1, var2: 2 * cov12**2 + var1 * var2), np.square, lambda x: 2 * x),
    "numerical": (ElementwiseNumerical(jnp.sin, None, 40), np.sin, np.cos),
}
JUMPS = ("sign", "step")
ACTIVATIONS = {name: row[0] for name, row in FUNCTIONS.items()}
each_activation = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    """Runs a test in both precisions, each with JAX's default types to match."""
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def deficit_of(correlation, var1, var2):
    return 0.5 * (var1 + var2) - correlation * np.sqrt(var1) * np.sqrt(var2)


# --- The definitions


def gauss_legendre(borders, degree):
    nodes, weights = np.polynomial.legendre.leggauss(degree)
    borders = np.unique(borders)
    low, high = borders[:-1, None], borders[1:, None]
    return ((high + low + (high - low) * nodes) / 2).ravel(), ((high - low) / 2 * weights).ravel()


def mean(integrand, var1, var2, correlation):
    """E integrand(u, v), in polar coordinates: the kinks of functions at zero are at four angles, borders of panels."""
    angle = math.acos(correlation)
    borders = [-math.pi / 2, 0, angle - math.pi / 2, math.pi / 2, angle + math.pi / 2, math.pi, 1.5 * math.pi]
    turns, turn_weights = gauss_legendre(borders, 28)
    radii, radius_weights = gauss_legendre(np.linspace(0, 10, 5), 24)
    u = math.sqrt(var1) * radii[:, None] * np.cos(turns)
    v = math.sqrt(var2) * radii[:, None] * np.cos(turns - angle)
    weights = (radii * np.exp(-0.5 * radii**2) * radius_weights)[:, None] * turn_weights / (2 * math.pi)
    return np.sum(weights * integrand(u, v))


VARIANCES = [(1.0, 1.0), (0.3, 2.0), (1e-4, 1.5), (3.0, 3.001)]
CORRELATIONS = [-1.0, -0.999, -0.5, -0.1, 0.0, 0.3, 0.8, 0.999, 1.0]


@each_activation
def test_dual_is_its_definition(name, x64):
    activation, f, df = FUNCTIONS[name]
    points = [(var1, var2, correlation) for var1, var2 in VARIANCES for correlation in CORRELATIONS]
    var1, var2, correlation = np.array(points).T
    arguments = [jnp.asarray(x) for x in (var1, var2, deficit_of(correlation, var1, var2))]
    deficits, dots = jax.jit(activation.dual)(*arguments)
    variances = [[mean(lambda u, v: f(u) * f(u), q, q, 0.0) for q in var] for var in (var1, var2)]
    np.testing.assert_allclose(activation.variance(arguments[0]), variances[0], rtol=1e-12)
    for i, point in enumerate(points):
        half_square = mean(lambda u, v: 0.5 * (f(u) - f(v)) ** 2, *point)
        scale = variances[0][i] + variances[1][i]
        # At correlations of 1 and -1 the angle has half of the digits only, and with it the factor of a kink, and what
        # is after a jump.
        is_parallel = abs(point[2]) == 1
        atol = 1e-7 if is_parallel and name in JUMPS else 1e-13 * scale
        np.testing.assert_allclose(deficits[i], half_square, rtol=1e-10, atol=atol)
        atol = 1e-7 if is_parallel else 1e-11
        slope = mean(lambda u, v: df(u) * df(v), *point)
        np.testing.assert_allclose(dots[i], slope, rtol=1e-10, atol=atol)


# --- Accuracy over the whole range, by closed forms in 50 digits


each_closed_form = pytest.mark.parametrize("name", CLOSED_FORMS)


@pytest.mark.sample(40)
@each_closed_form
@pytest.mark.parametrize("variance_ratio", [equal, nearly_equal])
def test_nearly_equal_inputs_keep_the_relative_accuracy_of_the_deficit(name, variance_ratio, dtype):
    activation, form, max_variance = CLOSED_FORMS[name]
    arguments = samples(100, dtype, max_variance, variance_ratio, [1])
    deficit, _ = activation.dual(*map(jnp.asarray, arguments))
    exact = [exact_dual(form, *row)[0] for row in zip(*arguments, strict=True)]
    errors = [abs(mp.mpf(float(x)) / y - 1) for x, y in zip(deficit, exact, strict=True)]
    assert max(errors) < 8 * jnp.finfo(dtype).eps


@pytest.mark.sample(40)
@each_closed_form
@pytest.mark.parametrize("variance_ratio", [equal, nearly_equal, any_ratio])
def test_dual_is_exact_for_inputs_changed_in_the_last_places(name, variance_ratio, dtype):
    """No formula can do better, but for a rounding error in proportion to the result's own variance or slope."""
    activation, form, max_variance = CLOSED_FORMS[name]
    arguments = samples(40, dtype, max_variance, variance_ratio, [1, -1], seed=1)
    results = [np.asarray(x, np.float64) for x in activation.dual(*map(jnp.asarray, arguments))]
    check_backward_error(form, arguments, results, float(jnp.finfo(dtype).eps))


@each_closed_form
def test_variance_is_accurate(name, dtype):
    activation, form, max_variance = CLOSED_FORMS[name]
    var = (max_variance * 10 ** np.random.default_rng(2).uniform(-12, 0, 100)).astype(dtype)
    with mp.workdps(50):
        exact = [form(x, x, x)[0] for x in map(mp.mpf, map(float, var))]
    errors = [abs(mp.mpf(float(x)) / y - 1) for x, y in zip(activation.variance(jnp.asarray(var)), exact, strict=True)]
    assert max(errors) < 4 * jnp.finfo(dtype).eps


def test_polynomials_are_as_accurate_as_they_say():
    w = np.linspace(0, 1, 101)[1:]
    with mp.workdps(50):
        angles = [mp.acos(1 - mp.mpf(x)) for x in w]
        p = [angle / (mp.pi * mp.sqrt(x)) for x, angle in zip(w, angles, strict=True)]
        q = [(mp.sin(t) - mp.cos(t) * t) / (mp.pi * mp.mpf(x) ** 1.5) for x, t in zip(w, angles, strict=True)]
        for exact, single, double in (
            (p, polynomials.P_FLOAT32, polynomials.P_FLOAT64),
            (q, polynomials.Q_FLOAT32, polynomials.Q_FLOAT64),
        ):
            for coefficients, bound in ((single, 2e-8), (double, 1e-16)):
                values = [sum(c * mp.mpf(x) ** k for k, c in enumerate(coefficients)) for x in w]
                assert max(abs(value / e - 1) for value, e in zip(values, exact, strict=True)) < bound


def test_angle_is_atan2_on_the_whole_circle(dtype):
    turns = np.concatenate([np.linspace(-3.1, 3.1, 41), [1e-9, -1e-9, math.pi / 2, -math.pi / 2, math.pi, 0.0]])
    y, x = (jnp.asarray(2.0 * f(turns), dtype) for f in (np.sin, np.cos))
    angle, excess = arcs.angle_and_excess(y, x)
    with mp.workdps(50):
        exact = [mp.atan2(mp.mpf(float(b)), mp.mpf(float(a))) for b, a in zip(y, x, strict=True)]
        exact_excess = [t - mp.sin(t) for t in exact]
    np.testing.assert_allclose(angle, np.array(exact, float), rtol=8 * jnp.finfo(dtype).eps)
    np.testing.assert_allclose(excess, np.array(exact_excess, float), rtol=16 * jnp.finfo(dtype).eps)


def test_relu_needs_arithmetic_and_square_roots_only():
    one = jnp.ones(4)
    assert primitives(jax.make_jaxpr(ABRelu(0.0, 1.0).dual)(one, one, one).jaxpr) <= {
        *("add", "sub", "mul", "div", "sqrt", "square", "integer_pow", "max", "min", "lt", "gt", "select_n"),
        *("broadcast_in_dim", "convert_element_type", "copy", "jit", "custom_jvp_call"),
    }


def primitives(jaxpr):
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                names |= primitives(inner)
    return names


# --- Degenerate inputs


@pytest.mark.sample(16)
@each_activation
def test_equal_inputs_have_exactly_no_deficit(name, dtype):
    var = jnp.asarray([0.0, 1e-12, 0.1, 1.0, 3.7], dtype)
    for dual in (ACTIVATIONS[name].dual, jax.jit(ACTIVATIONS[name].dual)):
        np.testing.assert_array_equal(dual(var, var, jnp.zeros_like(var))[0], 0)


DEGENERATE = {
    "equal": (1.0, 1.0, 0.0),
    "opposite": (1.0, 1.0, 2.0),
    "parallel": (4.0, 1.0, 0.5),
    "antiparallel": (4.0, 1.0, 4.5),
    "uncorrelated": (1.0, 1.0, 1.0),
    "both zero": (0.0, 0.0, 0.0),
    "first zero": (0.0, 1.0, 0.5),
    "second zero": (1.0, 0.0, 0.5),
    "tiny": (1e-12, 1e-12, 0.0),
    "nearly equal": (1.0, 1.0, 1e-12),
    "rounded below equal": (2.0, 2.0, -1e-7),
    "rounded beyond opposite": (1.0, 1.0, 2.0 + 3e-7),
    "far apart": (10.0, 1e-3, 5.0),
}


def derivatives(dual, arguments):
    """The first derivatives in forward and reverse mode and the second ones, at every entry."""

    def at(*arguments):
        each = (0, 1, 2)

        def backward(*arguments):
            return (jax.jacrev(dual, each)(*arguments),) * 2

        second, first = jax.jacfwd(backward, each, has_aux=True)(*arguments)
        return jax.jacfwd(dual, each)(*arguments), first, second

    # Compilation is most of what this takes, and no time of the result matters.
    return jax.jit(jax.vmap(at), compiler_options={"xla_backend_optimization_level": 0})(*arguments)


@pytest.mark.sample(6)
@each_activation
def test_derivatives_are_finite_at_degenerate_inputs(name, dtype):
    activation = ACTIVATIONS[name]
    arguments = [jnp.asarray(x, dtype) for x in zip(*DEGENERATE.values(), strict=True)]
    forward, backward, second = derivatives(activation.dual, arguments)
    result = jax.jit(activation.dual)(*arguments)
    of_variance = jax.jit(jax.vmap(jax.grad(activation.variance)))(arguments[0])
    for leaf in jax.tree.leaves((result, forward, backward, second, of_variance)):
        assert np.isfinite(leaf).all(), [point for point, x in zip(DEGENERATE, leaf, strict=True) if not np.isfinite(x)]

    def check_close(x, y):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * max(1, np.abs(y).max()))

    jax.tree.map(check_close, forward, backward)
    # The derivative of the covariance is the covariance of the derivatives (Price), also at degenerate inputs.
    if name not in JUMPS:
        check_close(forward[0][2], result[1])


@each_activation
@pytest.mark.parametrize("excursion", [1e-7, 1e-5])
def test_correlations_rounded_beyond_one_are_those_of_one(name, excursion, dtype):
    var = jnp.asarray(1.0, dtype)
    _, own_slope = ACTIVATIONS[name].dual(var, var, jnp.zeros_like(var))
    for deficit in (0.0, 2.0):
        sign = -1 if deficit == 0 else 1
        expected = ACTIVATIONS[name].dual(var, var, jnp.asarray(deficit, dtype))
        got = ACTIVATIONS[name].dual(var, var, jnp.asarray(deficit + sign * excursion, dtype))
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=10 * excursion * max(1, own_slope))


def test_the_derivative_of_the_relu_factor_is_zero_where_it_is_infinite(dtype):
    var = jnp.asarray([1.0, 2.0, 0.0], dtype)
    deficit = jnp.asarray([0.0, 4.0, 0.0], dtype)
    slope = jax.vmap(jax.grad(lambda d, v: ABRelu(0.0, 1.0).dual(v, v, d)[1]))(deficit, var)
    np.testing.assert_array_equal(slope, 0)


def test_relu_factor_at_zero_variance_is_that_of_uncorrelated_inputs(dtype):
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    for var1, var2 in ((zero, zero), (zero, one), (one, zero)):
        _, dot = ABRelu(0.5, 1.0).dual(var1, var2, 0.5 * (var1 + var2))
        np.testing.assert_allclose(dot, 0.75**2, rtol=1e-6)


# --- Derivatives elsewhere


POINTS = [(1.0, 1.0, 0.3), (0.7, 1.9, 0.9), (2.0, 0.4, 1.9), (1.0, 1.001, 1e-4), (0.02, 0.8, 0.4)]


def mp_dual(form, var1, var2, deficit):
    value, dot = form((var1 + var2) / 2 - deficit, var1, var2)
    return (form(var1, var1, var1)[0] + form(var2, var2, var2)[0]) / 2 - value, dot


HAVE_A_ROOT = ("relu", "abs", "leaky", "exp normalized", "sign", "rectified square", "rectified cube")


@pytest.mark.sample(8)
@each_closed_form
def test_derivatives_are_the_true_ones(name, x64):
    """Those of smooth activations also at equal inputs and at zero variance."""
    activation, form, _ = CLOSED_FORMS[name]
    points = POINTS + ([(0.0, 0.0, 0.0), (0.6, 0.6, 0.0)] if name not in HAVE_A_ROOT else [])
    first, _, second = derivatives(activation.dual, [jnp.asarray(x) for x in np.array(points).T])
    unit = np.eye(3, dtype=int)
    for n, point in enumerate(points):
        for output in (0, 1):

            def exact(orders, point=point, output=output):
                with mp.workdps(60):
                    x = tuple(map(mp.mpf, point))
                    return float(mp.diff(lambda *x: mp_dual(form, *x)[output], x, tuple(map(int, orders))))

            for i in range(3):
                np.testing.assert_allclose(first[output][i][n], exact(unit[i]), rtol=1e-8, atol=1e-11)
                for j in range(i + 1):
                    orders = unit[i] + unit[j]
                    np.testing.assert_allclose(second[output][i][j][n], exact(orders), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if jax.tree.leaves(ACTIVATIONS[name])])
def test_derivatives_in_the_coefficients(name, x64):
    activation = ACTIVATIONS[name]
    leaves, structure = jax.tree.flatten(activation)
    arguments = [jnp.asarray(x) for x in (0.7, 1.9, 0.9)]

    def outputs(*leaves):
        return jnp.stack(
            [*structure.unflatten(leaves).dual(*arguments), structure.unflatten(leaves).variance(arguments[0])]
        )

    step = 1e-6
    for i, leaf in enumerate(leaves):
        slope = jax.jit(jax.jacrev(outputs, i))(*leaves)
        up, down = (jax.jit(outputs)(*leaves[:i], leaf + s, *leaves[i + 1 :]) for s in (step, -step))
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-7, atol=1e-8)


# --- Types and transformations


@pytest.mark.sample(12)
@each_activation
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)])
def test_shapes_types_jit_and_vmap(name, shape, dtype):
    activation = ACTIVATIONS[name]
    var1, var2 = jnp.full(shape, 1.0, dtype), jnp.full(shape, 2.0, dtype)
    deficit = jnp.linspace(0.1, 2.0, math.prod(shape), dtype=dtype).reshape(shape)
    expected = activation.dual(var1, var2, deficit)
    for result in (*expected, activation.variance(var1)):
        assert (result.shape, result.dtype) == (shape, dtype)
    transformed = [jax.jit(lambda activation, *arguments: activation.dual(*arguments))(activation, var1, var2, deficit)]
    if shape:
        transformed.append(jax.vmap(activation.dual)(var1, var2, deficit))
    for results in transformed:
        for x, y in zip(results, expected, strict=True):
            # Sums whose terms are larger than the result round differently in another order.
            largest = max(1, jnp.abs(y).max(initial=0))
            np.testing.assert_allclose(x, y, rtol=4 * jnp.finfo(dtype).eps, atol=16 * jnp.finfo(dtype).eps * largest)


@each_activation
def test_float32_stays_float32_with_float64_coefficients(name, x64):
    activation = jax.tree.map(np.float64, ACTIVATIONS[name])
    one = jnp.ones(3, jnp.float32)
    results = (*activation.dual(one, one, 0.5 * one), activation.variance(one))
    traced = jax.jit(lambda activation: activation.dual(one, one, 0.5 * one))(activation)
    assert {x.dtype for x in (*results, *traced)} == {jnp.dtype("float32")}


def test_one_network_per_coefficient_by_vmap(dtype):
    slopes = jnp.asarray([0.0, 0.2, -1.0], dtype)
    one = jnp.ones((), dtype)
    deficit, _ = jax.vmap(lambda a: ABRelu(a, 1.0).dual(one, one, 0.5 * one))(slopes)
    expected = [ABRelu(float(a), 1.0).dual(one, one, 0.5 * one)[0] for a in slopes]
    np.testing.assert_allclose(deficit, expected, rtol=1e-6)


# --- Functions of the user


def test_elementwise_with_and_without_a_derivative_agree(dtype):
    def nngp_fn(cov12, var1, var2):
        return jax.lax.cond(cov12 > 0, lambda: cov12**3, lambda: 2 * cov12**3) + var1 * var2  # of scalars only

    def d_nngp_fn(cov12, var1, var2):
        return jax.lax.cond(cov12 > 0, lambda: 3 * cov12**2, lambda: 6 * cov12**2)

    var, deficit = jnp.ones(4, dtype), jnp.asarray([0.0, 0.5, 1.5, 2.0], dtype)
    given = Elementwise(nngp_fn, d_nngp_fn).dual(var, var, deficit)
    derived = Elementwise(nngp_fn).dual(var, var, deficit)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), given, derived)
    np.testing.assert_allclose(given[0], [0.0, 1 - 0.125, 1 + 0.25, 3.0], rtol=1e-6)


def test_functions_of_the_user_see_covariances_that_they_can_differentiate(x64):
    """ReLU's, at equal and proportional inputs, fused and layer by layer: rounding must not put them at an end."""

    def relu(cov12, var1, var2):
        root = jnp.sqrt(var1 * var2)
        angle = jnp.arccos(cov12 / root)
        return root / (2 * jnp.pi) * (jnp.sin(angle) + (jnp.pi - angle) * jnp.cos(angle))

    var = jnp.asarray(np.random.default_rng(0).uniform(0.1, 3, 200))
    for activation in (Elementwise(relu), Elementwise(relu, jax.grad(relu))):
        for ratio in (1.0, 4.0):
            deficit = 0.5 * (var + ratio * var) - ratio**0.5 * var
            for excursion in (0, -1e-16, 1e-16):
                _, factor = jax.jit(activation.dual)(var, ratio * var, deficit + excursion)
                np.testing.assert_allclose(factor, 0.5, atol=1e-6)


def test_elementwise_refuses_a_function_that_is_none_or_not_of_scalars():
    with pytest.raises(TypeError, match="nngp_fn should be a function, got None"):
        Elementwise(None)
    with pytest.raises(TypeError, match="d_nngp_fn should be a function, got 3"):
        Elementwise(lambda cov12, var1, var2: cov12, 3)
    with pytest.raises(ValueError, match=r"nngp_fn should map scalars to a scalar.*shape \(2,\)"):
        Elementwise(lambda cov12, var1, var2: jnp.stack([cov12, cov12])).variance(jnp.ones(3))


@pytest.mark.parametrize("df", [None, lambda x: 5 * x**4 - 2 * x])
def test_hermite_coefficients_are_exact_for_polynomials(df, x64):
    points = [(var1, var2, correlation) for var1, var2 in VARIANCES for correlation in CORRELATIONS]
    var1, var2, correlation = np.array(points).T
    deficit, dot = jax.jit(ElementwiseNumerical(lambda x: x**5 - x**2, df, 6).dual)(
        *map(jnp.asarray, (var1, var2, deficit_of(correlation, var1, var2)))
    )
    k, p = correlation * np.sqrt(var1 * var2), var1 * var2
    variance = 0.5 * (945 * (var1**5 + var2**5) + 3 * (var1**2 + var2**2))
    covariance = 120 * k**5 + 600 * k**3 * p + 225 * k * p**2 + 2 * k**2 + p
    np.testing.assert_array_less(abs(deficit - (variance - covariance)), 1e-12 * variance)
    slope = 25 * (24 * k**4 + 72 * k**2 * p + 9 * p**2) + 4 * k
    np.testing.assert_allclose(dot, slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("fn", "closed_form", "tolerances"),
    [
        (jax.scipy.special.erf, Erf(1.0, 1.0, 0.0), (1e-8, 1e-8)),
        (lambda x: jax.nn.gelu(x, approximate=False), Gelu(), (1e-8, 1e-8)),
        (jax.nn.relu, ABRelu(0.0, 1.0), (1e-12, 1e-12)),  # a kink at 0 is split off
    ],
    ids=["erf", "gelu", "relu"],
)
def test_hermite_coefficients_give_closed_forms(fn, closed_form, tolerances, dtype):
    """Of equal and opposite, weakly correlated and nearly equal inputs, at the usual degree."""
    var1 = jnp.asarray([1.0, 3.0, 0.2, 2.0, 1.0, 3.0], dtype)
    var2 = jnp.asarray([1.0, 3.0, 0.5, 2.0, 0.5, 3.0], dtype)
    correlation = jnp.asarray([1.0, 0.0, -0.3, 0.999, -1.0, 0.05 / 3], dtype)
    deficit = jnp.maximum(0.5 * (var1 + var2) - correlation * jnp.sqrt(var1) * jnp.sqrt(var2), 0)
    got, expected = (a.dual(var1, var2, deficit) for a in (ElementwiseNumerical(fn, None, 25), closed_form))
    eps = float(jnp.finfo(dtype).eps)
    for x, y, tolerance in zip(got, expected, tolerances, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=max(tolerance, 32 * eps))
    ends = (np.asarray(x[1])[[0, 4]] for x in (got, expected))  # there, kinks do no harm
    np.testing.assert_allclose(*ends, atol=max(1e-8, 16 * eps))


def test_hermite_coefficients_keep_the_relative_accuracy_of_nearly_equal_inputs():
    arguments = [np.asarray(x, np.float32) for x in ([1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [1e-3, 1e-6, 1e-12])]
    with jax.enable_x64(True):
        exact, _ = Sin(1.0, 1.0, 0.0).dual(*(jnp.asarray(x, jnp.float64) for x in arguments))
    deficit, _ = ElementwiseNumerical(jnp.sin, jnp.cos, 20).dual(*map(jnp.asarray, arguments))
    np.testing.assert_allclose(deficit, exact, rtol=1e-6)


def test_hermite_coefficients_are_symmetric(dtype):
    activation = ElementwiseNumerical(jnp.exp, jnp.exp, 8)
    var1, var2, deficit = (jnp.asarray(x, dtype) for x in (0.5, 1.5, 0.4))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=16 * jnp.finfo(dtype).eps),
        activation.dual(var1, var2, deficit),
        activation.dual(var2, var1, deficit),
    )


def test_derivatives_of_hermite_coefficients(x64):
    arguments = [jnp.asarray(x) for x in np.array(POINTS).T]
    got = derivatives(ElementwiseNumerical(jnp.sin, None, 30).dual, arguments)
    expected = derivatives(Sin(1.0, 1.0, 0.0).dual, arguments)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9), got, expected)


@pytest.mark.parametrize("deg", [0, -3, 2.5, None])
def test_hermite_coefficients_refuse_a_degree_that_is_not_a_positive_integer(deg):
    with pytest.raises(ValueError, match="should be a positive integer, got"):
        ElementwiseNumerical(jnp.tanh, None, deg)


def test_hermite_coefficients_refuse_what_is_not_a_function():
    with pytest.raises(TypeError, match="fn should be a function, got 'tanh'"):
        ElementwiseNumerical("tanh", None, 5)
    with pytest.raises(TypeError, match="df should be a function, got 1"):
        ElementwiseNumerical(jnp.tanh, 1, 5)
