"""What is linear between two bounds and constant beyond, times its argument: hard SiLU.

Of `x min(max(x, -bound), bound)` the second derivative is 2 between the bounds, and the slope jumps at both. As of
`Clip`, the deficit and `E f'(u) f'(v)` become integrals of the joint density at the bounds, here times a polynomial of
the correlation and of the exponent of the density: docs/numerics.md.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from nt_core.activations.arcs import arccos_polynomials, horner, one_minus_correlation, safe_sqrt
from nt_core.activations.base import Activation, Scalar, activation, cast
from nt_core.activations.bounds import (
    Parallel,
    angle_at,
    beyond,
    drop,
    exponents,
    fourth_moment,
    inside,
    mean_between,
    normal,
    over_angles,
    relative,
    second_moment,
    second_moment_beyond,
)

# Where both standard deviations are so many times the bound, the function is `bound |x|`: that is less wrong than what
# rounding leaves of the integrals.
_SETTLED = {"float32": 3e3, "float64": 1e8}


@activation
class ClipGate(Activation):
    """`f(x) = x (a min(max(x, -bound), bound) + c)`, for a positive `bound`: `x` times a `Clip`.

    Hard SiLU is that of 1/6, 3 and 1/2. As `Clip` does, it loses digits at large variances, and takes derivatives of
    `E f'(u) f'(v)` for 0 where `u = v`.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import ClipGate
      >>> one = jnp.ones(())
      >>> f"{ClipGate(1 / 6, 3., 0.5).variance(one):.6f}"  # without bounds it were 1/4 + 3/36
      '0.331567'
    """

    a: Scalar
    bound: Scalar
    c: Scalar

    def __post_init__(self):
        if isinstance(self.bound, int | float) and self.bound <= 0:
            raise ValueError(f"ClipGate takes a positive bound, got {self.bound}.")

    def variance(self, var):
        a, bound, c = (cast(x, var) for x in (self.a, self.bound, self.c))
        at = relative(bound, safe_sqrt(var))
        bounded = safe_sqrt(var) * at  # squared after the product, which may be as large as the variance
        square = 2 * (var * fourth_moment(at) + bounded * bounded * second_moment_beyond(at))
        return var * (c * c + a * a * square)

    def dual(self, var1, var2, deficit):
        a, bound, c = (cast(x, deficit) for x in (self.a, self.bound, self.c))
        _, scale, w = one_minus_correlation(var1, var2, deficit)
        is_obtuse = w > 1
        w = jnp.where(is_obtuse, 2 - w, w)  # the product does not tell v from -v
        parallel = Parallel.of(var1, var2)
        inner, outer = relative(bound, parallel.larger), relative(bound, parallel.smaller)
        slope, bend = _slope_of_parallel(inner, outer), _bend_of_parallel(inner)
        crossing = _crossing(inner, outer, w)
        square = _deficit_of_parallel(inner, outer, parallel)
        square = square + scale * scale * (w * (slope - 0.5 * w * bend) + crossing.deficit)
        factor = scale * (slope - w * bend + crossing.slope)
        is_settled = parallel.smaller > _SETTLED[deficit.dtype.name] * bound
        limit, limit_of_factor = _limit(parallel, scale, w)
        square = jnp.where(is_settled, bound * bound * limit, square)
        factor = jnp.where(is_settled, bound * bound * limit_of_factor, factor)
        return c * c * deficit + a * a * square, c * c + a * a * jnp.where(is_obtuse, -factor, factor)


# The functions below are of the product, `f(x) = x min(max(x, -bound), bound)`. The bound is at `inner` units of the
# larger standard deviation `t`, and `outer` of the smaller one `s`.


def _limit(parallel: Parallel, scale: Array, w: Array) -> tuple[Array, Array]:
    """The deficit and the factor of `|x|`, for a correlation of `1 - w` that is not negative."""
    p, q = arccos_polynomials(w.dtype)
    root = safe_sqrt(w)
    return 0.5 * parallel.difference**2 + scale * w * (1 - 2 * root * horner(q, w)), 1 - 2 * root * horner(p, w)


class _Crossing(NamedTuple):
    """What the joint density at the bounds adds.

    Attributes:
      slope: to `E f'(u) f'(v)`, in units of the product of the deviations.
      deficit: to the deficit, in units of its square.
    """

    slope: Array
    deficit: Array


def _crossing(inner: Array, outer: Array, w: Array) -> _Crossing:
    """For a correlation of `1 - w`, which is not negative."""
    opening = safe_sqrt(w / (2 - w))  # the tangent of half the angle

    def at_node(at: Array, weight: Array) -> _Crossing:
        angle, chord = angle_at(opening * at, opening * weight)
        exponent, other, excess = exponents(inner, outer, outer, opening * at)
        like, unlike, until = jnp.exp(-exponent), jnp.exp(-other), w - chord
        # (1 + exponent) like - (1 + other) unlike: for large deviations these nearly agree.
        bend = until * (-(1 + exponent) * like * jnp.expm1(-excess) - excess * unlike)
        jump = inner * outer * (like + unlike)
        angle = angle / math.pi
        return _Crossing(angle * (4 * bend - jump), angle * until * (2 * bend - jump))

    zero = jnp.zeros_like(w)
    return over_angles(at_node, _Crossing(zero, zero))


def _slope_of_parallel(inner: Array, outer: Array) -> Array:
    """`E f'(s z) f'(t z)`, in units of the product of the deviations."""
    between = inner * (drop(inner) - drop(outer))
    return 8 * second_moment(inner) + 4 * between + 2 * inner * outer * beyond(outer)


def _bend_of_parallel(inner: Array) -> Array:
    """What `E f''(u) f''(v)` is near a correlation of 1, without the joint densities, in these units."""
    return 8 * inside(inner) - 4 * inner * normal(inner)


def _deficit_of_parallel(inner: Array, outer: Array, parallel: Parallel) -> Array:
    """`E (f(s z) - f(t z))^2 / 2`."""
    smaller, larger, difference = parallel

    def apart(z: Array, missing: Array) -> Array:  # bound t z - (s z)^2
        return z * (larger * missing + smaller * z * jnp.abs(difference))

    within = ((smaller + larger) * difference) ** 2 * fourth_moment(inner)
    beyond_both = (inner * larger * difference) ** 2 * second_moment_beyond(outer)
    return within + mean_between(inner, parallel, apart) + beyond_both
