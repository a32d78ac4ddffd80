"""Activations of which a user knows the covariance."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nt_core.activations.base import Activation, activation, static

ScalarFunction = Callable[..., Any]


@activation
class Elementwise(Activation):
    """Any function whose covariance is known: `nngp_fn(cov12, var1, var2)` is `E f(u) f(v)`, on scalars.

    The factor of the tangent kernel is `d_nngp_fn`, with the same arguments, or the derivative of `nngp_fn` in its
    first argument where that is None. The deficit is a difference of values of `nngp_fn`, hence less accurate for
    nearly equal inputs than that of the other activations; it is exactly 0 for equal ones. Derivatives, and what
    happens at zero variance, are those of the functions.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_core.activations import Elementwise
      >>> square = Elementwise(lambda cov12, var1, var2: 2 * cov12 ** 2 + var1 * var2)  # f(x) = x^2
      >>> deficit, dot = square.dual(jnp.ones(2), jnp.ones(2), jnp.array([0., 0.5]))
      >>> print(deficit, dot)
      [0.  1.5] [4. 2.]
    """

    nngp_fn: ScalarFunction = static()
    d_nngp_fn: ScalarFunction | None = static(default=None)

    def __post_init__(self):
        check_function("nngp_fn", self.nngp_fn)
        if self.d_nngp_fn is not None:
            check_function("d_nngp_fn", self.d_nngp_fn)

    def variance(self, var):
        return _map_scalars("nngp_fn", self.nngp_fn, var, var, var)

    def dual(self, var1, var2, deficit):
        covariance = _within(var1, var2, 0.5 * (var1 + var2) - deficit)
        difference = 0.5 * (self.variance(var1) + self.variance(var2))
        difference = difference - _map_scalars("nngp_fn", self.nngp_fn, covariance, var1, var2)
        is_equal = (deficit == 0) & (var1 == var2)
        d_nngp_fn = jax.grad(self.nngp_fn) if self.d_nngp_fn is None else self.d_nngp_fn
        dot = _map_scalars("d_nngp_fn", d_nngp_fn, covariance, var1, var2)
        # The values of equal inputs may differ in the last place, but their derivatives are wanted.
        return difference - jnp.where(is_equal, lax.stop_gradient(difference), 0), dot


def _within(var1, var2, covariance):
    """Moves covariances that rounding has put at the ends of what the variances allow, or beyond, a little inside.

    Functions of the user are not differentiable there, or not defined.
    """
    limit = (1 - 4 * float(jnp.finfo(covariance.dtype).eps)) * jnp.sqrt(var1) * jnp.sqrt(var2)
    return covariance + lax.stop_gradient(jnp.clip(covariance, -limit, limit) - covariance)


def _map_scalars(name, fn, *arguments):
    """Maps a function of scalars over arrays."""
    result = jnp.vectorize(fn)(*arguments)
    if result.shape != arguments[0].shape:
        raise ValueError(
            f"{name} should map scalars to a scalar, but it returned an array of shape "
            f"{result.shape[arguments[0].ndim :]} for scalar arguments."
        )
    return result.astype(arguments[0].dtype)


def check_function(name: str, fn: Any) -> None:
    """Raises `TypeError` for what is no function."""
    if not callable(fn):
        raise TypeError(f"{name} should be a function, got {fn!r}.")
