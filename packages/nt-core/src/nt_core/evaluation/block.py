"""Evaluates a lowered program on a block of pairs of samples."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array, lax

from nt_core.evaluation.fusion import constant, rematerialized, unfused
from nt_core.evaluation.geometry import AllPairs, Geometry, OffsetPlane, SamePosition, Sides, window_sums
from nt_core.evaluation.statistics import Statistics
from nt_core.lowering import Form, Lowered, LoweredNode, Pairs, Primitive, Repeated, Windows
from nt_core.lowering import windows as windows_
from nt_core.lowering.primitives import (
    Dropout,
    Dual,
    Flatten,
    Gather,
    Pool,
    Product,
    Rescale,
    Sum,
    Tied,
    Untie,
    as_covariance,
)
from nt_core.lowering.windows import along_axis

# Images with fewer positions are pooled from all their pairs at once: the loop over planes would cost more.
_MIN_POSITIONS_FOR_PLANES = 32
# Taps of pools in one turn of their loop: all of those that do not overlap.
_TAPS_AT_ONCE = 4


def pools_planes(lowered: Lowered, number: int) -> bool:
    """Whether a pool is evaluated one offset plane after another.

    Every layer from what mixed pairs before it to this pool must map offset planes to offset planes.
    """
    pending, seen = [number], set()
    while pending:
        i = pending.pop()
        node = lowered.node(i)
        if i in seen or node is None or (i != number and mixes_pairs(node.primitive)):
            continue
        seen.add(i)
        if i == number and math.prod(lowered.input_form(node).space) < _MIN_POSITIONS_FOR_PLANES:
            return False
        if isinstance(node.primitive, Pool) and any(w.is_dilated() for w in node.primitive.windows):
            return False
        if isinstance(node.primitive, Tied | Pool) and not all(w.keeps_planes() for w in node.primitive.windows):
            return False
        pending.extend(node.inputs)
    return True


def mixes_pairs(primitive: Primitive) -> bool:
    """Whether a pair of positions after a primitive comes from pairs that lie differently far apart."""
    return isinstance(primitive, Pool | Flatten | Gather | Untie)


class Loader(Protocol):
    """Forms the covariances of sources."""

    def __call__(self, number: int, geometry: Geometry) -> Pairs:
        """Returns a source for the pairs of positions of `geometry`, as a deficit if that is its form."""
        ...

    def identical(self, space: tuple[int, ...], geometry: Geometry, ndim: int) -> Array:
        """Which pairs are known to be of one sample at one position, broadcasting against pairs of rank `ndim`."""
        ...

    def same(self, space: tuple[int, ...], geometry: Geometry, ndim: int) -> Array:
        """Which pairs are taken for one sample at one position by dropout."""
        ...


class Block:
    """The pairs of two batches, or of one batch with itself sample by sample.

    Args:
      lowered: what to evaluate.
      first, second: statistics of the batches, laid out to broadcast against pairs: `(*space, n1, 1)` and
        `(*space, 1, n2)`; or both `(*space, n)` and the same object, for each sample with itself.
      load: forms the covariances of sources.
      ntk: evaluate the tangent kernel.
      pool_sums: `pool_sums(block, number)`, in the place of `Block.pool_sums`.
    """

    def __init__(
        self,
        lowered: Lowered,
        first: Statistics,
        second: Statistics,
        load: Loader,
        ntk: bool,
        pool_sums: "Callable[[Block, int], Pairs] | None" = None,
    ) -> None:
        self._lowered = lowered
        self._first = first
        self._second = second
        self._load = load
        self._ntk = ntk
        self._pool_sums = pool_sums or Block.pool_sums
        self._averages: dict[int, Pairs] = {}  # of pools, before their deficits are completed
        self._mixed: dict[int, Pairs] = {}  # of what mixes pairs

    @property
    def statistics(self) -> Statistics:
        """Of the first batch."""
        return self._first

    def covariance(self, value: int) -> Pairs:
        """Returns the covariances (never deficits) of a value at all the positions that are stored of it."""
        geometry = _stored(self._lowered.forms[value])
        return self._as_covariance(value, self.evaluate(value, geometry), geometry)

    def evaluate(self, value: int, geometry: Geometry) -> Pairs:
        """Returns a value for the pairs of positions of `geometry`, in its form."""
        wanted = self._pull(value, geometry)
        target = _key(value, geometry)
        results: dict[tuple, Pairs] = {}
        for key in sorted(wanted):
            number, geometry = key[0], wanted[key]
            node = self._lowered.node(number)
            if node is None:
                results[key] = self._load(number, geometry)
            elif mixes_pairs(node.primitive):
                stored = _stored(self._lowered.forms[number])
                results[key] = self.mixed(number).map(partial(select, stored=stored, wanted=geometry))
            else:
                before = self._before(node, geometry)
                inputs = [results[_key(i, before)] for i in node.inputs]
                results[key] = self._apply(number, node, inputs, before, geometry)
        return results[target]

    def mixed(self, number: int) -> Pairs:
        """Returns the stored pairs of what mixes pairs, evaluated once."""
        if number not in self._mixed:
            node = self._lowered.node(number)
            assert node is not None
            match node.primitive:
                case Flatten():
                    mix = self._flatten
                case Gather():
                    mix = self._gather
                case Untie():
                    mix = self._untie
                case _:
                    mix = self._pool
            self._mixed[number] = mix(number, node)
        return self._mixed[number]

    def pool_average(self, number: int) -> Pairs:
        """Returns what a pool makes of its input's pairs `(*pairs, *batch)`; deficits are those that were averaged."""
        if number not in self._averages:
            primitive = self._pool_of(number)
            sums = self._pool_sums(self, number)
            size, pairs = primitive.divisors(sums.value.dtype), AllPairs(len(primitive.windows))
            divisor = _trailing(pairs.first(size) * pairs.second(size), sums.value.ndim)
            self._averages[number] = sums.map(lambda a: a / divisor)
        return self._averages[number]

    def pool_sums(self, number: int) -> Pairs:
        """Returns the sums over all pairs of windows of a pool, in its form."""
        node = self._lowered.node(number)
        assert node is not None
        (source,), along = node.inputs, self._pool_of(number).windows

        def inputs(geometry: Geometry) -> Pairs:
            return self._in_form(source, number, self.evaluate(source, geometry), geometry)

        if pools_planes(self._lowered, number):
            return _pool_planes(along, inputs)
        return _pool_all_pairs(along, inputs(AllPairs(len(along))))

    # Walking the graph

    def _pull(self, value: int, geometry: Geometry) -> dict[tuple, Geometry]:
        """Finds what has to be evaluated, back to sources and to what mixes pairs, and for which pairs of positions.

        The keys sort in the order of evaluation. A strided layer reads other offset planes than it writes.
        """
        wanted = {_key(value, geometry): geometry}
        pending = [(value, geometry)]
        while pending:
            number, geometry = pending.pop()
            node = self._lowered.node(number)
            if node is None or mixes_pairs(node.primitive):
                continue
            before = self._before(node, geometry)
            for i in node.inputs:
                if _key(i, before) not in wanted:
                    wanted[_key(i, before)] = before
                    pending.append((i, before))
        return wanted

    def _before(self, node: LoweredNode, geometry: Geometry) -> Geometry:
        """The pairs of positions that a primitive reads to give those of `geometry`."""
        primitive = node.primitive
        if not isinstance(geometry, OffsetPlane) or not isinstance(primitive, Tied) or not primitive.windows:
            return geometry
        strides = [w.stride for w in primitive.windows]
        at = [primitive.order.index(a) for a in range(len(strides))]
        offset = tuple(geometry.offset[i] * s for i, s in zip(at, strides, strict=True))
        scale = tuple(geometry.scale[i] * s for i, s in zip(at, strides, strict=True))
        return OffsetPlane(self._lowered.input_form(node).space, offset, scale)

    # Forms

    def _is_deficit(self, number: int) -> bool:
        return self._lowered.forms[number].deficit

    def _variances(self, number: int, geometry: Geometry) -> Sides:
        return Sides(geometry, self._first.variance[number], self._second.variance[number])

    def _as_covariance(self, number: int, x: Pairs, geometry: Geometry) -> Pairs:
        return as_covariance(x, self._variances(number, geometry)) if self._is_deficit(number) else x

    def _in_form(self, number: int, of: int, x: Pairs, geometry: Geometry) -> Pairs:
        """A value in the form of another one that is computed from it."""
        return x if self._is_deficit(of) else self._as_covariance(number, x, geometry)

    # Primitives that keep pairs apart

    def _apply(self, number: int, node: LoweredNode, inputs: list[Pairs], before: Geometry, after: Geometry) -> Pairs:
        as_deficit, primitive = self._is_deficit(number), node.primitive
        in_form = [self._in_form(i, number, x, before) for i, x in zip(node.inputs, inputs, strict=True)]

        # Of what is no deficit, variances are not known, nor read.
        variances = [self._variances(i, before) if self._is_deficit(i) else None for i in node.inputs]
        match primitive:
            case Repeated():
                return self._repeated(number, primitive, inputs[0], before)
            case Tied():
                return self._tied(number, node, primitive, in_form[0], before, after)
            case Dual():
                assert variances[0] is not None
                return primitive.pairs(inputs[0], as_deficit, variances[0], self._variances_after_dual(node, after))
            case Rescale():
                scales = Sides(after, self._first.scale[number], self._second.scale[number])
                return primitive.pairs(in_form[0], as_deficit, scales, variances[0])
            case Sum():
                return primitive.pairs(in_form)
            case Product():
                return primitive.pairs(in_form, as_deficit, variances)
            case Dropout():
                is_same = self._load.same(self._lowered.input_form(node).space, after, inputs[0].value.ndim)
                return primitive.pairs(in_form[0], as_deficit, is_same, variances[0])
        raise NotImplementedError(f"The xla backend does not know the primitive {type(primitive).__name__}.")

    def _variances_after_dual(self, node: LoweredNode, geometry: Geometry) -> Sides:
        """Formed anew rather than kept: where they are read, the value is no deficit, and they are not needed again."""
        (source,), dual = node.inputs, node.primitive
        assert isinstance(dual, Dual)
        return Sides(geometry, *(dual.variance(s.variance[source]) for s in (self._first, self._second)))

    def _repeated(self, number: int, primitive: Repeated, x: Pairs, geometry: Geometry) -> Pairs:
        ntk = self._ntk and primitive.body.forms[0].has_ntk
        if x.ntk is None and ntk:
            x = Pairs(x.value, jnp.zeros_like(x.value))

        def apply(x: Pairs, iteration: tuple[Lowered, Statistics, Statistics]) -> tuple[Pairs, None]:
            body, first, second = iteration
            return type(self)(body, first, second, _Constant(x), ntk).evaluate(body.outputs[0], geometry), None

        none = Statistics({})
        xs = (primitive.body, self._first.repeated.get(number, none), self._second.repeated.get(number, none))
        x, _ = lax.scan(rematerialized(apply), x, xs)
        return x

    def _tied(
        self, number: int, node: LoweredNode, primitive: Tied, x: Pairs, before: Geometry, after: Geometry
    ) -> Pairs:
        (source,), along = node.inputs, primitive.windows
        as_deficit = self._is_deficit(number)
        variances = (self._first.variance[source], self._second.variance[source]) if as_deficit else None
        sums = Pairs(
            before.convolve(x.value, along, variances),
            None if x.ntk is None else before.convolve(x.ntk, along, None),
        )
        sums = sums.map(partial(permute, geometry=before, order=primitive.order))

        def variance_average() -> Array:
            of_samples = (permute(window_sums(v, along), SamePosition(), primitive.order) for v in variances or ())
            return Sides(after, *of_samples).mean / primitive.n_taps

        after_it = self._variances(number, after) if as_deficit else None
        return primitive.pairs(sums, as_deficit, as_deficit, self._ntk, variance_average, after_it)

    # Primitives that mix pairs

    def _flatten(self, number: int, node: LoweredNode) -> Pairs:
        (source,) = node.inputs
        x = self._in_form(source, number, self.evaluate(source, SamePosition()), SamePosition())
        axes = tuple(range(len(self._lowered.forms[source].space)))
        return x.map(partial(jnp.mean, axis=axes))

    def _gather(self, number: int, node: LoweredNode) -> Pairs:
        primitive, (source,) = node.primitive, node.inputs
        assert isinstance(primitive, Gather)
        stored = _stored(self._lowered.forms[number])
        in_pair = 2 if isinstance(stored, AllPairs) else 1

        def copied(a: Array) -> Array:
            for axis in range(in_pair * len(primitive.positions)):
                a = primitive.copies(a, axis // in_pair, axis)
            return a

        x = self._in_form(source, number, self.evaluate(source, stored), stored)
        x = unfused(lambda x: x.map(copied), x)
        if not self._is_deficit(number):
            return x
        # A zero has no covariance with anything: the deficit is half the variance of the other.
        is_copy = primitive.is_copy()
        both = _trailing(stored.first(is_copy) & stored.second(is_copy), x.value.ndim)
        return Pairs(jnp.where(both, x.value, self._variances(number, stored).mean), x.ntk)

    def _untie(self, number: int, node: LoweredNode) -> Pairs:
        (source,), form = node.inputs, self._lowered.forms[number]
        stored = _stored(form)
        x = self._in_form(source, number, self.evaluate(source, SamePosition()), SamePosition())
        if isinstance(stored, SamePosition):
            return x
        position = jnp.arange(math.prod(form.space)).reshape(form.space)
        same = _trailing(stored.first(position) == stored.second(position), len(form.space) + x.value.ndim)
        independent = self._variances(number, stored).mean if self._is_deficit(number) else 0
        value = jnp.where(same, stored.first(x.value), independent)
        return Pairs(value, None if x.ntk is None else jnp.where(same, stored.first(x.ntk), 0))

    def _pool_of(self, number: int) -> Pool:
        node = self._lowered.node(number)
        assert node is not None and isinstance(node.primitive, Pool)
        return node.primitive

    def _pool(self, number: int, node: LoweredNode) -> Pairs:
        primitive, (source,) = self._pool_of(number), node.inputs
        n_space = len(primitive.windows)
        if self._lowered.forms[source].same_position:
            x = self._in_form(source, number, self.evaluate(source, SamePosition()), SamePosition())
            x = x.map(partial(pool_same_position, primitive))
            return x if primitive.keeps_axes else _without_axes(x, n_space)
        x = self.pool_average(number)
        if self._is_deficit(number):
            x = Pairs(self._pooled_deficit(number, primitive, source, x.value), x.ntk)
        return x if primitive.keeps_axes else _without_axes(x, 2 * n_space)

    def _pooled_deficit(self, number: int, primitive: Pool, source: int, average: Array) -> Array:
        along, pairs = primitive.windows, AllPairs(len(primitive.windows))
        held = _trailing(windows_.positions_inside(along), average.ndim - len(along))
        sums = [windows_.sums(along, s.variance[source]) for s in (self._first, self._second)]
        return primitive.deficit(
            average,
            own=Sides(pairs, self._first.self_deficit[number], self._second.self_deficit[number]),
            sums=Sides(pairs, *sums),
            inside=Sides(pairs, held, held),
            is_identical=self._load.identical(windows_.counts(along), pairs, average.ndim),
        )


class _Constant:
    """The source of the body of a loop: what the iteration before left."""

    def __init__(self, x: Pairs) -> None:
        self._x = x

    def __call__(self, number: int, geometry: Geometry) -> Pairs:
        return self._x

    def identical(self, space: tuple[int, ...], geometry: Geometry, ndim: int) -> Array:
        raise NotImplementedError("Repeated blocks hold no pools.")

    def same(self, space: tuple[int, ...], geometry: Geometry, ndim: int) -> Array:
        raise NotImplementedError("Repeated blocks hold no dropout.")


def pool_same_position(primitive: Pool, x: Array) -> Array:
    """Pools numbers of equal positions, `(*space, *batch)`, whose entries at different positions are 0."""
    sums = windows_.sums(primitive.windows, x)
    return sums / _trailing(primitive.divisors(x.dtype), x.ndim) ** 2


def _without_axes(x: Pairs, n: int) -> Pairs:
    """Drops leading axes of size 1."""
    return x.map(lambda a: a.reshape(a.shape[n:]))


def select(x: Array, stored: Geometry, wanted: Geometry) -> Array:
    """Picks the pairs of one geometry from those of another that holds them."""
    if isinstance(stored, SamePosition) or isinstance(wanted, AllPairs):
        return x
    assert isinstance(stored, AllPairs)
    rows, columns = [], []
    for axis in range(stored.n_space):
        size = x.shape[2 * axis]
        position = jnp.arange(size)
        partner = (position + wanted.offset[axis]) % size if isinstance(wanted, OffsetPlane) else position
        shape = [1] * stored.n_space
        shape[axis] = size
        rows.append(position.reshape(shape))
        columns.append(partner.reshape(shape))
    return x[tuple(i for pair in zip(rows, columns, strict=True) for i in pair)]


def permute(x: Array, geometry: Geometry, order: tuple[int, ...]) -> Array:
    """Reorders spatial axes."""
    if order == tuple(range(len(order))):
        return x
    if isinstance(geometry, AllPairs):
        order = tuple(a for i in order for a in (2 * i, 2 * i + 1))
    return jnp.transpose(x, order + tuple(range(len(order), x.ndim)))


def _pool_all_pairs(along: Windows, x: Pairs) -> Pairs:
    def pooled(a: Array) -> Array:
        for axis, window in enumerate(along):
            a = window.sum(window.sum(a, 2 * axis), 2 * axis + 1)
        return a

    return unfused(lambda x: x.map(pooled), x)


def _pool_planes(along: Windows, inputs: Callable[[Geometry], Pairs]) -> Pairs:
    """Pools the offset planes one after another: only one of them is in memory, besides the pooled output."""
    space = tuple(w.size for w in along)

    def plane(index: Array) -> tuple[Pairs, tuple[Array, ...]]:
        offset = jnp.unravel_index(index, space)
        return inputs(OffsetPlane(space, tuple(offset), (1,) * len(offset))), tuple(offset)

    indices = jnp.arange(math.prod(space))
    if all(w.count == 1 for w in along):

        def total(index: Array) -> Pairs:
            x, _ = plane(index)
            return x.map(partial(_sum_space, n_space=len(space)))

        sums = lax.map(rematerialized(total), indices)
        return sums.map(lambda a: _add_pair_axes(_sum_in_two(a), len(space)))

    def accumulate(sums: Pairs, index: Array) -> tuple[Pairs, None]:
        x, offset = plane(index)
        added = (None if a is None else _add_plane(s, a, offset, along) for s, a in zip(sums, x, strict=True))
        return Pairs(*added), None  # type: ignore[arg-type]

    first, _ = plane(indices[0])  # only its shape is used
    counts = tuple(w.count for w in along)
    zeros = first.map(lambda a: constant(counts + counts + a.shape[len(counts) :], 0, a.dtype, a))
    sums, _ = lax.scan(rematerialized(accumulate), zeros, indices)
    return sums.map(partial(_planes_to_pairs, counts=counts))


def _add_plane(sums: Any, plane: Array, offset: tuple[Array, ...], along: Windows) -> Array:
    """Adds a plane to pooled planes `(*offsets, *positions, *batch)`.

    The pair (p, p + d) lies under tap a of window P and tap b of window P' wherever p = s P + a and p + d = s P' + b:
    for given d and a, that is for one b in every stride.
    """
    n = len(along)
    for axis, window in enumerate(along):
        plane = window.pad(plane, (axis,))
    ranges = [range(r) for w in along for r in (w.taps, -(-w.taps // w.stride))]
    taps = jnp.array(list(itertools.product(*ranges)), jnp.int32).reshape(-1, n, 2)

    def add_tap(sums: Array, tap: Array) -> tuple[Array, None]:
        piece, slots, mask = plane, [], jnp.ones((1,) * plane.ndim, bool)
        for axis, (window, d) in enumerate(zip(along, offset, strict=True)):
            a, k = tap[axis, 0], tap[axis, 1]
            b = (a + d) % window.stride + k * window.stride
            piece = window.traced_tap(piece, a, axis)
            slots.append((d + a - b) // window.stride % window.count)
            allowed = jnp.broadcast_to(b < window.taps, (window.count,))
            if not window.circular:
                p = window.positions(a)
                partner = (p + d) % window.size
                other = (partner + window.low - b) // window.stride
                allowed &= (p >= 0) & (p < window.size) & (other >= 0) & (other < window.count)
            mask &= along_axis(allowed, axis, plane.ndim)
        at = (*slots, *(jnp.zeros_like(slots[0]) for _ in range(sums.ndim - n)))
        old = lax.dynamic_slice(sums, at, (1,) * n + sums.shape[n:])
        return lax.dynamic_update_slice(sums, old + jnp.where(mask, piece, 0)[(None,) * n], at), None

    return lax.scan(add_tap, sums, taps, unroll=min(len(taps), _TAPS_AT_ONCE))[0]


def _planes_to_pairs(planes: Array, counts: tuple[int, ...]) -> Array:
    """Turns `(*offsets, *positions, *batch)` into zipped pairs `(H, H, W, W, *batch)`."""
    n = len(counts)
    offsets, positions = [], []
    for axis, count in enumerate(counts):
        rows = jnp.arange(count).reshape([count if i == 2 * axis else 1 for i in range(2 * n)])
        columns = jnp.arange(count).reshape([count if i == 2 * axis + 1 else 1 for i in range(2 * n)])
        offsets.append((columns - rows) % count)
        positions.append(rows)
    return planes[(*offsets, *positions)]


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


def _trailing(x: Array, ndim: int) -> Array:
    """Adds trailing axes up to a rank."""
    return lax.expand_dims(x, range(x.ndim, ndim))


def _stored(form: Form) -> Geometry:
    return SamePosition() if form.same_position else AllPairs(len(form.space))


def _key(number: int, geometry: Geometry) -> tuple:
    return (number, geometry.scale) if isinstance(geometry, OffsetPlane) else (number,)
