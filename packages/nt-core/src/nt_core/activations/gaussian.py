"""Activations with the Gaussian bell: derivatives of the error function, and products with a wave.

Their covariances depend on the root `leg` of a determinant that error functions have as well: see docs/numerics.md.
"""

import jax.numpy as jnp

from nt_core.activations.arcs import inverse_deficit, legs
from nt_core.activations.base import Activation, Scalar, activation, cast


@activation
class Gaussian(Activation):
    """`f(x) = a exp(b x^2)`. Derivatives are exact everywhere.

    With `b > 0`, `f(u)` has a variance where `4 b var < 1`, and results are NaN elsewhere.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import Gaussian
      >>> f"{Gaussian(1., -1.).variance(jnp.ones(())):.6f}"  # 1/sqrt(5)
      '0.447214'
    """

    a: Scalar
    b: Scalar

    def variance(self, var):
        a, b = cast(self.a, var), cast(self.b, var)
        return a * a / jnp.sqrt(1 - 4 * b * var)

    def dual(self, var1, var2, deficit):
        # Up to a factor, f is the derivative of the error function, and E f(u) f(v) = a^2 / leg.
        a, b = cast(self.a, deficit), cast(self.b, deficit)
        sides = legs(-2 * b, var1, var2, deficit)
        inverse = 1 / sides.leg
        covariance = 0.5 * (var1 + var2) - deficit
        return a * a * inverse_deficit(sides), 4 * a * a * b * b * covariance * inverse * inverse * inverse


@activation
class Gabor(Activation):
    """`f(x) = exp(-x^2) sin(x)`. Derivatives are exact everywhere.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import Gabor
      >>> f"{Gabor().variance(jnp.ones(())):.6f}"  # (1 - exp(-2/5)) / (2 sqrt(5))
      '0.073719'
    """

    def variance(self, var):
        square = 1 + 4 * var
        return -0.5 * jnp.expm1(-2 * var / square) / jnp.sqrt(square)

    def dual(self, var1, var2, deficit):
        # 2 E f(u) f(v) = i exp(-(deficit + det/2) i^2) - i exp(((1 + 2 deficit) i^2 - 1)/2), with i = 1/leg. The last
        # term is that of exp(i^2/2) i = bell(i), which is subtracted from its mean over (u, u) and (v, v).
        sides = legs(2, var1, var2, deficit)
        i, i1, i2 = 1 / sides.leg, 1 / sides.leg1, 1 / sides.leg2
        square = i * i
        mean = 0.5 * (i1 + i2)
        half_difference = (var2 - var1) / sides.mean_leg * i1 * i2
        shortening = inverse_deficit(sides)  # mean - i
        near = jnp.expm1(-(deficit + 0.5 * sides.det) * square)
        growth = jnp.expm1(deficit * square)
        to_mean = jnp.expm1(0.5 * shortening * (mean + i))  # exp(mean^2/2) / exp(i^2/2) - 1
        # The mean of bell(i1) and bell(i2) over exp(mean^2/2), less mean; with cosh x = 1 + 2 sinh(x/2)^2.
        sinh_half = jnp.sinh(0.5 * mean * half_difference)
        cosh_excess = 2 * sinh_half * sinh_half
        sinh = 2 * sinh_half * jnp.sqrt(1 + sinh_half * sinh_half)
        spread = jnp.expm1(0.5 * half_difference * half_difference)
        convexity = mean * (spread * (1 + cosh_excess) + cosh_excess) + (1 + spread) * half_difference * sinh
        # The mean of bell(i1) and bell(i2), less bell(i), over exp(i^2/2).
        bell_deficit = (shortening + convexity) * (1 + to_mean) + i * to_mean
        at_i = jnp.exp(0.5 * (square - 1))
        deficit_out = 0.5 * (shortening - i * near + at_i * (i * growth - bell_deficit))
        covariance = 0.5 * (var1 + var2) - deficit
        even = 1 + 2 * (var1 + var2) + 4 * (covariance * covariance + var1 * var2)
        odd = 4 * covariance * (sides.det + 3 * (var1 + var2) + 2)
        far = at_i * (1 + growth)
        dot = 0.5 * i * square * square * (far * (even - odd) + (1 + near) * (even + odd))
        return deficit_out, dot
