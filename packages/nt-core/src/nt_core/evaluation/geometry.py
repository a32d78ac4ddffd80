"""Which pairs of positions a covariance array holds, and how windows move over them.

All arrays here have their spatial axes first and end in batch axes: `(*pairs, n1, n2)` for two batches, `(*pairs, n)`
for every sample with itself. A *deficit* of a pair is `(var1 + var2) / 2 - covariance`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from nt_core.evaluation.fusion import constant, unfused
from nt_core.lowering import Pairs
from nt_core.lowering.windows import Window, add, along_axis, inside, wrap_pad

_T = TypeVar("_T")  # a tree of arrays


class Geometry(Protocol):
    """The pairs of positions that an array holds."""

    def first(self, x: Array) -> Array:
        """Lays `(*space, *batch)` out so that it varies with the first position of each pair."""
        ...

    def second(self, x: Array) -> Array:
        """The same for the second position, for what `continued` returns."""
        ...

    def continued(self, x: Array) -> Array:
        """Prepares `(*space, *batch)` for `second`."""
        ...

    def original(self, x: Array) -> Array:
        """Undoes `continued`."""
        ...

    def convolve(self, x: Pairs, along: Sequence[Window], variances: tuple[Array, Array] | None) -> Pairs:
        """Sums over windows that move both positions of a pair alike.

        Args:
          x: covariances, or deficits if `variances` is given, with their tangent kernel.
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

    second = continued = original = first

    def convolve(self, x: Pairs, along: Sequence[Window], variances: tuple[Array, Array] | None) -> Pairs:
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

    def continued(self, x: Array) -> Array:
        return x

    original = continued

    def convolve(self, x: Pairs, along: Sequence[Window], variances: tuple[Array, Array] | None) -> Pairs:
        def move(x: Pairs, variances: tuple[Array, Array] | None, axis: int, window: Window) -> Pairs:
            value = self._convolve(x.value, axis, window, variances)
            return Pairs(value, None if x.ntk is None else self._convolve(x.ntk, axis, window, None))

        for axis, window in enumerate(along):
            if window.is_trivial():
                continue
            x = unfused(partial(move, axis=axis, window=window), x, variances)
            if variances is not None:
                first, second = variances  # each by itself: under `jax.shard_map` they vary over different axes
                variances = _window_sum(first, axis, window), _window_sum(second, axis, window)
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
      offset: one number for each of them, in [0, size): traced, or of many planes as a NumPy array.
      scale: how many times further apart the pairs are than in the plane that was asked for.
    """

    space: tuple[int, ...]
    offset: tuple[Any, ...]
    scale: tuple[int, ...]

    def first(self, x: Array) -> Array:
        return x

    def second(self, x: Array) -> Array:
        at = (*self.offset, *(jnp.zeros_like(self.offset[0]) for _ in range(x.ndim - len(self.space))))
        return lax.dynamic_slice(x, at, (*self.space, *x.shape[len(self.space) :]))

    def continued(self, x: Array) -> Array:
        return unfused(lambda x: continued(x, len(self.space)), x)

    def original(self, x: Array) -> Array:
        return lax.slice(x, (0,) * x.ndim, (*self.space, *x.shape[len(self.space) :]))

    def convolve(self, x: Pairs, along: Sequence[Window], variances: tuple[Array, Array] | None) -> Pairs:
        plane = self
        for axis, window in enumerate(along):
            if not window.is_trivial():
                sum_inside = partial(_sum_inside, axis=axis, window=window)
                x = unfused(lambda x, d, f=sum_inside: x.map(partial(f, offset=d)), x, plane.offset[axis])
            plane = plane._after(axis, window)
        if variances is None or all(_stays_inside(window) for window in along):
            return x
        edges1, edges2 = self._edges(variances[0], along), self._mirrored()._edges(variances[1], along)
        return x._replace(value=x.value + (edges1 + plane.second(plane.continued(edges2))) / 2)

    def after(self, along: Sequence[Window]) -> "OffsetPlane":
        plane = self
        for axis, window in enumerate(along):
            plane = plane._after(axis, window)
        return plane

    def _after(self, axis: int, window: Window) -> "OffsetPlane":
        space, offset = list(self.space), list(self.offset)
        space[axis], offset[axis] = window.count, _divided(offset[axis], window.stride)
        return OffsetPlane(tuple(space), tuple(offset), self.scale)

    def _mirrored(self) -> "OffsetPlane":
        """The same pairs, but ordered by the second position."""
        offset = tuple(lax.rem(size - d, size) for d, size in zip(self.offset, self.space, strict=True))
        return OffsetPlane(self.space, offset, self.scale)

    def _edges(self, variance: Array, along: Sequence[Window]) -> Array:
        """Sums of the variance over the taps inside for the first position and in the padding for the second."""

        def move(x: _Edges, offset: Array, axis: int, window: Window) -> _Edges:
            outside = _outside(x.variance, axis, window, offset)
            return _Edges(
                add(outside, _sum_inside(x.edges, axis, window, offset)),
                window.sum(x.variance, axis),
            )

        plane, x = self, _Edges(constant(variance.shape, 0, variance.dtype, variance), variance)
        for axis, window in enumerate(along):
            if not window.is_trivial():
                # Small arrays, but without the barrier XLA would compute them anew for every pair of samples.
                x = unfused(partial(move, axis=axis, window=window), x, plane.offset[axis])
            plane = plane._after(axis, window)
        return x.edges


class _Edges(NamedTuple):
    """Of one batch: the sum over taps in the padding for the other position, and that over all taps."""

    edges: Array
    variance: Array


def _sum_inside(x: Array, axis: int, window: Window, offset: Array) -> Array:
    """Sums over the taps that lie inside for both positions of a pair, along one axis."""
    return add(
        window.under(x, k, axis)
        if window.is_inside(k)
        else _partner_inside(axis, window, k, offset, x) * window.under(x, k, axis)
        for k in range(window.taps)
    )


def _outside(x: Array, axis: int, window: Window, offset: Array) -> Iterator[Array]:
    """What lies under the other taps."""
    for k in range(window.taps):
        if not window.is_inside(k):
            yield (1 - _partner_inside(axis, window, k, offset, x)) * window.under(x, k, axis)


def _partner_inside(axis: int, window: Window, tap: int, offset: Array, like: Array) -> Array:
    """1 where a tap lies inside the image for the second position of a pair, 0 where it does not.

    Products of floating point numbers are vectorised by XLA where selections of shifted arrays are not.
    """
    partners = lax.rem(jnp.arange(window.count) + _divided(offset, window.stride), window.count)
    is_inside = inside(partners * window.stride + tap * window.dilation - window.low, window.size)
    return along_axis(is_inside.astype(like.dtype), axis, like.ndim)


def _stays_inside(window: Window) -> bool:
    return all(window.is_inside(k) for k in range(window.taps))


def _divided(offset: Array, stride: int) -> Array:
    return offset if stride == 1 else lax.div(offset, stride)


def continued(x: Array, n_space: int, axis: int = 0) -> Array:
    """Continues spatial axes periodically, such that an image that starts at any position lies in one piece.

    Args:
      axis: the first of them.
    """
    for a in range(axis, axis + n_space):
        x = wrap_pad(x, a, 0, x.shape[a] - 1)
    return x


def window_sums(x: _T, along: Sequence[Window]) -> _T:
    """Sums a tree of arrays `(*space, *batch)` over windows along every axis."""
    for axis, window in enumerate(along):
        if not window.is_trivial():
            x = _window_sum(x, axis, window)
    return x


def _window_sum(x: _T, axis: int, window: Window) -> _T:
    return unfused(partial(jax.tree.map, lambda a: window.sum(a, axis)), x)


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
