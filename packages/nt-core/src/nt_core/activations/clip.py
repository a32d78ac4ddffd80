"""What is linear between two bounds, and constant beyond: hard tanh, hard sigmoid, ReLU6.

With `u`, `v` of standard deviations `s1`, `s2` and a correlation `c`, the mean `E f'(u) f'(v)` is the probability that
both are within the bounds, and its derivative in `c` is the sum over pairs of bounds of their joint density. So it and
the deficit are integrals of that density, over the angle between `u` and `v`: docs/numerics.md.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from nt_core.activations.arcs import one_minus_correlation, safe_sqrt
from nt_core.activations.base import Activation, Scalar, activation, cast
from nt_core.activations.bounds import (
    Parallel,
    angle_at,
    beyond,
    drop,
    exponents,
    inside,
    mean_between,
    over_angles,
    relative,
    second_moment,
)


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
            at = relative(bound, std)
            square = square + var * (second_moment(at) + at * at * beyond(at))
            mean = mean + sign * std * (at * beyond(at) - drop(at))
        return a * a * square + c * (2 * a * mean + c)

    def dual(self, var1, var2, deficit):
        square = cast(self.a, deficit) ** 2
        _, scale, w = one_minus_correlation(var1, var2, deficit)
        parallel = Parallel.of(var1, var2)
        coincident = sum(inside(relative(bound, parallel.larger)) for _, bound in self._bounds(var1))
        apart = sum(_deficit_of_parallel(bound, parallel) for _, bound in self._bounds(var1))
        crossing = self._crossing(safe_sqrt(var1), safe_sqrt(var2), w)
        deficit_out = apart + scale * (w * coincident - crossing.moment)
        return square * deficit_out, square * (coincident - crossing.probability)

    def _bounds(self, like: Array) -> list[tuple[int, Array]]:
        """The distances of both bounds from 0, with their signs."""
        return [(-1, -cast(self.low, like)), (1, cast(self.high, like))]

    def _crossing(self, std1: Array, std2: Array, w: Array) -> "_Crossing":
        first, second = ([relative(bound, std) for _, bound in self._bounds(w)] for std in (std1, std2))
        # Tangents of half the angle: from coincident variables up to a right angle, and beyond, to opposite ones.
        near, far = jnp.minimum(w, 1), jnp.minimum(2 - w, 1)
        opening, remaining = safe_sqrt(near / (2 - near)), safe_sqrt(far / (2 - far))
        zero = jnp.zeros_like(w)
        obtuse = jnp.where(w > 1, 1 - remaining, 0)

        def at_node(at: Array, weight: Array) -> _Crossing:
            total = _Crossing(zero, zero)
            for sign, start, length in ((1, 0.0, opening), (-1, remaining, obtuse)):
                tangent = start + length * at
                angle, chord = angle_at(tangent, length * weight)
                density = angle * _density(first, second, tangent, sign)
                until = w - chord if sign > 0 else w - 2 + chord
                total = _Crossing(total.probability + density, total.moment + until * density)
            return total

        return over_angles(at_node, _Crossing(zero, zero))


class _Crossing(NamedTuple):
    """Integrals over correlations, from that of `u` and `v` to 1, of the joint density at the bounds.

    Attributes:
      probability: the integral.
      moment: that of the density times the difference of the correlations.
    """

    probability: Array
    moment: Array


def _density(first: list[Array], second: list[Array], tangent: Array, sign: int) -> Array:
    """The joint density at like bounds less that at unlike ones, per angle between the variables.

    Args:
      first, second: the distances of the bounds from 0, in standard deviations.
      tangent: of half the angle.
      sign: -1 if it is the angle that remains to opposite variables.
    """
    total = jnp.zeros_like(tangent)
    for i, x in enumerate(first):
        near, far = second[:: 1 if i == 0 else -1][::sign]  # on one side of 0 with x, seen from there, or not
        exponent, other, excess = exponents(x, near, far, tangent)
        # The difference of both: for large deviations densities nearly agree.
        difference = -jnp.exp(-jnp.where(excess > 0, exponent, other)) * jnp.expm1(-jnp.abs(excess))
        total = total + sign * jnp.where(excess > 0, difference, -difference)
    return total / (2 * math.pi)


def _deficit_of_parallel(bound: Array, parallel: Parallel) -> Array:
    """`E (f(s z) - f(t z))^2 / 2` for positive `z`, with `s` and `t` the smaller and the larger deviation."""
    inner = relative(bound, parallel.larger)
    within = parallel.difference**2 * second_moment(inner)
    return 0.5 * (within + mean_between(inner, parallel, lambda _, missing: missing))
