"""What a program costs, estimated from its jaxpr."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from nt_empirical._uses import shape_of

# An entry that is computed or copied takes as long as so many operations of a matrix product: it passes through memory.
OPERATIONS_PER_ENTRY = 64


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a program.

    Attributes:
      operations: additions and multiplications, with `OPERATIONS_PER_ENTRY` for an entry of what is no product.
      peak_bytes: the most that is in memory at once, if equations run one by one: as they stand, or each where its
        results are first asked for, whichever takes less.
    """

    operations: int
    peak_bytes: int


def cost_of(jaxpr: Jaxpr) -> Cost:
    """Returns the cost of a jaxpr."""
    costs = {id(equation): _cost_of_equation(equation) for equation in jaxpr.eqns}
    operations = sum(cost.operations for cost in costs.values())
    # Compilers choose an order, which is no worse: sums of products of Jacobians are taken array by array.
    return Cost(operations, min(_peak(jaxpr, order, costs) for order in (jaxpr.eqns, _on_demand(jaxpr))))


def _peak(jaxpr: Jaxpr, order: Sequence[JaxprEqn], costs: dict[int, Cost]) -> int:
    """Returns the most bytes that are in memory at once, if equations run in an order."""
    last_use = {var: i for i, equation in enumerate(order) for var in _variables(equation.invars)}
    live = peak = sum(map(bytes_of, {*jaxpr.invars, *jaxpr.constvars}))
    kept = {*jaxpr.invars, *jaxpr.constvars, *_variables(jaxpr.outvars)}
    for i, equation in enumerate(order):
        live += sum(map(bytes_of, equation.outvars))
        peak = max(peak, live + costs[id(equation)].peak_bytes)
        gone = {var for var in _variables(equation.invars) if last_use[var] == i and var not in kept}
        unused = [var for var in equation.outvars if var not in last_use and var not in kept]
        live -= sum(map(bytes_of, (*gone, *unused)))
    return peak


def _on_demand(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Returns the equations that outputs depend on, each where its results are first asked for."""
    maker = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
    ordered: dict[int, JaxprEqn] = {}

    def missing(variables: Iterable[Any]) -> list[JaxprEqn]:
        makers = (maker[var] for var in variables if not isinstance(var, Literal) and var in maker)
        return [equation for equation in makers if id(equation) not in ordered]

    waiting = missing(jaxpr.outvars)[::-1]
    while waiting:
        if first := missing(waiting[-1].invars):
            waiting += first[::-1]
        else:
            equation = waiting.pop()
            ordered[id(equation)] = equation
    return list(ordered.values())


def _cost_of_equation(equation: JaxprEqn) -> Cost:
    """Returns the operations of an equation, and the bytes that it takes apart from its inputs and outputs."""
    entries = sum(math.prod(shape_of(var)) for var in equation.outvars)
    params = equation.params
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        terms = math.prod(shape_of(equation.invars[0])[axis] for axis in contracted)
        # A product without a sum, or of few terms, is no faster than other equations. Both factors are copied: into the
        # order of axes that matrix products have, and into blocks.
        return Cost(entries * max(2 * terms, OPERATIONS_PER_ENTRY), sum(map(bytes_of, equation.invars)))
    if equation.primitive.name == "conv_general_dilated":
        filters, features = shape_of(equation.invars[1]), params["dimension_numbers"].rhs_spec[0]
        terms = math.prod(filters) // max(filters[features], 1)
        return Cost(entries * max(2 * terms, OPERATIONS_PER_ENTRY), 0)
    inner = [cost_of(jaxpr) for jaxpr in _jaxprs(params.values())]
    if not inner:
        return Cost(entries * OPERATIONS_PER_ENTRY, 0)
    times = params["length"] if equation.primitive.name == "scan" else 1
    return Cost(times * max(cost.operations for cost in inner), max(cost.peak_bytes for cost in inner))


def _jaxprs(values: Iterable[Any]) -> Iterable[Jaxpr]:
    """Returns the jaxprs among the parameters of an equation."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)


def _variables(atoms: Iterable[Any]) -> set[Any]:
    return {atom for atom in atoms if not isinstance(atom, Literal)}


def bytes_of(variable: Any) -> int:
    """Returns the size of a variable."""
    return math.prod(shape_of(variable)) * getattr(variable.aval.dtype, "itemsize", 0)
