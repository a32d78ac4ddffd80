"""Calls of the engine, as JAX functions of arrays: of values alone, with cotangents carried back, and with tangents."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nt_core.backends.base import Refused
from nt_core.backends.cpu import native
from nt_core.manual import varying, varying_axes

Types = Sequence[jax.ShapeDtypeStruct]
# From the code of a program, the types of its results, and its operands, to its results.
Call = Callable[[np.ndarray, Types, Sequence[Array]], list[Array]]


def propagate(code: np.ndarray, results: Types, operands: Sequence[Array]) -> list[Array]:
    """Returns the results of a program, see `make_job` in csrc/job.h. Not differentiable."""
    return _call("nt_propagate", code, results, operands)


def check_derivative(code: np.ndarray, results: Types, operands: Sequence[Array]) -> list[Array]:
    """Raises `Refused` if a program has no native derivative. Otherwise returns zeros in the place of its results."""
    reason = native.refusal_of_derivative(code)
    if reason is not None:
        raise Refused(reason)
    return [jnp.zeros(x.shape, x.dtype) for x in results]


def propagate_with_pullback(code: np.ndarray, results: Types, operands: Sequence[Array]) -> list[Array]:
    """Returns the results of a program, to be differentiated in reverse mode once."""

    @jax.custom_vjp
    def run(*operands: Array) -> list[Array]:
        return propagate(code, results, operands)

    def backward(operands: tuple[Array, ...], cotangents: list[Array]) -> tuple[Array, ...]:
        return tuple(_call("nt_backward", code, operands, [*operands, *cotangents]))

    run.defvjp(lambda *operands: (run(*operands), operands), backward)
    return run(*varying(list(operands), varying_axes(operands)))


def propagate_with_pushforward(code: np.ndarray, results: Types, operands: Sequence[Array]) -> list[Array]:
    """Returns the results of a program, to be differentiated in forward mode once."""

    @jax.custom_jvp
    def run(*operands: Array) -> list[Array]:
        return propagate(code, results, operands)

    @run.defjvp
    def jvp(operands: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[list[Array], list[Array]]:
        return run(*operands), _call("nt_tangents", code, results, [*operands, *tangents])

    return run(*operands)


def _call(target: str, code: np.ndarray, like: Types | Sequence[Array], operands: Sequence[Array]) -> list[Array]:
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like]
    computed = jax.ffi.ffi_call(target, results, vmap_method="sequential")(*operands, code=code)
    return varying(computed, varying_axes(operands))  # JAX does not know over which axes of a mesh these vary
