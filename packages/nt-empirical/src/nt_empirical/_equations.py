"""Equations of JAX, evaluated one by one."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

# Equations that call a function, which is looked into where it takes what is followed.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr"}


def closed(jaxpr: Any) -> ClosedJaxpr:
    """Returns a jaxpr with its constants, none if it had none."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def evaluated(equation: JaxprEqn, inputs: Sequence[Any], jaxpr: Jaxpr) -> list[Any]:
    """Returns the outputs of an equation of a jaxpr, as part of which its own derivatives are kept."""
    values = {var: x for var, x in zip(equation.invars, inputs, strict=True) if not isinstance(var, Literal)}
    alone = jaxpr.replace(
        constvars=[],
        invars=list(values),
        outvars=list(equation.outvars),
        eqns=[equation],
        effects=equation.effects,
    )
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*values.values())


def state_of_scan(equation: JaxprEqn) -> tuple[int, int]:
    """Returns where, among the inputs of a `scan`, those begin that go from round to round, and where they end.

    Its parameters have other names in other versions of JAX; but what rounds get or make a part of has an axis more.
    """
    body = closed(equation.params["jaxpr"]).jaxpr

    def whole(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)  # type: ignore[attr-defined]

    last = whole(equation.invars, body.invars)
    return last - whole(equation.outvars, body.outvars), last


def scanned(
    equation: JaxprEqn,
    inputs: Sequence[Any],
    evaluate: Callable[[list[Any], Any], tuple[list[Any], Any]],
    of_rounds: Any = None,
) -> tuple[list[Any], Any]:
    """Evaluates a `scan` with another body.

    Args:
      equation: the scan.
      inputs: its inputs.
      evaluate: takes the inputs of a round, and its part of `of_rounds`; returns the outputs of a round, and more.
      of_rounds: a pytree of arrays with the rounds first, or None.

    Returns:
      The outputs of the scan, and what else rounds return, stacked.
    """
    first, last = state_of_scan(equation)
    consts, carry, xs = list(inputs[:first]), list(inputs[first:last]), list(inputs[last:])

    def body(carry: list[Any], of_round: Any) -> tuple[list[Any], Any]:
        given, part = of_round
        outputs, more = evaluate([*consts, *carry, *given], part)
        return outputs[: last - first], (outputs[last - first :], more)

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    carry, (stacked, more) = lax.scan(body, carry, (xs, of_rounds), **options)
    return [*carry, *stacked], more


def evaluated_channels_last(program: ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
    """Returns the outputs of a program, of which all convolutions have channels last.

    In loops, XLA for CPUs is slow in other layouts, such as derivatives have: their filters are transposed.
    """
    jaxpr = program.jaxpr
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *inputs], strict=True))
    for equation in jaxpr.eqns:
        values = [var.val if isinstance(var, Literal) else known[var] for var in equation.invars]
        if (name := equation.primitive.name) in CALLS:
            outputs = evaluated_channels_last(closed(equation.params[CALLS[name]]), values)
        elif name == "scan":
            body = functools.partial(evaluated_channels_last, closed(equation.params["jaxpr"]))
            outputs, _ = scanned(equation, values, lambda inputs, _, body=body: (body(inputs), None))
        elif name == "conv_general_dilated":
            outputs = [_channels_last(equation, *values)]
        else:
            outputs = evaluated(equation, values, jaxpr)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [var.val if isinstance(var, Literal) else known[var] for var in jaxpr.outvars]


def _channels_last(convolution: JaxprEqn, images: Any, filters: Any) -> Any:
    """Returns a convolution, computed with channels last and filters `(*space, channels of images, of outputs)`."""
    images_at, filters_at, outputs_at = convolution.params["dimension_numbers"]
    last = len(images_at) - 1
    order = (0, last, *range(1, last))
    outputs = convolution.primitive.bind(
        jnp.transpose(images, (images_at[0], *images_at[2:], images_at[1])),
        jnp.transpose(filters, (*filters_at[2:], filters_at[1], filters_at[0])),
        **convolution.params
        | {"dimension_numbers": lax.ConvDimensionNumbers(order, (last, last - 1, *range(last - 1)), order)},
    )
    # The axis that an axis of the output comes from.
    return jnp.transpose(outputs, [order[outputs_at.index(axis)] for axis in range(last + 1)])
