"""Linearised and Taylor-expanded functions of parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from empirical_networks import TOLERANCE, assert_close, mlp, mlp_params
from nt_empirical import linearize, taylor_expand

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 4))


def shifted(params, size, seed=7):
    rng = np.random.default_rng(seed)
    return {name: p + size * jnp.asarray(rng.normal(size=p.shape), p.dtype) for name, p in params.items()}


def test_linearize_is_value_and_jacobian(dtype):
    params, x = mlp_params(4, 3, dtype=dtype), jnp.asarray(X, dtype)
    moved = shifted(params, 0.3)
    expected = np.array(mlp(params, x), "float64")
    for name, jacobian in jax.jacobian(mlp)(params, x).items():
        expected += np.tensordot(jacobian, np.asarray(moved[name] - params[name]), axes=params[name].ndim)
    actual = linearize(mlp, params)(moved, x)
    assert actual.dtype == dtype
    assert_close(actual, expected, TOLERANCE[dtype])


def test_expansions_are_right_to_their_order(x64):
    """The error of order k shrinks by 2^(k+1) when the step is halved."""
    params, x = mlp_params(4, 3), jnp.asarray(X)

    def error(expanded, step):
        moved = shifted(params, step)
        return float(jnp.max(jnp.abs(expanded(moved, x) - mlp(moved, x))))

    for order in range(4):
        expansions = [taylor_expand(mlp, params, order)] + [linearize(mlp, params)] * (order == 1)
        for expanded in expansions:
            assert np.log2(error(expanded, 2e-3) / error(expanded, 1e-3)) == pytest.approx(order + 1, abs=0.05)


def cubic(params, x, scale=1.0):
    """A polynomial of degree 3 in both parameters together."""
    a, b = params["a"], params["b"][0]
    return {"y": scale * (x * a * b**2 - 2 * a * b + 3 * b + 5), "z": [a**3 + x]}


def test_taylor_expansion_of_a_polynomial_is_exact(dtype):
    origin = {"a": jnp.asarray(0.5, dtype), "b": (jnp.asarray(-1.5, dtype),)}
    params = {"a": jnp.asarray(2.0, dtype), "b": (jnp.asarray(1.0, dtype),)}
    x = jnp.asarray([1.0, -3.0, 0.25], dtype)
    expected = cubic(params, x, scale=2.0)
    for degree in (3, 4, 5):
        actual = taylor_expand(cubic, origin, degree)(params, x, scale=2.0)
        jax.tree.map(lambda a, e: assert_close(a, e, TOLERANCE[dtype]), actual, expected)
    # Of a b^2, the second-order expansion misses da db^2.
    second = taylor_expand(cubic, origin, 2)(params, x, scale=2.0)
    assert_close(expected["y"] - second["y"], 2 * np.asarray(x) * 1.5 * 2.5**2, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("degree", range(7))
def test_taylor_expansion_of_the_exponential(degree, x64):
    actual = taylor_expand(lambda w, x: jnp.exp(w * x), jnp.array(0.2), degree)(jnp.array(1.1), jnp.asarray(X))
    expected = np.exp(0.2 * X) * sum((0.9 * X) ** k / math.factorial(k) for k in range(degree + 1))
    assert_close(actual, expected, 1e-14)


def test_degree_zero_is_constant_and_degree_one_linear(x64):
    params, x = mlp_params(4, 3), jnp.asarray(X)
    moved = shifted(params, 0.5)
    np.testing.assert_array_equal(taylor_expand(mlp, params, 0)(moved, x), mlp(params, x))
    np.testing.assert_array_equal(taylor_expand(mlp, params, 1)(moved, x), linearize(mlp, params)(moved, x))


def test_the_gradient_of_a_linearised_loss_is_that_of_the_network_at_the_origin(x64):
    params, x = mlp_params(4, 3), jnp.asarray(X)
    f_lin = linearize(mlp, params)
    expected = jax.grad(lambda p: jnp.sum(mlp(p, x)))(params)
    actual = jax.jit(jax.grad(lambda p: jnp.sum(f_lin(p, x))))(shifted(params, 1.0))
    jax.tree.map(lambda a, e: assert_close(a, e, 1e-13), actual, expected)


def test_expansions_under_jit_and_vmap(x64):
    params, x = mlp_params(4, 3), jnp.asarray(X)
    many = jax.tree.map(lambda p: jnp.stack([p, p + 0.1]), params)
    for f in (linearize(mlp, params), taylor_expand(mlp, params, 2)):
        batched = jax.jit(jax.vmap(f, in_axes=(0, None)))(many, x)
        for i in range(2):
            assert_close(batched[i], f(jax.tree.map(lambda p, i=i: p[i], many), x), 1e-14)


def test_origin_may_be_traced(x64):
    """The expansion point is an ordinary argument: it can be differentiated with respect to."""
    derivative = jax.jit(jax.grad(lambda w0: linearize(lambda w, x: w**2 * x, w0)(3.0, 1.0)))(1.0)
    assert derivative == 4.0  # of 2 * 3 w0 - w0^2 at 1


@pytest.mark.parametrize("expand", [linearize, lambda f, p: taylor_expand(f, p, 2)])
def test_parameters_must_be_like_the_origin(expand):
    f = expand(lambda p, x: p["w"] * x, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"params\['w'\] must have shape \(3,\), got \(1,\)"):
        f({"w": jnp.ones(1)}, 1.0)
    with pytest.raises(ValueError, match="structured"):
        f([jnp.ones(3)], 1.0)


def test_degree_must_be_a_non_negative_integer():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        taylor_expand(mlp, {}, -1)
    with pytest.raises(TypeError, match="integer"):
        taylor_expand(mlp, {}, 1.5)  # type: ignore[arg-type]
