"""Functions with a jump or a kink at zero: steps, and rectified powers (arc-cosine kernels of any degree)."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from nt_core.activations.arcs import arccos_polynomials, horner, one_minus_correlation, safe_sqrt
from nt_core.activations.base import Activation, Scalar, activation, cast, static
from nt_core.activations.hermite import power, series_deficit, series_factor, series_variance


@activation
class Step(Activation):
    """`f(x) = a` for `x < 0`, `b` for `x > 0`, and `c` at 0: the sign is `Step(-1, 1, 0)`.

    The tangent kernel ends here: `f'` is 0 but for the jump, and its factor is 0, although the derivative of the
    covariance is not. Derivatives are defined as 0 where they are infinite, at correlations of 1 and -1.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import Step
      >>> one = jnp.ones(())
      >>> deficit, dot = Step(-1., 1., 0.).dual(one, one, 0.5 * one)  # at an angle of pi/3
      >>> f"{1 - deficit:.4f} {dot}"
      '0.3333 0.0'
    """

    a: Scalar
    b: Scalar
    c: Scalar

    def variance(self, var):
        a, b, c = (cast(x, var) for x in (self.a, self.b, self.c))
        return jnp.where(var > 0, 0.5 * (a * a + b * b), c * c)

    def dual(self, var1, var2, deficit):
        a, b, c = (cast(x, deficit) for x in (self.a, self.b, self.c))
        _, scale, w = one_minus_correlation(var1, var2, deficit)
        is_negative = w > 1
        turn = arc_cosine_kernel(0, jnp.where(is_negative, 2 - w, w))
        turn = jnp.where(is_negative, 1 - turn, turn)  # arccos c / pi
        mean1, mean2 = (jnp.where(var > 0, 0.5 * (a + b), c) for var in (var1, var2))
        of_zero = 0.5 * (self.variance(var1) + self.variance(var2)) - mean1 * mean2
        return jnp.where(scale > 0, 0.5 * (a - b) ** 2 * turn, of_zero), jnp.zeros_like(deficit)


@activation
class RectifiedMonomial(Activation):
    """`f(x) = max(x, 0)^degree` with `degree >= 2` (Cho & Saul, 2009). Lower ones are `ABRelu` and `Step`.

    Derivatives are exact, but those of the factor for `degree == 2` at correlations of 1 and -1, where the second is
    infinite and defined as 0, and those of second order at zero variance, where the covariance grows with a root of it.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import RectifiedMonomial
      >>> one = jnp.ones(())
      >>> deficit, dot = RectifiedMonomial(2).dual(one, one, one)  # independent u and v of variance 1
      >>> f"{1.5 - deficit:.5f} {dot:.5f}"  # 1/4 and 2/pi
      '0.25000 0.63662'
    """

    degree: int = static()

    def __post_init__(self):
        if self.degree < 2:
            raise ValueError(f"RectifiedMonomial needs a degree of at least 2, got {self.degree}.")

    def variance(self, var):
        return 0.5 * series_variance(power(self.degree), var)

    def dual(self, var1, var2, deficit):
        # Half of what x^n has, E u^n v^n / 2, is E f(u) f(v) + (-1)^n E f(u) f(-v).
        n = self.degree
        _, scale, w = one_minus_correlation(var1, var2, deficit)
        is_negative = w > 1
        nearest = jnp.where(is_negative, 2 - w, w)

        def opposed(n):
            """E f(u) f(-v) for K >= 0, E f(u) f(v) for K < 0."""
            even = (var1 * var2) ** (n // 2)
            return 0.5 * (even * scale if n % 2 else even) * arc_cosine_kernel(n, nearest)

        mean_variance = 0.5 * (self.variance(var1) + self.variance(var2))
        positive = 0.5 * series_deficit(power(n), var1, var2, deficit) + (-1) ** n * opposed(n)
        slope = 0.5 * series_factor(power(n), var1, var2, deficit) + (-1) ** n * n * n * opposed(n - 1)
        deficit_out = jnp.where(is_negative, mean_variance - opposed(n), positive)
        return deficit_out, jnp.where(is_negative, n * n * opposed(n - 1), slope)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def arc_cosine_kernel(degree: int, w: jax.Array) -> jax.Array:
    """Returns `2 E max(u, 0)^degree max(v, 0)^degree` for variances of 1 and the correlation `w - 1`, in [-1, 0].

    It vanishes with `w` like `w^(degree + 1/2)`; its relative accuracy does so for degrees of 0 and 1, and its accuracy
    in proportion to `w` for all.
    """
    root = safe_sqrt(w)
    p, q = arccos_polynomials(w.dtype)
    before, kernel = root * horner(p, w), w * root * horner(q, w)
    if degree == 0:
        return before
    # The recurrence of Legendre functions.
    for n in range(1, degree):
        before, kernel = kernel, n * n * w * (2 - w) * before - (2 * n + 1) * (1 - w) * kernel
    return kernel


@arc_cosine_kernel.defjvp
def _arc_cosine_kernel_jvp(degree, primals, tangents):
    (w,), (dw,) = primals, tangents
    if degree > 0:
        return arc_cosine_kernel(degree, w), degree * degree * arc_cosine_kernel(degree - 1, w) * dw
    # Nearer to 0 than the threshold, second derivatives would overflow.
    square = w * (2 - w)
    is_regular = square > math.pi**2 * float(jnp.finfo(w.dtype).tiny) ** (2 / 3)
    slope = jnp.where(is_regular, 1 / (math.pi * jnp.sqrt(jnp.where(is_regular, square, 1))), 0)
    return arc_cosine_kernel(0, w), slope * dw
