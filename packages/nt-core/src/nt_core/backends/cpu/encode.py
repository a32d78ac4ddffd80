"""Encodes covariance programs for the native engine, and says which ones it does not take.

The layout of the code is that of `decode_program` in csrc/program.cc.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from nt_core.activations import ABRelu, Activation, Erf, Exp, Gelu, Rbf, Sin
from nt_core.backends.base import Request
from nt_core.lowering import lower
from nt_core.program import Node, Program
from nt_core.sources import Inputs, Source, is_symmetric
from nt_core.spec import Spec
from nt_core.steps import Combine, Conv, Dual, Flatten, GlobalPool, Linear, Multiply, Normalize, Pool, window_pads

_ENCODING = 2
_INPUTS, _MATERIALISED, _LINEAR, _DUAL, _POOL, _FLATTEN, _NORMALIZE, _COMBINE, _MULTIPLY = range(9)
_MAX_AXES = 3
# Positions after a pool, squared: all pairs of them are kept for 16 pairs of samples at a time, in each thread.
_MAX_POOLED_PAIRS = 2**21


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A program as the engine reads it.

    Attributes:
      code: its structure.
      coefficients: the numbers in it, which may be traced. The first says whether both batches are the same samples.
      needs: whether each source is read as a deficit, so that its variances are needed.
      owns: whether the covariance of each sample with itself is needed, for sources that are materialised.
      has_ntk: whether the tangent kernel is computed.
      axes: which spatial axis of the sources stands at each spatial axis of the output.
      all_pairs: whether the output holds all pairs of positions.
    """

    code: np.ndarray
    coefficients: list[Any]
    needs: tuple[bool, ...]
    owns: bool
    has_ntk: bool
    axes: tuple[int, ...]
    all_pairs: bool


class Refused(Exception):
    """The engine does not take this program, for the reason given."""


def encode(program: Program, sources: tuple[Source, ...], request: Request, same_inputs: Any) -> Encoded:
    """Encodes a program. Raises `Refused`."""
    return _Encoder(program, sources, request).encode(same_inputs)


class _Encoder:
    def __init__(self, program: Program, sources: tuple[Source, ...], request: Request) -> None:
        if len(program.outputs) != 1:
            raise Refused("the program has several outputs")
        self._program = program
        self._sources = sources
        self._request = request
        self._n_sources = len(sources)
        (self._output,) = program.outputs
        self._needs = [form.deficit for form in lower(program, sources, ntk=False, covariances=False).forms]
        self._apart = _pairs_of_different_positions(program)
        self._number: list[int] = []  # in the code, of every value of the program
        self._axes: list[tuple[int, ...]] = []
        self._values: list[list[int]] = []
        self._coefficients: list[Any] = []
        # Axes of windows since the last readout, and whether they are circular.
        self._wrapping: list[set[tuple[int, bool]]] = []

    def encode(self, same_inputs: Any) -> Encoded:
        program, spec = self._program, self._program.spec(self._output)
        self._coefficients = [same_inputs]
        owns = self._needs_own_covariances()
        for number, source in enumerate(self._sources):
            self._axes.append(tuple(range(len(source.spec.space))))
            self._number.append(len(self._values))
            self._wrapping.append(set())
            self._source(number, source, owns)
        for number, node in enumerate(program.nodes, self._n_sources):
            self._axes.append(self._axes_after(node))
            self._wrapping.append(self._wrapping_after(node))
            self._node(number, node)
        has_ntk = self._request.ntk and self._has_parameters()
        all_pairs = math.prod(spec.space) > 1 and not spec.diagonal_spatial
        if all_pairs:
            self._check_wrapping(self._output)
        symmetric = all(is_symmetric(source) for source in self._sources)
        header = [
            _ENCODING,
            spec.n1,
            spec.n2,
            symmetric,
            has_ntk,
            self._request.covariances,
            all_pairs,
            len(self._coefficients),
            self._n_sources,
            len(self._values),
            self._number[self._output],
        ]
        return Encoded(
            code=np.array([*header, *(number for value in self._values for number in value)], np.int64),
            coefficients=self._coefficients,
            needs=tuple(self._needs[: self._n_sources]),
            owns=owns,
            has_ntk=has_ntk,
            axes=self._axes[self._output],
            all_pairs=all_pairs,
        )

    def _needs_own_covariances(self) -> bool:
        pools = (number for number, node in enumerate(self._program.nodes, self._n_sources) if _is_pool(node))
        return self._request.covariances or any(self._needs[number] for number in pools)

    def _has_parameters(self) -> bool:
        has = [not isinstance(s, Inputs) and s.ntk is not None and s.ntk.ndim > 0 for s in self._sources]
        for node in self._program.nodes:
            has.append(isinstance(node.step, Linear) or any(has[i] for i in node.inputs))
        return has[self._output]

    def _source(self, number: int, source: Source, owns: bool) -> None:
        spec = source.spec
        if len(spec.space) > _MAX_AXES:
            raise Refused(f"inputs have {len(spec.space)} spatial axes, it takes up to {_MAX_AXES}")
        if 0 in spec.space or spec.n_channels == 0:
            raise Refused(f"inputs of shape {spec.shape1} are empty")
        if self._request.covariances and not spec.diagonal_batch:
            raise Refused("covariances between all samples of one batch are asked for")
        if not isinstance(source, Inputs):
            if (self._needs[number] or owns) and source.cov1 is None:
                raise Refused("variances are needed, and the kernel it starts from holds none")
            has_ntk = self._request.ntk and source.ntk is not None and source.ntk.ndim > 0
            same_position = spec.diagonal_spatial or math.prod(spec.space) == 1
            self._add(_MATERIALISED, number, spec.space, [], [has_ntk, owns, same_position])
            return
        if self._flattened(number):  # positions are channels from the start
            self._add(_INPUTS, number, (), [], [spec.n_channels * math.prod(spec.space)])
        else:
            self._add(_INPUTS, number, spec.space, [], [spec.n_channels])

    def _flattened(self, source: int) -> bool:
        readers = [node for node in self._program.nodes if source in node.inputs]
        return source != self._output and all(isinstance(node.step, Flatten) for node in readers)

    def _node(self, number: int, node: Node) -> None:
        step, before = node.step, self._program.spec(node.inputs[0])
        single = math.prod(before.space) == 1 or self._values[self._number[node.inputs[0]]][3:6] == [1, 1, 1]
        if single and isinstance(step, Flatten | GlobalPool):  # changes the shape, and no number
            self._number.append(self._number[node.inputs[0]])
            return
        self._number.append(len(self._values))
        space = self._canonical(node.spec.space, number)
        match step:
            case Linear():
                self._linear(number, node, step, before, space)
            case Dual():
                self._dual(number, node, step, space)
            case Pool() | GlobalPool():
                self._pool(number, node, step, before, space)
            case Flatten():
                self._add(_FLATTEN, number, space, node.inputs, [])
            case Normalize():
                if step.first is not None:
                    raise Refused("a normalisation over positions of which some are masked")
                axes = [self._axes[node.inputs[0]][a] for a in step.space_axes]
                lead = _MAX_AXES - len(before.space)
                flags = [a - lead in axes for a in range(_MAX_AXES)]
                self._add(_NORMALIZE, number, space, node.inputs, flags, [step.eps])
            case Combine():
                self._add(_COMBINE, number, space, node.inputs, [], step.weights)
            case Multiply():
                self._add(_MULTIPLY, number, space, node.inputs, [])
            case _:
                raise Refused(f"it does not know the step {type(step).__name__}")

    def _linear(self, number: int, node: Node, step: Linear, before: Spec, space: tuple[int, ...]) -> None:
        b_var = 0.0 if step.b_var is None else step.b_var
        coefficients = [step.w_var, b_var, *step.ntk_coefficients(before)]
        windows = _trivial_windows()
        if isinstance(step, Conv):
            windows = self._windows(node, step, step.dilation, before)
            for w, size, count in zip(windows, self._canonical(before.space, node.inputs[0]), space, strict=True):
                if (count - 1) * w[1] >= size:
                    raise Refused(f"the padding {step.padding} of Conv is larger than the image of {before.space}")
                if w[5] and size > 1 and self._apart[number] and count * w[1] != size:
                    raise Refused(f"a CIRCULAR convolution whose stride {w[1]} does not divide {size} positions")
        follows = step.parameterization == "ntk"
        self._add(_LINEAR, number, space, node.inputs, [follows, *(i for w in windows for i in w)], coefficients)

    def _dual(self, number: int, node: Node, step: Dual, space: tuple[int, ...]) -> None:
        activation, coefficients = encode_activation(step.activation)
        self._add(_DUAL, number, space, node.inputs, [activation], coefficients)

    def _pool(self, number: int, node: Node, step: Pool | GlobalPool, before: Spec, space: tuple[int, ...]) -> None:
        if before.diagonal_spatial:
            raise Refused("a pool over same-position covariances")
        if math.prod(space) ** 2 > _MAX_POOLED_PAIRS:
            raise Refused(
                f"a pool leaves {math.prod(space)} positions, whose pairs are too many for its scratch memory"
            )
        self._check_wrapping(node.inputs[0])
        normalize_edges = False
        if isinstance(step, GlobalPool):
            windows = [[size, 1, 1, 0, 0, 0] for size in self._canonical(before.space, node.inputs[0])]
        else:
            if step.padding == "CIRCULAR":
                raise Refused("pools with CIRCULAR padding")
            windows = self._windows(node, step, (1,) * len(step.window), before)
            normalize_edges = step.normalize_edges
        self._add(_POOL, number, space, node.inputs, [step.mean, normalize_edges, *(i for w in windows for i in w)])

    def _windows(self, node: Node, step: Conv | Pool, dilation: tuple[int, ...], before: Spec) -> list[list[int]]:
        """Windows along the axes of the sources: taps, stride, dilation, low, high, circular."""
        pads = window_pads(before.space, step.window, step.strides, step.padding, dilation)
        windows = _trivial_windows()
        lead = _MAX_AXES - len(before.space)
        for i, axis in enumerate(self._axes[node.inputs[0]]):
            circular = step.padding == "CIRCULAR"
            windows[lead + axis] = [step.window[i], step.strides[i], dilation[i], *pads[i], circular]
        return windows

    def _axes_after(self, node: Node) -> tuple[int, ...]:
        before = [self._axes[i] for i in node.inputs]
        if len(set(before)) > 1:
            raise Refused("branches order their spatial axes differently")
        if isinstance(node.step, Conv):
            return tuple(before[0][i] for i in node.step.space_order(self._program.spec(node.inputs[0])))
        return before[0][: len(node.spec.space)]

    def _wrapping_after(self, node: Node) -> set[tuple[int, bool]]:
        if isinstance(node.step, Pool | GlobalPool | Flatten):
            return set()
        wrapping = set().union(*(self._wrapping[i] for i in node.inputs))
        if isinstance(node.step, Conv):
            windows = self._windows(node, node.step, node.step.dilation, self._program.spec(node.inputs[0]))
            wrapping |= {(a, bool(w[5])) for a, w in enumerate(windows) if w[:5] != [1, 1, 1, 0, 0]}
        return wrapping

    def _check_wrapping(self, number: int) -> None:
        """Circular convolutions mix the offset planes that all others keep apart."""
        if any((axis, True) in self._wrapping[number] and (axis, False) in self._wrapping[number] for axis in range(3)):
            raise Refused("CIRCULAR convolutions and others share their offset planes")

    def _canonical(self, space: tuple[int, ...], number: int) -> tuple[int, ...]:
        """Sizes along the axes of the sources, with leading ones."""
        sizes = [1] * _MAX_AXES
        lead = _MAX_AXES - len(space)
        for size, axis in zip(space, self._axes[number], strict=True):
            sizes[lead + axis] = size
        return tuple(sizes)

    def _add(
        self,
        op: int,
        number: int,
        space: tuple[int, ...],
        inputs: tuple[int, ...] | list[int],
        parameters: list[Any],
        coefficients: Any = (),
    ) -> None:
        space = (1,) * (_MAX_AXES - len(space)) + tuple(space)
        start = len(self._coefficients)
        self._coefficients.extend(coefficients)
        numbers = [self._number[i] for i in inputs]
        count = [len(numbers)] if op not in (_INPUTS, _MATERIALISED) else []
        self._values.append([op, self._needs[number], start, *space, *count, *numbers, *map(int, parameters)])


def encode_activation(activation: Activation) -> tuple[int, list[Any]]:
    """The number of an activation and its coefficients, as the classes of csrc/duals.h expect them."""
    match activation:
        case ABRelu(a, b):
            return 0, [(a * a + b * b) / 2, (a - b) * (a - b) / 2]
        case Erf(a, b, c):
            return 1, [a * a * (2 / math.pi), 2 * b * b, c * c]
        case Gelu():
            return 2, []
        case Sin(a, b, c):
            return 3, [a * a / 2, b * b, jnp.cos(2 * c), 2 * jnp.cos(c) ** 2, jnp.sin(c) ** 2]
        case Rbf(gamma):
            return 4, [2 * gamma]
        case Exp(a, b):
            return 5, [a * a, b * b]
    raise Refused(f"the dual of {type(activation).__name__} is not native")


def _pairs_of_different_positions(program: Program) -> list[bool]:
    """Says for each value whether pairs of different positions are needed of it."""
    apart = [False] * program.n_values
    for output in program.outputs:
        spec = program.spec(output)
        apart[output] = not spec.diagonal_spatial and math.prod(spec.space) > 1
    for number, node in reversed(list(enumerate(program.nodes, len(program.sources)))):
        for i in node.inputs:
            apart[i] |= _is_pool(node) or (apart[number] and not isinstance(node.step, Flatten))
    return apart


def _is_pool(node: Node) -> bool:
    return isinstance(node.step, Pool | GlobalPool)


def _trivial_windows() -> list[list[int]]:
    return [[1, 1, 1, 0, 0, 0] for _ in range(_MAX_AXES)]
