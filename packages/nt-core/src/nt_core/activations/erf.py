"""Activations made of the error function (arcsine kernels).

Both have the angle `asin(K / sqrt((1 + var1) (1 + var2)))`, whose sine is the correlation after adding independent
noise of variance 1 to `u` and `v`. Derivatives are exact everywhere, also at zero variance. The formulas, which are
free of cancellation, are derived in docs/numerics.md.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nt_core.activations.arcs import Legs, angle, angle_and_excess, inverse_deficit, legs, one_minus_cos
from nt_core.activations.base import Activation, Scalar, activation, cast


@activation
class Erf(Activation):
    """`f(x) = a erf(b x) + c` (Williams, 1997).

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import Erf
      >>> one = jnp.ones(())
      >>> f"{Erf(1., 1., 0.).variance(one):.6f}"  # 2/pi asin(2/3)
      '0.464559'
    """

    a: Scalar
    b: Scalar
    c: Scalar

    def variance(self, var):
        a, c = cast(self.a, var), cast(self.c, var)
        return a * a * (2 / math.pi) * _own_arcsine(self._scale(var) * var) + c * c

    def dual(self, var1, var2, deficit):
        a, scale = cast(self.a, deficit), self._scale(deficit)
        arcs = _arcs(scale, var1, var2, deficit)
        amplitude = a * a * (2 / math.pi)
        return amplitude * (angle(arcs.sin, arcs.cos) - arcs.skew), amplitude * scale / arcs.legs.leg

    def _scale(self, like):
        b = cast(self.b, like)
        return 2 * b * b


@activation
class Gelu(Activation):
    """`f(x) = x Phi(x)` with `Phi` the normal distribution function (arXiv:2002.08517).

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import Gelu
      >>> f"{Gelu().variance(jnp.ones(())):.6f}"  # 1/4 + (1/sqrt(12) + asin(1/2)/2) / pi
      '0.425221'
    """

    def variance(self, var):
        return var * (0.25 + (var / ((1 + var) * _own_leg(var)) + 0.5 * _own_arcsine(var)) / math.pi)

    def dual(self, var1, var2, deficit):
        # 2 pi E f(u) f(v) = pi K/2 + 1/leg + leg (1 - 1/(1 + var1) - 1/(1 + var2)) + K arcsine. Each of the last three
        # terms is subtracted from its mean over (u, u) and (v, v).
        inverse1, inverse2 = 1 / (1 + var1), 1 / (1 + var2)
        mean, difference = 0.5 * (var1 + var2), var1 - var2
        covariance = mean - deficit
        arcs = _arcs(1, var1, var2, deficit)
        leg, leg1, leg2, mean_leg, leg_excess, gap, _ = arcs.legs
        arcsine = angle(covariance, leg)
        own_arcsine_difference = angle(
            difference * (1 + leg1 * leg2) / (leg1 + leg2) * inverse1 * inverse2,
            (leg1 * leg2 + var1 * var2) * inverse1 * inverse2,
        )
        of_inverse = inverse_deficit(arcs.legs)
        of_leg = 0.5 * difference * difference * inverse1 * inverse2 / mean_leg
        of_leg = of_leg + leg_excess * (inverse1 + inverse2)  # and - leg_excess, below
        of_arcsine = deficit * arcsine + 0.25 * difference * own_arcsine_difference
        of_arcsine = of_arcsine - mean * arcs.skew  # and + mean * turn, below
        # mean * turn - leg_excess
        turn, turn_excess = angle_and_excess(arcs.sin, arcs.cos)
        hypotenuse = jnp.sqrt((1 + mean) ** 2 - gap)
        scale = jnp.sqrt(1 + var1) * jnp.sqrt(1 + var2)
        lengthening = (0.25 * difference * difference - gap) / (hypotenuse + scale)  # hypotenuse - scale
        along = mean * lengthening * (turn - turn_excess)
        across = mean_leg * (lengthening + scale * one_minus_cos(arcs.sin, arcs.cos))
        of_both = mean * turn_excess + (along + across) / hypotenuse
        deficit_out = 0.25 * deficit + (of_inverse + of_leg + of_arcsine + of_both) / (2 * math.pi)
        slope = covariance / leg * (1 / (leg * leg) + inverse1 + inverse2)
        return deficit_out, 0.25 + (arcsine + slope) / (2 * math.pi)


class _Arcs(NamedTuple):
    """The triangles with hypotenuses `sqrt((1 + var1) (1 + var2))`, and opposite sides that are covariances.

    Attributes:
      legs: their adjacent sides.
      sin, cos: in proportion to those of the *turn*, the angle of the vector `(mean_leg, (var1 + var2)/2)` less that
        of `(leg, K)`.
      skew: the first of these two angles less the mean of those for `u` and `u`, `v` and `v`.
    """

    legs: Legs
    sin: jax.Array
    cos: jax.Array
    skew: jax.Array


def _arcs(scale, var1, var2, deficit) -> _Arcs:
    """Of `scale` times the covariances."""
    sides = legs(scale, var1, var2, deficit)
    leg_product = sides.leg1 * sides.leg2
    difference = scale * (var1 - var2)  # that is exact before it is scaled
    var1, var2, deficit = scale * var1, scale * var2, scale * deficit
    mean = 0.5 * (var1 + var2)
    norm1, norm2 = 1 + var1, 1 + var2
    norm = (1 + mean) * jnp.sqrt(norm1) * jnp.sqrt(norm2)
    sin = (mean * sides.leg_excess + sides.mean_leg * deficit) / norm
    cos = (sides.mean_leg * sides.leg + mean * (mean - deficit)) / norm
    tan_half = difference * (1 + leg_product) / (2 * sides.mean_leg) / (norm1 * norm2 + leg_product + var1 * var2)
    tan_skew = 0.5 * difference * tan_half / (1 + mean)
    return _Arcs(sides, sin, cos, angle(tan_skew, jnp.ones_like(tan_skew)))


def _own_leg(var):
    return jnp.sqrt(1 + 2 * var)


def _own_arcsine(var):
    """Returns asin(var / (1 + var))."""
    return angle(var / (1 + var), _own_leg(var) / (1 + var))
