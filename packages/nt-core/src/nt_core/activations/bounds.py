"""What activations with bounds share: moments of a normal variable up to a bound, and integrals over angles.

Bounds are given by their distances from 0. `z` is a normal variable; moments are means over its positive values.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_core.activations.arcs import horner, safe_sqrt

# Nodes on the way from coincident to orthogonal variables, and the root of the tangent of half the angle in which they
# are those of Gauss-Legendre quadrature: the density may change abruptly at small angles.
_ANGLES, _POWER = 160, 10
# Beyond so many standard deviations there is nothing.
_FAR = 40.0
# Where one of two parallel variables is beyond a bound: nodes, and as far from there as a double tells.
_NODES_BETWEEN, _WIDTH = 24, 9.0
# Up to here moments are Taylor series, of integrals of z^n exp(-z^2 / 2).
_SERIES_UP_TO = 0.5


def relative(bound: Array, std: Array) -> Array:
    """The distance of a bound, which may be infinite, in standard deviations, up to `_FAR`."""
    is_near = bound < _FAR * std
    return jnp.where(is_near, bound / jnp.where(is_near, std, 1), _FAR) * (bound > 0)


def inside(x: Array) -> Array:
    """The probability of `0 < z < x`."""
    return 0.5 * lax.erf(math.sqrt(0.5) * x)


def beyond(x: Array) -> Array:
    """The probability of `z > x`."""
    return 0.5 * lax.erfc(math.sqrt(0.5) * x)


def normal(x: Array) -> Array:
    """The density of `z`."""
    return math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * x * x)


def drop(x: Array) -> Array:
    """The normal density, less that at 0."""
    return math.sqrt(0.5 / math.pi) * jnp.expm1(-0.5 * x * x)


def second_moment(x: Array) -> Array:
    """`E z^2` for `z` from 0 to `x`."""
    return jnp.where(x < _SERIES_UP_TO, _moment_series(2, x), inside(x) - x * normal(x))


def second_moment_beyond(x: Array) -> Array:
    """`E z^2` for `z > x`."""
    return beyond(x) + x * normal(x)


def fourth_moment(x: Array) -> Array:
    """`E z^4` for `z` from 0 to `x`."""
    return jnp.where(x < _SERIES_UP_TO, _moment_series(4, x), 3 * second_moment(x) - x * x * x * normal(x))


def _moment_series(order: int, x: Array) -> Array:
    at = jnp.minimum(x, _SERIES_UP_TO)
    series = tuple((-0.5) ** k / (math.factorial(k) * (2 * k + order + 1)) for k in range(11))
    return math.sqrt(0.5 / math.pi) * at ** (order + 1) * horner(series, at * at)


class Parallel(NamedTuple):
    """The standard deviations of two variables.

    Attributes:
      smaller, larger: the deviations.
      difference: that of the first and the second, with all digits that their variances have.
    """

    smaller: Array
    larger: Array
    difference: Array

    @classmethod
    def of(cls, var1: Array, var2: Array) -> "Parallel":
        std1, std2 = safe_sqrt(var1), safe_sqrt(var2)
        total = std1 + std2
        return cls(jnp.minimum(std1, std2), jnp.maximum(std1, std2), (var1 - var2) / jnp.where(total > 0, total, 1))


def mean_between(inner: Array, parallel: Parallel, apart: Callable[[Array, Array], Array]) -> Array:
    """The mean of `apart(z, bound - s z)^2` where `s z` is within a bound and `t z` beyond.

    `s` is the smaller deviation, `t` the larger. Nothing cancels, however near they are to each other.

    Args:
      inner: the bound, in units of `t`.
      parallel: the deviations.
      apart: how far the function at `s z` is from that at `t z`.
    """
    gap = inner * jnp.abs(parallel.difference)  # bound - s z where t z is at the bound
    length = jnp.minimum(relative(gap, parallel.smaller), _WIDTH)

    def at_node(at: Array, weight: Array) -> Array:
        z = inner + length * at
        return length * weight * normal(z) * apart(z, gap - parallel.smaller * length * at) ** 2

    return _integral(at_node, _NODES_BETWEEN, jnp.zeros_like(gap))


def over_angles(at_node: Callable[[Array, Array], Any], zero: Any) -> Any:
    """The sum of what a function of nodes in [0, 1] and their weights returns, dense towards 0.

    Args:
      at_node: returns arrays in a pytree.
      zero: zeros of the same structure.
    """
    return _integral(at_node, _ANGLES, zero)


def angle_at(tangent: Array, weight: Array) -> tuple[Array, Array]:
    """For the tangent of half an angle: the angle that goes with a weight of it, and 1 - the cosine."""
    square = tangent * tangent
    return 2 / (1 + square) * weight, 2 * square / (1 + square)


def exponents(x: Array, near: Array, far: Array, tangent: Array) -> tuple[Array, Array, Array]:
    """Minus the logarithms of the joint densities, per angle, at `(x, near)` and at `(x, -far)`.

    Args:
      x, near, far: distances in standard deviations.
      tangent: of half the angle between the variables, up to a right one.

    Returns:
      Both, and the second less the first, in which their squares cancel.
    """
    half_sum = 0.5 * (1 + tangent * tangent)  # 1 / (1 + cos)
    # 1 / sin, whose fourth power, which second derivatives hold, is still a number
    inverse = half_sum / jnp.maximum(tangent, float(jnp.finfo(tangent.dtype).tiny) ** 0.21)
    half_inverse = 0.5 * inverse * inverse
    exponent = (x - near) ** 2 * half_inverse + x * near * half_sum
    other = (x + far) ** 2 * half_inverse - x * far * half_sum
    return exponent, other, (near + far) * (half_inverse * (2 * x + far - near) - x * half_sum)


# The quadratures: how many nodes, and of which power.
QUADRATURES = {_ANGLES: _POWER, _NODES_BETWEEN: 1}


def quadrature(count: int, dtype: Any) -> tuple[Array, Array]:
    """Returns the nodes of one of the `QUADRATURES`, in [0, 1], and their weights."""
    at, weights = _quadrature(count, QUADRATURES[count])
    return jnp.asarray(at, dtype), jnp.asarray(weights, dtype)


def _integral(at_node: Callable[[Array, Array], Any], count: int, zero: Any) -> Any:
    @jax.checkpoint
    def add(total: Any, node: tuple[Array, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, at_node(*node)), None

    return lax.scan(add, zero, quadrature(count, jax.tree.leaves(zero)[0].dtype))[0]


@lru_cache
def _quadrature(count: int, power: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre quadrature on [0, 1] for a power of the variable: nodes and weights."""
    at, weights = np.polynomial.legendre.leggauss(count)
    at, weights = 0.5 * (at + 1), 0.5 * weights
    return at**power, weights * power * at ** (power - 1)
