"""What a kernel does with one plane: the steps of a stage, written once for GPU and TPU.

Only additions, products, divisions, roots, selections and polynomials: they lower everywhere.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nt_core.activations import ElementwiseNumerical
from nt_core.activations.bounds import QUADRATURES
from nt_core.backends.mosaic.duals import inlined, relu_dual
from nt_core.backends.mosaic.plan import (
    Instance,
    Row,
    Stage,
    Torus,
    Two,
    is_relu,
    is_sum,
    pool_turns,
    with_roots,
)
from nt_core.backends.mosaic.terms import Terms
from nt_core.lowering import Pairs, Primitive, Repeated, Window
from nt_core.lowering.primitives import Dual, Rescale, Sum, Tied

Int = Any  # a Python number or a traced scalar
_FAR = 8  # more turns around a torus than a window reaches
_MAX_UNROLLED = 16  # pieces of all phases of a value


class Place(NamedTuple):
    """A row of a table of statistics."""

    table: int
    iteration: Int
    row: Int


class Machine(Protocol):
    """Where the numbers are. All arrays are pieces of planes, of one shape."""

    def coefficient(self, index: Int) -> Array: ...

    def begin(self, table: int, iteration: Int) -> None:
        """Says that what follows reads this iteration of a table."""
        ...

    def first(self, place: Place, piece: int) -> Array:
        """A statistic of the first sample."""
        ...

    def second(self, place: Place, start: Int, piece: int) -> Array:
        """A statistic of the second sample, `start` addresses on, with `0 <= start < torus.size`."""
        ...

    def source(self, row: Int, piece: int) -> Array:
        """A plane of a covariance that an earlier stage has left, at the offset at hand."""
        ...

    def read(self, buffer: int, is_ntk: bool, phase: Int, start: Int, piece: int) -> Array: ...

    def write(self, buffer: int, phase: Int, plane: list[Pairs]) -> None:
        """Writes all pieces of a plane, so that it may be read from any address on."""
        ...


class Evaluation:
    """One plane of a stage.

    Args:
      offset: the offset of the plane, as an address.
      finer: what is to be added to `stride * offset`, along each axis, for a pool; zeros otherwise.
    """

    def __init__(self, stage: Stage, machine: Machine, offset: Int, finer: tuple[Int, Int]) -> None:
        self._stage = stage
        self._machine = machine
        self._offset = offset
        self._finer = finer

    def run(self) -> None:
        """Computes all values that are stored."""
        self._chain(self._stage.instances, None)

    def root(self) -> list[Pairs]:
        """Returns what is summed, with ghosts as 0, for a stage that ends in a sum."""
        instances, phase = self._stage.instances, (0, 0)

        def summed(piece: "_Piece") -> Pairs:
            x = piece.form(instances, len(instances) - 1, phase, None, self._stage.deficit)
            return piece.without_ghosts(x, phase)

        return self._pieces(summed)

    def pooled(self, add: Callable[[Int, list[Pairs]], None]) -> None:
        """Calls `add(offset, plane)` with what this plane adds to those after the pool."""
        stage = self._stage
        assert stage.windows is not None
        along = [self._pool_terms(axis) for axis in range(2)]
        for turn_y, taps_y in along[0]:
            for turn_x, taps_x in along[1]:

                def windows(piece: "_Piece", taps_y: _Taps = taps_y, taps_x: _Taps = taps_x) -> Pairs:
                    total = None
                    for tap_y, weight_y in taps_y:
                        for tap_x, weight_x in taps_x:
                            x = _scaled(weight_y * weight_x, piece.tapped(stage.root, (tap_y, tap_x)))
                            total = x if total is None else _sum(total, x)
                    assert total is not None
                    return total

                add(turned(stage.torus, self._offset, turn_y, turn_x), self._pieces(windows))

    def _pool_terms(self, axis: int) -> "list[tuple[int, _Taps]]":
        """For each offset after the pool, less that of the torus, the positions in a window that belong to it."""
        stage = self._stage
        assert stage.windows is not None
        window, stride = stage.windows[axis], stage.stride[axis]
        terms = []
        for turn in pool_turns(window):
            # The partner of tap a is b = a + finer - stride * turn
            taps = []
            for a in range(window.taps):
                b = a + self._finer[axis] - stride * turn
                inside = jnp.logical_and(b >= 0, b < window.taps)
                taps.append((a - window.low, jnp.where(inside, jnp.float32(1), jnp.float32(0))))
            terms.append((turn, taps))
        return terms

    def _chain(self, instances: list[Instance], iteration: Int | None) -> None:
        for i, instance in enumerate(instances):
            if instance.stored and not (iteration is not None and i == 0):
                self._store(instances, i, iteration)

    def _store(self, instances: list[Instance], i: int, iteration: Int | None) -> None:
        instance = instances[i]
        is_repeated = instance.body is not None
        of = instance.inputs[0] if is_repeated else i
        is_pool_input = i == len(instances) - 1 and iteration is None and self._stage.windows is not None

        def store(phase: tuple[Int, Int]) -> None:
            def stored(piece: _Piece) -> Pairs:
                x = piece.form(instances, of, phase, iteration, instances[of].deficit, compute=of == i)
                if is_pool_input and not is_repeated:
                    x = piece.pool_input(instances, i, phase, x)
                elif instance.masked:
                    x = piece.with_ghosts(instances, i, of, phase, iteration, x)
                if instance.has_ntk and x.ntk is None:
                    x = Pairs(x.value, jnp.zeros_like(x.value))
                return x

            self._machine.write(instance.buffer, _flat(phase, instance.scale), self._pieces(stored))

        def finish(phase: tuple[Int, Int]) -> None:
            plane = self._pieces(lambda piece: piece.pool_input(instances, i, phase, piece.read(instance, phase)))
            self._machine.write(instance.buffer, _flat(phase, instance.scale), plane)

        self._for_phases(instance.scale, store)
        if is_repeated:
            self._repeat(instance)
            if is_pool_input:  # only now: what the iterations read has other ghosts
                self._for_phases(instance.scale, finish)

    def _repeat(self, instance: Instance) -> None:
        body = instance.body
        assert body is not None and isinstance(instance.primitive, Repeated)

        def move(phase: tuple[Int, Int]) -> None:
            plane = self._pieces(lambda piece: piece.read(body[-1], phase))
            self._machine.write(instance.buffer, _flat(phase, instance.scale), plane)

        def iterate(iteration: Int, carry: Any) -> Any:
            self._machine.begin(body[0].table, iteration)
            self._chain(body, iteration)
            if body[-1].buffer != instance.buffer:
                self._for_phases(instance.scale, move)
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(instance.primitive.count), iterate, ())

    def _pieces(self, compute: "Callable[[_Piece], Pairs]") -> list[Pairs]:
        """Computes all pieces of a plane from what is stored, before any of it is written."""
        sums: dict[Any, Pairs] = {}
        return [
            compute(_Piece(self._stage, self._machine, self._offset, self._finer, piece, sums))
            for piece in range(self._stage.torus.pieces)
        ]

    def _for_phases(self, scale: Two, do: Callable[[tuple[Int, Int]], None]) -> None:
        # Pieces share sums only where phases are known when the kernel is compiled.
        if 1 < self._stage.torus.pieces <= _MAX_UNROLLED // math.prod(scale):
            for phase in np.ndindex(scale):
                do((int(phase[0]), int(phase[1])))
            return
        if scale == (1, 1):
            return do((0, 0))

        def one(phase: Array, carry: Any) -> Any:
            columns = jnp.int32(scale[1])
            do((lax.div(phase, columns), lax.rem(phase, columns)))
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(scale[0] * scale[1]), one, ())


_Taps = list[tuple[int, Array]]


class _Piece:
    """The values of instances, at one piece of the plane.

    Args:
      sums: over the rows of windows, which the pieces of a plane share.
    """

    def __init__(
        self,
        stage: Stage,
        machine: Machine,
        offset: Int,
        finer: tuple[Int, Int],
        piece: int,
        sums: dict[Any, Pairs],
    ) -> None:
        self._stage = stage
        self._torus = stage.torus
        self._machine = machine
        self._offset = offset
        self._finer = finer
        self._piece = piece
        self._sums = sums

    def without_ghosts(self, x: Pairs, phase: tuple[Int, Int]) -> Pairs:
        """What the end of the stage reads, with ghosts as 0."""
        instances = self._stage.instances
        both = self._both(instances, len(instances) - 1, phase, None)
        zero = jnp.zeros_like(x.value)
        return Pairs(jnp.where(both, x.value, zero), None if x.ntk is None else jnp.where(both, x.ntk, zero))

    def pool_input(self, instances: list[Instance], i: int, phase: tuple[Int, Int], x: Pairs) -> Pairs:
        if instances[i].deficit and not self._stage.deficit:
            x = Pairs(self._halves(instances, i, phase, None) - x.value, x.ntk)
        return self.without_ghosts(x, phase)

    def with_ghosts(
        self,
        instances: list[Instance],
        i: int,
        of: int,
        phase: tuple[Int, Int],
        iteration: Int | None,
        x: Pairs,
    ) -> Pairs:
        """Pairs with a ghost: its variance and the covariance are 0."""
        both, zero = self._both(instances, i, phase, iteration), jnp.zeros_like(x.value)
        ghost = self._halves(instances, of, phase, iteration) if instances[of].deficit else zero
        return Pairs(jnp.where(both, x.value, ghost), None if x.ntk is None else jnp.where(both, x.ntk, zero))

    def form(
        self,
        instances: list[Instance],
        i: int,
        phase: tuple[Int, Int],
        iteration: Int | None,
        as_deficit: bool,
        compute: bool = False,
    ) -> Pairs:
        """Returns a value as a deficit or as a covariance; from its buffer, unless it is to be computed."""
        instance = instances[i]
        if instance.stored and not compute:
            x = self.read(instance, phase)
        else:
            x = self._compute(instances, i, phase, iteration)
        if as_deficit or not instance.deficit:
            return x
        return Pairs(self._halves(instances, i, phase, iteration) - x.value, x.ntk)

    def _compute(self, instances: list[Instance], i: int, phase: tuple[Int, Int], iteration: Int | None) -> Pairs:
        instance = instances[i]
        if instance.primitive is None:
            return self._load(instance, phase)
        primitive = self._with_coefficients(instance, iteration)
        if isinstance(primitive, Tied):
            return self._tied(instances, i, primitive, phase, iteration)
        if isinstance(primitive, Dual):
            return self._dual(instances, i, primitive, phase, iteration)
        inputs = [self.form(instances, j, phase, iteration, instance.deficit) for j in instance.inputs]
        match primitive:
            case Rescale():
                scales = _Sides(self, instances, i, phase, iteration, "scale")
                before = _Sides(self, instances, instance.inputs[0], phase, iteration)
                return primitive.pairs(inputs[0], instance.deficit, scales, before)
            case Sum():
                return primitive.pairs(inputs)
        raise NotImplementedError(f"No kernel for the primitive {type(primitive).__name__}.")

    def _load(self, instance: Instance, phase: tuple[Int, Int]) -> Pairs:
        if instance.source >= 0:
            row = self._stage.source_row(instance) + _flat(phase, instance.scale)
            ntk = self._machine.source(row + instance.phases, self._piece) if instance.has_ntk else None
            return Pairs(self._machine.source(row, self._piece), ntk)
        n, total = instance.channels, None
        for channel in range(n):
            first, second = (load(instance, "channel", phase, None, channel) for load in (self._first, self._second))
            if instance.deficit:
                difference = first - second
                term = difference * difference
            else:
                term = first * second
            total = term if total is None else total + term
        assert total is not None
        return Pairs(total * (0.5 / n if instance.deficit else 1 / n), None)

    def _tied(
        self, instances: list[Instance], i: int, primitive: Tied, phase: tuple[Int, Int], iteration: Int | None
    ) -> Pairs:
        instance, (source,) = instances[i], instances[i].inputs
        before = instances[source]
        if instance.windows is None:
            sums = self.form(instances, source, phase, iteration, before.deficit)
        else:
            sums = self._window_sum(before, instance, instance.windows, phase)

        def variance_average() -> Array:
            first, second = (load(instance, "average", phase, iteration) for load in (self._first, self._second))
            return first + second  # halves

        after = _Sides(self, instances, i, phase, iteration)
        return primitive.pairs(sums, before.deficit, instance.deficit, instance.has_ntk, variance_average, after)

    def _window_sum(
        self, before: Instance, instance: Instance, along: tuple[Window, Window], phase: tuple[Int, Int]
    ) -> Pairs:
        total = None
        for tap_y in _taps(along[0], phase[0]):
            row = self._row_sum(before, instance, tap_y, _taps(along[1], phase[1]))
            total = row if total is None else _sum(total, row)
        assert total is not None
        return total

    def _row_sum(self, before: Instance, instance: Instance, tap_y: Int, taps_x: list[Int]) -> Pairs:
        """The sum over one row of a window. The next piece has it too: as another row."""
        phase_y, turn_y = _split(tap_y, before.scale[0])
        known = self._torus.pieces > 1 and isinstance(phase_y, int) and isinstance(taps_x[0], int)
        key = (id(instance), phase_y, self._piece + turn_y) if known else None
        if key in self._sums:
            return self._sums[key]
        total = None
        for tap_x in taps_x:
            x = self.tapped(before, (tap_y, tap_x))
            total = x if total is None else _sum(total, x)
        assert total is not None
        if key is not None:
            self._sums[key] = total
        return total

    def tapped(self, x: Instance, position: tuple[Int, Int]) -> Pairs:
        """Reads a stored value where each position of the torus finds the one that is this far from its own."""
        (phase_y, turn_y), (phase_x, turn_x) = (_split(p, s) for p, s in zip(position, x.scale, strict=True))
        return self.read(x, (phase_y, phase_x), (turn_y, turn_x))

    def read(self, x: Instance, phase: tuple[Int, Int], turns: tuple[Int, Int] = (0, 0)) -> Pairs:
        flat = _flat(phase, x.scale)

        def read(is_ntk: bool) -> Array:
            def load(start: Int) -> Array:
                return self._machine.read(x.buffer, is_ntk, flat, start, self._piece)

            return self._shifted(load, 0, *turns)

        return Pairs(read(False), read(True) if x.has_ntk else None)

    def _dual(
        self, instances: list[Instance], i: int, primitive: Dual, phase: tuple[Int, Int], iteration: Int | None
    ) -> Pairs:
        instance, (source,) = instances[i], instances[i].inputs
        x = self.form(instances, source, phase, iteration, True)
        if is_relu(primitive):
            roots = self._roots(instances[source], phase, iteration)
            activation: Any = primitive.activation
            deficit, covariance, dot = relu_dual(activation.a, activation.b, *roots, x.value)
            return Pairs(deficit if instance.deficit else covariance, None if x.ntk is None else x.ntk * dot)
        before = _Sides(self, instances, source, phase, iteration)
        if is_sum(primitive):
            variances = before.first, before.second
            value, factor = self._summed(instance, primitive, phase, iteration, *variances, x.value)
            value = value if instance.deficit else self._halves(instances, i, phase, iteration) - value
            return Pairs(value, None if x.ntk is None else x.ntk * factor)

        def pairs(dual: Dual, x: Pairs, var1: Array, var2: Array) -> Pairs:
            own = _Given(dual.variance(var1), dual.variance(var2)) if not instance.deficit else _Given(var1, var2)
            return dual.pairs(x, instance.deficit, _Given(var1, var2), own)

        return inlined(pairs, primitive, x, before.first, before.second)

    def _summed(
        self,
        instance: Instance,
        primitive: Dual,
        phase: tuple[Int, Int],
        iteration: Int | None,
        var1: Array,
        var2: Array,
        deficit: Array,
    ) -> tuple[Array, Array]:
        """What a dual that is a sum does to a deficit, and the factor of the tangent kernel."""
        activation: Any = primitive.activation
        coefficient = self._machine.coefficient
        if not isinstance(activation, ElementwiseNumerical):
            return inlined(lambda dual, *pair: dual.dual(*pair), activation, var1, var2, deficit, node=self._node)

        def number(k: Int) -> tuple[Array, Array]:
            at = instance, "terms", phase, iteration, k
            return self._first(*at), self._second(*at)

        turns = coefficient(instance.turns + (0 if iteration is None else iteration))
        return Terms(activation).dual(turns, number, var1, var2, deficit)

    def _node(self, count: int, k: Int) -> tuple[Array, Array]:
        """One of so many nodes of a quadrature, and its weight: what stands behind the coefficients (see `tables`)."""
        before = 2 * sum(itertools.takewhile(lambda other: other != count, QUADRATURES))
        start = self._stage.n_coefficients + before + k
        return self._machine.coefficient(start), self._machine.coefficient(start + count)

    # Statistics of samples

    def _halves(self, instances: list[Instance], i: int, phase: tuple[Int, Int], iteration: Int | None) -> Array:
        """The mean of both variances."""
        instance = instances[i]
        if is_relu(instance.primitive):
            return self._slope(instance, iteration) * self._halves(instances, instance.inputs[0], phase, iteration)
        if "root" in instance.rows:  # in terms of what the dual needs too
            root1, root2 = self._roots(instance, phase, iteration)
            return root1 * root2 + 0.5 * (root1 - root2) * (root1 - root2)
        first = self._half(instances, i, phase, iteration, self._first)
        return first + self._half(instances, i, phase, iteration, self._second)

    def _roots(self, instance: Instance, phase: tuple[Int, Int], iteration: Int | None) -> tuple[Array, Array]:
        """The standard deviations of both."""
        return self._first(instance, "root", phase, iteration), self._second(instance, "root", phase, iteration)

    def _slope(self, instance: Instance, iteration: Int | None) -> Array:
        """Of the variance after a ReLU, in that before it."""
        activation: Any = self._with_coefficients(instance, iteration).activation  # type: ignore[attr-defined]
        return 0.5 * (activation.a * activation.a + activation.b * activation.b)

    def _half(
        self,
        instances: list[Instance],
        i: int,
        phase: tuple[Int, Int],
        iteration: Int | None,
        load: Callable[..., Array],
    ) -> Array:
        """Half the variance of one of the samples: `load` is `self._first` or `self._second`."""
        instance = instances[i]
        if is_relu(instance.primitive):
            return self._slope(instance, iteration) * self._half(instances, instance.inputs[0], phase, iteration, load)
        if "root" in instance.rows:
            root = load(instance, "root", phase, iteration)
            return 0.5 * root * root
        return load(instance, "half", phase, iteration)

    def _both(self, instances: list[Instance], i: int, phase: tuple[Int, Int], iteration: Int | None) -> Array:
        """Which pairs are of two positions of the image."""
        source = with_roots(instances, i)
        if source is not None:
            root1, root2 = self._roots(source, phase, iteration)
            return jnp.minimum(root1, root2) >= 0
        return self._first(instances[i], "mask", phase, None) * self._second(instances[i], "mask", phase, None) > 0

    def _first(
        self, instance: Instance, kind: str, phase: tuple[Int, Int], iteration: Int | None, channel: Int = 0
    ) -> Array:
        """A statistic of the first sample."""
        return self._machine.first(_place(instance, kind, phase, iteration, channel), self._piece)

    def _second(
        self, instance: Instance, kind: str, phase: tuple[Int, Int], iteration: Int | None, channel: Int = 0
    ) -> Array:
        """A statistic of the second sample, at the partner of each position."""
        phases, turns = [], []
        for p, s, stride, finer in zip(phase, instance.scale, self._stage.stride, self._finer, strict=True):
            if s == 1:
                phases.append(0)
                turns.append(0)
            else:
                moved = p + s // stride * finer
                phases.append(moved % s if isinstance(moved, int) else lax.rem(moved, jnp.int32(s)))
                turns.append(moved // s if isinstance(moved, int) else lax.div(moved, jnp.int32(s)))
        place = _place(instance, kind, (phases[0], phases[1]), iteration, channel)
        return self._shifted(lambda start: self._machine.second(place, start, self._piece), self._offset, *turns)

    def _shifted(self, load: Callable[[Int], Array], offset: Int, turn_y: Int, turn_x: Int) -> Array:
        """Loads what lies `offset` and some turns on, on the torus."""
        start = turned(self._torus, offset, turn_y, turn_x)
        if not self._torus.wraps or (isinstance(start, int) and start == 0):
            return load(start)
        columns, size = self._torus.shape[1], self._torus.size
        column = _rem(start, columns)
        row = self._stage.tables[0].rows[Row("column", None, 0, self._torus.shape, (1, 1))]
        own = self._machine.first(Place(0, 0, row), self._piece)
        stays = own < jnp.asarray(columns - column, jnp.float32)
        return jnp.where(stays, load(start), load(_rem(start + size - columns, size)))

    def _with_coefficients(self, instance: Instance, iteration: Int | None) -> Primitive:
        leaves, structure = jax.tree.flatten(instance.primitive)
        start = instance.coefficients
        if iteration is not None:
            start = start + iteration * self._iteration_size(instance)
        return jax.tree.unflatten(structure, [self._machine.coefficient(start + k) for k in range(len(leaves))])

    def _iteration_size(self, instance: Instance) -> int:
        return next(
            i.coefficients for i in self._stage.instances if i.body is not None and any(j is instance for j in i.body)
        )


class _Given(NamedTuple):
    """Variances that are known."""

    first: Array
    second: Array

    @property
    def mean(self) -> Array:
        return 0.5 * (self.first + self.second)


class _Sides(NamedTuple):
    """Numbers of both samples, read where they are asked for: variances, or the rows of another kind."""

    piece: _Piece
    instances: list[Instance]
    i: int
    phase: tuple[Int, Int]
    iteration: Int | None
    kind: str = "variance"

    @property
    def first(self) -> Array:
        return self._of(self.piece._first)

    @property
    def second(self) -> Array:
        return self._of(self.piece._second)

    @property
    def mean(self) -> Array:
        return self.piece._halves(self.instances, self.i, self.phase, self.iteration)

    def _of(self, load: Callable[..., Array]) -> Array:
        if self.kind == "variance":
            return 2 * self.piece._half(self.instances, self.i, self.phase, self.iteration, load)
        return load(self.instances[self.i], self.kind, self.phase, self.iteration)


def turned(torus: Torus, offset: Int, turn_y: Int, turn_x: Int) -> Int:
    """Returns the address that lies some turns on from an offset."""
    rows, columns = torus.shape
    if not torus.wraps:
        moved = offset + turn_y * torus.steps[0] + turn_x * torus.steps[1]
        return _rem(moved + 2 * _FAR * torus.size, torus.size)
    row = offset // columns if isinstance(offset, int) else lax.div(offset, jnp.int32(columns))
    row = _rem(row + turn_y + _FAR * rows, rows)
    return row * columns + _rem(_rem(offset, columns) + turn_x + _FAR * columns, columns)


def _place(instance: Instance, kind: str, phase: tuple[Int, Int], iteration: Int | None, channel: Int) -> Place:
    row = instance.rows[kind] + channel * instance.phases + _flat(phase, instance.scale)
    return Place(0, 0, row) if kind == "mask" or iteration is None else Place(instance.table, iteration, row)


def _taps(window: Window, phase: Int) -> list[Int]:
    """The positions that a window of a position reads, along one axis."""
    return [window.stride * phase + tap * window.dilation - window.low for tap in range(window.taps)]


def _split(position: Int, scale: int) -> tuple[Int, Int]:
    """Returns the phase of a position, and its place on the torus."""
    if isinstance(position, int):
        return position % scale, position // scale
    shifted = position + _FAR * scale
    return lax.rem(shifted, jnp.int32(scale)), lax.div(shifted, jnp.int32(scale)) - _FAR


def _scaled(factor: Array, x: Pairs) -> Pairs:
    return Pairs(factor * x.value, None if x.ntk is None else factor * x.ntk)


def _flat(phase: tuple[Int, Int], scale: Two) -> Int:
    return phase[0] * scale[1] + phase[1]


def _rem(x: Int, n: int) -> Int:
    return x % n if isinstance(x, int) else lax.rem(x, jnp.int32(n))


def _sum(x: Pairs, y: Pairs) -> Pairs:
    return Pairs(x.value + y.value, None if x.ntk is None or y.ntk is None else x.ntk + y.ntk)
