"""Evaluates a program on a block of pairs of samples."""

import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array, lax

from nt_core.backends.xla.fusion import constant, rematerialized, unfused
from nt_core.backends.xla.geometry import (
    AllPairs,
    Geometry,
    OffsetPlane,
    SamePosition,
    Window,
    keeps_planes,
    window_sums,
)
from nt_core.backends.xla.repeats import Repeated
from nt_core.backends.xla.variances import Statistics, pool_sum, window_counts, windows
from nt_core.program import Node, Program
from nt_core.spec import Spec
from nt_core.steps import Combine, Conv, Dual, Flatten, GlobalPool, Linear, Multiply, Normalize, Pool

# Images with fewer positions are pooled from all their pairs at once: the loop over planes would cost more.
_MIN_POSITIONS_FOR_PLANES = 32


class Pairs(NamedTuple):
    """Covariances, or deficits, of some pairs of positions, and their tangent kernel (None where it is 0)."""

    value: Array
    ntk: Array | None


def pools_planes(program: Program, number: int) -> bool:
    """Whether a pool is evaluated one offset plane after another.

    Every layer from the last readouts to this pool must map offset planes to offset planes.
    """
    pending, seen = [number], set()
    while pending:
        i = pending.pop()
        node = program.nodes[i - len(program.sources)] if i >= len(program.sources) else None
        if i in seen or node is None or (i != number and _is_readout(node)):
            continue
        seen.add(i)
        spec = program.spec(node.inputs[0])
        if i == number and math.prod(spec.space) < _MIN_POSITIONS_FOR_PLANES:
            return False
        if isinstance(node.step, Conv | Pool) and not all(keeps_planes(w) for w in windows(node.step, spec)):
            return False
        pending.extend(node.inputs)
    return True


class Loader(Protocol):
    """Forms the covariances of sources."""

    def __call__(self, number: int, geometry: Geometry) -> Pairs:
        """Returns a source for the pairs of positions of `geometry`, as a deficit if that source needs variances."""
        ...

    def identical(self, space: tuple[int, ...], geometry: Geometry, ndim: int) -> Array:
        """Which pairs are known to be of one sample at one position, broadcasting against pairs of rank `ndim`."""
        ...


def needs_variance(program: Program, covariances: bool) -> tuple[bool, ...]:
    """Says for each value whether variances are needed there.

    There, covariances are carried as deficits. After the last step that reads variances they are carried as they are.
    """
    needs = [False] * program.n_values
    for output in program.outputs:
        needs[output] = covariances
    first_node = len(program.sources)
    for number, node in reversed(list(enumerate(program.nodes, first_node))):
        for i in node.inputs:
            needs[i] = needs[i] or needs[number] or node.step.reads_variance
    return tuple(needs)


class Block:
    """The pairs of two batches, or of one batch with itself sample by sample.

    Args:
      program: what to evaluate.
      needs: see `needs_variance`.
      first, second: statistics of the batches, laid out to broadcast against pairs: `(*space, n1, 1)` and
        `(*space, 1, n2)`; or both `(*space, n)` and the same object, then this block completes them.
      load: forms the covariances of sources.
      ntk: evaluate the tangent kernel.
    """

    def __init__(
        self,
        program: Program,
        needs: tuple[bool, ...],
        first: Statistics,
        second: Statistics,
        load: Loader,
        ntk: bool,
    ) -> None:
        self._program = program
        self._needs = needs
        self._first = first
        self._second = second
        self._load = load
        self._ntk = ntk
        self._readouts: dict[int, Pairs] = {}

    def covariance(self, value: int) -> Pairs:
        """Returns the covariances (never deficits) of a value at all the positions that its spec stores."""
        geometry = _stored(self._program.spec(value))
        return self._as_covariance(value, self.evaluate(value, geometry), geometry)

    def evaluate(self, value: int, geometry: Geometry) -> Pairs:
        """Returns a value for the pairs of positions of `geometry`."""
        wanted = self._pull(value, geometry)
        target = _key(value, geometry)
        results: dict[tuple, Pairs] = {}
        for key in sorted(wanted):
            number, geometry = key[0], wanted[key]
            node = self._node(number)
            if node is None or _is_readout(node):
                results[key] = self._stored_value(number, geometry)
            else:
                before = _before(node, self._program, geometry)
                inputs = [results[_key(i, before)] for i in node.inputs]
                results[key] = self._step(number, node, inputs, before, geometry)
        return results[target]

    def complete_statistics(self) -> None:
        """Fills in the variances of a batch, for a block of each sample with itself."""
        for number in range(self._program.n_values):
            node = self._node(number)
            if node is None or not self._needs[number]:
                continue
            if isinstance(node.step, Pool | GlobalPool) and not _is_same_position(self._input_spec(node)):
                self._readout(number, node)
            elif isinstance(node.step, Repeated):
                source = self._first.variance[node.inputs[0]]
                self._first.variance[number], self._first.repeated[number] = _repeated_variances(node.step, source)
            else:
                variances = [self._first.variance[i] for i in node.inputs]
                self._first.variance[number] = _variance_after(node, self._input_spec(node), variances)

    # Walking the graph

    def _node(self, number: int) -> Node | None:
        """The node that computes a value, or None for a source."""
        n = len(self._program.sources)
        return None if number < n else self._program.nodes[number - n]

    def _input_spec(self, node: Node) -> Spec:
        return self._program.spec(node.inputs[0])

    def _pull(self, value: int, geometry: Geometry) -> dict[tuple, Geometry]:
        """Finds what has to be evaluated, back to sources and readouts, and for which pairs of positions.

        The keys sort in the order of evaluation. A strided layer reads other offset planes than it writes.
        """
        wanted = {_key(value, geometry): geometry}
        pending = [(value, geometry)]
        while pending:
            number, geometry = pending.pop()
            node = self._node(number)
            if node is None or _is_readout(node):
                continue
            before = _before(node, self._program, geometry)
            for i in node.inputs:
                if _key(i, before) not in wanted:
                    wanted[_key(i, before)] = before
                    pending.append((i, before))
        return wanted

    def _stored_value(self, number: int, geometry: Geometry) -> Pairs:
        node = self._node(number)
        if node is None:
            return self._load(number, geometry)
        stored = _stored(self._program.spec(number))
        value, ntk = self._readout(number, node)
        return Pairs(select(value, stored, geometry), None if ntk is None else select(ntk, stored, geometry))

    # Steps that keep pairs apart

    def _step(self, number: int, node: Node, inputs: list[Pairs], before: Geometry, after: Geometry) -> Pairs:
        match node.step:
            case Repeated():
                return self._repeated(number, node, inputs[0], before)
            case Linear():
                return self._linear(number, node, inputs[0], before)
            case Dual():
                return self._dual(number, node, inputs[0], after)
            case Normalize():
                return self._normalize(number, node, inputs[0], after)
            case Combine():
                return self._combine(number, node, inputs, after)
            case Multiply():
                return self._multiply(number, node, inputs, after)
        raise NotImplementedError(f"The xla backend does not know the step {type(node.step).__name__}.")

    def _repeated(self, number: int, node: Node, x: Pairs, geometry: Geometry) -> Pairs:
        step = node.step
        assert isinstance(step, Repeated)
        if x.ntk is None and self._ntk:
            x = Pairs(x.value, jnp.zeros_like(x.value))

        def apply(x: Pairs, iteration: tuple[Program, dict[int, Array], dict[int, Array]]) -> tuple[Pairs, None]:
            body, variance1, variance2 = iteration
            first, second = Statistics(variance1), Statistics(variance2)
            block = Block(body, step.needs, first, second, _Constant(x), self._ntk)
            return block.evaluate(body.outputs[0], geometry), None

        xs = (step.body, self._first.repeated.get(number, {}), self._second.repeated.get(number, {}))
        x, _ = lax.scan(rematerialized(apply), x, xs)
        return x

    def _linear(self, number: int, node: Node, x: Pairs, geometry: Geometry) -> Pairs:
        step, spec = node.step, self._input_spec(node)
        assert isinstance(step, Linear)
        (source,) = node.inputs
        as_deficit = self._needs[number]
        if not as_deficit:
            x = self._as_covariance(source, x, geometry)
        variances = self._variances(source) if as_deficit else None
        along, scale = windows(step, spec), 1 / step.window_size
        value = geometry.convolve(x.value, along, variances) * scale
        ntk = None if x.ntk is None else geometry.convolve(x.ntk, along, None) * scale
        covariance = value if self._ntk else None
        if variances is not None and self._ntk:
            after = geometry.after(along)
            summed = (window_sums(variances[0], along), window_sums(variances[1], along))
            covariance = _mean(summed, after) * scale - value
        if covariance is not None:
            weight, bias = step.ntk_coefficients(spec)
            own = weight * covariance + bias
            ntk = own if ntk is None else step.w_var * ntk + own
        value = step.w_var * value
        if step.b_var is not None and not as_deficit:
            value = value + step.b_var
        if isinstance(step, Conv):
            order = step.space_order(spec)
            value = permute(value, geometry, order)
            ntk = None if ntk is None else permute(ntk, geometry, order)
        return Pairs(value, ntk)

    def _dual(self, number: int, node: Node, x: Pairs, geometry: Geometry) -> Pairs:
        step = node.step
        assert isinstance(step, Dual)
        var1, var2 = self._variances(node.inputs[0])
        shape = x.value.shape
        deficit, dot = step.activation.dual(
            jnp.broadcast_to(geometry.first(var1), shape), jnp.broadcast_to(geometry.second(var2), shape), x.value
        )
        ntk = None if x.ntk is None else x.ntk * dot
        if self._needs[number]:
            return Pairs(deficit, ntk)
        after = (step.activation.variance(var1), step.activation.variance(var2))
        return Pairs(_mean(after, geometry) - deficit, ntk)

    def _normalize(self, number: int, node: Node, x: Pairs, geometry: Geometry) -> Pairs:
        step = node.step
        assert isinstance(step, Normalize)
        var1, var2 = self._variances(node.inputs[0])
        scale1, scale2 = _normalizer(step, var1), _normalizer(step, var2)
        r1, r2 = geometry.first(scale1), geometry.second(scale2)
        ntk = None if x.ntk is None else x.ntk * r1 * r2
        if not self._needs[number]:
            return Pairs(self._as_covariance(node.inputs[0], x, geometry).value * r1 * r2, ntk)
        # (var1 r1^2 + var2 r2^2) / 2 - K r1 r2, without taking the difference of nearly equal numbers
        rest = (r1 - r2) * (geometry.first(var1 * scale1) - geometry.second(var2 * scale2)) / 2
        return Pairs(x.value * r1 * r2 + rest, ntk)

    def _combine(self, number: int, node: Node, inputs: list[Pairs], geometry: Geometry) -> Pairs:
        step = node.step
        assert isinstance(step, Combine)
        if not self._needs[number]:
            inputs = [self._as_covariance(i, x, geometry) for i, x in zip(node.inputs, inputs, strict=True)]
        values = [w * x.value for w, x in zip(step.weights, inputs, strict=True)]
        ntks = [w * x.ntk for w, x in zip(step.weights, inputs, strict=True) if x.ntk is not None]
        return Pairs(sum(values[1:], values[0]), sum(ntks[1:], ntks[0]) if ntks else None)

    def _multiply(self, number: int, node: Node, inputs: list[Pairs], geometry: Geometry) -> Pairs:
        as_deficit = self._needs[number]
        covariances = [self._as_covariance(i, x, geometry).value for i, x in zip(node.inputs, inputs, strict=True)]
        (value, ntk), covariance = inputs[0], covariances[0]
        variances = self._variances(node.inputs[0]) if as_deficit else None
        if not as_deficit:
            value = covariance
        for i, factor, other in zip(node.inputs[1:], inputs[1:], covariances[1:], strict=True):
            terms = [t * k for t, k in ((ntk, other), (factor.ntk, covariance)) if t is not None]
            ntk = sum(terms[1:], terms[0]) if terms else None
            if variances is None:
                value = value * other
            else:  # the mean of the products of variances is that of the means, and what their differences add
                variances2 = self._variances(i)
                apart = [geometry.first(a) - geometry.second(b) for a, b in (variances, variances2)]
                value = _mean(variances, geometry) * factor.value + value * other + apart[0] * apart[1] / 4
                variances = (variances[0] * variances2[0], variances[1] * variances2[1])
            covariance = covariance * other
        return Pairs(value, ntk)

    def _variances(self, number: int) -> tuple[Array, Array]:
        return self._first.variance[number], self._second.variance[number]

    def _as_covariance(self, number: int, x: Pairs, geometry: Geometry) -> Pairs:
        if not self._needs[number]:
            return x
        return Pairs(_mean(self._variances(number), geometry) - x.value, x.ntk)

    # Steps that mix pairs

    def _readout(self, number: int, node: Node) -> Pairs:
        """Returns the stored pairs after a readout, evaluated once."""
        if number not in self._readouts:
            self._readouts[number] = (
                self._flatten(number, node) if isinstance(node.step, Flatten) else self._pool(number, node)
            )
        return self._readouts[number]

    def _flatten(self, number: int, node: Node) -> Pairs:
        (source,) = node.inputs
        x = self.evaluate(source, SamePosition())
        if not self._needs[number]:
            x = self._as_covariance(source, x, SamePosition())
        axes = tuple(range(len(self._input_spec(node).space)))
        return Pairs(jnp.mean(x.value, axes), None if x.ntk is None else jnp.mean(x.ntk, axes))

    def _pool(self, number: int, node: Node) -> Pairs:
        step, spec = node.step, self._input_spec(node)
        assert isinstance(step, Pool | GlobalPool)
        (source,) = node.inputs
        as_deficit = self._needs[number]
        pool = _as_pool(step, spec)
        if _is_same_position(spec):
            x = self.evaluate(source, SamePosition())
            x = x if as_deficit else self._as_covariance(source, x, SamePosition())
            divisor = _trailing(_window_sizes(pool, spec, x.value.dtype), x.value.ndim) ** 2
            shape = tuple(self._program.spec(number).space) + x.value.shape[len(spec.space) :]
            pooled = [None if a is None else (pool_sum(pool, spec, a) / divisor).reshape(shape) for a in x]
            return Pairs(*pooled)  # type: ignore[arg-type]

        x = self._pool_sums(number, pool)
        pairs = AllPairs(len(spec.space))
        size = _window_sizes(pool, spec, x.value.dtype)
        divisor = _trailing(pairs.first(size) * pairs.second(size), x.value.ndim)
        value = x.value / divisor
        if as_deficit:
            value = self._pooled_deficit(number, pool, spec, source, value)
        ntk = None if x.ntk is None else x.ntk / divisor
        if isinstance(step, GlobalPool):
            axes = tuple(range(2 * len(spec.space)))
            value, ntk = jnp.squeeze(value, axes), None if ntk is None else jnp.squeeze(ntk, axes)
        return Pairs(value, ntk)

    def _pool_sums(self, number: int, pool: Pool) -> Pairs:
        """Returns the sums over all pairs of windows of a pool, as deficits where those are needed after it."""
        node = self._program.nodes[number - len(self._program.sources)]
        (source,), spec, as_deficit = node.inputs, self._input_spec(node), self._needs[number]

        def inputs(geometry: Geometry) -> Pairs:
            x = self.evaluate(source, geometry)
            return x if as_deficit else self._as_covariance(source, x, geometry)

        if pools_planes(self._program, number):
            return _pool_planes(pool, spec, inputs)
        return _pool_all_pairs(pool, spec, inputs(AllPairs(len(spec.space))))

    def _pooled_deficit(self, number: int, pool: Pool, spec: Spec, source: int, pooled: Array) -> Array:
        """Turns a pooled deficit into the deficit of the pooled covariance.

        With S the sums of variances over a window, c the number of its positions inside and m its size:
        `K(P, P') = (c(P') S1(P) + c(P) S2(P')) / (2 m^2) - pooled(P, P')`, and the variances are K(P, P) of each sample
        with itself. The deficit is their mean less K, ordered such that equal samples give exactly 0.
        """
        pairs = AllPairs(len(spec.space))
        var1, var2 = self._variances(source)
        counts = window_counts(pool, spec)
        if number not in self._first.self_deficit:  # this block is of samples with themselves, see `Block`
            own = select(pooled, pairs, SamePosition())
            size = _window_sizes(pool, spec, own.dtype)
            variance = _trailing(counts / size**2, own.ndim) * pool_sum(pool, spec, var1) - own
            self._first.self_deficit[number] = own
            self._first.variance[number] = variance.reshape(
                tuple(self._program.spec(number).space) + variance.shape[len(spec.space) :]
            )
        own1, own2 = self._first.self_deficit[number], self._second.self_deficit[number]
        deficit = pooled - (pairs.first(own1) + pairs.second(own2)) / 2
        identical = self._load.identical(tuple(counts.shape), pairs, deficit.ndim)
        deficit = jnp.where(identical, 0, deficit)  # not just 0 up to rounding: sqrt(1e-7) is 3e-4
        if (pool.mean and pool.normalize_edges) or pool.padding == "CIRCULAR":
            return deficit
        size = math.prod(pool.window) if pool.mean else 1
        uneven = _trailing((pairs.first(counts) - pairs.second(counts)) / (2 * size**2), pooled.ndim)
        sums1, sums2 = pool_sum(pool, spec, var1), pool_sum(pool, spec, var2)
        return deficit + uneven.astype(pooled.dtype) * (pairs.first(sums1) - pairs.second(sums2))


class _Constant:
    """The source of the body of a loop: what the iteration before left."""

    def __init__(self, x: Pairs) -> None:
        self._x = x

    def __call__(self, number: int, geometry: Geometry) -> Pairs:
        return self._x

    def identical(self, space: tuple[int, ...], geometry: Geometry, ndim: int) -> Array:
        raise NotImplementedError("Repeated blocks hold no pools.")


def _repeated_variances(step: Repeated, source: Array) -> tuple[Array, dict[int, Array]]:
    """Variances after repeated layers, and at every value of each iteration."""

    def apply(source: Array, body: Program) -> tuple[Array, dict[int, Array]]:
        variance = {0: source}
        for number, node in enumerate(body.nodes, 1):
            inputs = [variance[i] for i in node.inputs]
            variance[number] = _variance_after(node, body.spec(node.inputs[0]), inputs)
        return variance[body.outputs[0]], variance

    return lax.scan(apply, source, step.body)


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


def _pool_all_pairs(pool: Pool, spec: Spec, x: Pairs) -> Pairs:
    def pooled(a: Array) -> Array:
        for axis, window in enumerate(windows(pool, spec)):
            a = window.sum(window.sum(a, 2 * axis), 2 * axis + 1)
        return a

    return unfused(lambda x: Pairs(pooled(x.value), None if x.ntk is None else pooled(x.ntk)), x)


def _pool_planes(pool: Pool, spec: Spec, inputs: Callable[[Geometry], Pairs]) -> Pairs:
    """Pools the offset planes one after another: only one of them is in memory, besides the pooled output."""
    along = windows(pool, spec)

    def plane(index: Array) -> tuple[Pairs, tuple[Array, ...]]:
        offset = jnp.unravel_index(index, spec.space)
        return inputs(OffsetPlane(spec.space, tuple(offset), (1,) * len(offset))), tuple(offset)

    indices = jnp.arange(math.prod(spec.space))
    if all(w.count == 1 for w in along):

        def total(index: Array) -> Pairs:
            x, _ = plane(index)
            return Pairs(*(None if a is None else _sum_space(a, len(spec.space)) for a in x))  # type: ignore[arg-type]

        sums = lax.map(rematerialized(total), indices)
        return Pairs(
            *(None if a is None else _add_pair_axes(_sum_in_two(a), len(spec.space)) for a in sums)  # type: ignore
        )

    def accumulate(sums: Pairs, index: Array) -> tuple[Pairs, None]:
        x, offset = plane(index)
        added = (None if a is None else _add_plane(s, a, offset, along) for s, a in zip(sums, x, strict=True))
        return Pairs(*added), None  # type: ignore[arg-type]

    first, _ = plane(indices[0])  # only its shape is used
    counts = tuple(w.count for w in along)
    zeros = [None if a is None else constant(counts + counts + a.shape[len(counts) :], 0, a.dtype, a) for a in first]
    sums, _ = lax.scan(rematerialized(accumulate), Pairs(*zeros), indices)  # type: ignore[arg-type]
    return Pairs(*(None if a is None else _planes_to_pairs(a, counts) for a in sums))  # type: ignore[arg-type]


def _add_plane(sums: Any, plane: Array, offset: tuple[Array, ...], along: list[Window]) -> Array:
    """Adds a plane to pooled planes `(*offsets, *positions, *batch)`.

    The pair (p, p + d) lies under tap a of window P and tap b of window P' wherever p = s P + a and p + d = s P' + b:
    for given d and a, that is for one b in every stride.
    """
    n = len(along)
    for taps in itertools.product(*(itertools.product(range(w.taps), range(-(-w.taps // w.stride))) for w in along)):
        piece, slots, mask = plane, [], jnp.ones((1,) * plane.ndim, bool)
        for axis, ((a, k), window, d) in enumerate(zip(taps, along, offset, strict=True)):
            b = (a + d) % window.stride + k * window.stride
            piece = window.tap(window.pad(piece, (axis,)), a, axis)
            slots.append((d + a - b) // window.stride % window.count)
            allowed = jnp.broadcast_to(b < window.taps, (window.count,))
            if not window.circular:
                p = window.positions(a)
                partner = (p + d) % window.size
                other = (partner + window.low - b) // window.stride
                allowed &= (p >= 0) & (p < window.size) & (other >= 0) & (other < window.count)
            mask &= allowed.reshape([window.count if i == axis else 1 for i in range(plane.ndim)])
        at = (*slots, *(jnp.zeros_like(slots[0]) for _ in range(sums.ndim - n)))
        old = lax.dynamic_slice(sums, at, (1,) * n + sums.shape[n:])
        sums = lax.dynamic_update_slice(sums, old + jnp.where(mask, piece, 0)[(None,) * n], at)
    return sums


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


def _variance_after(node: Node, spec: Spec, variances: list[Array]) -> Array:
    """Variances after a step that reads only variances."""
    step, var = node.step, variances[0]
    match step:
        case Linear():
            for axis, window in enumerate(windows(step, spec)):
                var = window.sum(var, axis)
            var = step.w_var * var / step.window_size
            var = var if step.b_var is None else var + step.b_var
            return permute(var, SamePosition(), step.space_order(spec)) if isinstance(step, Conv) else var
        case Dual():
            return step.activation.variance(var)
        case Normalize():
            return var * _normalizer(step, var) ** 2
        case Combine():
            terms = [w * v for w, v in zip(step.weights, variances, strict=True)]
            return sum(terms[1:], terms[0])
        case Multiply():
            return functools.reduce(operator.mul, variances)
        case Flatten():
            return jnp.mean(var, tuple(range(len(spec.space))))
        case Pool() | GlobalPool():
            pool = _as_pool(step, spec)
            pooled = pool_sum(pool, spec, var) / _trailing(_window_sizes(pool, spec, var.dtype), var.ndim) ** 2
            return pooled.reshape(tuple(node.spec.space) + var.shape[len(spec.space) :])
    raise NotImplementedError(f"The xla backend does not know the step {type(step).__name__}.")


def _normalizer(step: Normalize, variance: Array) -> Array:
    """One over the standard deviation that layer normalisation divides by; 0 where that is 0: zeros stay zeros."""
    total = jnp.mean(step.eps + variance, step.space_axes, keepdims=True)
    positive = total > 0
    scale = jnp.where(positive, lax.rsqrt(jnp.where(positive, total, 1)), 0)
    return jnp.broadcast_to(scale, variance.shape)


def _mean(variances: tuple[Array, Array], geometry: Geometry) -> Array:
    return (geometry.first(variances[0]) + geometry.second(variances[1])) / 2


def _as_pool(step: Pool | GlobalPool, spec: Spec) -> Pool:
    if isinstance(step, Pool):
        return step
    return Pool(spec.space, (1,) * len(spec.space), "VALID", step.mean)


def _window_sizes(pool: Pool, spec: Spec, dtype: jnp.dtype) -> Array:
    """What the sum over each window is divided by, `(*space,)`."""
    counts = window_counts(pool, spec)
    if pool.mean and pool.normalize_edges:
        return counts.astype(dtype)
    return jnp.full(counts.shape, math.prod(pool.window) if pool.mean else 1, dtype)


def _trailing(x: Array, ndim: int) -> Array:
    """Adds trailing axes up to a rank."""
    return lax.expand_dims(x, range(x.ndim, ndim))


def _is_readout(node: Node) -> bool:
    return isinstance(node.step, Pool | GlobalPool | Flatten)


def _is_same_position(spec: Spec) -> bool:
    return spec.diagonal_spatial or not spec.space


def _stored(spec: Spec) -> Geometry:
    return SamePosition() if _is_same_position(spec) else AllPairs(len(spec.space))


def _before(node: Node, program: Program, geometry: Geometry) -> Geometry:
    """The pairs of positions that a step reads to give those of `geometry`."""
    step = node.step
    if not isinstance(geometry, OffsetPlane) or not isinstance(step, Conv):
        return geometry
    spec = program.spec(node.inputs[0])
    order = step.space_order(spec)
    offset = tuple(geometry.offset[order.index(a)] * step.strides[a] for a in range(len(order)))
    scale = tuple(geometry.scale[order.index(a)] * step.strides[a] for a in range(len(order)))
    return OffsetPlane(spec.space, offset, scale)


def _key(number: int, geometry: Geometry) -> tuple:
    return (number, geometry.scale) if isinstance(geometry, OffsetPlane) else (number,)
