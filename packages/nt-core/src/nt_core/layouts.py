"""Index gymnastics of covariances stored over pairs of positions.

Full covariances are stored *zipped*, `(..., H, H, W, W)`: each axis of the first position is followed by the same axis
of the second. All functions leave the axes before `start` alone.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array


def zip_axes(x: Array, start: int = 0) -> Array:
    """Interleaves the two halves of the axes: `(..., X, Y, X', Y') -> (..., X, X', Y, Y')`."""
    n_pairs = _n_pairs(x, start)
    return jnp.transpose(x, _lead(start) + [start + i + half for i in range(n_pairs) for half in (0, n_pairs)])


def unzip_axes(x: Array, start: int = 0) -> Array:
    """Undoes `zip_axes`: `(..., X, X', Y, Y') -> (..., X, Y, X', Y')`."""
    n_pairs = _n_pairs(x, start)
    return jnp.transpose(x, _lead(start) + [start + 2 * i + half for half in (0, 1) for i in range(n_pairs)])


def transpose_zipped(x: Array, order: Sequence[int], start: int = 0) -> Array:
    """Reorders pairs of axes: pair `i` of the result is pair `order[i]` of `x`."""
    return jnp.transpose(x, _lead(start) + [start + 2 * i + half for i in order for half in (0, 1)])


def reverse_zipped(x: Array, start: int = 0) -> Array:
    """Reverses the order of pairs: `(..., H, H', W, W') -> (..., W, W', H, H')`."""
    return transpose_zipped(x, range(_n_pairs(x, start))[::-1], start)


def zipped_diagonal(x: Array, start: int = 0) -> Array:
    """Keeps the entries of equal positions: `(..., H, H, W, W) -> (..., H, W)`."""
    _n_pairs(x, start)
    # One gather for all axes. The index arrays broadcast against each other, which puts the result's axes in order.
    indices = np.ogrid[tuple(slice(n) for n in x.shape[start::2])]
    return x[(slice(None),) * start + tuple(i for index in indices for i in (index, index))]


def interleave_ones(x: Array, start: int, stop: int, second: bool) -> Array:
    """Gives each axis in `[start, stop)` a partner of size 1, behind it, or in front of it if it is the `second`."""
    pairs = [(1, n) if second else (n, 1) for n in x.shape[start:stop]]
    return jnp.reshape(x, x.shape[:start] + tuple(n for pair in pairs for n in pair) + x.shape[stop:])


def make_2d(x: Array, start: int = 0) -> Array:
    """Returns the matrices of a zipped array: rows run over the first positions, columns over the second.

    >>> make_2d(jnp.zeros((2, 3, 4, 5))).shape
    (8, 15)
    """
    rows, columns = (math.prod(x.shape[first::2]) for first in (start, start + 1))
    return jnp.reshape(unzip_axes(x, start), x.shape[:start] + (rows, columns))


def same_sample(x: Array) -> Array:
    """Keeps the entries of equal samples: `(n, n, ...) -> (n, ...)`."""
    return jnp.moveaxis(jnp.diagonal(x, axis1=0, axis2=1), -1, 0)


def to_positions(x: Array, batch_axis: int, channel_axis: int) -> Array:
    """Returns activations as `(n, positions, channels)`.

    >>> to_positions(jnp.zeros((2, 3, 4, 5)), batch_axis=0, channel_axis=1).shape
    (2, 20, 3)
    """
    x = jnp.moveaxis(x, (batch_axis, channel_axis), (0, -1))
    return jnp.reshape(x, (x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]))


def from_positions(x: Array, space: Sequence[int], batch_axis: int, channel_axis: int) -> Array:
    """Undoes `to_positions`, for spatial axes of the sizes `space`.

    >>> from_positions(jnp.zeros((2, 20, 3)), (4, 5), batch_axis=0, channel_axis=1).shape
    (2, 3, 4, 5)
    """
    x = jnp.reshape(x, (x.shape[0], *space, x.shape[-1]))
    return jnp.moveaxis(x, (0, -1), (batch_axis, channel_axis))


def _lead(start: int) -> list[int]:
    return list(range(start))


def _n_pairs(x: Array, start: int) -> int:
    n_pairs, rest = divmod(x.ndim - start, 2)
    if rest or n_pairs < 0:
        raise ValueError(f"Expected an even number of axes from axis {start} on, got an array of shape {x.shape}.")
    return n_pairs
