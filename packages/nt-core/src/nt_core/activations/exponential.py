"""Trigonometric and exponential activations: for these the covariance depends on the deficit through exponentials."""

import jax.numpy as jnp

from nt_core.activations.arcs import one_minus_correlation
from nt_core.activations.base import Activation, Scalar, activation, cast


@activation
class Sin(Activation):
    """`f(x) = a sin(b x + c)`; the cosine is the phase `c = pi/2`. Derivatives are exact everywhere.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import Sin
      >>> f"{Sin(1., 1., 0.).variance(jnp.ones(())):.6f}"  # (1 - exp(-2))/2
      '0.432332'
    """

    a: Scalar
    b: Scalar
    c: Scalar

    def variance(self, var):
        a, b, c = cast(self.a, var), cast(self.b, var), cast(self.c, var)
        return a * a * (jnp.sin(c) ** 2 - 0.5 * jnp.cos(2 * c) * jnp.expm1(-2 * b * b * var))

    def dual(self, var1, var2, deficit):
        # With b = 1, D the deficit of u and v and F = var1 + var2 - D that of u and -v:
        # 2/a^2 E f(u) f(v) = exp(-D) - cos(2 c) exp(-F).
        a, b, c = cast(self.a, deficit), cast(self.b, deficit), cast(self.c, deficit)
        square = b * b
        half_difference = 0.5 * square * (var1 - var2)  # exact before it is scaled
        var1, var2, deficit = square * var1, square * var2, square * deficit
        cos2, one_plus_cos2 = jnp.cos(2 * c), 2 * jnp.cos(c) ** 2
        opposite = var1 + var2 - deficit
        by_deficit = -jnp.expm1(-deficit) * (one_plus_cos2 + cos2 * jnp.expm1(-opposite))
        # (exp(-var1) - exp(-var2))^2
        by_difference = ((jnp.exp(-var1) + jnp.exp(-var2)) * jnp.tanh(half_difference)) ** 2
        deficit_out = by_deficit - 0.5 * cos2 * by_difference
        # exp(-D) + cos(2 c) exp(-F); the two exponentials differ by their sum times tanh K.
        near, far = jnp.exp(-deficit), jnp.exp(-opposite)
        dot = one_plus_cos2 * near - cos2 * (near + far) * jnp.tanh(0.5 * (var1 + var2) - deficit)
        amplitude = 0.5 * a * a
        return amplitude * deficit_out, amplitude * square * dot


@activation
class Rbf(Activation):
    """`f(x) = sqrt(2) sin(sqrt(2 gamma) x + pi/4)`, whose covariance is the RBF kernel `exp(-gamma E (u - v)^2)`.

    Derivatives are exact everywhere.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import Rbf
      >>> one = jnp.ones(())
      >>> deficit, dot = Rbf(0.5).dual(one, one, one)
      >>> f"{1 - deficit:.5f} {dot:.5f}"  # exp(-1), twice
      '0.36788 0.36788'
    """

    gamma: Scalar

    def variance(self, var):
        return jnp.ones_like(var)

    def dual(self, var1, var2, deficit):
        rate = 2 * cast(self.gamma, deficit)
        return -jnp.expm1(-rate * deficit), rate * jnp.exp(-rate * deficit)


@activation
class Exp(Activation):
    """`f(x) = a exp(b x)`. Derivatives are exact everywhere.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import Exp
      >>> f"{Exp(1., 1.).variance(jnp.ones(())):.5f}"  # exp(2)
      '7.38906'
    """

    a: Scalar
    b: Scalar

    def variance(self, var):
        a, b = cast(self.a, var), cast(self.b, var)
        return a * a * jnp.exp(2 * b * b * var)

    def dual(self, var1, var2, deficit):
        a, b = cast(self.a, deficit), cast(self.b, deficit)
        square = b * b
        half_difference = 0.5 * square * (var1 - var2)  # exact before it is scaled
        var1, var2, deficit = square * var1, square * var2, square * deficit
        # exp(var1) - exp(var2)
        difference = (jnp.exp(var1) + jnp.exp(var2)) * jnp.tanh(half_difference)
        deficit_out = 0.5 * difference * difference - jnp.exp(var1 + var2) * jnp.expm1(-deficit)
        return a * a * deficit_out, a * a * square * jnp.exp(var1 + var2 - deficit)


@activation
class ExpNormalized(Activation):
    """`E f(u) f(v) = s exp(gamma (c + shift))`, with `s` the product of the standard deviations, `c` the correlation.

    See p. 6 of arXiv:2003.02237. Correlations are held to [-1, 1]. Derivatives are exact where both variances are
    positive; at zero, the share that grows with the root of a variance is dropped.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import ExpNormalized
      >>> one = jnp.ones(())
      >>> deficit, dot = ExpNormalized(1., -1.).dual(one, one, one)
      >>> f"{1 - deficit:.5f} {dot:.5f}"  # exp(-1), twice
      '0.36788 0.36788'
    """

    gamma: Scalar
    shift: Scalar

    def variance(self, var):
        gamma, shift = cast(self.gamma, var), cast(self.shift, var)
        return var * jnp.exp(gamma * (1 + shift))

    def dual(self, var1, var2, deficit):
        gamma, shift = cast(self.gamma, deficit), cast(self.shift, deficit)
        parallel, scale, w = one_minus_correlation(var1, var2, deficit)
        amplitude = jnp.exp(gamma * (1 + shift))
        deficit_out = parallel - scale * jnp.expm1(-gamma * w)
        return amplitude * deficit_out, gamma * amplitude * jnp.exp(-gamma * w)
