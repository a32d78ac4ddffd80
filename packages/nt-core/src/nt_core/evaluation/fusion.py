"""Keeps XLA from fusing a stencil with what produces its inputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nt_core.evaluation.platform import is_gpu


def unfused(fn: Callable[..., Any], *args: Any) -> Any:
    """Returns `fn(*args)`, compiled as a computation of its own.

    XLA fuses a window sum into its consumer and recomputes the producer once per tap: over several layers the work, and
    the time to compile it, grow exponentially. A conditional is never fused across. Its predicate is always true, which
    the barrier hides from XLA until fusion is over; it also survives `vmap` (the predicate is not batched) and `grad`.

    On GPUs `fn` is left to XLA, which weighs there what a fusion costs: to read the predicate the CPU would wait for
    the GPU.
    """
    if is_gpu():
        return rematerialized(fn)(*args)
    always = lax.optimization_barrier(jnp.array(True))
    results = jax.eval_shape(fn, *args)

    def never(*args: Any) -> Any:
        return jax.tree.map(lambda result: _anything(result, jax.tree.leaves(args)), results)

    return lax.cond(always, rematerialized(fn), never, *args)


def _anything(like: jax.ShapeDtypeStruct, args: list[jax.Array]) -> jax.Array:
    """Returns one of the arguments if it has the right type: that need not be compiled. Otherwise a constant.

    Under `jax.shard_map`, all arguments of one type must vary over the same mesh axes, as the results of that type do.
    """
    fitting = [x for x in args if (x.shape, x.dtype) == (like.shape, like.dtype)]
    return fitting[0] if fitting else constant(like.shape, jnp.nan, like.dtype, args)


def rematerialized(body: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the body of a loop such that reverse mode keeps its inputs only, and computes it again.

    Loops over blocks of pairs, over offset planes within a block, and over repeated layers within a plane: without it,
    the derivative would keep what lies within every layer of every plane of every block. A loop needs no barrier
    against common subexpressions, which would cost time.
    """
    return jax.checkpoint(body, prevent_cse=False)


def constant(shape: tuple[int, ...], value: float, dtype: Any, like: Any) -> jax.Array:
    """Returns an array of one value; under `jax.shard_map` it varies over the mesh axes over which `like` varies."""
    anchor = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(like))
    return jnp.full(shape, jnp.where(anchor == 0, value, value), dtype)
