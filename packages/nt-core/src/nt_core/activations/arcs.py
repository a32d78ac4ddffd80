"""Angles between Gaussian variables, without cancellation where the variables nearly coincide."""

import math
from typing import Any, NamedTuple

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
    """Returns P and Q of `tools/fit_polynomials.py`, in the degrees that a precision needs."""
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
    std1, std2 = safe_sqrt(var1), safe_sqrt(var2)
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


class Legs(NamedTuple):
    """Sides of the triangles with hypotenuses `sqrt((1 + var1) (1 + var2))`, and opposite sides that are covariances.

    Attributes:
      leg: the adjacent side, for `u` and `v`.
      leg1, leg2: those for `u` and `u`, `v` and `v`.
      mean_leg: the mean of the last two.
      leg_excess: `leg - mean_leg`, at least 0.
      gap: the squared half of the difference of `leg1` and `leg2`.
      det: the determinant of the covariances.
    """

    leg: jax.Array
    leg1: jax.Array
    leg2: jax.Array
    mean_leg: jax.Array
    leg_excess: jax.Array
    gap: jax.Array
    det: jax.Array


def legs(scale: Any, var1: jax.Array, var2: jax.Array, deficit: jax.Array) -> Legs:
    """Returns these sides for `scale` times the covariances; `scale` may be negative, as of imaginary `u` and `v`."""
    leg1, leg2 = jnp.sqrt(1 + 2 * scale * var1), jnp.sqrt(1 + 2 * scale * var2)
    mean_leg = 0.5 * (leg1 + leg2)
    gap = (0.5 * scale * (var1 - var2) / mean_leg) ** 2  # scaled after the subtraction: that is exact
    det = scale * scale * determinant(var1, var2, deficit)
    leg = jnp.sqrt(1 + scale * (var1 + var2) + det)
    return Legs(leg, leg1, leg2, mean_leg, (det + gap) / (leg + mean_leg), gap, det)


def inverse_deficit(sides: Legs) -> jax.Array:
    """Returns the mean of `1/leg1` and `1/leg2`, less `1/leg`."""
    return (sides.mean_leg * sides.leg_excess + sides.gap) / (sides.leg * sides.leg1 * sides.leg2)


@jax.custom_jvp
def one_minus_correlation(var1: jax.Array, var2: jax.Array, deficit: jax.Array) -> tuple[jax.Array, ...]:
    """Returns `(std1 - std2)^2 / 2`, `std1 std2`, and 1 less the correlation, in [0, 2].

    The first is the deficit of parallel `u` and `v`. With a variance of zero the correlation is taken for zero. In
    derivatives with respect to a variance, the share that grows with its root is dropped at zero.
    """
    std1, std2 = safe_sqrt(var1), safe_sqrt(var2)
    scale, total = std1 * std2, std1 + std2
    difference = (var1 - var2) / jnp.where(total > 0, total, 1)  # as in `determinant`
    parallel = 0.5 * difference * difference
    has_scale = scale > 0
    w = jnp.clip((deficit - parallel) / jnp.where(has_scale, scale, 1), 0, 2)
    return parallel, scale, jnp.where(has_scale, w, 1)


@one_minus_correlation.defjvp
def _one_minus_correlation_jvp(primals, tangents):
    var1, var2, deficit = primals
    dvar1, dvar2, ddeficit = tangents
    half_difference = 0.5 * (var1 - var2)
    relative1, relative2 = 0.5 * dvar1 * reciprocal(var1), 0.5 * dvar2 * reciprocal(var2)
    parallel, scale, w = one_minus_correlation(var1, var2, deficit)
    dscale = scale * (relative1 + relative2)
    # The brackets are var1 - K and var2 - K.
    dangular = ddeficit - (deficit + half_difference) * relative1 - (deficit - half_difference) * relative2
    tangent = 0.5 * (dvar1 + dvar2) - dscale, dscale, reciprocal(scale) * dangular
    return (parallel, scale, w), tangent


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Returns the square root, with a derivative of 0 at 0; 0 for negative numbers.

    For functions with derivatives written by hand, too: JAX forgets these within loops when it differentiates forward
    over reverse, and takes those of the functions, which then must be finite.
    """
    is_positive = x > 0
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, x, 1)), 0)


def reciprocal(x: jax.Array) -> jax.Array:
    """Returns 1/x, and 0 for x = 0."""
    is_positive = x >= float(jnp.finfo(x.dtype).tiny)
    return jnp.where(is_positive, 1 / jnp.where(is_positive, x, 1), 0)
