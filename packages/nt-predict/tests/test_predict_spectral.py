"""Functions of symmetric matrices against arithmetic with 50 digits."""

import itertools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from nt_predict._spectral import (
    DECAY,
    FALL,
    GAIN,
    _second_difference,
    apply_matrix,
    apply_spectrum,
    decompose,
    decompose_known,
    few_times,
    phi,
)

mpmath.mp.dps = 50
GRID = [0.0, 1e-12, 1e-6, 9e-4, 1.1e-3, 0.03, 0.4, 0.99, 1.01, 2.5, 20.0, 300.0, 1e5]
FUNCTIONS = {"decay": DECAY, "fall": FALL, "gain": GAIN}


def exact(name, rate, time):
    rate, time = mpmath.mpf(rate), mpmath.mpf(time)
    if name == "gain":
        return time if rate == 0 else -mpmath.expm1(-rate * time) / rate
    return mpmath.exp(-rate * time) if name == "decay" else mpmath.expm1(-rate * time)


def matrix_with(eigenvalues, seed=0):
    vectors, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))
    return vectors, (vectors * np.asarray(eigenvalues)) @ vectors.T


def ulp(dtype):
    return float(np.finfo(dtype).eps)


def test_phi(dtype):
    z = np.array(GRID, dtype)
    expected = [
        float(mpmath.mpf(1) if x == 0 else -mpmath.expm1(-mpmath.mpf(float(x))) / mpmath.mpf(float(x))) for x in z
    ]
    np.testing.assert_allclose(phi(jnp.asarray(z)), expected, rtol=4 * ulp(dtype))


def test_second_difference_has_no_cancellation(dtype):
    pairs = [(high, low) for high, low in itertools.product(np.array(GRID, dtype), repeat=2) if high >= low]
    high, low = (jnp.asarray(values, dtype) for values in zip(*pairs, strict=True))

    def phi(z):
        return mpmath.mpf(1) if z == 0 else -mpmath.expm1(-z) / z

    def expected(x, y):
        x, y = mpmath.mpf(float(x)), mpmath.mpf(float(y))
        return (phi(y) - phi(x)) / (x - y) if x != y else -mpmath.diff(phi, x + mpmath.mpf(10) ** -30)

    np.testing.assert_allclose(
        _second_difference(high, low), [float(expected(x, y)) for x, y in pairs], rtol=12 * ulp(dtype)
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name, dtype):
    eigenvalues = [0.02, 0.5, 0.5, 3.0]
    vectors, matrix = matrix_with(eigenvalues)
    times = [0.0, 1e-3, 0.7, 40.0, 1e8, np.inf]
    rhs = np.random.default_rng(1).normal(size=(4, 2))
    result = apply_matrix(FUNCTIONS[name], *(jnp.asarray(v, dtype) for v in (matrix, times, rhs)))
    assert result.shape == (6, 4, 2)
    assert result.dtype == dtype
    for time, actual in zip(times, result, strict=True):
        if time == np.inf:
            limit = {"decay": lambda rate: 0.0, "fall": lambda rate: -1.0, "gain": lambda rate: 1 / rate}[name]
        else:
            limit = lambda rate: float(exact(name, rate, time))  # noqa: E731, B023
        expected = (vectors * [limit(rate) for rate in eigenvalues]) @ vectors.T @ rhs
        np.testing.assert_allclose(actual, expected, atol=1000 * ulp(dtype) * np.abs(expected).max() + 50 * ulp(dtype))


def divided_difference(name, first, second, time):
    if first == second:
        return mpmath.diff(lambda rate: exact(name, rate, time), mpmath.mpf(first) + mpmath.mpf(10) ** -30)
    return (exact(name, first, time) - exact(name, second, time)) / (mpmath.mpf(first) - mpmath.mpf(second))


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("time", [0.0, 1e-3, 0.7, 40.0, 1e4])
def test_derivative_with_respect_to_the_matrix_at_equal_and_zero_eigenvalues(name, time, x64):
    eigenvalues = [0.0, 0.0, 0.5, 0.5, 0.5 + 1e-9, 3.0]
    vectors, matrix = matrix_with(eigenvalues)
    rng = np.random.default_rng(2)
    rhs, change = rng.normal(size=(6, 2)), rng.normal(size=(6, 6))
    change = change + change.T
    differences = [[float(divided_difference(name, a, b, time)) for a in eigenvalues] for b in eigenvalues]
    expected = vectors @ (np.array(differences) * (vectors.T @ change @ vectors)) @ vectors.T @ rhs

    def function(matrix):
        return apply_matrix(FUNCTIONS[name], matrix, jnp.array([time]), jnp.asarray(rhs))[0]

    _, forward = jax.jvp(function, (jnp.asarray(matrix),), (jnp.asarray(change),))
    _, pullback = jax.vjp(function, jnp.asarray(matrix))
    weights = jnp.asarray(rng.normal(size=(6, 2)))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(forward, expected, atol=1e-9 * scale)
    np.testing.assert_allclose((pullback(weights)[0] * change).sum(), (weights * expected).sum(), rtol=1e-8)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_with_respect_to_time_and_right_hand_side(name, x64):
    _, matrix = matrix_with([0.02, 0.5, 0.5, 3.0])
    rhs = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)))

    def function(time, rhs):
        return apply_matrix(FUNCTIONS[name], jnp.asarray(matrix), time[None], rhs)[0]

    for time in (0.0, 0.7, 40.0):
        jacobian = jax.jacfwd(function)(jnp.array(time), rhs)
        # d/dt of decay and fall is -A decay, of gain it is decay.
        decay = apply_matrix(DECAY, jnp.asarray(matrix), jnp.array([time]), rhs)[0]
        np.testing.assert_allclose(jacobian, decay if name == "gain" else -matrix @ decay, atol=1e-12)
        np.testing.assert_allclose(
            jax.jvp(lambda r, time=time: function(jnp.array(time), r), (rhs,), (rhs,))[1],
            function(jnp.array(time), rhs),
        )
    assert (jax.jacrev(function)(jnp.array(jnp.inf), rhs) == 0).all()


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivative(name, x64):
    rng = np.random.default_rng(3)
    root, direction = rng.normal(size=(2, 4, 4))
    rhs = jnp.asarray(rng.normal(size=(4, 1)))

    def function(step):
        factor = root + step * direction
        return apply_matrix(FUNCTIONS[name], factor @ factor.T, jnp.array([0.3]), rhs).sum()

    def gradient(step):
        return jax.grad(function)(step)

    step = 1e-5
    expected = (gradient(step) - gradient(-step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(gradient)(0.0), expected, rtol=1e-6)


def test_null_modes_at_infinite_time_are_those_of_the_pseudo_inverse(dtype):
    factor = np.random.default_rng(4).normal(size=(30, 7)).astype(dtype)
    matrix = factor @ factor.T
    rhs = np.random.default_rng(5).normal(size=(30, 2)).astype(dtype)
    expected = np.linalg.pinv(factor.astype("float64") @ factor.T.astype("float64"), rcond=1e-10) @ rhs
    for time in (1e30, np.inf):
        actual = apply_matrix(GAIN, jnp.asarray(matrix), jnp.array([time], dtype), jnp.asarray(rhs))[0]
        np.testing.assert_allclose(actual, expected, atol=100 * ulp(dtype) * np.abs(expected).max())


def test_derivative_of_the_pseudo_inverse(x64):
    rng = np.random.default_rng(6)
    factor, change = rng.normal(size=(2, 6, 3))
    rhs = rng.normal(size=(6, 1))

    def function(step):  # keeps the rank, so that the pseudo-inverse is differentiable
        root = jnp.asarray(factor + step * change)
        return apply_matrix(GAIN, root @ root.T, jnp.array([jnp.inf]), jnp.asarray(rhs))[0]

    def pseudo_inverse(step):
        root = factor + step * change
        return np.linalg.pinv(root @ root.T, rcond=1e-10) @ rhs

    step = 1e-5
    expected = (pseudo_inverse(step) - pseudo_inverse(-step)) / (2 * step)
    np.testing.assert_allclose(jax.jacfwd(function)(0.0), expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_results_do_not_depend_on_units(scale, dtype):
    _, matrix = matrix_with([0.02, 0.5, 0.5, 3.0])
    times, rhs = jnp.array([0.1, 2.0, 1e9, np.inf], dtype), jnp.ones((4, 1), dtype)
    one = apply_matrix(GAIN, jnp.asarray(matrix, dtype), times, rhs)
    other = apply_matrix(GAIN, jnp.asarray(matrix * scale, dtype), times / scale, rhs) * scale
    np.testing.assert_allclose(one, other, rtol=300 * ulp(dtype))


@pytest.mark.parametrize("time", [1.0, 20.0, 1e6, np.inf])
def test_single_precision_suffices_for_kernels_of_known_values(time):
    """A constant component makes the largest eigenvalue of a kernel large, and should not cost digits of the others."""
    rng = np.random.default_rng(7)
    _, matrix = matrix_with(np.geomspace(0.02, 1, 100))
    matrix = (matrix + 30).astype("float32")
    matrix, rhs = (matrix + matrix.T) / 2, rng.normal(size=(100, 2)).astype("float32")
    rates, vectors = np.linalg.eigh(matrix.astype("float64"))
    expected = (vectors * (-np.expm1(-rates * time) / rates)) @ vectors.T @ rhs
    with jax.enable_x64(False):
        actual = apply_spectrum(GAIN, decompose_known(jnp.asarray(matrix)), jnp.array([time]), jnp.asarray(rhs))[0]
        assert actual.dtype == "float32"
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    "rates",
    [np.geomspace(1e-6, 1e3, 40), [0, 0, 1e-3, 5.0, 7.0], [-0.5, 0, 2.0, 3.0], [1.0], [0, 0, 0], [-1, -2, -3]],
    ids=["wide", "null", "negative", "one", "zero", "none"],
)
@pytest.mark.parametrize("last", [np.inf, 1e9, 1e-9])
def test_gains_at_many_times_are_sums_of_those_at_a_few(rates, last, dtype):
    _, matrix = matrix_with(rates)
    spectrum = decompose(jnp.asarray(matrix, dtype))
    times = jnp.asarray(np.random.default_rng(0).permutation([0.0, *np.geomspace(1e-6, 1e8, 98), last]), dtype)
    few, weights = few_times(spectrum, times)
    assert weights.shape == (100, len(few)) and len(few) <= (30 if dtype == "float32" else 60)
    rhs = jnp.asarray(matrix, dtype)  # as kernels of test points, it is as small as the eigenvalue in each mode
    expected = apply_spectrum(GAIN, spectrum, times, rhs)
    actual = jnp.einsum("tf,fij->tij", weights, apply_spectrum(GAIN, spectrum, few, rhs), precision="highest")
    errors, sizes = (jnp.abs(part).max((1, 2)) for part in (actual - expected, expected))
    np.testing.assert_array_less(errors, 40 * ulp(dtype) * sizes + 1e-30)
