"""Networks with a state, which kernels are of only if a call leaves it as it is."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from nt_core.cells import Mixed
from nt_core.keywords import is_array

# Equations that call a function once, with their own inputs and outputs, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def outputs_at(network: Callable[[Any], tuple[Any, Any]], state: Any, advice: str) -> Any:
    """Returns the outputs of a network that does not change its state.

    A network with state that passes through an inner `jax.jit` or `jax.checkpoint` is traced once more at each call:
    they return other arrays than they are given, and only the program tells whether they hand them on.

    Args:
      network: a function of a pytree, its state; returns outputs, and the state after the call.
      state: the state: arrays, and anything else.
      advice: what to do about a network that changes it.

    Raises:
      ValueError: the network changes its state, or computes it anew.
    """
    outputs, after = network(state)
    if changed := _replaced(state, after):
        changed = _recomputed(network, state)
    if changed:
        raise ValueError(
            f"The network changes its state, or computes it anew, when it is called: {', '.join(changed)}. Its kernels "
            f"are those of one function, in evaluation mode, which leaves all that is not trained as it is. {advice}"
        )
    return outputs


def _replaced(before: Any, after: Any) -> list[str]:
    """Returns the names of what is not the same in two pytrees: arrays are the very same, anything else is equal."""
    leaves1, leaves2 = _by_name(before), _by_name(after)
    return [
        name
        for name in leaves1 | leaves2
        if name not in leaves1 or name not in leaves2 or not _is_same(leaves1[name], leaves2[name])
    ]


def _is_same(before: Any, after: Any) -> bool:
    if before is after:
        return True
    return not is_array(before) and not is_array(after) and bool(before == after)


def _recomputed(network: Callable[[Any], tuple[Any, Any]], state: Any) -> list[str]:
    """Returns the names of what a network changes or computes anew, and does not merely hand on through a call.

    A function under `jax.jit`, `jax.checkpoint` or with a derivative of its own returns other arrays even where it
    returns its arguments.
    """
    given = Mixed(state)  # of which arrays only are traced
    program, shapes = jax.make_jaxpr(lambda s: Mixed(network(s.tree)[1]), return_shape=True)(given)
    before, after = (
        jax.tree.structure(tree).unflatten(variables).tree
        for tree, variables in [(given, program.jaxpr.invars), (shapes, _origins(program.jaxpr))]
    )
    return _replaced(before, after)


def _origins(jaxpr: Jaxpr) -> list[Any]:
    """Returns of every output the variable, or the value of the number, from which calls hand it on."""
    origin: dict[int, Any] = {}  # by the identity of a variable
    for equation in jaxpr.eqns:
        if (parameter := _CALLS.get(equation.primitive.name)) is None:
            continue
        called = equation.params[parameter]
        called = called.jaxpr if isinstance(called, ClosedJaxpr) else called
        given = {id(inner): outer for inner, outer in zip(called.invars, equation.invars, strict=True)}
        for outer, inner in zip(equation.outvars, _origins(called), strict=True):
            if id(inner) in given:
                argument = given[id(inner)]
                origin[id(outer)] = origin.get(id(argument), argument)
    origins = [origin.get(id(output), output) for output in jaxpr.outvars]
    return [np.asarray(found.val).tolist() if isinstance(found, Literal) else found for found in origins]


def _by_name(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
