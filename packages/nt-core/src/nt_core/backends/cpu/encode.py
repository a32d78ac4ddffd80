"""Encodes covariance programs for the native engine, and says which ones it does not take.

The layout of the code is that of `decode_program` in csrc/program.cc; the numbers in it come from the compiled module.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from nt_core.activations import (
    ABRelu,
    Activation,
    Erf,
    Exp,
    ExpNormalized,
    Gabor,
    Gaussian,
    Gelu,
    Rbf,
    RectifiedMonomial,
    Sin,
    Step,
)
from nt_core.activations.hermite import Expansion, Series, power
from nt_core.backends.base import Request
from nt_core.backends.cpu import native
from nt_core.lowering import Form, LoweredNode, Windows, lower
from nt_core.lowering.primitives import (
    Dropout,
    Dual,
    Flatten,
    Gather,
    Normalize,
    Pool,
    Product,
    Rescale,
    Scale,
    Sum,
    Tied,
    Untie,
)
from nt_core.program import Program
from nt_core.sources import Inputs, Source, identical_batches, is_symmetric, same_batches

# Positions after a pool, squared: all pairs of them are kept for 16 pairs of samples at a time, in each thread.
_MAX_POOLED_PAIRS = 2**21


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A program as the engine reads it.

    Attributes:
      code: its structure.
      coefficients: the numbers in it, which may be traced. The first two say whether both batches hold equal samples,
        and whether they hold the same ones to dropout.
      numbers: those of each sample and position that come with steps, `(n, positions)`.
      symmetric: the second batch is the first.
      owns: whether the covariance of each sample with itself is needed, for sources that are materialised.
      forms: of all values of the program.
      all_pairs: for each output, whether it holds all pairs of positions.
    """

    code: np.ndarray
    coefficients: list[Any]
    numbers: list[Array]
    symmetric: bool
    owns: bool
    forms: tuple[Form, ...]
    all_pairs: tuple[bool, ...]


class Refused(Exception):
    """The engine does not take this program, for the reason given."""


def encode(program: Program, sources: tuple[Source, ...], request: Request) -> Encoded:
    """Encodes a program. Raises `Refused`."""
    return _Encoder(program, sources, request).encode()


class _Window(NamedTuple):
    """Windows along one axis, as the engine reads them."""

    taps: int = 1
    stride: int = 1
    dilation: int = 1
    low: int = 0
    high: int = 0
    circular: bool = False

    @property
    def is_trivial(self) -> bool:
        return self.taps == 1 and self.stride == 1 and self.low == 0 and self.high == 0

    def without_stride(self) -> "_Window":
        """The same circular windows, one at each position."""
        return self._replace(stride=1, high=(self.taps - 1) * self.dilation - self.low)


class _Encoder:
    def __init__(self, program: Program, sources: tuple[Source, ...], request: Request) -> None:
        schema = native.schema()
        self._encoding, self._ops, self._n_axes = schema["encoding"], schema["ops"], schema["max_axes"]
        self._sources = sources
        self._request = request
        self._lowered = lower(program, sources, ntk=request.ntk, covariances=False)
        self._forms = self._lowered.forms
        self._check()
        self._symmetric = all(is_symmetric(source) for source in sources)
        self._wrapping: list[set[tuple[int, bool]]] = []
        self._cut = self._find_cuts()
        # What is written so far.
        self._number: list[int] = []  # in the code, of every value of the program
        self._separated: dict[int, int] = {}  # the same, of values behind a cut
        self._values: list[list[int]] = []
        self._spaces: list[tuple[int, ...]] = []
        self._coefficients: list[Any] = [identical_batches(sources), same_batches(sources)]
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
            self._request.covariances,
            len(self._coefficients),
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
            symmetric=self._symmetric,
            owns=owns,
            forms=self._forms,
            all_pairs=all_pairs,
        )

    # What is known of all values before any is written

    def _check(self) -> None:
        for source in self._sources:
            if len(source.spec.space) > self._n_axes:
                raise Refused(f"inputs have {len(source.spec.space)} spatial axes, it takes up to {self._n_axes}")
        if any(form.axes is None for form in self._forms):
            raise Refused("branches order their spatial axes differently")

    def _find_cuts(self) -> set[int]:
        """Returns the nodes before which the program is cut.

        Circular convolutions mix offset planes that all others keep apart. Where both meet on one axis, a pool with
        windows of one position stands between them: what is after a pool is kept plane by plane. `_wrapping` has, for
        each value, the axes of windows since the last pool, and whether they are circular.
        """
        self._wrapping = [set() for _ in self._sources]
        cut = set()
        for number, node in self._lowered.numbered_nodes():
            own = set()
            if isinstance(node.primitive, Tied):
                windows, sizes = self._windows(node, node.primitive.windows), self._canonical(node.inputs[0])
                own = {(a, w.circular) for a, w in enumerate(windows) if sizes[a] > 1 and not w.is_trivial}
            before = set().union(*(self._wrapping[i] for i in node.inputs))
            together = before | own
            if self._forms[number].apart and any((a, not circular) in together for a, circular in together):
                cut.add(number)
                before = set()
            is_pool = isinstance(node.primitive, Pool | Flatten | Gather | Untie) or self._subsampled(number, node)
            self._wrapping.append(set() if is_pool else before | own)
        return cut

    def _subsampled(self, number: int, node: LoweredNode) -> list[int]:
        """Axes of a circular convolution whose strides do not divide the circle.

        Offset planes are closed without its strides, so these are taken by a pool with windows of one position.
        """
        if not isinstance(node.primitive, Tied) or not self._forms[number].apart:
            return []
        windows = self._windows(node, node.primitive.windows)
        sizes, counts = self._canonical(node.inputs[0]), self._canonical(number)
        return [a for a, w in enumerate(windows) if w.circular and 1 != sizes[a] != counts[a] * w.stride]

    def _needs_own_covariances(self) -> bool:
        """Pools mix positions: for variances after them the covariances of each sample with itself are needed."""
        needed = [self._request.covariances]
        for number, node in self._lowered.numbered_nodes():
            if isinstance(node.primitive, Pool) or self._subsampled(number, node):
                needed.append(self._forms[number].deficit)
            if number in self._cut:
                needed.extend(self._forms[i].deficit for i in node.inputs)
        return any(needed)

    # Values of the code

    def _source(self, number: int, source: Source, owns: bool) -> int:
        spec, form = source.spec, self._forms[number]
        if 0 in spec.space or spec.n_channels == 0:
            raise Refused(f"inputs of shape {spec.shape1} are empty")
        if self._request.covariances and not spec.diagonal_batch:
            raise Refused("covariances between all samples of one batch are asked for")
        space = self._canonical(number)
        if not isinstance(source, Inputs):
            if (form.deficit or owns) and source.cov1 is None:
                raise Refused("variances are needed, and the kernel it starts from holds none")
            parameters = [form.has_ntk, owns, _stores_equal_positions(form)]
            return self._add("Materialised", form.deficit, space, [], parameters)
        if self._flattened(number):  # positions are channels from the start
            n_channels = spec.n_channels * math.prod(spec.space)
            return self._add("Inputs", form.deficit, (1,) * self._n_axes, [], [n_channels])
        return self._add("Inputs", form.deficit, space, [], [spec.n_channels])

    def _flattened(self, source: int) -> bool:
        readers = [node for node in self._lowered.nodes if source in node.inputs]
        return source not in self._lowered.outputs and all(isinstance(node.primitive, Flatten) for node in readers)

    def _node(self, number: int, node: LoweredNode) -> int:
        primitive, deficit, space = node.primitive, self._forms[number].deficit, self._canonical(number)
        inputs = [self._separate(i) if number in self._cut else self._number[i] for i in node.inputs]
        is_whole = isinstance(primitive, Flatten | Untie) or (isinstance(primitive, Pool) and not primitive.keeps_axes)
        if is_whole and math.prod(self._spaces[inputs[0]]) == 1:
            return inputs[0]  # changes the shape, and no number
        match primitive:
            case Tied():
                return self._tied(number, node, primitive, inputs)
            case Dual():
                activation, coefficients = encode_activation(primitive.activation)
                return self._add("Dual", deficit, space, inputs, [activation], coefficients)
            case Pool():
                if self._lowered.input_form(node).same_position:
                    raise Refused("a pool over same-position covariances")
                windows = self._windows(node, primitive.windows)
                return self._add_pool(deficit, space, inputs[0], windows, primitive.mean, primitive.normalize_edges)
            case Gather():
                if self._forms[number].apart:
                    self._check_pairs("a transposed convolution", space)
                positions = [[0]] * self._n_axes
                for axis, along in enumerate(primitive.positions):
                    positions[self._canonical_axis(number, axis)] = list(along)
                return self._add("Gather", deficit, space, inputs, [p for along in positions for p in along])
            case Untie():
                if self._forms[number].apart:
                    self._check_pairs("a layer with weights of each position's own", space)
                return self._add("Untie", deficit, space, inputs)
            case Flatten():
                return self._add("Flatten", deficit, space, inputs)
            case Scale():
                self._add_numbers(number, primitive)
                return self._add("Scale", deficit, space, inputs)
            case Normalize():
                weighted = primitive.first is not None
                if weighted:
                    self._add_numbers(number, primitive)
                axes = {self._canonical_axis(number, a) for a in primitive.space_axes}
                flags = [a in axes for a in range(self._n_axes)]
                return self._add("Normalize", deficit, space, inputs, [weighted, *flags], [primitive.eps])
            case Dropout():
                return self._add("Dropout", deficit, space, inputs, [], [primitive.rate])
            case Sum():
                return self._add("Sum", deficit, space, inputs, [], primitive.weights)
            case Product():
                return self._add("Product", deficit, space, inputs)
            case _:
                raise Refused(f"it does not know the primitive {type(primitive).__name__}")

    def _tied(self, number: int, node: LoweredNode, primitive: Tied, inputs: list[int]) -> int:
        deficit, space, sizes = self._forms[number].deficit, self._canonical(number), self._canonical(node.inputs[0])
        windows = self._windows(node, primitive.windows)
        if any((count - 1) * w.stride >= size for w, size, count in zip(windows, sizes, space, strict=True)):
            raise Refused(f"the padding of a convolution is larger than the image of {sizes}")
        strides, convolved = [_Window()] * self._n_axes, list(space)
        subsampled = self._subsampled(number, node)
        for a in subsampled:
            strides[a], convolved[a] = _Window(stride=windows[a].stride), sizes[a]
            windows[a] = windows[a].without_stride()
        b_var = 0.0 if primitive.b_var is None else primitive.b_var
        coefficients = [primitive.w_var, b_var, primitive.own_w, primitive.own_b]
        parameters = [primitive.follows, *_flat(windows)]
        value = self._add("Tied", deficit, tuple(convolved), inputs, parameters, coefficients)
        return self._add_pool(deficit, space, value, strides) if subsampled else value

    def _separate(self, number: int) -> int:
        """The value behind a cut."""
        if not self._wrapping[number]:
            return self._number[number]
        if number not in self._separated:
            deficit, space = self._forms[number].deficit, self._canonical(number)
            windows = [_Window()] * self._n_axes
            self._separated[number] = self._add_pool(deficit, space, self._number[number], windows)
        return self._separated[number]

    def _canonical_axis(self, number: int, axis: int) -> int:
        """The axis of the engine that a spatial axis of a value is."""
        form = self._forms[number]
        assert form.axes is not None
        return self._n_axes - len(form.space) + form.axes[axis]

    def _windows(self, node: LoweredNode, along: Windows) -> list[_Window]:
        """Windows along the axes of the engine."""
        windows = [_Window()] * self._n_axes
        for axis, w in enumerate(along):
            at = self._canonical_axis(node.inputs[0], axis)
            windows[at] = _Window(w.taps, w.stride, w.dilation, w.low, w.high, w.circular)
        return windows

    def _canonical(self, number: int) -> tuple[int, ...]:
        """Sizes of a value along the axes of the engine."""
        sizes = [1] * self._n_axes
        for axis, size in enumerate(self._forms[number].space):
            sizes[self._canonical_axis(number, axis)] = size
        return tuple(sizes)

    def _add_numbers(self, number: int, primitive: Rescale) -> None:
        """Appends the numbers of the samples of each batch, with positions in the order of the engine."""
        order = np.argsort([self._canonical_axis(number, a) for a in range(len(self._forms[number].space))])
        for which in (1,) if self._symmetric else (1, 2):
            numbers = primitive.sample_numbers(which)
            assert numbers is not None
            in_order = jnp.transpose(numbers, (0, *(1 + int(a) for a in order)))
            self._numbers.append(in_order.reshape(numbers.shape[0], -1))

    def _add_pool(
        self,
        deficit: bool,
        space: tuple[int, ...],
        value: int,
        windows: list[_Window],
        mean: bool = True,
        normalize_edges: bool = False,
    ) -> int:
        self._check_pairs("a pool", space)
        return self._add("Pool", deficit, space, [value], [mean, normalize_edges, *_flat(windows)])

    def _check_pairs(self, what: str, space: tuple[int, ...]) -> None:
        """Raises `Refused` where all pairs of positions are too many to be kept."""
        if math.prod(space) ** 2 > _MAX_POOLED_PAIRS:
            raise Refused(
                f"{what} leaves {math.prod(space)} positions, whose pairs are too many for its scratch memory"
            )

    def _add(
        self,
        op: str,
        deficit: bool,
        space: tuple[int, ...],
        inputs: list[int],
        parameters: list[Any] | tuple[()] = (),
        coefficients: Any = (),
    ) -> int:
        """Appends a value, and returns its number in the code."""
        start = len(self._coefficients)
        self._coefficients.extend(coefficients)
        count = [len(inputs)] if inputs else []
        self._values.append([self._ops[op], deficit, start, *space, *count, *inputs, *map(int, parameters)])
        self._spaces.append(space)
        return len(self._values) - 1


def encode_activation(activation: Activation) -> tuple[int, list[Any]]:
    """The number of an activation and its coefficients, as the classes of csrc/duals_*.h expect them."""
    match activation:
        case ABRelu(a, b):
            name, coefficients = "AbRelu", [(a * a + b * b) / 2, (a - b) * (a - b) / 2]
        case Erf(a, b, c):
            name, coefficients = "Erf", [a * a * (2 / math.pi), 2 * b * b, c * c]
        case Gelu():
            name, coefficients = "Gelu", []
        case Sin(a, b, c):
            name = "Sin"
            coefficients = [a * a / 2, b * b, jnp.cos(2 * c), 2 * jnp.cos(c) ** 2, jnp.sin(c) ** 2]
        case Rbf(gamma):
            name, coefficients = "Rbf", [2 * gamma]
        case Exp(a, b):
            name, coefficients = "Exp", [a * a, b * b]
        case ExpNormalized(gamma, shift):
            name, coefficients = "ExpNormalized", [gamma, jnp.exp(gamma * (1 + shift))]
        case Step(a, b, c):
            name = "Step"
            coefficients = [(a - b) * (a - b) / 2, (a * a + b * b) / 4, c * c / 2, (a + b) / 2, c]
        case Gaussian(a, b):
            name, coefficients = "Gaussian", [a * a, -2 * b]
        case Gabor():
            name, coefficients = "Gabor", []
        case Series():
            name, coefficients = "Polynomial", _table(activation.expansion())
        case RectifiedMonomial(degree):
            name, coefficients = "RectifiedMonomial", _table(power(degree))
        case _:
            raise Refused(f"the dual of {type(activation).__name__} is not native")
    return native.schema()["activations"][name], coefficients


def _table(expansion: Expansion) -> list[Any]:
    """The coefficients of all `p_l`, row after row. What is not there is zero."""
    degree = max((l + 2 * i for l, i in expansion), default=0)
    largest = native.schema()["max_degree"]
    if degree > largest:
        raise Refused(f"the dual of a polynomial of degree {degree}, it takes those of up to {largest}")
    return [expansion.get((l, i), 0.0) for l in range(largest + 1) for i in range(largest // 2 + 1)]


def _flat(windows: list[_Window]) -> list[int]:
    return [int(number) for window in windows for number in window]


def _stores_equal_positions(form: Form) -> bool:
    """Whether the engine holds pairs of equal positions only."""
    return form.same_position or math.prod(form.space) == 1
