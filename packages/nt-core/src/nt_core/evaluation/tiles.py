"""Cuts the work into blocks of samples, so that memory does not grow with their number."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nt_core.evaluation import platform
from nt_core.evaluation.block import pools_planes
from nt_core.evaluation.fusion import rematerialized
from nt_core.grid import Grid, evenly
from nt_core.lowering import Lowered, Pairs, Primitive, Repeated
from nt_core.lowering.primitives import Flatten, Gather, Pool, Tied, Untie

# Numbers in an array that stays in cache, and pairs of samples that fill vectors: so many go through windows together.
_IN_CACHE = 2**18
_LANES = 256
# Samples of the second batch in a block: XLA vectorises over them.
_COLUMNS = 32
# Numbers that one array of a block may hold.
_MAX_ELEMENTS = 2**26


def block_size(lowered: Lowered, n1: int, n2: int) -> tuple[int, int]:
    """Returns how many samples of each batch to take together."""
    if n1 == 0 or n2 == 0:
        return n1, n2
    numbers = _numbers_per_pair(lowered)
    pairs = max(1, _MAX_ELEMENTS // numbers)
    if any(_moves(node.primitive) for node in lowered.nodes):
        together = platform.NUMBERS_ON_GPU if platform.is_gpu() else _IN_CACHE
        pairs = min(pairs, max(_LANES, together // numbers))
    columns = min(n2, pairs, max(_COLUMNS, pairs // n1))
    return evenly(n1, pairs // columns), evenly(n2, columns)


def _moves(primitive: Primitive) -> bool:
    """Whether a primitive reads other positions than it writes, or repeats."""
    return isinstance(primitive, Pool | Repeated | Gather) or (isinstance(primitive, Tied) and bool(primitive.windows))


def _numbers_per_pair(lowered: Lowered) -> int:
    """Size of the largest array for one pair of samples: all pairs of positions where they are formed, or a plane."""
    formed = set(lowered.outputs)
    for number, node in reversed(list(lowered.numbered_nodes())):
        if isinstance(node.primitive, Pool):
            formed.add(number)
            if not pools_planes(lowered, number):
                formed.update(node.inputs)
        elif isinstance(node.primitive, Gather):
            formed.update((number, *node.inputs))
        elif isinstance(node.primitive, Untie):
            formed.add(number)
        elif number in formed and not isinstance(node.primitive, Flatten):
            formed.update(node.inputs)
    sizes = [(math.prod(form.space), i in formed and not form.same_position) for i, form in enumerate(lowered.forms)]
    return max(size ** (2 if pairs else 1) for size, pairs in sizes)


def map_samples(fn: Callable[[Any], Any], data: Any, n: int, block: int) -> Any:
    """Applies `fn` to blocks of a tree of arrays with a trailing batch axis of size `n`, and joins its outputs.

    Like `fn(data)`, for `fn` that treats each sample on its own.
    """
    if block >= n:
        return fn(data)
    count = -(-n // block)
    padded = _pad_last(data, count * block)
    blocks = lax.map(rematerialized(lambda i: fn(_take_last(padded, i, block))), jnp.arange(count))
    return jax.tree.map(lambda a: _join_last(a)[..., :n], blocks)


def map_pairs(
    fn: Callable[[Any, Any, Any], list[Pairs]],
    data1: Any,
    data2: Any,
    pairs: Any,
    shape: tuple[int, int],
    block: tuple[int, int],
    symmetric: bool,
) -> list[Pairs]:
    """Applies `fn` to blocks of pairs of samples, and joins its outputs, arrays `(*positions, n1, n2)`.

    Args:
      fn: gets a block of `data1`, of `data2` and of `pairs`.
      data1, data2: trees of arrays with a trailing batch axis.
      pairs: a tree of arrays with two trailing batch axes.
      shape: sizes of the batches.
      block: sizes of the blocks.
      symmetric: both batches are the same, and the outputs symmetric: blocks below the diagonal are not computed.
    """
    if block == shape:
        return fn(data1, data2, pairs)
    grid = Grid(*shape, *block, symmetric)
    (b1, b2), (padded1, padded2) = block, grid.padded
    data1, data2 = _pad_last(data1, padded1), _pad_last(data2, padded2)
    pairs = jax.tree.map(lambda a: _pad_axis(_pad_axis(a, -2, padded1), -1, padded2), pairs)

    def compute(cell: Array) -> list[Pairs]:
        i, j = cell[0], cell[1]

        def cut(a: Array) -> Array:
            return lax.dynamic_slice_in_dim(lax.dynamic_slice_in_dim(a, i * b1, b1, -2), j * b2, b2, -1)

        return fn(_take_last(data1, i, b1), _take_last(data2, j, b2), jax.tree.map(cut, pairs))

    blocks = lax.map(rematerialized(compute), jnp.array(grid.cells()))
    return jax.tree.map(lambda a: grid.join(a, axis=-2), blocks)


def _pad_last(data: Any, n: int) -> Any:
    return jax.tree.map(lambda a: _pad_axis(a, -1, n), data)


def _pad_axis(a: Array, axis: int, n: int) -> Array:
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, n - a.shape[axis])
    return jnp.pad(a, widths)


def _take_last(data: Any, i: Array, block: int) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, i * block, block, -1), data)


def _join_last(a: Array) -> Array:
    """`(count, *positions, block) -> (*positions, count * block)`."""
    a = jnp.moveaxis(a, 0, -2)
    return a.reshape(a.shape[:-2] + (-1,))
