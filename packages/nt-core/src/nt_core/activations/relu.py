"""The ReLU family: piecewise linear functions with one kink, at zero (arc-cosine kernels)."""

import math

import jax
import jax.numpy as jnp

from nt_core.activations.arcs import arccos_polynomials, horner, reciprocal, safe_sqrt
from nt_core.activations.base import Activation, Scalar, activation, cast


@activation
class ABRelu(Activation):
    """`f(x) = a min(x, 0) + b max(x, 0)`: ReLU is `ABRelu(0, 1)`, leaky ReLU `ABRelu(alpha, 1)`, `|x|` `ABRelu(-1, 1)`.

    The dual is that of arXiv:1711.09090 (the arc-cosine kernel of degree 1, Cho & Saul 2009), by arithmetic, square
    roots and selections only: no inverse trigonometric function, which would be slow on CPU and has no lowering in
    Pallas.

    The factor `E f'(u) f'(v)` has an infinite derivative at correlations of 1 and -1, and the covariance has one at
    zero variance. There the derivatives are defined as 0; everywhere else they are the true ones, of any order. With
    one of the variances zero, the factor is that of uncorrelated `u` and `v`, i.e. `f'(0) = (a + b)/2`.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import ABRelu
      >>> one = jnp.ones(())
      >>> deficit, dot = ABRelu(0., 1.).dual(one, one, one)  # independent u and v of variance 1
      >>> f"{0.5 - deficit:.5f} {dot:.5f}"  # E f(u) f(v) = 1/(2 pi) and E f'(u) f'(v) = 1/4
      '0.15915 0.25000'
    """

    a: Scalar
    b: Scalar

    def variance(self, var):
        return self._mean_square_slope(var) * var

    def dual(self, var1, var2, deficit):
        # With kink k = (a - b)^2/2 and g the mean square slope: E f(u) f(v) = g K + k (s kappa_1(-|c|) - min(K, 0)).
        slope = self._mean_square_slope(deficit)
        kink = cast(self.a, deficit) - cast(self.b, deficit)
        kink = 0.5 * kink * kink
        covariance = 0.5 * (var1 + var2) - deficit
        is_negative = covariance < 0
        kappa1, kappa0 = arc_cosine_kernels(var1, var2, deficit)
        kappa1 = kappa1 - jnp.where(is_negative, covariance, 0)
        kappa0 = jnp.where(is_negative, 1 - kappa0, kappa0)
        return slope * deficit - kink * kappa1, slope - kink * kappa0

    def _mean_square_slope(self, like):
        a, b = cast(self.a, like), cast(self.b, like)
        return 0.5 * (a * a + b * b)


@jax.custom_jvp
def arc_cosine_kernels(var1: jax.Array, var2: jax.Array, deficit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `s kappa_1(-|c|)` and `kappa_0(-|c|)`, the arc-cosine kernels of degree 1 and 0 (Cho & Saul 2009).

    With `c` the correlation and `s` the product of the standard deviations, these are `s (sqrt(1 - c^2) - |c| arccos
    |c|) / pi` and `arccos |c| / pi`: `2 E max(u, 0) max(-v, 0)` and `2 P(u > 0, v < 0)`, where `c > 0`. Both vanish at
    c = 1 and c = -1, and keep their relative accuracy there; and `kappa_0(c) = 1 - kappa_0(-c)`, `kappa_1(c) = c +
    kappa_1(-c)`. Their derivatives are defined as 0 where they are infinite.
    """
    std1, std2 = safe_sqrt(var1), safe_sqrt(var2)
    scale = std1 * std2
    # The deficit of u and the nearer of v and -v, less what is due to unequal variances, is scale (1 - |c|).
    nearest = jnp.minimum(deficit, var1 + var2 - deficit)
    has_scale = scale > 0
    angular = nearest - 0.5 * (std1 - std2) ** 2
    # No more than what rounding of the deficit leaves for parallel variables: as if it left nothing.
    is_parallel = angular < 4 * float(jnp.finfo(deficit.dtype).eps) * deficit
    w = jnp.where(is_parallel, 0, angular) / jnp.where(has_scale, scale, 1)
    # Not 0, for then the root has no derivative (see `safe_sqrt`); kappa_1 still underflows to 0.
    w = jnp.where(has_scale, jnp.clip(w, float(jnp.finfo(w.dtype).tiny), 1), 1)
    root = jnp.sqrt(w)
    p, q = arccos_polynomials(w.dtype)
    return scale * (w * root * horner(q, w)), root * horner(p, w)


@arc_cosine_kernels.defjvp
def _arc_cosine_kernels_jvp(primals, tangents):
    var1, var2, deficit = primals
    dvar1, dvar2, ddeficit = tangents
    kappa1, kappa0 = arc_cosine_kernels(var1, var2, deficit)
    covariance = 0.5 * (var1 + var2) - deficit
    half_difference = 0.5 * (var1 - var2)
    sign = jnp.where(covariance < 0, -1, 1).astype(deficit.dtype)
    # The change of the correlation: dangular = -scale dc. The brackets are var1 - K and var2 - K.
    relative1 = 0.5 * dvar1 * reciprocal(var1)
    relative2 = 0.5 * dvar2 * reciprocal(var2)
    dangular = ddeficit - (deficit + half_difference) * relative1 - (deficit - half_difference) * relative2
    # scale sqrt(1 - c^2)/pi. Nearer to c = 1 or -1 than the threshold, second derivatives would overflow.
    sine = kappa1 + kappa0 * jnp.abs(covariance)
    scale = jnp.sqrt(var1) * jnp.sqrt(var2)
    # At zero variance the sine is a rounding error, or 0.
    is_regular = (scale > 0) & (sine > scale * float(jnp.finfo(deficit.dtype).tiny) ** (1 / 3))
    dkappa0 = jnp.where(is_regular, sign * dangular / (math.pi**2 * jnp.where(is_regular, sine, 1)), 0)
    dkappa1 = sign * kappa0 * dangular + kappa1 * (relative1 + relative2)
    return (kappa1, kappa0), (dkappa1, dkappa0)
