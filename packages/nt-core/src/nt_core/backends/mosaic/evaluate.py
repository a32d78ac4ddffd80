"""What a kernel does with one plane: the steps of a stage, written once for GPU and TPU.

Only additions, products, divisions, square roots, selections and polynomials: they lower everywhere.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Jaxpr, Literal

from nt_core.activations.arcs import horner
from nt_core.activations.polynomials import P_FLOAT32, Q_FLOAT32
from nt_core.backends.mosaic.plan import Instance, Row, Stage, Two, is_relu, needs_average, pool_turns
from nt_core.backends.xla.geometry import Window
from nt_core.backends.xla.repeats import Repeated
from nt_core.steps import Combine, Dual, Linear, Normalize, Step

Int = Any  # a Python number or a traced scalar
_FAR = 8  # more turns around a torus than a window reaches


class Planes(NamedTuple):
    """A covariance or deficit on a plane, and its tangent kernel (None where it is 0)."""

    value: Array
    ntk: Array | None

    def arrays(self) -> list[Array]:
        return [self.value] if self.ntk is None else [self.value, self.ntk]


class Machine(Protocol):
    """Where the numbers are. A plane is an array of one shape throughout."""

    def coefficient(self, index: Int) -> Array: ...

    def first(self, row: Int) -> Array:
        """A row of the first sample's table."""
        ...

    def second(self, row: Int, start: Int) -> Array:
        """A row of the second sample's table, `start` positions on, with `0 <= start < torus.size`."""
        ...

    def source(self, row: Int) -> Array:
        """A plane of a covariance that an earlier stage has left, at the offset at hand."""
        ...

    def read(self, buffer: int, is_ntk: bool, phase: Int, start: Int) -> Array: ...

    def write(self, buffer: int, phase: Int, planes: Planes) -> None: ...


class Evaluation:
    """One plane of a stage.

    Args:
      offset: the offset of the plane, a position of the torus.
      finer: what is to be added to `stride * offset`, along each axis, for a pool; zeros otherwise.
    """

    def __init__(self, stage: Stage, machine: Machine, offset: Int, finer: tuple[Int, Int]) -> None:
        self._stage = stage
        self._torus = stage.torus
        self._machine = machine
        self._offset = offset
        self._finer = finer

    def run(self) -> None:
        """Computes all values that are stored."""
        self._chain(self._stage.instances, None)

    def root(self) -> Planes:
        """Returns what is read out, with ghosts as 0, for a stage that ends in a sum."""
        instances, phase = self._stage.instances, (0, 0)
        return self._without_ghosts(self._form(instances, len(instances) - 1, phase, None, self._stage.deficit), phase)

    def _without_ghosts(self, x: Planes, phase: tuple[Int, Int]) -> Planes:
        both = self._both(self._stage.root, phase)
        zero = jnp.zeros_like(x.value)
        return Planes(jnp.where(both, x.value, zero), None if x.ntk is None else jnp.where(both, x.ntk, zero))

    def pooled(self, add: Callable[[Int, Planes], None]) -> None:
        """Calls `add(offset, planes)` with what this plane adds to those after the pool."""
        stage, root = self._stage, self._stage.root
        assert stage.windows is not None
        along = [self._pool_terms(axis) for axis in range(2)]
        for turn_y, taps_y in along[0]:
            for turn_x, taps_x in along[1]:
                total = None
                for tap_y, weight_y in taps_y:
                    for tap_x, weight_x in taps_x:
                        x = self._tapped(root, (tap_y, tap_x))
                        weight = weight_y * weight_x
                        x = Planes(weight * x.value, None if x.ntk is None else weight * x.ntk)
                        total = x if total is None else _sum(total, x)
                assert total is not None
                add(self._turned(self._offset, turn_y, turn_x), total)

    def _pool_terms(self, axis: int) -> list[tuple[int, list[tuple[int, Array]]]]:
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

    # Values

    def _chain(self, instances: list[Instance], iteration: Int | None) -> None:
        for i, instance in enumerate(instances):
            if instance.stored and not (iteration is not None and i == 0):
                self._store(instances, i, iteration)

    def _store(self, instances: list[Instance], i: int, iteration: Int | None) -> None:
        instance = instances[i]
        of = instance.inputs[0] if instance.body is not None else i

        def store(phase: tuple[Int, Int]) -> None:
            x = self._form(instances, of, phase, iteration, instances[of].deficit, compute=of == i)
            if i == len(instances) - 1 and iteration is None and self._stage.windows is not None:
                x = self._pool_input(instances, i, phase, x)
            elif instance.masked:
                x = self._with_ghosts(instances, of, self._both(instance, phase), phase, iteration, x)
            if instance.has_ntk and x.ntk is None:
                x = Planes(x.value, jnp.zeros_like(x.value))
            self._machine.write(instance.buffer, _flat(phase, instance.scale), x)

        _for_phases(instance.scale, store)
        if instance.body is not None:
            self._repeat(instance)

    def _repeat(self, instance: Instance) -> None:
        body = instance.body
        assert body is not None and isinstance(instance.step, Repeated)

        def iterate(iteration: Int, carry: Any) -> Any:
            self._chain(body, iteration)
            if body[-1].buffer != instance.buffer:
                _for_phases(
                    instance.scale,
                    lambda phase: self._machine.write(
                        instance.buffer, _flat(phase, instance.scale), self._read(body[-1], phase)
                    ),
                )
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(instance.step.count), iterate, ())

    def _pool_input(self, instances: list[Instance], i: int, phase: tuple[Int, Int], x: Planes) -> Planes:
        if instances[i].deficit and not self._stage.deficit:
            x = Planes(self._halves(instances, i, phase, None) - x.value, x.ntk)
        return self._without_ghosts(x, phase)

    def _with_ghosts(
        self,
        instances: list[Instance],
        i: int,
        both: Array,
        phase: tuple[Int, Int],
        iteration: Int | None,
        x: Planes,
    ) -> Planes:
        """Pairs with a ghost: its variance and the covariance are 0."""
        zero = jnp.zeros_like(x.value)
        ghost = self._halves(instances, i, phase, iteration) if instances[i].deficit else zero
        return Planes(jnp.where(both, x.value, ghost), None if x.ntk is None else jnp.where(both, x.ntk, zero))

    def _form(
        self,
        instances: list[Instance],
        i: int,
        phase: tuple[Int, Int],
        iteration: Int | None,
        as_deficit: bool,
        compute: bool = False,
    ) -> Planes:
        """Returns a value as a deficit or as a covariance; from its buffer, unless it is to be computed."""
        instance = instances[i]
        if instance.stored and not compute:
            x = self._read(instance, phase)
        else:
            x = self._compute(instances, i, phase, iteration)
        if as_deficit or not instance.deficit:
            return x
        return Planes(self._halves(instances, i, phase, iteration) - x.value, x.ntk)

    def _compute(self, instances: list[Instance], i: int, phase: tuple[Int, Int], iteration: Int | None) -> Planes:
        instance = instances[i]
        if instance.step is None:
            return self._load(instance, phase)
        step = self._with_coefficients(instance, iteration)
        match step:
            case Linear():
                return self._linear(instances, i, step, phase, iteration)
            case Dual():
                return self._dual(instances, i, step, phase, iteration)
            case Normalize():
                return self._normalize(instances, i, phase, iteration)
            case Combine():
                inputs = [self._form(instances, j, phase, iteration, instance.deficit) for j in instance.inputs]
                values = [w * x.value for w, x in zip(step.weights, inputs, strict=True)]
                ntks = [w * x.ntk for w, x in zip(step.weights, inputs, strict=True) if x.ntk is not None]
                return Planes(sum(values[1:], values[0]), sum(ntks[1:], ntks[0]) if ntks else None)
        raise NotImplementedError(f"No kernel for the step {type(step).__name__}.")

    def _load(self, instance: Instance, phase: tuple[Int, Int]) -> Planes:
        if instance.source >= 0:
            row = self._stage.source_row(instance) + _flat(phase, instance.scale)
            ntk = self._machine.source(row + instance.phases) if instance.has_ntk else None
            return Planes(self._machine.source(row), ntk)
        n, total = instance.spec.n_channels, None
        for channel in range(n):
            row = instance.rows["channel"] + channel * instance.phases
            first, second = self._first(row, instance, phase), self._second(row, instance, phase)
            if instance.deficit:
                difference = first - second
                term = difference * difference
            else:
                term = first * second
            total = term if total is None else total + term
        assert total is not None
        return Planes(total * (0.5 / n if instance.deficit else 1 / n), None)

    def _linear(
        self, instances: list[Instance], i: int, step: Linear, phase: tuple[Int, Int], iteration: Int | None
    ) -> Planes:
        instance, (source,) = instances[i], instances[i].inputs
        before = instances[source]
        if instance.windows is None:
            x = self._form(instances, source, phase, iteration, before.deficit)
        else:
            x = self._window_sum(before, instance, instance.windows, phase)
        value = x.value * (1 / step.window_size)
        covariance = value
        if needs_average(instance, before):
            rows = instance.rows["average"], instance
            covariance = self._first_of(rows, phase, iteration) + self._second_of(rows, phase, iteration) - value
        weight, bias = step.ntk_coefficients(instance.spec)
        if instance.deficit:
            value = step.w_var * value
        else:
            value = step.w_var * covariance
            value = value if step.b_var is None else value + step.b_var
        if not instance.has_ntk:
            return Planes(value, None)
        if step.parameterization == "ntk":  # what its own parameters add is the covariance after it
            own = self._halves(instances, i, phase, iteration) - value if instance.deficit else value
        else:
            own = weight * covariance + bias
        if x.ntk is None:
            return Planes(value, own)
        return Planes(value, (step.w_var * (1 / step.window_size)) * x.ntk + own)

    def _window_sum(
        self, before: Instance, instance: Instance, along: tuple[Window, Window], phase: tuple[Int, Int]
    ) -> Planes:
        total = None
        for tap_y in range(along[0].taps):
            for tap_x in range(along[1].taps):
                tap = (tap_y * along[0].dilation - along[0].low, tap_x * along[1].dilation - along[1].low)
                moved = (along[0].stride * phase[0] + tap[0], along[1].stride * phase[1] + tap[1])
                x = self._tapped(before, moved)
                total = x if total is None else _sum(total, x)
        assert total is not None
        return total

    def _tapped(self, x: Instance, position: tuple[Int, Int]) -> Planes:
        """Reads a stored value where each position of the torus finds the one that is this far from its own."""
        phases, turns = [], []
        for p, s in zip(position, x.scale, strict=True):
            shifted = p + _FAR * s
            phases.append(shifted % s if isinstance(p, int) else lax.rem(shifted, jnp.int32(s)))
            turns.append((shifted // s if isinstance(p, int) else lax.div(shifted, jnp.int32(s))) - _FAR)
        return self._read(x, (phases[0], phases[1]), (turns[0], turns[1]))

    def _read(self, x: Instance, phase: tuple[Int, Int], turns: tuple[Int, Int] = (0, 0)) -> Planes:
        flat = _flat(phase, x.scale)

        def read(is_ntk: bool) -> Array:
            return self._shifted(lambda start: self._machine.read(x.buffer, is_ntk, flat, start), 0, *turns)

        return Planes(read(False), read(True) if x.has_ntk else None)

    def _dual(
        self, instances: list[Instance], i: int, step: Dual, phase: tuple[Int, Int], iteration: Int | None
    ) -> Planes:
        instance, (source,) = instances[i], instances[i].inputs
        x = self._form(instances, source, phase, iteration, True)
        if is_relu(step):
            rows = instances[source].rows["root"], instances[source]
            roots = self._first_of(rows, phase, iteration), self._second_of(rows, phase, iteration)
            deficit, covariance, dot = relu_dual(step.activation.a, step.activation.b, *roots, x.value)  # type: ignore
            value = deficit if instance.deficit else covariance
        else:
            var1 = 2 * self._half(instances, source, phase, iteration, self._first)
            var2 = 2 * self._half(instances, source, phase, iteration, self._second)
            value, dot = _inlined(
                lambda activation, *args: activation.dual(*args), step.activation, var1, var2, x.value
            )
            if not instance.deficit:
                own = _inlined(
                    lambda activation, *vars: sum(map(activation.variance, vars)), step.activation, var1, var2
                )
                value = 0.5 * own - value
        return Planes(value, None if x.ntk is None else x.ntk * dot)

    def _normalize(self, instances: list[Instance], i: int, phase: tuple[Int, Int], iteration: Int | None) -> Planes:
        instance, (source,) = instances[i], instances[i].inputs
        rows = instance.rows["normalizer"], instance
        scale1, scale2 = self._first_of(rows, phase, iteration), self._second_of(rows, phase, iteration)
        x = self._form(instances, source, phase, iteration, instance.deficit)
        value = x.value * scale1 * scale2
        if instance.deficit:
            half1 = self._half(instances, source, phase, iteration, self._first)
            half2 = self._half(instances, source, phase, iteration, self._second)
            value = value + (scale1 - scale2) * (half1 * scale1 - half2 * scale2)
        return Planes(value, None if x.ntk is None else x.ntk * scale1 * scale2)

    # Statistics of samples

    def _halves(self, instances: list[Instance], i: int, phase: tuple[Int, Int], iteration: Int | None) -> Array:
        """The mean of both variances."""
        first = self._half(instances, i, phase, iteration, self._first)
        return first + self._half(instances, i, phase, iteration, self._second)

    def _half(
        self,
        instances: list[Instance],
        i: int,
        phase: tuple[Int, Int],
        iteration: Int | None,
        load: Callable[[Int, Instance, tuple[Int, Int]], Array],
    ) -> Array:
        instance = instances[i]
        if is_relu(instance.step):
            step = self._with_coefficients(instance, iteration)
            a, b = step.activation.a, step.activation.b  # type: ignore[union-attr]
            return (0.5 * (a * a + b * b)) * self._half(instances, instance.inputs[0], phase, iteration, load)
        if "root" in instance.rows:
            root = load(_iterated(instance.rows["root"], instance, iteration), instance, phase)
            return 0.5 * root * root
        return load(_iterated(instance.rows["half"], instance, iteration), instance, phase)

    def _first_of(self, row: tuple[int, Instance], phase: tuple[Int, Int], iteration: Int | None) -> Array:
        return self._first(_iterated(*row, iteration), row[1], phase)

    def _second_of(self, row: tuple[int, Instance], phase: tuple[Int, Int], iteration: Int | None) -> Array:
        return self._second(_iterated(*row, iteration), row[1], phase)

    def _both(self, instance: Instance, phase: tuple[Int, Int]) -> Array:
        """Which pairs are of two positions of the image."""
        row = instance.rows["mask"]
        return self._first(row, instance, phase) * self._second(row, instance, phase) > 0

    def _first(self, row: Int, instance: Instance, phase: tuple[Int, Int]) -> Array:
        return self._machine.first(row + _flat(phase, instance.scale))

    def _second(self, row: Int, instance: Instance, phase: tuple[Int, Int]) -> Array:
        """A row of the second sample, at the partner of each position."""
        phases, turns = [], []
        for p, s, stride, finer in zip(phase, instance.scale, self._stage.stride, self._finer, strict=True):
            if s == 1:
                phases.append(0)
                turns.append(0)
            else:
                moved = p + s // stride * finer
                phases.append(moved % s if isinstance(moved, int) else lax.rem(moved, jnp.int32(s)))
                turns.append(moved // s if isinstance(moved, int) else lax.div(moved, jnp.int32(s)))
        row = row + _flat((phases[0], phases[1]), instance.scale)
        return self._shifted(lambda start: self._machine.second(row, start), self._offset, turns[0], turns[1])

    # Ways around the torus

    def _shifted(self, load: Callable[[Int], Array], offset: Int, turn_y: Int, turn_x: Int) -> Array:
        """Loads what lies `offset` and some turns on, on the torus."""
        start = self._turned(offset, turn_y, turn_x)
        if not self._torus.wraps or (isinstance(start, int) and start == 0):
            return load(start)
        columns = self._torus.shape[1]
        column = _rem(start, columns)
        own = self._machine.first(self._stage.rows[Row("column", None, 0, self._torus.shape, (1, 1))])
        stays = own < jnp.asarray(columns - column, jnp.float32)
        before = _rem(start + self._torus.size - columns, self._torus.size)
        return jnp.where(stays, load(start), load(before))

    def _turned(self, offset: Int, turn_y: Int, turn_x: Int) -> Int:
        rows, columns = self._torus.shape
        size = self._torus.size
        if not self._torus.wraps:
            return _rem(offset + turn_y * columns + turn_x + _FAR * size, size)
        row = offset // columns if isinstance(offset, int) else lax.div(offset, jnp.int32(columns))
        row = _rem(row + turn_y + _FAR * rows, rows)
        return row * columns + _rem(_rem(offset, columns) + turn_x + _FAR * columns, columns)

    def _with_coefficients(self, instance: Instance, iteration: Int | None) -> Step:
        leaves, structure = jax.tree.flatten(instance.step)
        start = instance.coefficients
        if iteration is not None:
            start = start + iteration * self._iteration_size(instance)
        return jax.tree.unflatten(structure, [self._machine.coefficient(start + k) for k in range(len(leaves))])

    def _iteration_size(self, instance: Instance) -> int:
        return next(
            i.coefficients for i in self._stage.instances if i.body is not None and any(j is instance for j in i.body)
        )


def relu_dual(a: Array, b: Array, root1: Array, root2: Array, deficit: Array) -> tuple[Array, Array, Array]:
    """Returns deficit and covariance after `a min(x, 0) + b max(x, 0)`, and the factor of the tangent kernel.

    As `ABRelu.dual`, from the standard deviations.
    """
    slope, kink = 0.5 * (a * a + b * b), 0.5 * (a - b) * (a - b)
    difference = root1 - root2
    excess = deficit - 0.5 * difference * difference  # scale (1 - c)
    scale = root1 * root2
    has_scale, one = scale > 0, jnp.ones_like(scale)
    w = jnp.minimum(excess, 2 * scale - excess) / jnp.where(has_scale, scale, one)
    w = jnp.where(has_scale, jnp.minimum(jnp.maximum(w, 0.0), 1.0), one)
    root = jnp.sqrt(w)
    below = excess - scale  # minus the covariance
    opposed = scale * (w * root * horner(Q_FLOAT32, w)) + jnp.maximum(below, 0.0)
    angle = root * horner(P_FLOAT32, w)
    angle = jnp.where(below > 0, 1 - angle, angle)
    return slope * deficit - kink * opposed, kink * opposed - slope * below, slope - kink * angle


def _inlined(fn: Callable[..., Any], *args: Any) -> Any:
    """Calls `fn` without its custom derivatives, which Mosaic GPU of JAX 0.11 does not lower."""
    leaves, structure = jax.tree.flatten(args)
    jaxpr, shape = jax.make_jaxpr(lambda *leaves: fn(*jax.tree.unflatten(structure, leaves)), return_shape=True)(
        *leaves
    )
    return jax.tree.unflatten(jax.tree.structure(shape), _evaluated(jaxpr.jaxpr, jaxpr.consts, leaves))


def _evaluated(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, Literal) else values[x]

    for equation in jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        inner = equation.params.get("call_jaxpr", equation.params.get("jaxpr"))
        if inner is None:
            outputs = equation.primitive.bind(*inputs, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        else:
            outputs = _evaluated(inner.jaxpr, inner.consts, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _iterated(row: int, instance: Instance, iteration: Int | None) -> Int:
    return row if iteration is None else row + iteration * instance.phases


def _for_phases(scale: Two, do: Callable[[tuple[Int, Int]], None]) -> None:
    if scale == (1, 1):
        return do((0, 0))

    def one(phase: Array, carry: Any) -> Any:
        columns = jnp.int32(scale[1])
        do((lax.div(phase, columns), lax.rem(phase, columns)))
        return carry

    lax.fori_loop(jnp.int32(0), jnp.int32(scale[0] * scale[1]), one, ())


def _flat(phase: tuple[Int, Int], scale: Two) -> Int:
    return phase[0] * scale[1] + phase[1]


def _rem(x: Int, n: int) -> Int:
    return x % n if isinstance(x, int) else lax.rem(x, jnp.int32(n))


def _sum(x: Planes, y: Planes) -> Planes:
    return Planes(x.value + y.value, None if x.ntk is None or y.ntk is None else x.ntk + y.ntk)
