"""Derivatives of nonlinearities: found forward, entry by entry, with the values.

What a nonlinearity makes of a pair depends on three numbers. Backwards, JAX would keep all that lies between them and
the results, for a table of coefficients every term of every entry; and XLA would compute much of it again wherever it
is read, over several layers more and more.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from nt_core.activations import Activation
from nt_core.activations.base import activation
from nt_core.evaluation.fusion import unfused
from nt_core.manual import varying, varying_axes
from nt_core.pytrees import replace_leaves
from nt_core.tracing import is_traced

Results = tuple[Array, Array]  # of a dual


@activation
class Entrywise(Activation):
    """An activation whose dual is differentiated forward.

    Attributes:
      activation: the activation.
    """

    activation: Activation

    def variance(self, var: Array) -> Array:
        return self.activation.variance(var)

    def dual(self, var1: Array, var2: Array, deficit: Array) -> Results:
        captured = jax.make_jaxpr(_results)(self.activation, var1, var2, deficit).consts
        if any(map(is_traced, captured)):  # by a function of the user: derivatives by rule would not see it
            return self.activation.dual(var1, var2, deficit)
        arguments = self.activation, var1, var2, deficit
        return _dual(*varying(arguments, varying_axes(arguments)))

    def covariance(self, var1: Array, var2: Array, deficit: Array) -> Array | None:
        return self.activation.covariance(var1, var2, deficit)


def _results(activation: Activation, *arguments: Array) -> Results:
    """Returns the dual, with an entry for each pair, and over all axes of a mesh over which the arguments vary."""
    shape, axes = jnp.broadcast_shapes(*(x.shape for x in arguments)), varying_axes((activation, arguments))
    value, factor = activation.dual(*arguments)
    return varying((jnp.broadcast_to(value, shape), jnp.broadcast_to(factor, shape)), axes)


_dual = jax.custom_jvp(_results)


@functools.partial(_dual.defjvp, symbolic_zeros=True)
def _dual_jvp(primals: Any, tangents: Any) -> Any:
    activation, *arguments = primals
    of_activation, *of_arguments = tangents
    moving = tuple(i for i, tangent in enumerate(of_arguments) if not isinstance(tangent, SymbolicZero))
    results, slopes = unfused(functools.partial(_with_slopes, moving), activation, *arguments)
    changes = [[slope * of_arguments[i] for slope in of_i] for i, of_i in zip(moving, slopes, strict=True)]
    numbers = {i: t for i, t in enumerate(jax.tree.leaves(of_activation)) if not isinstance(t, SymbolicZero)}
    if numbers:

        def of_numbers(point: dict[int, Array]) -> Results:
            return _results(replace_leaves(activation, point), *arguments)

        leaves = jax.tree.leaves(activation)
        changes.append(list(jax.jvp(of_numbers, ({i: leaves[i] for i in numbers},), (numbers,))[1]))
    return results, tuple(functools.reduce(jnp.add, change) for change in zip(*changes, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _with_slopes(moving: tuple[int, ...], activation: Activation, *arguments: Array) -> tuple[Results, list[Results]]:
    """Returns the dual, and its derivatives by some of its arguments. Equal layers are traced once."""
    axes = varying_axes((activation, arguments))

    def along(i: int) -> tuple[Results, Results]:
        def of_argument(x: Array) -> Results:
            return _results(activation, *(x if k == i else argument for k, argument in enumerate(arguments)))

        return jax.jvp(of_argument, (arguments[i],), (varying(jnp.ones_like(arguments[i]), axes),))

    if not moving:
        return _results(activation, *arguments), []
    results, slopes = zip(*map(along, moving), strict=True)
    return results[0], varying(list(slopes), axes)
