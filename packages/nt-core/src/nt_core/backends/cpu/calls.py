"""Calls of the engine, as JAX functions of arrays: of values alone, with cotangents carried back, and with tangents."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero

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

    def forward(*operands: Any) -> Any:
        # Which cotangents are wanted is said by the structure: JAX keeps nothing else that it does not trace.
        wanted = [() if x.perturbed else None for x in operands]
        values = [x.value for x in operands]
        return run(*values), (values, wanted)

    def backward(kept: Any, cotangents: list[Array]) -> tuple[Array, ...]:
        operands, wanted = kept
        types = [
            jax.ShapeDtypeStruct(x.shape if w is not None else (0,), x.dtype)
            for x, w in zip(operands, wanted, strict=True)
        ]
        cotangents = [jnp.zeros(c.shape, c.dtype) if isinstance(c, SymbolicZero) else c for c in cotangents]
        computed = _call("nt_backward", code, types, [*operands, *cotangents])
        return tuple(
            c if w is not None else jnp.zeros_like(x) for c, x, w in zip(computed, operands, wanted, strict=True)
        )

    run.defvjp(forward, backward, symbolic_zeros=True)
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
