"""Kernels in tiles of samples, within a bound on memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from nt_core import batch
from nt_core.cells import Mixed
from nt_core.keywords import is_absent

from nt_empirical._cost import cost_of


def in_tiles(kernel_fn: Callable[..., Any], max_bytes: int) -> Callable[..., Any]:
    """Returns a function that computes the same kernels, `kernel_fn(x1, x2, params, **kwargs)`, within so many bytes.

    They are those of a tile, by the estimate of `cost_of`, its inputs, parameters and part of the kernel included. What
    fits whole is compiled: what `kernel_fn` reads besides its arguments is then what it was at the first call.
    """
    batched = functools.cache(lambda size: batch(kernel_fn, size, device_count=0, progress=False))
    # Compiled: equation by equation, the Jacobians by all parameters would be in memory at once.
    whole = jax.jit(lambda arguments: kernel_fn(*arguments.tree[0], **arguments.tree[1]))

    def bounded(x1: Any, x2: Any, params: Any, **kwargs: Any) -> Any:
        if "rng" in kwargs:
            raise ValueError("With `max_bytes` networks must not be random: each tile would have its own `rng`.")
        n = size = max(jnp.shape(leaf)[0] for leaf in jax.tree.leaves((x1, x2)))
        while (needed := _peak_bytes(kernel_fn, size, x1, x2, params, kwargs)) > max_bytes:
            if size <= 1:
                raise ValueError(
                    f"The kernel of one sample takes some {needed:,} bytes, more than max_bytes={max_bytes:,}. "
                    "NtkImplementation.NTK_VECTOR_PRODUCTS takes less, and `ntk_operator` the least."
                )
            size = -(-size // 2)
        if size == n:
            return whole(Mixed(((x1, x2, params), kwargs)))
        return batched(size)(x1, x2, params, **kwargs)

    return bounded


def _peak_bytes(kernel_fn: Callable[..., Any], size: int, x1: Any, x2: Any, params: Any, kwargs: dict[str, Any]) -> int:
    """Estimates the memory of a tile of two batches of so many samples.

    One batch alone takes no less: compilers copy what is multiplied with itself.
    """

    def cut(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((min(size, a.shape[0]), *a.shape[1:]), a.dtype), tree)

    def is_cut(name: str, value: Any) -> bool:
        return isinstance(value, tuple) and all(hasattr(a, "ndim") for a in jax.tree.leaves(value))

    second = x1 if is_absent(x2) else x2
    keywords = {name: cut(value) if is_cut(name, value) else value for name, value in kwargs.items()}
    arguments = Mixed(((cut(x1), cut(second), params), keywords))
    return cost_of(jax.make_jaxpr(lambda m: kernel_fn(*m.tree[0], **m.tree[1]))(arguments).jaxpr).peak_bytes
