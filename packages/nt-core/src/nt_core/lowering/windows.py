"""Windows that move over the axes of images: all that is known of them before any number is."""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class Window:
    """Windows along one axis of `size` positions, of which there are `count`.

    Attributes:
      low, high: positions added before the axis and after it: zeros, or with `circular` those of its other end.
    """

    size: int
    count: int
    taps: int
    stride: int
    dilation: int
    low: int
    high: int
    circular: bool

    def is_trivial(self) -> bool:
        """Whether every window is one position, and every position one window."""
        return self.taps == 1 and self.stride == 1 and self.low == 0 and self.high == 0

    def is_dilated(self) -> bool:
        """Whether positions under neighbouring taps are no neighbours."""
        return self.taps > 1 and self.dilation > 1

    def keeps_planes(self) -> bool:
        """Whether pairs of positions a wrapped offset apart come from such pairs, for windows that move alike."""
        return self.size == self.stride * self.count

    def covers_axis(self) -> bool:
        """Whether there is one window, over all positions."""
        return self.count == 1 and self.low == self.high == 0 and self.taps == self.size and not self.circular

    def positions(self, tap: int | Array) -> Array:
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

    def traced_tap(self, padded: Array, tap: Array, axis: int) -> Array:
        """The same for a traced tap."""
        span = (self.count - 1) * self.stride + 1
        entries = lax.dynamic_slice_in_dim(padded, tap * self.dilation, span, axis)
        return lax.slice_in_dim(entries, 0, None, self.stride, axis)

    def under(self, x: Array, tap: int, axis: int) -> Array:
        """The entries under a tap, one for every window, and 0 in the padding."""
        if self.circular:
            return self.tap(self.pad(x, (axis,)), tap, axis)
        start, stop = self._span(tap)
        widths = [(0, 0, 0)] * x.ndim
        widths[axis] = (-start, stop - self.size, 0)
        x = lax.pad(x, jnp.zeros((), x.dtype), widths)
        return x if self.stride == 1 else lax.slice_in_dim(x, 0, None, self.stride, axis)

    def is_inside(self, tap: int) -> bool:
        """Whether a tap is inside the image for every window."""
        start, stop = self._span(tap)
        return self.circular or (start >= 0 and stop <= self.size)

    def _span(self, tap: int) -> tuple[int, int]:
        start = tap * self.dilation - self.low
        return start, start + (self.count - 1) * self.stride + 1

    def sum(self, x: Array, axis: int) -> Array:
        """Sums over the windows along an axis."""
        if self.is_trivial():
            return x
        return add(self.under(x, k, axis) for k in range(self.taps))

    def counts(self) -> Array:
        """How many positions of every window lie inside."""
        if self.circular:
            return jnp.full((self.count,), self.taps)
        return add(inside(self.positions(k), self.size).astype(int) for k in range(self.taps))


Windows = tuple[Window, ...]  # one for each spatial axis


def size(along: Windows) -> int:
    """Number of taps of a window."""
    return math.prod(w.taps for w in along)


def counts(along: Windows) -> tuple[int, ...]:
    """Number of windows along each axis."""
    return tuple(w.count for w in along)


def positions_inside(along: Windows) -> Array:
    """Number of positions inside every window, `(*space,)`."""
    total = jnp.ones((1,) * len(along), int)
    for axis, window in enumerate(along):
        total = total * along_axis(window.counts(), axis, len(along))
    return total


def sums(along: Windows, x: Array) -> Array:
    """Sums `(*space, *batch)` over windows. In a jitted computation of many such sums, see `evaluation/fusion.py`."""
    for axis, window in enumerate(along):
        x = window.sum(x, axis)
    return x


def wrap_pad(x: Array, axis: int, low: int, high: int) -> Array:
    """Continues an axis periodically."""
    size = x.shape[axis]
    if low == high == 0:
        return x
    repeats = [x] * (1 + math.ceil(low / size) + math.ceil(high / size))
    start = math.ceil(low / size) * size - low
    return lax.slice_in_dim(jnp.concatenate(repeats, axis), start, start + low + size + high, axis=axis)


def inside(positions: Array, size: int) -> Array:
    """Which positions lie inside an axis."""
    return (positions >= 0) & (positions < size)


def along_axis(x: Array, axis: int, ndim: int) -> Array:
    """Lays a vector along an axis of an array of rank `ndim`."""
    return lax.expand_dims(x, tuple(a for a in range(ndim) if a != axis))


def add(terms: Iterable[Array], *start: Array) -> Array:
    """Sums arrays one after another."""
    return functools.reduce(operator.add, terms, *start)
