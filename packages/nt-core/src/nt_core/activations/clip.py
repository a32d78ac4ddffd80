"""What is linear between two bounds, and constant beyond: hard tanh, hard sigmoid, ReLU6.

With `u`, `v` of standard deviations `s1`, `s2` and a correlation `c`, the mean `E f'(u) f'(v)` is the probability that
both are within the bounds, and its derivative in `c` is the sum over pairs of bounds of their joint density. So it and
the deficit are integrals of that density, over the angle between `u` and `v`: docs/numerics.md.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_core.activations.arcs import horner, one_minus_correlation, safe_sqrt
from nt_core.activations.base import Activation, Scalar, activation, cast

# Nodes on the way from coincident to orthogonal variables, and the root of the tangent of half the angle in which they
# are those of Gauss-Legendre quadrature: the density may change abruptly at small angles.
N_NODES, _POWER = 160, 10
# Up to this relative difference, what is between two standard deviations is interpolated.
_NEAR = {"float32": 2**-3, "float64": 2**-8}
# Beyond so many standard deviations there is nothing.
_FAR = 40.0
# Up to this square the second moment is a Taylor series, of the integral of z^2 exp(-z^2 / 2).
_SERIES_UP_TO = 0.25
_SERIES = tuple((-0.5) ** k / (math.factorial(k) * (2 * k + 3)) for k in range(11))


@activation
class Clip(Activation):
    """`f(x) = a min(max(x, low), high) + c`, for `low <= 0 <= high`.

    Where the variances are much larger than the squares of the bounds, digits are lost: in single precision the deficit
    is up to 1e-3 off at a million times the square.

    Derivatives of the deficit are exact; those of `E f'(u) f'(v)` are infinite where `u = v`, and taken for 0 there.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import Clip
      >>> one = jnp.ones(())
      >>> f"{Clip(1., -1., 1., 0.).variance(one):.6f}"  # 1 - sqrt(2 / (pi e))
      '0.516059'
    """

    a: Scalar
    low: Scalar
    high: Scalar
    c: Scalar

    def __post_init__(self):
        low, high = self.low, self.high
        if isinstance(low, int | float) and isinstance(high, int | float) and not low <= 0 <= high:
            raise ValueError(f"Clip takes bounds on either side of 0, got low={low} and high={high}.")

    def variance(self, var):
        a, c = cast(self.a, var), cast(self.c, var)
        std = safe_sqrt(var)
        square, mean = jnp.zeros_like(var), jnp.zeros_like(var)
        for sign, bound in self._bounds(var):
            square = square + _product(bound, std, std)
            mean = mean + sign * _mean(bound, std)
        return a * a * square + c * (2 * a * mean + c)

    def dual(self, var1, var2, deficit):
        angles = self.angles(var1, var2, deficit)

        @jax.checkpoint
        def add(total: Crossing, node: Any) -> tuple[Crossing, None]:
            return angles.add(total, *node), None

        zero = jnp.zeros_like(angles.w)
        crossing, _ = lax.scan(add, Crossing(zero, zero), nodes(deficit.dtype))
        return self.dual_of(crossing, var1, var2, deficit)

    def dual_of(self, crossing: "Crossing", var1: Array, var2: Array, deficit: Array) -> tuple[Array, Array]:
        """As `dual`, from integrals that are known."""
        square = cast(self.a, deficit) ** 2
        _, scale, w = one_minus_correlation(var1, var2, deficit)
        std1, std2 = safe_sqrt(var1), safe_sqrt(var2)
        smaller, larger, total = jnp.minimum(std1, std2), jnp.maximum(std1, std2), std1 + std2
        difference = jnp.abs(var1 - var2) / jnp.where(total > 0, total, 1)  # std1 - std2 has lost digits
        coincident = sum(_inside(_relative(bound, larger)) for _, bound in self._bounds(var1))
        apart = sum(_deficit_of_parallel(bound, smaller, larger, difference) for _, bound in self._bounds(var1))
        deficit_out = apart + scale * (w * coincident - crossing.moment)
        return square * deficit_out, square * (coincident - crossing.probability)

    def angles(self, var1: Array, var2: Array, deficit: Array) -> "Angles":
        """Returns what the integrals are over."""
        w = one_minus_correlation(var1, var2, deficit)[2]
        stds = safe_sqrt(var1), safe_sqrt(var2)
        first, second = ([_relative(bound, std) for _, bound in self._bounds(w)] for std in stds)
        # Tangents of half the angle: from coincident variables up to a right angle, and beyond, to opposite ones.
        near, far = jnp.minimum(w, 1), jnp.minimum(2 - w, 1)
        opening, remaining = safe_sqrt(near / (2 - near)), safe_sqrt(far / (2 - far))
        return Angles(first, second, w, opening, remaining, jnp.where(w > 1, 1 - remaining, 0))

    def _bounds(self, like: Array) -> list[tuple[int, Array]]:
        """The distances of both bounds from 0, with their signs."""
        return [(-1, -cast(self.low, like)), (1, cast(self.high, like))]


class Crossing(NamedTuple):
    """Integrals over correlations, from that of `u` and `v` to 1, of the joint density at the bounds.

    Attributes:
      probability: the integral.
      moment: that of the density times the difference of the correlations.
    """

    probability: Array
    moment: Array


class Angles(NamedTuple):
    """The angles between variables, from coincident ones to `u` and `v`, by the tangents of their halves.

    Attributes:
      first, second: the distances of the bounds from 0, in standard deviations.
      w: 1 - the correlation of `u` and `v`.
      opening: the last tangent up to a right angle.
      remaining, beyond: the first tangent from a right angle on, of what remains to opposite variables, and the length.
    """

    first: list[Array]
    second: list[Array]
    w: Array
    opening: Array
    remaining: Array
    beyond: Array

    def add(self, total: Crossing, at: Array, weight: Array) -> Crossing:
        """Adds a node of the integrals, at a share of the way."""
        for sign, start, length in ((1, 0.0, self.opening), (-1, self.remaining, self.beyond)):
            tangent = start + length * at
            square = tangent * tangent
            angle = 2 / (1 + square) * weight * length
            density = angle * _density(self.first, self.second, square, sign)
            chord = 2 * square / (1 + square)  # 1 - the cosine
            until = self.w - chord if sign > 0 else self.w - 2 + chord
            total = Crossing(total.probability + density, total.moment + until * density)
        return total


def _density(first: list[Array], second: list[Array], square: Array, sign: int) -> Array:
    """The joint density at like bounds less that at unlike ones, per angle between the variables.

    Args:
      first, second: the distances of the bounds from 0, in standard deviations.
      square: of the tangent of half the angle.
      sign: -1 if it is the angle that remains to opposite variables.
    """
    half_sum = 0.5 * (1 + square)  # 1 / (1 + cos)
    half_inverse = 0.5 * half_sum * half_sum / jnp.maximum(square, float(jnp.finfo(square.dtype).eps) ** 1.75)
    total = jnp.zeros_like(square)
    for i, x in enumerate(first):
        near, far = second[:: 1 if i == 0 else -1][::sign]  # on one side of 0 with x, seen from there, or not
        exponent = (x - near) ** 2 * half_inverse + x * near * half_sum
        other = (x + far) ** 2 * half_inverse - x * far * half_sum
        # The difference of both, in which their squares cancel: for large deviations densities nearly agree.
        excess = (near + far) * (half_inverse * (2 * x + far - near) - x * half_sum)
        difference = -jnp.exp(-jnp.where(excess > 0, exponent, other)) * jnp.expm1(-jnp.abs(excess))
        total = total + sign * jnp.where(excess > 0, difference, -difference)
    return total / (2 * math.pi)


def _product(bound: Array, smaller: Array, larger: Array) -> Array:
    """`E f(s z) f(t z)` for positive `z`, with `s` and `t` the smaller and the larger deviation."""
    inner, outer = _relative(bound, larger), _relative(bound, smaller)
    bound = jnp.minimum(bound, _FAR * larger)  # it may be infinite
    between = bound * smaller * (_drop(inner) - _drop(outer))
    return smaller * larger * _second_moment(inner) + between + bound * bound * _beyond(outer)


def _mean(bound: Array, std: Array) -> Array:
    """`E f(s z)` for positive `z`."""
    at = _relative(bound, std)
    return jnp.minimum(bound, _FAR * std) * _beyond(at) - std * _drop(at)


def _deficit_of_parallel(bound: Array, smaller: Array, larger: Array, difference: Array) -> Array:
    """`E (f(s z) - f(t z))^2 / 2` for positive `z`."""
    own = 0.5 * (_product(bound, smaller, smaller) + _product(bound, larger, larger))
    direct = own - _product(bound, smaller, larger)
    # Nearly equal ones: the integral of (std - smaller) E z^2 f'(std z)^2 from the smaller to the larger deviation, of
    # the polynomial that has the same values and two derivatives at both ends.
    (a, slope_a, bend_a), (b, slope_b, bend_b) = (_moment_and_derivatives(bound, std) for std in (smaller, larger))
    slopes = difference * (4 / 105 * slope_a - 13 / 210 * slope_b)
    bends = difference * difference * (bend_a / 280 + bend_b / 210)
    interpolated = difference * difference * (a / 7 + 5 / 14 * b + slopes + bends)
    return jnp.where(difference < _NEAR[smaller.dtype.name] * larger, interpolated, direct)


def _moment_and_derivatives(bound: Array, std: Array) -> tuple[Array, Array, Array]:
    """`E z^2 f'(std z)^2` for positive `z`, and its derivatives in the deviation."""
    at, inverse = _relative(bound, std), 1 / jnp.where(std > 0, std, 1)
    cube = at * at * at * _normal(at)
    return _second_moment(at), -cube * inverse, (4 - at * at) * cube * inverse * inverse


def _relative(bound: Array, std: Array) -> Array:
    is_near = bound < _FAR * std
    return jnp.where(is_near, bound / jnp.where(is_near, std, 1), _FAR) * (bound > 0)


def _inside(x: Array) -> Array:
    """The probability of `0 < z < x`."""
    return 0.5 * lax.erf(math.sqrt(0.5) * x)


def _beyond(x: Array) -> Array:
    return 0.5 * lax.erfc(math.sqrt(0.5) * x)


def _normal(x: Array) -> Array:
    return math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * x * x)


def _drop(x: Array) -> Array:
    """The normal density, less that at 0."""
    return math.sqrt(0.5 / math.pi) * jnp.expm1(-0.5 * x * x)


def _second_moment(x: Array) -> Array:
    """`E z^2` for `z` from 0 to `x`."""
    square = jnp.minimum(x * x, _SERIES_UP_TO)
    series = math.sqrt(0.5 / math.pi) * square * safe_sqrt(square) * horner(_SERIES, square)
    return jnp.where(x * x < _SERIES_UP_TO, series, _inside(x) - x * _normal(x))


@lru_cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    at, weights = np.polynomial.legendre.leggauss(N_NODES)
    at, weights = 0.5 * (at + 1), 0.5 * weights
    return at**_POWER, weights * _POWER * at ** (_POWER - 1)


def nodes(dtype: Any) -> tuple[Array, Array]:
    """Returns the nodes of the integrals, as shares of the way, and their weights."""
    at, weights = _quadrature()
    return jnp.asarray(at, dtype), jnp.asarray(weights, dtype)
