"""Pools offset planes one after another, such that loops stay loops in derivatives.

A loop accumulates by scattered additions and reads its planes from stacks, because the transposes of these cost as much
as they do: what is read by an index from an array outside of a loop would have a derivative as large as that array in
each of its iterations.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_core.evaluation import platform
from nt_core.evaluation.fusion import constant, rematerialized
from nt_core.grid import evenly
from nt_core.lowering import Pairs, Windows
from nt_core.lowering import windows as windows_
from nt_core.lowering.windows import along_axis, inside

# Taps of pools in one turn of their loop: all of those that do not overlap.
_TAPS_AT_ONCE = 4

Offset = tuple[Array, ...]  # one number for each spatial axis


def pool(along: Windows, plane: Callable[[Offset, Any], Pairs], stacks: Any, positions: int) -> Pairs:
    """Returns sums over all pairs of windows. Besides the pooled output only one plane is in memory, or on GPUs a few.

    Args:
      along: the windows.
      plane: `plane(offset, planes)` returns the plane of an offset; `planes` is a tree of what it reads.
      stacks: the same tree for all planes, with a leading axis, in the order of `all_offsets`.
      positions: of the largest plane from which one is computed.
    """
    n = len(along)
    xs = (tuple(jnp.array(offset) for offset in all_offsets(along)), stacks)
    at_once = 1
    if platform.is_gpu():
        n_pairs = math.prod(_shapes(plane, xs).value.shape[n:])
        at_once = max(1, platform.NUMBERS_ON_GPU // max(1, positions * n_pairs))
    if all(w.count == 1 for w in along):
        of_plane = rematerialized(lambda x: plane(*x).map(partial(_sum_space, n_space=n)))
        sums = lax.map(of_plane, xs, batch_size=at_once if at_once > 1 else None)
        return sums.map(lambda a: _add_pair_axes(_sum_in_two(a), n))

    def add(sums: Pairs, x: tuple[Offset, Pairs]) -> tuple[Pairs, None]:
        added = (None if a is None else _add_plane(s, a, x[0], along) for s, a in zip(sums, x[1], strict=True))
        return Pairs(*added), None  # type: ignore[arg-type]

    def accumulate(sums: Pairs, x: tuple[Offset, Any]) -> tuple[Pairs, None]:
        return add(sums, (x[0], plane(*x)))

    def accumulate_group(sums: Pairs, group: Any) -> tuple[Pairs, None]:
        (offsets, planes), exist = group
        found = jax.vmap(plane)(offsets, planes)
        found = found.map(lambda a: jnp.where(lax.expand_dims(exist, range(1, a.ndim)), a, 0))
        return lax.scan(add, sums, (offsets, found))  # one after another: they share windows

    counts, like = windows_.counts(along), _shapes(plane, xs)
    zeros = like.map(lambda a: constant((math.prod(counts), *counts, *a.shape[n:]), 0, a.dtype, stacks))
    if at_once == 1:
        sums, _ = lax.scan(rematerialized(accumulate), zeros, xs)
    else:
        sums, _ = lax.scan(rematerialized(accumulate_group), zeros, _in_groups(xs, at_once))
    return sums.map(lambda a: _planes_to_pairs(a.reshape(counts + a.shape[1:]), n))


def _shapes(plane: Callable[[Offset, Any], Pairs], xs: Any) -> Pairs:
    """Returns the shapes of a plane's arrays."""
    return jax.eval_shape(lambda xs: plane(*jax.tree.map(lambda a: a[0], xs)), xs)


def _in_groups(xs: Any, most: int) -> tuple[Any, Array]:
    """Cuts arrays into groups of one size, with zeros at the end, and says which of their members exist."""
    n = len(xs[0][0])
    size = evenly(n, most)
    count = -(-n // size)

    def cut(a: Array) -> Array:
        a = jnp.concatenate([a, jnp.zeros((count * size - n, *a.shape[1:]), a.dtype)])
        return a.reshape(count, size, *a.shape[1:])

    return jax.tree.map(cut, xs), cut(jnp.ones(n, bool))


def all_offsets(along: Windows) -> tuple[np.ndarray, ...]:
    """Returns the offsets of the planes that a pool reads, an array for each spatial axis."""
    return tuple(np.indices(tuple(w.size for w in along)).reshape(len(along), -1))


def stacked(x: Array, offsets: tuple[np.ndarray, ...]) -> Array:
    """Takes planes `(len(offsets), H, W, ..., *batch)` from zipped pairs `(H, H, W, W, ..., *batch)`.

    Args:
      offsets: an array for each spatial axis.
    """
    n, space = len(offsets), x.shape[: 2 * len(offsets) : 2]
    for axis in range(n):
        x = _to_offsets(x, 2 * axis)
    x = jnp.transpose(x, [*range(1, 2 * n, 2), *range(0, 2 * n, 2), *range(2 * n, x.ndim)])
    x = x.reshape((-1, *x.shape[n:]))
    index = np.ravel_multi_index(offsets, space)
    return x if np.array_equal(index, np.arange(len(x))) else x[index]


def same_position(x: Array, n_space: int) -> Array:
    """Takes the pairs of equal positions `(H, W, ..., *batch)` from zipped pairs."""
    for axis in range(n_space):
        size = x.shape[axis]
        flat = x.reshape((*x.shape[:axis], size * size, *x.shape[axis + 2 :]))
        x = lax.slice_in_dim(flat, 0, None, size + 1, axis)
    return x


def _to_offsets(x: Array, axis: int) -> Array:
    """From positions `(p, p')` at two axes to `(p, d)`, for `p' = p + d` modulo their number.

    Slices of rows that overlap by one: their transposes are slices too, where that of an index is a slow scatter.
    """
    size, before, after = x.shape[axis], x.shape[:axis], x.shape[axis + 2 :]
    flat = jnp.concatenate([x, x], axis + 1).reshape((*before, 2 * size * size, *after))
    flat = lax.pad(flat, jnp.zeros((), x.dtype), [(0, size if i == axis else 0, 0) for i in range(flat.ndim)])
    return lax.slice_in_dim(flat.reshape((*before, size, 2 * size + 1, *after)), 0, size, 1, axis + 1)


def _from_offsets(x: Array, axis: int) -> Array:
    """From `(p, d)` at two axes back to pairs of positions."""
    size, before, after = x.shape[axis], x.shape[:axis], x.shape[axis + 2 :]
    flat = jnp.concatenate([x, x], axis + 1).reshape((*before, 2 * size * size, *after))
    rows = lax.slice_in_dim(flat, size, None, 1, axis).reshape((*before, size, 2 * size - 1, *after))
    return lax.slice_in_dim(rows, 0, size, 1, axis + 1)


def _planes_to_pairs(planes: Array, n_space: int) -> Array:
    """Turns `(*offsets, *positions, *batch)` into zipped pairs `(H, H, W, W, ..., *batch)`."""
    order = [a for axis in range(n_space) for a in (n_space + axis, axis)]
    x = jnp.transpose(planes, (*order, *range(2 * n_space, planes.ndim)))
    for axis in range(n_space):
        x = _from_offsets(x, 2 * axis)
    return x


def _add_plane(sums: Any, plane: Array, offset: Offset, along: Windows) -> Array:
    """Adds a plane to pooled planes `(offsets, *positions, *batch)`."""
    n = len(along)
    for axis, window in enumerate(along):
        plane = window.pad(plane, (axis,))
    ranges = [range(r) for w in along for r in (w.taps, -(-w.taps // w.stride))]
    taps = jnp.array(list(itertools.product(*ranges))).reshape(-1, n, 2)
    slots, exist = jax.vmap(partial(_tap, along=along), (0, None))(taps, offset)
    numbers = lax.ScatterDimensionNumbers(tuple(range(plane.ndim)), (0,), (0,))

    def add_tap(sums: Array, x: tuple[Array, Array, Array]) -> tuple[Array, None]:
        tap, slot, exists = x
        piece = plane
        for axis, window in enumerate(along):
            piece = window.traced_tap(piece, tap[axis, 0], axis)
        piece = jnp.where(lax.expand_dims(exists, range(n, plane.ndim)), piece, 0)
        return lax.scatter_add(sums, slot, piece, numbers, mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS), None

    return lax.scan(add_tap, sums, (taps, slots, exist), unroll=min(len(taps), _TAPS_AT_ONCE))[0]


def _tap(tap: Array, offset: Offset, along: Windows) -> tuple[Array, Array]:
    """Under which pairs of windows the pairs of positions of a plane lie.

    The pair (p, p + d) lies under tap a of window P and tap b of window P' wherever p = s P + a and p + d = s P' + b:
    for given d and a, that is for one b in every stride.

    Args:
      tap: a along each axis, and in which stride b is, `(n_space, 2)`.

    Returns:
      The number of the offset from P to P', `(1,)`, and whether there is such a pair, for every P.
    """
    slot, exists = jnp.zeros((1,), int), jnp.ones(windows_.counts(along), bool)
    for axis, (window, d) in enumerate(zip(along, offset, strict=True)):
        a, k = tap[axis, 0], tap[axis, 1]
        # Of numbers that are not negative, `lax.rem` and `lax.div` are the operations that Python has.
        b = lax.rem(a + d, window.stride) + k * window.stride
        offset_along = lax.rem(lax.div(a + d, window.stride) - k + window.taps * window.count, window.count)
        slot = slot * window.count + offset_along
        exists &= b < window.taps
        if not window.circular:
            p = window.positions(a)
            other = lax.rem(p + d + window.size, window.size) + window.low - b
            last = (window.count - 1) * window.stride
            exists &= along_axis(inside(p, window.size) & (other >= 0) & (other <= last), axis, len(along))
    return slot, exists


def _sum_space(x: Array, n_space: int) -> Array:
    """Sums over positions, axis by axis: fewer terms in a row means less rounding."""
    for _ in range(n_space):
        x = jnp.sum(x, 0)
    return x


def _sum_in_two(x: Array) -> Array:
    """Sums over the leading axis in rows of about its square root, for less rounding."""
    row = math.isqrt(x.shape[0])
    while x.shape[0] % row:
        row -= 1
    return jnp.sum(jnp.sum(x.reshape((row, -1) + x.shape[1:]), 1), 0)


def _add_pair_axes(x: Array, n_space: int) -> Array:
    return x.reshape((1, 1) * n_space + x.shape)
