"""What the implementations of an empirical tangent kernel cost, in words."""

from collections.abc import Callable
from typing import Any

from nt_empirical._auto import choice


def explain_ntk(ntk_fn: Callable[..., Any], x1: Any, x2: Any, params: Any, **kwargs: Any) -> str:
    """Returns what each implementation of an empirical NTK would cost, and which one `AUTO` takes.

    Costs are estimates from the program of each: operations (2 for each term of a product, 64 for each entry of
    anything else) and the bytes that are in memory at once, under ``jax.jit``. Nothing is computed.

    Args:
      ntk_fn: made by :func:`empirical_ntk_fn`, whatever its implementation is, without ``max_bytes``.
      x1, x2, params, **kwargs: its arguments.

    Raises:
      TypeError: ``ntk_fn`` is another function.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_empirical import empirical_ntk_fn, explain_ntk
      >>> ntk_fn = empirical_ntk_fn(lambda w, x: jnp.tanh(x @ w), vmap_axes=0)
      >>> print(explain_ntk(ntk_fn, jnp.ones((20, 64)), None, jnp.ones((64, 32))))
      JACOBIAN_CONTRACTION: ... operations, ... MB
      NTK_VECTOR_PRODUCTS: ... operations, ... MB
      STRUCTURED_DERIVATIVES: ... operations, ... MB
      AUTO takes STRUCTURED_DERIVATIVES.
    """
    if not hasattr(ntk_fn, "costs"):
        raise TypeError(f"`ntk_fn` must come from `empirical_ntk_fn`, without `max_bytes`, got {ntk_fn!r}.")
    costs = ntk_fn.costs(x1, x2, params, **kwargs)
    lines = [
        f"{name.name}: {cost.operations:.3g} operations, {cost.peak_bytes / 1e6:.3g} MB" for name, cost in costs.items()
    ]
    if not lines:
        return "No parameters count: the kernel is 0."
    return "\n".join([*lines, f"AUTO takes {list(costs)[choice(list(costs.values()))].name}."])
