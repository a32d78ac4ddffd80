"""Which pairs of positions a covariance array holds, and how windows move over them.

All arrays here have their spatial axes first and end in batch axes: `(*pairs, n1, n2)` for two batches, `(*pairs, n)`
for every sample with itself. A *deficit* of a pair is `(var1 + var2) / 2 - covariance`.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Protocol

import jax.numpy as jnp
from jax import Array, lax

from nt_core.backends.xla.fusion import unfused


@dataclasses.dataclass(frozen=True)
class Window:
    """Windows along one axis of `size` positions, of which there are `count`."""

    size: int
    count: int
    taps: int
    stride: int
    dilation: int
    low: int
    high: int
    circular: bool

    def is_trivial(self) -> bool:
        return self.taps == 1 and self.stride == 1 and self.low == 0 and self.high == 0

    def positions(self, tap: int) -> Array:
        """The position under a tap, for every window; outside of [0, size) in the padding."""
        return jnp.arange(self.count) * self.stride + tap * self.dilation - self.low

    def pad(self, x: Array, axes: Sequence[int]) -> Array:
        """Pads axes with zeros, or wraps them around."""
        if not self.circular:
            widths = [(0, 0, 0)] * x.ndim
            for axis in axes:
                widths[axis] = (self.low, self.high, 0)
            return lax.pad(x, jnp.zeros((), x.dtype), widths)
        for axis in axes:
            x = wrap_pad(x, axis, self.low, self.high)
        return x

    def tap(self, padded: Array, tap: int, axis: int) -> Array:
        """The entries of a padded axis under a tap, one for every window."""
        start = tap * self.dilation
        limit = start + (self.count - 1) * self.stride + 1
        return lax.slice_in_dim(padded, start, limit, self.stride, axis)

    def sum(self, x: Array, axis: int) -> Array:
        """Sums over the windows along an axis."""
        if self.is_trivial():
            return x
        padded = self.pad(x, (axis,))
        return _add(self.tap(padded, k, axis) for k in range(self.taps))

    def counts(self) -> Array:
        """How many positions of every window lie inside."""
        if self.circular:
            return jnp.full((self.count,), self.taps)
        return _add(_inside(self.positions(k), self.size).astype(int) for k in range(self.taps))


class Geometry(Protocol):
    """The pairs of positions that an array holds."""

    def first(self, x: Array) -> Array:
        """Lays `(*space, *batch)` out so that it varies with the first position of each pair."""
        ...

    def second(self, x: Array) -> Array:
        """The same for the second position."""
        ...

    def convolve(self, x: Array, axis: int, window: Window, variances: tuple[Array, Array] | None) -> Array:
        """Sums over a window that moves both positions of a pair alike, along one spatial axis.

        Args:
          x: covariances, or deficits if `variances` is given.
          variances: of both batches, `(*space, *batch)`. A tap inside for one position of a pair and in the padding
            for the other has covariance 0, hence as its deficit half the variance of the former.
        """
        ...

    def after(self, axis: int, window: Window) -> "Geometry":
        """Returns the geometry once a window has moved along an axis."""
        ...


class SamePosition:
    """Only pairs of equal positions: arrays `(*space, *batch)`."""

    def first(self, x: Array) -> Array:
        return x

    second = first

    def convolve(self, x: Array, axis: int, window: Window, variances: tuple[Array, Array] | None) -> Array:
        return window.sum(x, axis)

    def after(self, axis: int, window: Window) -> "SamePosition":
        return self


@dataclasses.dataclass(frozen=True)
class AllPairs:
    """All pairs of positions, zipped: arrays `(H, H, W, W, ..., *batch)`, with `n_space` spatial axes."""

    n_space: int

    def first(self, x: Array) -> Array:
        return jnp.expand_dims(x, tuple(2 * a + 1 for a in range(self.n_space)))

    def second(self, x: Array) -> Array:
        return jnp.expand_dims(x, tuple(2 * a for a in range(self.n_space)))

    def convolve(self, x: Array, axis: int, window: Window, variances: tuple[Array, Array] | None) -> Array:
        if window.is_trivial():
            return x
        rows, columns = 2 * axis, 2 * axis + 1
        padded = window.pad(x, (rows, columns))
        if variances is not None and not window.circular:
            var1, var2 = (window.pad(v, (axis,)) for v in variances)
            inside = _inside(jnp.arange(-window.low, window.size + window.high), window.size)
            both = _along(inside, rows, x.ndim) & _along(inside, columns, x.ndim)
            padded = jnp.where(both, padded, (self.first(var1) + self.second(var2)) / 2)
        return _add(window.tap(window.tap(padded, k, rows), k, columns) for k in range(window.taps))

    def after(self, axis: int, window: Window) -> "AllPairs":
        return self


@dataclasses.dataclass(frozen=True)
class OffsetPlane:
    """The pairs `(p, p + offset)`, wrapped around the image: arrays `(*space, *batch)`.

    A plane holds those of offset `d` and those of offset `d - size` together, so that it is always a full image.
    Windows must keep the wrapping: `size == stride * count` on every axis (see `keeps_planes`).

    Attributes:
      space: sizes of the spatial axes.
      offset: one (traced) number for each of them, in [0, size).
      scale: how many times further apart the pairs are than in the plane that was asked for.
    """

    space: tuple[int, ...]
    offset: tuple[Array, ...]
    scale: tuple[int, ...]

    def first(self, x: Array) -> Array:
        return x

    def second(self, x: Array) -> Array:
        for axis, offset in enumerate(self.offset):
            size = self.space[axis]
            x = lax.dynamic_slice_in_dim(wrap_pad(x, axis, 0, size - 1), offset, size, axis)
        return x

    def convolve(self, x: Array, axis: int, window: Window, variances: tuple[Array, Array] | None) -> Array:
        if window.is_trivial():
            return x
        padded = wrap_pad(x, axis, window.low, window.high)
        if window.circular:
            return _add(window.tap(padded, k, axis) for k in range(window.taps))
        inside = [self._inside(axis, window, k) for k in range(window.taps)]
        total = _add(
            jnp.where(_along(in1 & in2, axis, x.ndim), window.tap(padded, k, axis), 0)
            for k, (in1, in2) in enumerate(inside)
        )
        if variances is None:
            return total

        def edges(variance: Array, only: list[Array]) -> Array:
            """Sum over the taps that are inside for this position and in the padding for its partner."""
            padded = wrap_pad(variance, axis, window.low, window.high)
            return _add(
                jnp.where(_along(mask, axis, x.ndim), window.tap(padded, k, axis), 0) for k, mask in enumerate(only)
            )

        # Small arrays, which XLA would otherwise compute anew for every pair of samples.
        edges1 = unfused(edges, variances[0], [in1 & ~in2 for in1, in2 in inside])
        edges2 = unfused(edges, self.second(variances[1]), [in2 & ~in1 for in1, in2 in inside])
        return total + (edges1 + edges2) / 2

    def after(self, axis: int, window: Window) -> "OffsetPlane":
        space, offset = list(self.space), list(self.offset)
        space[axis], offset[axis] = window.count, offset[axis] // window.stride
        return OffsetPlane(tuple(space), tuple(offset), self.scale)

    def _inside(self, axis: int, window: Window, tap: int) -> tuple[Array, Array]:
        """Whether a tap lies inside the image, for the first and for the second position."""
        offset_out = self.offset[axis] // window.stride
        windows = jnp.arange(window.count)
        partners = (windows + offset_out) % window.count
        shift = tap * window.dilation - window.low
        return tuple(_inside(w * window.stride + shift, window.size) for w in (windows, partners))  # type: ignore


def keeps_planes(window: Window) -> bool:
    """Whether a convolution maps offset planes to offset planes."""
    return window.size == window.stride * window.count


def wrap_pad(x: Array, axis: int, low: int, high: int) -> Array:
    """Continues an axis periodically."""
    size = x.shape[axis]
    if low == high == 0:
        return x
    repeats = [x] * (1 + math.ceil(low / size) + math.ceil(high / size))
    start = math.ceil(low / size) * size - low
    return lax.slice_in_dim(jnp.concatenate(repeats, axis), start, start + low + size + high, axis=axis)


def _inside(positions: Array, size: int) -> Array:
    return (positions >= 0) & (positions < size)


def _along(x: Array, axis: int, ndim: int) -> Array:
    """Lays a vector along an axis of an array of rank `ndim`."""
    return lax.expand_dims(x, tuple(a for a in range(ndim) if a != axis))


def _add(terms: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, terms)
