"""Functions that agree with a network to some order in its parameters."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ApplyFn = Callable[..., Any]


def linearize(f: ApplyFn, params: Any) -> ApplyFn:
    r"""First-order Taylor expansion of a function in its parameters.

    Returns :math:`f_{lin}(\theta, x) = f(\theta_0, x) + \partial_\theta f(\theta_0, x) (\theta - \theta_0)`, the model
    that wide networks follow throughout training (Lee et al., 2019, arXiv:1902.06720).

    Args:
      f: ``f(params, *args, **kwargs)``, returns an array or a pytree of arrays.
      params: the point of expansion, an array or a pytree of arrays.

    Returns:
      ``f_lin(params, *args, **kwargs)``, with outputs as those of ``f``. It raises a ``ValueError`` for parameters of
      another structure or other shapes than those of the expansion.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_empirical import linearize
      >>> f_lin = linearize(lambda w, x: w**2 * x, jnp.array(3.0))
      >>> print(f_lin(jnp.array(4.0), 10.0))  # 90 + 60 (4 - 3)
      150.0
    """

    def f_lin(p: Any, *args: Any, **kwargs: Any) -> Any:
        value, change = jax.jvp(lambda q: f(q, *args, **kwargs), (params,), (_displacement(params, p),))
        return jax.tree.map(jnp.add, value, change)

    return f_lin


def taylor_expand(f: ApplyFn, params: Any, degree: int) -> ApplyFn:
    r"""Taylor expansion of a function in its parameters, to any order.

    Args:
      f: ``f(params, *args, **kwargs)``, returns an array or a pytree of arrays.
      params: the point of expansion, an array or a pytree of arrays.
      degree: order of the expansion; 0 is the constant :math:`f(\theta_0, x)`, 1 is :func:`linearize`. The cost grows
        as :math:`2^{degree}`.

    Returns:
      ``f_taylor(params, *args, **kwargs)``, with outputs as those of ``f``. It raises a ``ValueError`` for parameters
      of another structure or other shapes than those of the expansion.

    Raises:
      TypeError: ``degree`` is no integer.
      ValueError: ``degree`` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_empirical import taylor_expand
      >>> f_quadratic = taylor_expand(lambda w, x: w**3 * x, jnp.array(1.0), degree=2)
      >>> print(f_quadratic(jnp.array(3.0), 1.0))  # 1 + 3 (3 - 1) + 3 (3 - 1)**2
      19.0
    """
    if operator.index(degree) < 0:
        raise ValueError(f"`degree` of a Taylor expansion must be at least 0, got {degree}.")

    def f_taylor(p: Any, *args: Any, **kwargs: Any) -> Any:
        direction = _displacement(params, p)
        derivatives = _directional_derivatives(lambda q: f(q, *args, **kwargs), direction, degree)(params)
        total = derivatives[0]
        for order, derivative in enumerate(derivatives[1:], start=1):
            total = jax.tree.map(lambda s, d, k=order: s + d / math.factorial(k), total, derivative)
        return total

    return f_taylor


def _directional_derivatives(f: Callable[[Any], Any], direction: Any, degree: int) -> Callable[[Any], list[Any]]:
    """Returns the function with values `[f, D f, ..., D^degree f]`, where D is the derivative along `direction`."""
    if degree == 0:
        return lambda p: [f(p)]
    lower = _directional_derivatives(f, direction, degree - 1)

    def derivatives(p: Any) -> list[Any]:
        values, changes = jax.jvp(lower, (p,), (direction,))
        return [*values, changes[-1]]

    return derivatives


def _displacement(origin: Any, params: Any) -> Any:
    structures = jax.tree.structure(origin), jax.tree.structure(params)
    if structures[0] != structures[1]:
        raise ValueError(
            f"Parameters must be structured as those of the expansion, {structures[0]}; got {structures[1]}."
        )

    def subtract(path: Any, p0: Any, p: Any) -> Any:
        if jnp.shape(p0) != jnp.shape(p):
            raise ValueError(
                f"Parameters must be shaped as those of the expansion: params{jax.tree_util.keystr(path)} must have "
                f"shape {jnp.shape(p0)}, got {jnp.shape(p)}."
            )
        return jnp.subtract(p, p0)

    return jax.tree_util.tree_map_with_path(subtract, origin, params)
