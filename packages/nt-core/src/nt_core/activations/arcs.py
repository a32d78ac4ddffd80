"""Angles between Gaussian variables, without cancellation where the variables nearly coincide."""

import math

import jax
import jax.numpy as jnp

from nt_core.activations import polynomials


def horner(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    """Evaluates a polynomial, constant coefficient first."""
    value = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value


def arccos_polynomials(dtype) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns P and Q of `tools/fit_relu_polynomials.py`, in the degrees that a precision needs."""
    if dtype == jnp.float64:
        return polynomials.P_FLOAT64, polynomials.Q_FLOAT64
    return polynomials.P_FLOAT32, polynomials.Q_FLOAT32


@jax.custom_jvp
def angle_and_excess(y: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the angle `t` of the vector `(x, y)` and `t - sin t`, both to full relative accuracy when small.

    The angle is that of `atan2`, which takes many times longer on CPU. Not for `x = y = 0`.
    """
    norm = jnp.sqrt(x * x + y * y)
    root = y / jnp.sqrt(norm * (norm + jnp.abs(x)))
    w = jnp.minimum(root * root, 1)  # 1 - |cos t|
    p, q = arccos_polynomials(x.dtype)
    of_p = horner(p, w)
    to_axis, to_axis_excess = math.pi * root * of_p, math.pi * root * w * (of_p - horner(q, w))
    beyond = jnp.where(y < 0, -math.pi, math.pi) - to_axis
    is_beyond = x < 0
    return jnp.where(is_beyond, beyond, to_axis), jnp.where(is_beyond, beyond - y / norm, to_axis_excess)


@angle_and_excess.defjvp
def _angle_and_excess_jvp(primals, tangents):
    y, x = primals
    dy, dx = tangents
    square = x * x + y * y
    dangle = (x * dy - y * dx) / square
    return angle_and_excess(y, x), (dangle, one_minus_cos(y, x) * dangle)


def angle(y: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the angle of the vector `(x, y)`."""
    return angle_and_excess(y, x)[0]


def one_minus_cos(y: jax.Array, x: jax.Array) -> jax.Array:
    """Returns 1 - cos of the angle of the vector `(x, y)`."""
    square = x * x + y * y
    norm = jnp.sqrt(square)
    return jnp.where(x < 0, 1 - x / norm, y * y / (square + norm * jnp.abs(x)))


@jax.custom_jvp
def determinant(var1: jax.Array, var2: jax.Array, deficit: jax.Array) -> jax.Array:
    """Returns `var1 var2 - K^2`, at least 0, accurately also where the correlation is nearly 1."""
    std1, std2 = jnp.sqrt(var1), jnp.sqrt(var2)
    total, twice_scale = std1 + std2, 2 * std1 * std2
    # std1 - std2 has lost digits that var1 - var2 has; half its square is the deficit of parallel u and v.
    difference = (var1 - var2) / jnp.where(total > 0, total, 1)
    angular = jnp.clip(deficit - 0.5 * difference * difference, 0, twice_scale)
    return angular * (twice_scale - angular)


@determinant.defjvp
def _determinant_jvp(primals, tangents):
    # The determinant is a polynomial; only the square roots of the way it is computed are singular.
    var1, var2, deficit = primals
    dvar1, dvar2, ddeficit = tangents
    half_difference = 0.5 * (var1 - var2)
    covariance = 0.5 * (var1 + var2) - deficit
    tangent = (deficit - half_difference) * dvar1 + (deficit + half_difference) * dvar2 + 2 * covariance * ddeficit
    return determinant(var1, var2, deficit), tangent


def reciprocal(x: jax.Array) -> jax.Array:
    """Returns 1/x, and 0 for x = 0."""
    is_positive = x >= float(jnp.finfo(x.dtype).tiny)
    return jnp.where(is_positive, 1 / jnp.where(is_positive, x, 1), 0)
