"""Derivatives of nonlinearities: found forward, entry by entry, with the values.

What a nonlinearity makes of a pair depends on three numbers. Backwards, JAX would keep all that lies between them and
the results, for a table of coefficients every term of every entry; and XLA would compute much of it again wherever it
is read, over several layers more and more.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

from nt_core.activations import Activation
from nt_core.activations.base import activation
from nt_core.evaluation.fusion import unfused

Dual = tuple[Array, Array]


@activation
class Entrywise(Activation):
    """An activation whose dual is differentiated forward.

    Attributes:
      activation: the activation.
    """

    activation: Activation

    def variance(self, var: Array) -> Array:
        return self.activation.variance(var)

    def dual(self, var1: Array, var2: Array, deficit: Array) -> Dual:
        if self.activation.captures(deficit.dtype):  # which rules of JAX for derivatives would not see
            return self.activation.dual(var1, var2, deficit)
        return _dual(self.activation, var1, var2, deficit)

    def covariance(self, var1: Array, var2: Array, deficit: Array) -> Array | None:
        return self.activation.covariance(var1, var2, deficit)


@jax.custom_jvp
def _dual(activation: Activation, var1: Array, var2: Array, deficit: Array) -> Dual:
    return activation.dual(var1, var2, deficit)


@functools.partial(_dual.defjvp, symbolic_zeros=True)
def _dual_jvp(primals: Any, tangents: Any) -> tuple[Dual, Dual]:
    activation, *arguments = primals
    of_activation, *of_arguments = tangents
    changing = tuple(i for i, tangent in enumerate(of_arguments) if not isinstance(tangent, SymbolicZero))
    values, slopes = unfused(functools.partial(_with_slopes, changing), activation, *arguments)
    changes = [[slope * of_arguments[i] for slope in of_i] for i, of_i in zip(changing, slopes, strict=True)]
    if any(not isinstance(tangent, SymbolicZero) for tangent in jax.tree.leaves(of_activation)):
        of_activation = jax.tree.map(_instantiated, of_activation)
        changes.append(list(jax.jvp(lambda a: a.dual(*arguments), (activation,), (of_activation,))[1]))
    return values, tuple(functools.reduce(jnp.add, of_value) for of_value in zip(*changes, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _with_slopes(changing: tuple[int, ...], activation: Activation, *arguments: Array) -> tuple[Dual, list[Dual]]:
    """Returns the dual, and its derivatives by some of its arguments. Equal layers are traced once."""
    values, slopes = activation.dual(*arguments), []
    for i in changing:

        def of_argument(x: Array, i: int = i) -> Dual:
            return activation.dual(*arguments[:i], x, *arguments[i + 1 :])

        values, slope = jax.jvp(of_argument, (arguments[i],), (jnp.ones_like(arguments[i]),))
        slopes.append(slope)
    return values, slopes


def _instantiated(tangent: Any) -> Any:
    if not isinstance(tangent, SymbolicZero):
        return tangent
    zeros = np.zeros if tangent.dtype == jax.dtypes.float0 else jnp.zeros  # of integers: JAX has no such arrays
    return zeros(tangent.shape, tangent.dtype)
