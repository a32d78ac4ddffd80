"""Equations of JAX, evaluated one by one."""

from collections.abc import Sequence
from typing import Any

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
