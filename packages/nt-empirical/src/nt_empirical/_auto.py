"""The choice of an implementation by its cost."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from nt_empirical._cost import cost_of

# Implementations that take more memory are chosen only if all do, where the user gives no bound.
MEMORY = 4 * 2**30


def cheapest(implementations: Sequence[Callable[[Any], Any]], params: Any, memory: int | None = None) -> Any:
    """Evaluates the cheapest of functions of parameters that all have the same results.

    The cheapest has the fewest operations of those with at most so many bytes at once (None for `MEMORY`); or the least
    memory, if all have more.
    """
    programs, structures = zip(*(_traced(implementation, params) for implementation in implementations), strict=True)
    costs = [cost_of(program.jaxpr) for program in programs]
    allowed = MEMORY if memory is None else memory
    best = costs.index(min(costs, key=lambda cost: (max(cost.peak_bytes, allowed), cost.operations)))
    return structures[best].unflatten(jaxpr_as_fun(programs[best])(*jax.tree.leaves(params)))


def _traced(implementation: Callable[[Any], Any], params: Any) -> tuple[ClosedJaxpr, Any]:
    program, shapes = jax.make_jaxpr(implementation, return_shape=True)(params)
    return program, jax.tree.structure(shapes)
