"""What an activation is to a covariance."""

from typing import Any

import jax
import jax.numpy as jnp

from nt_core.pytrees import pytree_dataclass, static

__all__ = ["Activation", "Scalar", "activation", "cast", "static"]

Scalar = Any  # a Python number or a traced scalar


activation = pytree_dataclass  # leaves are the fields that are not static


class Activation:
    """A scalar function `f`, as seen by an infinitely wide layer: its *dual*, for Gaussian pre-activations.

    Covariances are given as *deficits*: `D = (var1 + var2)/2 - K` for a covariance `K`, which is `E (u - v)^2 / 2`.
    Nearly equal inputs have a tiny deficit, which keeps all its digits; `K` would lose them against the variances.

    A subclass is a frozen dataclass decorated by `activation`; it defines `variance` and `dual`. Its numeric
    coefficients are pytree leaves and may be traced. Results have the dtype of the arguments.
    """

    def variance(self, var: jax.Array) -> jax.Array:
        """Returns `E f(u)^2` for `u ~ N(0, var)`, elementwise."""
        raise NotImplementedError

    def dual(self, var1: jax.Array, var2: jax.Array, deficit: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the deficit after the activation, and the factor of the tangent kernel.

        Args:
          var1, var2: variances of `u` and `v`.
          deficit: `(var1 + var2)/2 - E u v`. All three have one dtype, and shapes that broadcast to that of the
            deficit. An entry of the results depends on the entries at its place alone.

        Returns:
          `(variance(var1) + variance(var2))/2 - E f(u) f(v)`, exactly 0 where `deficit == 0` and `var1 == var2`, and
          `E f'(u) f'(v)`.
        """
        raise NotImplementedError

    def covariance(self, var1: jax.Array, var2: jax.Array, deficit: jax.Array) -> jax.Array | None:
        """Returns `E f(u) f(v)`, or None where it is as accurate as the mean of the variances less the deficit."""
        return None


def cast(coefficient: Scalar, like: jax.Array) -> jax.Array:
    """Returns a coefficient in the dtype of `like`, so that a float64 coefficient does not promote float32 arrays."""
    return jnp.asarray(coefficient, like.dtype)
