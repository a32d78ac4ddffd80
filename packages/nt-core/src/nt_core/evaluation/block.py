"""Evaluates a lowered program on a block of pairs of samples."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array, lax

from nt_core.evaluation import planes
from nt_core.evaluation.entrywise import Entrywise
from nt_core.evaluation.fusion import rematerialized, unfused
from nt_core.evaluation.geometry import AllPairs, Geometry, OffsetPlane, SamePosition, Sides, continued, window_sums
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

# Images with fewer positions are pooled from all their pairs at once: the loop over planes would cost more.
_MIN_POSITIONS_FOR_PLANES = 32


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

    def is_stored(self, number: int) -> bool:
        """Whether a source is held for all pairs of positions, not formed from what is known of each."""
        ...

    def continued(self, n_space: int) -> "Loader":
        """Returns a loader for the planes of images whose second batch is continued periodically."""
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
        self._stored_pairs: dict[int, Pairs] = {}  # of what is stored (see `_is_stored`)

    @property
    def statistics(self) -> Statistics:
        """Of the first batch."""
        return self._first

    def covariance(self, value: int) -> Pairs:
        """Returns the covariances (never deficits) of a value at all the positions that are stored of it."""
        geometry = _stored(self._lowered.forms[value])
        return self._as_covariance(value, self.evaluate(value, geometry), geometry)

    def evaluate(self, value: int, geometry: Geometry, given: "dict[tuple, Pairs] | None" = None) -> Pairs:
        """Returns a value for the pairs of positions of `geometry`, in its form.

        Args:
          given: what is stored, for the plane that `geometry` is, by the keys of `_stacks`.
        """
        wanted = self._pull(value, geometry)
        target = _key(value, geometry)
        results = dict(given or {})
        for key in sorted(wanted.keys() - results.keys()):
            number, geometry = key[0], wanted[key]
            node = self._lowered.node(number)
            if self._is_stored(number):
                stored = _stored(self._lowered.forms[number])
                results[key] = self.stored(number).map(partial(select, stored=stored, wanted=geometry))
            elif node is None:
                results[key] = self._load(number, geometry)
            else:
                before = self._before(node, geometry)
                inputs = [results[_key(i, before)] for i in node.inputs]
                results[key] = self._apply(number, node, inputs, before, geometry)
        return results[target]

    def stored(self, number: int) -> Pairs:
        """Returns all pairs of a value that is stored, evaluated once."""
        if number not in self._stored_pairs:
            self._stored_pairs[number] = self._all_stored(number)
        return self._stored_pairs[number]

    def _all_stored(self, number: int) -> Pairs:
        node = self._lowered.node(number)
        if node is None:
            return self._load(number, _stored(self._lowered.forms[number]))
        match node.primitive:
            case Flatten():
                return self._flatten(number, node)
            case Gather():
                return self._gather(number, node)
            case Untie():
                return self._untie(number, node)
        return self._pool(number, node)

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

        def inputs(block: Block, geometry: Geometry, given: dict[tuple, Pairs]) -> Pairs:
            return block._in_form(source, number, block.evaluate(source, geometry, given), geometry)

        if not pools_planes(self._lowered, number):
            return _pool_all_pairs(along, inputs(self, AllPairs(len(along)), {}))

        def plane(offset: tuple[Any, ...]) -> OffsetPlane:
            return OffsetPlane(tuple(w.size for w in along), offset, (1,) * len(along))

        every, block = plane(planes.all_offsets(along)), self._continued(len(along))
        on_the_way = {key[0] for key in self._pull(source, every)}
        return planes.pool(
            along,
            lambda offset, given: inputs(block, plane(offset), given),
            self._stacks(source, every),
            positions=max(math.prod(self._lowered.forms[i].space) for i in on_the_way),
        )

    def _continued(self, n_space: int) -> "Block":
        """Returns a block that evaluates planes."""
        second = self._second.map(partial(continued, n_space=n_space), partial(continued, n_space=n_space, axis=1))
        return Block(self._lowered, self._first, second, self._load.continued(n_space), self._ntk)

    # Walking the graph

    def _is_stored(self, number: int) -> bool:
        """Whether a value is there for all the positions that are stored of it, before any of them is read."""
        node = self._lowered.node(number)
        return self._load.is_stored(number) if node is None else mixes_pairs(node.primitive)

    def _stacks(self, value: int, every: OffsetPlane) -> dict[tuple, Pairs]:
        """Returns what is stored and read for a value, in stacks of planes.

        Args:
          every: the planes on which the value is read; their offsets are NumPy arrays.
        """
        return {
            key: self.stored(key[0]).map(partial(planes.stacked, offsets=geometry.offset))
            for key, geometry in self._pull(value, every).items()
            if isinstance(geometry, OffsetPlane) and self._is_stored(key[0])
        }

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
                after_it = self._variances_after_dual(node, after)
                return Dual(Entrywise(primitive.activation)).pairs(inputs[0], as_deficit, variances[0], after_it)
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
        variances = None
        if as_deficit:
            variances = self._first.variance[source], before.original(self._second.variance[source])
        sums = before.convolve(x, along, variances)
        sums = sums.map(partial(permute, geometry=before, order=primitive.order))

        def variance_average() -> Array:
            first, second = (permute(v, SamePosition(), primitive.order) for v in window_sums(variances, along) or ())
            return Sides(after, first, after.continued(second)).mean / primitive.n_taps

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

    def is_stored(self, number: int) -> bool:
        return False

    def continued(self, n_space: int) -> "Loader":
        raise NotImplementedError("Repeated blocks hold no pools.")

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
    if isinstance(stored, AllPairs) and isinstance(wanted, SamePosition):
        return planes.same_position(x, stored.n_space)
    return x


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


def _trailing(x: Array, ndim: int) -> Array:
    """Adds trailing axes up to a rank."""
    return lax.expand_dims(x, range(x.ndim, ndim))


def _stored(form: Form) -> Geometry:
    return SamePosition() if form.same_position else AllPairs(len(form.space))


def _key(number: int, geometry: Geometry) -> tuple:
    return (number, geometry.scale) if isinstance(geometry, OffsetPlane) else (number,)
