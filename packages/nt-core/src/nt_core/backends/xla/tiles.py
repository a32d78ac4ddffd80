"""Cuts the work into blocks of samples, so that memory does not grow with their number."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_core.backends.xla.block import Pairs, pools_planes
from nt_core.backends.xla.fusion import rematerialized
from nt_core.backends.xla.repeats import Repeated
from nt_core.program import Program
from nt_core.steps import Conv, Flatten, GlobalPool, Pool

# Numbers in an array that stays in cache, and pairs of samples that fill vectors: so many go through windows together.
_IN_CACHE = 2**18
_LANES = 256
# Samples of the second batch in a block: XLA vectorises over them.
_COLUMNS = 32
# Numbers that one array of a block may hold.
_MAX_ELEMENTS = 2**26


def block_size(program: Program, n1: int, n2: int) -> tuple[int, int]:
    """Returns how many samples of each batch to take together."""
    if n1 == 0 or n2 == 0:
        return n1, n2
    numbers = _numbers_per_pair(program)
    pairs = max(1, _MAX_ELEMENTS // numbers)
    if any(isinstance(node.step, Conv | Pool | GlobalPool | Repeated) for node in program.nodes):
        pairs = min(pairs, max(_LANES, _IN_CACHE // numbers))
    columns = min(n2, pairs, max(_COLUMNS, pairs // n1))
    return _evenly(n1, pairs // columns), _evenly(n2, columns)


def _evenly(n: int, block: int) -> int:
    """Returns the size of blocks that are alike, of which `n` samples need as many as of blocks of the given size."""
    return -(-n // -(-n // block))


def _numbers_per_pair(program: Program) -> int:
    """Size of the largest array for one pair of samples: all pairs of positions where they are formed, or a plane."""
    formed = set(program.outputs)
    for number, node in reversed(list(enumerate(program.nodes, len(program.sources)))):
        if isinstance(node.step, Pool | GlobalPool):
            formed.add(number)
            if not pools_planes(program, number):
                formed.update(node.inputs)
        elif number in formed and not isinstance(node.step, Flatten):
            formed.update(node.inputs)
    specs = [program.spec(i) for i in range(program.n_values)]
    return max(math.prod(s.space) ** (2 if i in formed and not s.diagonal_spatial else 1) for i, s in enumerate(specs))


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
    (n1, n2), (b1, b2) = shape, block
    if (b1, b2) == shape:
        return fn(data1, data2, pairs)
    rows, columns = -(-n1 // b1), -(-n2 // b2)
    data1, data2 = _pad_last(data1, rows * b1), _pad_last(data2, columns * b2)
    pairs = jax.tree.map(lambda a: _pad_axis(_pad_axis(a, -2, rows * b1), -1, columns * b2), pairs)
    grid = [(i, j) for i in range(rows) for j in range(columns) if not symmetric or i * b1 < (j + 1) * b2]

    def compute(at: Array) -> list[Pairs]:
        i, j = at[0], at[1]

        def cut(a: Array) -> Array:
            return lax.dynamic_slice_in_dim(lax.dynamic_slice_in_dim(a, i * b1, b1, -2), j * b2, b2, -1)

        return fn(_take_last(data1, i, b1), _take_last(data2, j, b2), jax.tree.map(cut, pairs))

    blocks = lax.map(rematerialized(compute), jnp.asarray(np.array(grid)))
    where = np.zeros((rows, columns), int)
    for number, (i, j) in enumerate(grid):  # below the diagonal of a symmetric grid, any block does
        where[i, j] = number
    return jax.tree.map(lambda a: _join_grid(a[where])[..., :n1, :n2], blocks)


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


def _join_grid(a: Array) -> Array:
    """`(rows, columns, *positions, b1, b2) -> (*positions, rows * b1, columns * b2)`."""
    a = jnp.moveaxis(a, (0, 1), (-4, -2))
    return a.reshape(a.shape[:-4] + (a.shape[-4] * a.shape[-3], a.shape[-2] * a.shape[-1]))
