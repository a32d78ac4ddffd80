"""Encodes covariance programs for the native engine, and says which ones it does not take.

The layout of the code is that of `decode_program` in csrc/program.cc; the numbers in it come from the compiled module.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from nt_core.backends.base import Refused, Request
from nt_core.backends.cpu import native
from nt_core.backends.cpu.duals import encode_activation
from nt_core.lowering import Form, LoweredNode, Window, Windows, lower
from nt_core.lowering import windows as windows_
from nt_core.lowering.primitives import (
    Dropout,
    Dual,
    Flatten,
    Gather,
    Normalize,
    Pool,
    Product,
    Scale,
    Sum,
    Tied,
    Untie,
)
from nt_core.program import Program
from nt_core.sources import Inputs, Source, dtype_of, identical_batches, is_symmetric, same_batches

# Positions whose pairs are kept, squared: all pairs of them for 16 pairs of samples at a time, in each thread.
_MAX_KEPT_PAIRS = 2**21
_MAX_COEFFICIENTS = 2**20


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A program as the engine reads it.

    Attributes:
      code: its structure.
      coefficients: the numbers in it, which may be traced, and tables of numbers, one after another. The first two say
        whether both batches hold equal samples, and whether they hold the same ones to dropout.
      numbers: those of each sample and position that come with steps, `(n, positions)`.
      formed: whether inputs stand for what their pairs are, formed already: covariances, or deficits and variances.
      symmetric: the second batch is the first.
      covariances: the engine returns the covariance of each sample with itself.
      owns: whether that is needed of sources that are materialised.
      forms: of all values of the program.
      all_pairs: for each output, whether it holds all pairs of positions.
    """

    code: np.ndarray
    coefficients: list[Any]
    numbers: list[Array]
    formed: bool
    symmetric: bool
    covariances: bool
    owns: bool
    forms: tuple[Form, ...]
    all_pairs: tuple[bool, ...]


def encode(
    program: Program,
    sources: tuple[Source, ...],
    request: Request,
    batches: tuple[int, int] = (1, 2),
    for_derivatives: bool = False,
) -> Encoded:
    """Encodes a program. Raises `Refused`.

    Args:
      program: what is done.
      sources: what it starts from.
      request: what is asked for. Covariances between all samples of one batch are another call, of that batch alone.
      batches: which batches of the program the first and the second one of the sources are.
      for_derivatives: the program is to be differentiated. Without positions what its inputs contribute is a product of
        matrices, which is left to XLA.
    """
    return _Encoder(program, sources, request, batches, for_derivatives).encode()


class _Encoder:
    def __init__(
        self,
        program: Program,
        sources: tuple[Source, ...],
        request: Request,
        batches: tuple[int, int],
        for_derivatives: bool,
    ) -> None:
        schema = native.schema()
        self._encoding, self._ops, self._n_axes = schema["encoding"], schema["ops"], schema["max_axes"]
        self._sources = sources
        self._request = request
        self._lowered = lower(program, sources, ntk=request.ntk, covariances=False)
        self._forms = self._lowered.forms
        self._check()
        self._symmetric = all(is_symmetric(source) for source in sources)
        self._batches = batches[:1] if self._symmetric else batches
        self._covariances = request.covariances and sources[0].spec.diagonal_batch
        self._formed = for_derivatives and self._has_no_positions()
        self._wrapping: list[set[tuple[int, bool]]] = []
        self._cut = self._find_cuts()
        # What is written so far.
        self._number: list[int] = []  # in the code, of every value of the program
        self._copied: dict[tuple[int, tuple[int, ...]], int] = {}  # the same, of copies of values with their axes
        self._values: list[list[int]] = []
        self._spaces: list[tuple[int, ...]] = []
        self._precision = dtype_of(sources[0]).name
        self._coefficients: list[Any] = self._equal_batches()
        self._n_coefficients = len(self._coefficients)
        self._tables: dict[int, int] = {}  # where the tables of activations start, by their identities
        self._numbers: list[Array] = []

    def encode(self) -> Encoded:
        owns = self._needs_own_covariances()
        for number, source in enumerate(self._sources):
            self._number.append(self._source(number, source, owns))
        for number, node in self._lowered.numbered_nodes():
            self._number.append(self._node(number, node))
        outputs = [self._forms[value] for value in self._lowered.outputs]
        all_pairs = tuple(not _stores_equal_positions(form) for form in outputs)
        spec = self._sources[0].spec
        header = [
            self._encoding,
            spec.n1,
            spec.n2,
            self._symmetric,
            self._covariances,
            self._n_coefficients,
            len(self._sources),
            len(self._values),
            len(outputs),
        ]
        for value, form, pairs in zip(self._lowered.outputs, outputs, all_pairs, strict=True):
            header += [self._number[value], pairs, form.has_ntk]
        return Encoded(
            code=np.array([*header, *(number for value in self._values for number in value)], np.int64),
            coefficients=self._coefficients,
            numbers=self._numbers,
            formed=self._formed,
            symmetric=self._symmetric,
            covariances=self._covariances,
            owns=owns,
            forms=self._forms,
            all_pairs=all_pairs,
        )

    # What is known of all values before any is written

    def _check(self) -> None:
        for source in self._sources:
            if len(source.spec.space) > self._n_axes:
                raise Refused(f"inputs have {len(source.spec.space)} spatial axes, it takes up to {self._n_axes}")

    def _equal_batches(self) -> list[Any]:
        """Whether both batches hold equal samples, and the same ones to dropout; False where nothing asks."""
        reads_deficits = any(form.deficit for form in self._forms)
        drops_out = any(isinstance(node.primitive, Dropout) for node in self._lowered.nodes)
        return [
            reads_deficits and identical_batches(self._sources),
            drops_out and same_batches(self._sources),
        ]

    def _find_cuts(self) -> set[int]:
        """Returns the nodes before which the program is cut.

        Circular convolutions mix offset planes that all others keep apart. Where both meet on one axis, a copy stands
        between them: copies are kept plane by plane. `_wrapping` has, for each value, the axes of windows since the
        last copy or pool, and whether they are circular.
        """
        self._wrapping = [set() for _ in self._sources]
        cut = set()
        for number, node in self._lowered.numbered_nodes():
            own = set()
            if isinstance(node.primitive, Tied):
                windows, sizes = self._windows(node, node.primitive.windows), self._canonical(node.inputs[0])
                own = {(a, w.circular) for a, w in enumerate(windows) if sizes[a] > 1 and not w.is_trivial()}
            before = set().union(*(self._wrapping[i] for i in node.inputs))
            together = before | own
            if self._forms[number].apart and any((a, not circular) in together for a, circular in together):
                cut.add(number)
                before = set()
            is_kept = isinstance(node.primitive, Pool | Flatten | Gather | Untie) or self._skipped_axes(number, node)
            self._wrapping.append(set() if is_kept else before | own)
        return cut

    def _skipped_axes(self, number: int, node: LoweredNode) -> list[int]:
        """Axes of a circular convolution whose strides do not divide the circle.

        Offset planes are closed without its strides, so these are taken by a copy of every so many positions.
        """
        if not isinstance(node.primitive, Tied) or not self._forms[number].apart:
            return []
        windows = self._windows(node, node.primitive.windows)
        sizes, counts = self._canonical(node.inputs[0]), self._canonical(number)
        return [a for a, w in enumerate(windows) if w.circular and 1 != sizes[a] != counts[a] * w.stride]

    def _needs_own_covariances(self) -> bool:
        """Pools mix positions: for variances after them the covariances of each sample with itself are needed."""
        pools = [number for number, node in self._lowered.numbered_nodes() if self._mixes_positions(node)]
        return self._covariances or any(self._forms[number].deficit for number in pools)

    def _mixes_positions(self, node: LoweredNode) -> bool:
        return isinstance(node.primitive, Pool) and not self._lowered.input_form(node).same_position

    # Values of the code

    def _source(self, number: int, source: Source, owns: bool) -> int:
        spec, form = source.spec, self._forms[number]
        if 0 in spec.space or spec.n_channels == 0:
            raise Refused(f"inputs of shape {spec.shape1} are empty")
        space = self._canonical(number)
        if not isinstance(source, Inputs):
            if (form.deficit or owns or self._request.covariances) and source.cov1 is None:
                raise Refused("variances are needed, and the kernel it starts from holds none")
            parameters = [form.has_ntk, owns, _stores_equal_positions(form), False]
            return self._add("Materialised", form.deficit, space, [], parameters)
        if self._formed:
            return self._add("Materialised", form.deficit, (1,) * self._n_axes, [], [False, False, True, form.deficit])
        if self._flattened(number):  # positions are channels from the start
            n_channels = spec.n_channels * math.prod(spec.space)
            return self._add("Inputs", form.deficit, (1,) * self._n_axes, [], [n_channels])
        return self._add("Inputs", form.deficit, space, [], [spec.n_channels])

    def _has_no_positions(self) -> bool:
        """Whether no value has positions, but inputs of which the first step makes channels."""
        flattened = {i for i, s in enumerate(self._sources) if isinstance(s, Inputs) and self._flattened(i)}
        return all(i in flattened or math.prod(self._canonical(i)) == 1 for i in range(len(self._forms)))

    def _flattened(self, source: int) -> bool:
        readers = [node for node in self._lowered.nodes if source in node.inputs]
        return source not in self._lowered.outputs and all(isinstance(node.primitive, Flatten) for node in readers)

    def _node(self, number: int, node: LoweredNode) -> int:
        primitive, form, space = node.primitive, self._forms[number], self._canonical(number)
        inputs = [self._read(number, node, i) for i in node.inputs]
        is_whole = isinstance(primitive, Flatten | Untie) or (isinstance(primitive, Pool) and not primitive.keeps_axes)
        if is_whole and math.prod(self._spaces[inputs[0]]) == 1:
            return inputs[0]  # changes the shape, and no number
        match primitive:
            case Tied():
                b_var = 0.0 if primitive.b_var is None else primitive.b_var
                coefficients = [primitive.w_var, b_var, primitive.own_w, primitive.own_b]
                return self._tied(number, node, primitive.windows, inputs[0], primitive.follows, coefficients)
            case Dual():
                parameters, coefficients = encode_activation(primitive.activation, self._precision)
                return self._add("Dual", form.deficit, space, inputs, parameters, coefficients)
            case Pool():
                if not self._mixes_positions(node):
                    return self._pool_of_equal_positions(number, node, primitive, inputs[0])
                windows = self._windows(node, primitive.windows)
                parameters = [primitive.mean, primitive.normalize_edges, *_flat(windows)]
                return self._add_kept("Pool", form, space, inputs[0], parameters)
            case Gather():
                positions: list[Sequence[int]] = [(0,)] * self._n_axes
                for axis, along in enumerate(primitive.positions):
                    positions[self._canonical_axis(number, axis)] = along
                return self._copies(form, inputs[0], positions)
            case Untie():
                return self._add_kept("Untie", form, space, inputs[0])
            case Flatten():
                return self._add("Flatten", form.deficit, space, inputs)
            case Scale():
                self._add_numbers(node, primitive.sample_numbers)
                return self._add("Scale", form.deficit, space, inputs)
            case Normalize():
                weighted = primitive.first is not None
                if weighted:
                    self._add_numbers(node, primitive.sample_numbers)
                axes = {self._canonical_axis(number, a) for a in primitive.space_axes}
                flags = [a in axes for a in range(self._n_axes)]
                return self._add("Normalize", form.deficit, space, inputs, [weighted, *flags], [primitive.eps])
            case Dropout():
                return self._add("Dropout", form.deficit, space, inputs, [], [primitive.rate])
            case Sum():
                return self._add("Sum", form.deficit, space, inputs, [], primitive.weights)
            case Product():
                return self._add("Product", form.deficit, space, inputs)
            case _:
                raise Refused(f"it does not know the primitive {type(primitive).__name__}")

    def _read(self, number: int, node: LoweredNode, value: int) -> int:
        """A value as a node reads it: copied behind a cut, or where its axes are in another order than the first's."""
        form, axes = self._forms[value], self._lowered.input_form(node).axes
        is_cut = number in self._cut and bool(self._wrapping[value])
        if form.axes == axes and not is_cut:
            return self._number[value]
        if (value, axes) not in self._copied:
            order, n_leading = list(range(self._n_axes)), self._n_axes - len(axes)
            for to, at in zip(axes, form.axes, strict=True):
                order[n_leading + to] = n_leading + at
            places = [range(self._canonical(value)[a]) for a in order]
            self._copied[value, axes] = self._copies(form, self._number[value], places, order)
        return self._copied[value, axes]

    def _tied(
        self, number: int, node: LoweredNode, along: Windows, value: int, follows: bool, coefficients: list[Any]
    ) -> int:
        form, windows = self._forms[number], self._windows(node, along)
        space, sizes = self._canonical(number), self._canonical(node.inputs[0])
        beyond = [a for a, w in enumerate(windows) if (space[a] - 1) * w.stride >= sizes[a]]
        if beyond:  # the engine knows no offsets larger than the image
            places = [_padded_positions(w) if a in beyond else range(sizes[a]) for a, w in enumerate(windows)]
            value = self._copies(self._lowered.input_form(node), value, places)
            windows = [dataclasses.replace(w, low=0, high=0) if a in beyond else w for a, w in enumerate(windows)]
        skipped = self._skipped_axes(number, node)
        if not skipped:
            return self._add("Tied", form.deficit, space, [value], [follows, *_flat(windows)], coefficients)
        closed = [_without_stride(w) if a in skipped else w for a, w in enumerate(windows)]
        convolved = tuple(sizes[a] if a in skipped else n for a, n in enumerate(space))
        value = self._add("Tied", form.deficit, convolved, [value], [follows, *_flat(closed)], coefficients)
        strides = [w.stride if a in skipped else 1 for a, w in enumerate(windows)]
        return self._copies(form, value, [range(0, n, s) for n, s in zip(convolved, strides, strict=True)])

    def _pool_of_equal_positions(self, number: int, node: LoweredNode, pool: Pool, value: int) -> int:
        """Positions are independent: their covariances are summed, and divided by the size of the window twice."""
        n_taps = float(windows_.size(pool.windows))
        sums = self._tied(number, node, pool.windows, value, False, [n_taps, 0.0, 0.0, 0.0])
        self._add_numbers(node, lambda _: 1 / pool.divisors(float)[None])
        return self._add("Scale", self._forms[number].deficit, self._canonical(number), [sums])

    def _canonical_axis(self, number: int, axis: int) -> int:
        """The axis of the engine that a spatial axis of a value is."""
        form = self._forms[number]
        return self._n_axes - len(form.space) + form.axes[axis]

    def _windows(self, node: LoweredNode, along: Windows) -> list[Window]:
        """Windows along the axes of the engine."""
        windows = [Window(1, 1, taps=1, stride=1, dilation=1, low=0, high=0, circular=False)] * self._n_axes
        for axis, window in enumerate(along):
            windows[self._canonical_axis(node.inputs[0], axis)] = window
        return windows

    def _canonical(self, number: int) -> tuple[int, ...]:
        """Sizes of a value along the axes of the engine."""
        sizes = [1] * self._n_axes
        for axis, size in enumerate(self._forms[number].space):
            sizes[self._canonical_axis(number, axis)] = size
        return tuple(sizes)

    def _add_numbers(self, node: LoweredNode, of_batch: Callable[[int], Array | None]) -> None:
        """Appends numbers of the samples of each batch, or of all, with positions in the order of the engine."""
        spec, before = self._sources[0].spec, node.inputs[0]
        order = np.argsort([self._canonical_axis(before, a) for a in range(len(self._forms[before].space))])
        for which, n in zip(self._batches, (spec.n1, spec.n2), strict=False):
            numbers = of_batch(which)
            assert numbers is not None
            in_order = jnp.transpose(numbers, (0, *(1 + int(a) for a in order))).reshape(len(numbers), -1)
            self._numbers.append(jnp.broadcast_to(in_order, (n, in_order.shape[1])))

    def _copies(
        self, form: Form, value: int, positions: Sequence[Sequence[int]], order: Sequence[int] | None = None
    ) -> int:
        """Appends copies of the positions of a value in the code, -1 for zero.

        Args:
          form: says what is needed of them.
          value: number in the code.
          positions: which one is copied to each place, along each axis of the copies.
          order: which axis of the value stands there; None for the same.
        """
        space = tuple(map(len, positions))
        order = range(self._n_axes) if order is None else order
        return self._add_kept("Gather", form, space, value, [*order, *itertools.chain(*positions)])

    def _add_kept(self, op: str, form: Form, space: tuple[int, ...], value: int, parameters: Iterable[Any] = ()) -> int:
        """Appends a value that is kept for all pairs of positions of which it is needed."""
        n_positions = math.prod(space)
        if form.apart and n_positions**2 > _MAX_KEPT_PAIRS:
            raise Refused(
                f"the pairs of {n_positions} positions, after a pool or a copy, are too many for its scratch memory"
            )
        return self._add(op, form.deficit, space, [value], parameters)

    def _add(
        self,
        op: str,
        deficit: bool,
        space: tuple[int, ...],
        inputs: list[int],
        parameters: Iterable[Any] = (),
        coefficients: Iterable[Any] = (),
    ) -> int:
        """Appends a value, and returns its number in the code."""
        start = self._write_coefficients(list(coefficients))
        count = [len(inputs)] if inputs else []
        self._values.append([self._ops[op], deficit, start, *space, *count, *inputs, *map(int, parameters)])
        self._spaces.append(space)
        return len(self._values) - 1

    def _write_coefficients(self, coefficients: list[Any]) -> int:
        """Appends coefficients, or finds a table that is there, and returns where they start."""
        table = next((id(c) for c in coefficients if np.ndim(c)), None)
        if table in self._tables:
            return self._tables[table]
        start = self._n_coefficients
        self._coefficients.extend(coefficients)
        self._n_coefficients += sum(map(np.size, coefficients))
        if self._n_coefficients > _MAX_COEFFICIENTS:
            raise Refused(f"more than {_MAX_COEFFICIENTS} coefficients of activations")
        if table is not None:
            self._tables[table] = start
        return start


def _flat(windows: list[Window]) -> list[int]:
    """Windows along the axes of the engine, as it reads them."""
    return [int(n) for w in windows for n in (w.taps, w.stride, w.dilation, w.low, w.high, w.circular)]


def _padded_positions(window: Window) -> list[int]:
    """The positions of an axis with its padding, which is -1."""
    return [p if 0 <= p < window.size else -1 for p in range(-window.low, window.size + window.high)]


def _without_stride(window: Window) -> Window:
    """The same circular windows, one at each position."""
    return dataclasses.replace(window, stride=1, high=(window.taps - 1) * window.dilation - window.low)


def _stores_equal_positions(form: Form) -> bool:
    """Whether the engine holds pairs of equal positions only."""
    return form.same_position or math.prod(form.space) == 1
