"""Derivatives of an output by the values that a network has inside, as products of factors.

The cotangents of all numbers of an output are carried back at once. What happens to them on the way is much the same
for all: a readout's weights belong to output and channel, the mean over positions is a number, the derivative of a
nonlinearity belongs to position and channel. As long as such factors are smaller than their product, they are kept
apart; contractions with other factors then take a part of the time.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from nt_core.manual import varying, varying_axes
from nt_core.tracing import is_traced

from nt_empirical._equations import CALLS, closed, evaluated
from nt_empirical._factors import Factor, new_labels
from nt_empirical._rules import LINEAR, SCALINGS
from nt_empirical._uses import Use, dtype_of, shape_of


@dataclasses.dataclass(frozen=True)
class Cotangent:
    """The cotangents of a value, for all numbers of an output.

    Attributes:
      use: how numbers of the output, its `weight_axes`, change the cotangent. They do alike along an axis of the output
        that is neither among its `axes` nor in a factor.
      finite: whether it is made of weights and values of the network, and not of derivatives of functions, which may be
        infinite where they do not count. Only then is a selection a product with 0 and 1.
    """

    use: Use
    finite: bool = False


def cotangents_of(pull_back: Callable[[jax.Array], Sequence[jax.Array]], output: jax.Array) -> list[Use | None]:
    """Returns how an output, whose derivative `pull_back` is, changes with each of some values; None if it does not.

    The `axes` of a use are those of the value, `weight_axes` are those of the output.
    """
    program = jax.make_jaxpr(pull_back)(output)
    found = _run(program.jaxpr, program.consts, [Cotangent(Use.of(0, output), finite=True)])
    return [_use(value, output) for value in found]


def _use(value: Any, output: jax.Array) -> Use | None:
    """Returns the use that a cotangent is."""
    if isinstance(value, Cotangent):
        return value.use
    if _is_known_zero(value):
        return None
    # A function with a derivative of its own may return the same for all numbers of the output.
    axes = new_labels(value.ndim)
    alike = Use(0, (), new_labels(output.ndim), output.shape, axes, value.shape)
    return alike.times(value, axes)


def _is_known_zero(value: Any) -> bool:
    return isinstance(value, np.ndarray) and not value.any()


def _run(jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Returns the outputs of a jaxpr, of inputs and with outputs that may be `Cotangent`."""
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else known[var]

    for equation in jaxpr.eqns:
        values = [read(var) for var in equation.invars]
        if not any(isinstance(value, Cotangent) for value in values):
            outputs = [_zeros(equation)] if _is_zero(equation, values) else evaluated(equation, values, jaxpr)
        elif (name := equation.primitive.name) in CALLS:
            called = closed(equation.params[CALLS[name]])
            outputs = _run(called.jaxpr, called.consts, values)
        else:
            outputs = _by_rule(equation, values) or _row_by_row(equation, values, jaxpr)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _is_zero(equation: JaxprEqn, values: list[Any]) -> bool:
    """Whether the output of an equation is known to be 0 everywhere."""
    return equation.primitive.name == "broadcast_in_dim" and _is_number(values[0]) and not np.asarray(values[0])


def _is_number(value: Any) -> bool:
    """Whether a value is a number that is known and finite."""
    if is_traced(value) or np.ndim(value) or not jnp.issubdtype(jnp.result_type(value), jnp.number):
        return False
    return bool(np.isfinite(np.asarray(value)))


def _zeros(equation: JaxprEqn) -> np.ndarray:
    """Returns zeros that are known to be, and take no memory."""
    (output,) = equation.outvars
    return np.broadcast_to(np.zeros((), dtype_of(output)), shape_of(output))


def _by_rule(equation: JaxprEqn, values: list[Any]) -> list[Any] | None:
    """Returns the output of an equation as a product, or None if it is none."""
    name, (output, *more) = equation.primitive.name, equation.outvars
    (which, *others) = (i for i, value in enumerate(values) if isinstance(value, Cotangent))
    real = all(jnp.issubdtype(dtype_of(var), jnp.floating) for var in (equation.invars[which], output))
    if others or more or not real:
        return None
    cotangent = values[which]
    if name == "select_n":
        use = _selected(cotangent.use, which, values, equation) if cotangent.finite else None
    elif name in LINEAR:
        shown = jax.ShapeDtypeStruct(cotangent.use.shape, dtype_of(equation.invars[which]))
        use = LINEAR[name](cotangent.use, which, [shown if i == which else v for i, v in enumerate(values)], equation)
    else:
        use = None
    if use is None or use.steps:
        return None
    finite = cotangent.finite and (name not in SCALINGS or _is_number(values[1 - which]))
    return [Cotangent(use.compressed(), finite)]


def _selected(use: Use, which: int, values: list[Any], equation: JaxprEqn) -> Use | None:
    """Returns the use where a predicate chooses it, if the other choice is 0."""
    if len(values) != 3 or which == 0:
        return None
    predicate, other = values[0], values[3 - which]
    if not _is_known_zero(other):
        return None
    chosen = (jnp.asarray(predicate, bool) == (which == 2)).astype(dtype_of(equation.outvars[0]))
    return use.times(chosen, use.axes if chosen.ndim else ())


def _row_by_row(equation: JaxprEqn, values: list[Any], jaxpr: Jaxpr) -> list[Any]:
    """Returns the outputs of an equation from its values for each number of the output."""
    which = [i for i, value in enumerate(values) if isinstance(value, Cotangent)]
    sizes, labels = values[which[0]].use.weight_shape, values[which[0]].use.weight_axes
    # Under `shard_map` they vary over devices as the values do that they are cotangents of.
    rows = [
        varying(values[i].use.array(dtype_of(equation.invars[i])), varying_axes(equation.invars[i].aval)) for i in which
    ]

    def row(rows: list[jax.Array]) -> list[jax.Array]:
        given = dict(zip(which, rows, strict=True))
        return evaluated(equation, [given.get(i, value) for i, value in enumerate(values)], jaxpr)

    found = jax.vmap(row)([array.reshape(math.prod(sizes), *array.shape[len(sizes) :]) for array in rows])

    def whole(array: jax.Array) -> Cotangent:
        axes, shape = new_labels(array.ndim - 1), array.shape[1:]
        factor = Factor(array.reshape(*sizes, *shape), (*labels, *axes))
        return Cotangent(Use(0, (), labels, sizes, axes, shape, (factor,)))

    return [whole(array) for array in found]
