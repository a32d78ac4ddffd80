"""Which pairs of positions a covariance array holds, and how windows move over them.

All arrays here have their spatial axes first and end in batch axes: `(*pairs, n1, n2)` for two batches, `(*pairs, n)`
for every sample with itself. A *deficit* of a pair is `(var1 + var2) / 2 - covariance`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax.numpy as jnp
from jax import Array, lax

from nt_core.evaluation.fusion import unfused
from nt_core.lowering.windows import Window, add, along_axis, inside, wrap_pad


class Geometry(Protocol):
    """The pairs of positions that an array holds."""

    def first(self, x: Array) -> Array:
        """Lays `(*space, *batch)` out so that it varies with the first position of each pair."""
        ...

    def second(self, x: Array) -> Array:
        """The same for the second position."""
        ...

    def convolve(self, x: Array, along: Sequence[Window], variances: tuple[Array, Array] | None) -> Array:
        """Sums over windows that move both positions of a pair alike.

        Args:
          x: covariances, or deficits if `variances` is given.
          along: a window for each spatial axis.
          variances: of both batches, `(*space, *batch)`. A tap inside for one position of a pair and in the padding
            for the other has covariance 0, hence as its deficit half the variance of the former.
        """
        ...

    def after(self, along: Sequence[Window]) -> "Geometry":
        """Returns the geometry once windows have moved."""
        ...


class SamePosition:
    """Only pairs of equal positions: arrays `(*space, *batch)`."""

    def first(self, x: Array) -> Array:
        return x

    second = first

    def convolve(self, x: Array, along: Sequence[Window], variances: tuple[Array, Array] | None) -> Array:
        return window_sums(x, along)

    def after(self, along: Sequence[Window]) -> "SamePosition":
        return self


@dataclasses.dataclass(frozen=True)
class AllPairs:
    """All pairs of positions, zipped: arrays `(H, H, W, W, ..., *batch)`, with `n_space` spatial axes."""

    n_space: int

    def first(self, x: Array) -> Array:
        return jnp.expand_dims(x, tuple(2 * a + 1 for a in range(self.n_space)))

    def second(self, x: Array) -> Array:
        return jnp.expand_dims(x, tuple(2 * a for a in range(self.n_space)))

    def convolve(self, x: Array, along: Sequence[Window], variances: tuple[Array, Array] | None) -> Array:
        for axis, window in enumerate(along):
            if not window.is_trivial():
                x = unfused(lambda x, v, a=axis, w=window: self._convolve(x, a, w, v), x, variances)
            if variances is not None:
                variances = tuple(unfused(lambda v, a=axis, w=window: w.sum(v, a), v) for v in variances)
        return x

    def _convolve(self, x: Array, axis: int, window: Window, variances: tuple[Array, Array] | None) -> Array:
        rows, columns = 2 * axis, 2 * axis + 1
        padded = window.pad(x, (rows, columns))
        if variances is not None and not window.circular:
            var1, var2 = (window.pad(v, (axis,)) for v in variances)
            is_inside = inside(jnp.arange(-window.low, window.size + window.high), window.size)
            both = along_axis(is_inside, rows, x.ndim) & along_axis(is_inside, columns, x.ndim)
            padded = jnp.where(both, padded, (self.first(var1) + self.second(var2)) / 2)
        return add(window.tap(window.tap(padded, k, rows), k, columns) for k in range(window.taps))

    def after(self, along: Sequence[Window]) -> "AllPairs":
        return self


@dataclasses.dataclass(frozen=True)
class OffsetPlane:
    """The pairs `(p, p + offset)`, wrapped around the image: arrays `(*space, *batch)`.

    A plane holds those of offset `d` and those of offset `d - size` together, so that it is always a full image.
    Windows must keep the wrapping (see `Window.keeps_planes`).

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
            twice = unfused(lambda x, a=axis, n=size: wrap_pad(x, a, 0, n - 1), x)
            x = lax.dynamic_slice_in_dim(twice, offset, size, axis)
        return x

    def convolve(self, x: Array, along: Sequence[Window], variances: tuple[Array, Array] | None) -> Array:
        plane = self
        for axis, window in enumerate(along):
            x = unfused(lambda x, p=plane, a=axis, w=window: p._convolve(x, a, w), x)
            plane = plane._after(axis, window)
        if variances is None:
            return x
        edges1 = self._edges(variances[0], along)
        edges2 = plane.second(self._mirrored()._edges(variances[1], along))
        return x + (edges1 + edges2) / 2

    def after(self, along: Sequence[Window]) -> "OffsetPlane":
        plane = self
        for axis, window in enumerate(along):
            plane = plane._after(axis, window)
        return plane

    def _after(self, axis: int, window: Window) -> "OffsetPlane":
        space, offset = list(self.space), list(self.offset)
        space[axis], offset[axis] = window.count, offset[axis] // window.stride
        return OffsetPlane(tuple(space), tuple(offset), self.scale)

    def _mirrored(self) -> "OffsetPlane":
        """The same pairs, but ordered by the second position."""
        offset = tuple(-d % size for d, size in zip(self.offset, self.space, strict=True))
        return OffsetPlane(self.space, offset, self.scale)

    def _convolve(self, x: Array, axis: int, window: Window) -> Array:
        """Sums over the taps that lie inside for both positions of a pair, along one axis."""
        if window.is_trivial():
            return x
        return add(
            window.under(x, k, axis)
            if window.is_inside(k)
            else self._partner_inside(axis, window, k, x) * window.under(x, k, axis)
            for k in range(window.taps)
        )

    def _edges(self, variance: Array, along: Sequence[Window]) -> Array:
        """Sum of the variance over the taps inside for the first position and in the padding for the second."""
        plane, edges = self, jnp.zeros_like(variance)
        for axis, window in enumerate(along):

            def move(edges: Array, variance: Array, p=plane, a=axis, w=window) -> tuple[Array, Array]:
                only = [
                    (1 - p._partner_inside(a, w, k, variance)) * w.under(variance, k, a)
                    for k in range(w.taps)
                    if not w.is_inside(k)
                ]
                return add(only, p._convolve(edges, a, w)), w.sum(variance, a)

            # Small arrays, but without the barrier XLA would compute them anew for every pair of samples.
            edges, variance = unfused(move, edges, variance)
            plane = plane._after(axis, window)
        return edges

    def _partner_inside(self, axis: int, window: Window, tap: int, like: Array) -> Array:
        """1 where a tap lies inside the image for the second position of a pair, 0 where it does not.

        Products of floating point numbers are vectorised by XLA where selections of shifted arrays are not.
        """
        partners = (jnp.arange(window.count) + self.offset[axis] // window.stride) % window.count
        is_inside = inside(partners * window.stride + tap * window.dilation - window.low, window.size)
        return along_axis(is_inside.astype(like.dtype), axis, like.ndim)


def window_sums(x: Array, along: Sequence[Window]) -> Array:
    """Sums `(*space, *batch)` over windows along every axis."""
    for axis, window in enumerate(along):
        if not window.is_trivial():
            x = unfused(lambda x, a=axis, w=window: w.sum(x, a), x)
    return x


@dataclasses.dataclass(frozen=True)
class Sides:
    """Numbers of both samples, `(*space, *batch)` (variances, mostly), at both positions of each pair."""

    geometry: Geometry
    of_first: Array
    of_second: Array

    @property
    def first(self) -> Array:
        return self.geometry.first(self.of_first)

    @property
    def second(self) -> Array:
        return self.geometry.second(self.of_second)

    @property
    def mean(self) -> Array:
        return (self.first + self.second) / 2
