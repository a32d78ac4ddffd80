"""The choice of an implementation by its cost."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from nt_empirical._cost import Cost, cost_of

# Implementations that take more memory are chosen only if all do, where the user gives no bound.
MEMORY = 4 * 2**30

Implementation = Callable[[Any], Any]


def cheapest(implementations: Sequence[Implementation], params: Any, memory: int | None = None) -> Any:
    """Evaluates the cheapest of functions of parameters that all have the same results; `memory` as for `choice`."""
    programs, structures = zip(*(_traced(implementation, params) for implementation in implementations), strict=True)
    best = choice([cost_of(program.jaxpr) for program in programs], memory)
    return structures[best].unflatten(jaxpr_as_fun(programs[best])(*jax.tree.leaves(params)))


def choice(costs: Sequence[Cost], memory: int | None = None) -> int:
    """Returns the number of the lowest cost.

    It has the fewest operations of those with at most so many bytes at once (None for `MEMORY`); or the least memory,
    if all have more.
    """
    allowed = MEMORY if memory is None else memory
    return costs.index(min(costs, key=lambda cost: (max(cost.peak_bytes, allowed), cost.operations)))


def cost_of_implementation(implementation: Implementation, params: Any) -> Cost:
    """Returns what a function of parameters would cost, without evaluating it."""
    return cost_of(_traced(implementation, params)[0].jaxpr)


def _traced(implementation: Implementation, params: Any) -> tuple[ClosedJaxpr, Any]:
    program, shapes = jax.make_jaxpr(implementation, return_shape=True)(params)
    return program, jax.tree.structure(shapes)
