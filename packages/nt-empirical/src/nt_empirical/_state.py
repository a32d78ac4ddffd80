"""Networks with a state, which kernels are of only if a call leaves it as it is."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from nt_empirical._perturbation import CALLS


def outputs_at(network: Callable[[Any], tuple[Any, Any]], state: Any, advice: str) -> Any:
    """Returns the outputs of a network that does not change its state.

    Args:
      network: of a pytree of arrays, its state; returns outputs, and the state after the call.
      state: the state.
      advice: what to do about a network that changes it.

    Raises:
      ValueError: the network changes its state.
    """
    outputs, after = network(state)
    if changed := _replaced(state, after):
        changed = _recomputed(network, state)
    if changed:
        raise ValueError(
            f"The network changes its state when it is called: {', '.join(changed)}. Its kernels are those of one "
            f"function, in evaluation mode, which leaves all that is not trained as it is. {advice}"
        )
    return outputs


def _replaced(before: Any, after: Any) -> list[str]:
    """Returns the names of what is not the very same in two pytrees."""
    arrays1, arrays2 = _by_name(before), _by_name(after)
    return [name for name in arrays1 | arrays2 if arrays1.get(name) is not arrays2.get(name)]


def _recomputed(network: Callable[[Any], tuple[Any, Any]], state: Any) -> list[str]:
    """Returns the names of what a network computes anew, and does not merely hand on through a call.

    A function under `jax.jit` or `jax.checkpoint` returns other arrays even where it returns its arguments.
    """
    program, shapes = jax.make_jaxpr(lambda s: network(s)[1], return_shape=True)(state)
    after = jax.tree.structure(shapes).unflatten(_origins(program.jaxpr))
    return _replaced(jax.tree.structure(state).unflatten(program.jaxpr.invars), after)


def _origins(jaxpr: Jaxpr) -> list[Any]:
    """Returns of every output the variable, or number, from which calls hand it on."""
    origin: dict[int, Any] = {}  # by the identity of a variable
    for equation in jaxpr.eqns:
        if (parameter := CALLS.get(equation.primitive.name)) is None:
            continue
        called = equation.params[parameter]
        called = called.jaxpr if isinstance(called, ClosedJaxpr) else called
        given = {id(inner): outer for inner, outer in zip(called.invars, equation.invars, strict=True)}
        for outer, inner in zip(equation.outvars, _origins(called), strict=True):
            if id(inner) in given:
                argument = given[id(inner)]
                origin[id(outer)] = origin.get(id(argument), argument)
    return [origin.get(id(output), output) for output in jaxpr.outvars]


def _by_name(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
