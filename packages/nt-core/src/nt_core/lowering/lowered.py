"""What backends read: a program as primitives, and what is to be carried of every value.

    program (steps) --lower--> lowered program (primitives, forms) --backend--> kernels

All that follows from the program alone is decided here, once: windows, the form of every value, which pairs of
positions are needed, where a tangent kernel exists.
"""

import dataclasses
import math
from collections.abc import Iterable

from nt_core import steps
from nt_core.lowering.primitives import (
    Dropout,
    Dual,
    Flatten,
    Gather,
    Normalize,
    Pool,
    Primitive,
    Product,
    Scale,
    Sum,
    Tied,
    Untie,
)
from nt_core.lowering.windows import Window, Windows
from nt_core.program import Program
from nt_core.pytrees import register_dataclass
from nt_core.sources import Inputs, Source
from nt_core.spec import Spec


@dataclasses.dataclass(frozen=True)
class Form:
    """What is carried of a value.

    Attributes:
      space: sizes of its spatial axes.
      same_position: only pairs of equal positions are stored of it, or there are no positions.
      deficit: it is carried as a deficit, because variances are read here or later; otherwise as a covariance.
      apart: pairs of different positions are needed.
      has_ntk: there is a tangent kernel (asked for, and not 0).
      axes: which spatial axis of the sources stands at each spatial axis; of branches that disagree, that of the first.
    """

    space: tuple[int, ...]
    same_position: bool
    deficit: bool
    apart: bool
    has_ntk: bool
    axes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LoweredNode:
    """A primitive, and the numbers of the values that it reads."""

    primitive: Primitive
    inputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program as primitives. Values are numbered as those of the program: sources first, then nodes.

    Attributes:
      n_sources: number of sources.
      nodes: the primitives, in an order of evaluation.
      forms: of every value.
      outputs: numbers of the values that are returned.
    """

    n_sources: int
    nodes: tuple[LoweredNode, ...]
    forms: tuple[Form, ...]
    outputs: tuple[int, ...]

    @property
    def n_values(self) -> int:
        return len(self.forms)

    def node(self, value: int) -> LoweredNode | None:
        """Returns what computes a value, or None for a source."""
        return None if value < self.n_sources else self.nodes[value - self.n_sources]

    def numbered_nodes(self) -> Iterable[tuple[int, LoweredNode]]:
        """Returns the nodes with the numbers of their values."""
        return enumerate(self.nodes, self.n_sources)

    def input_form(self, node: LoweredNode) -> Form:
        """Returns the form of the first value that a node reads."""
        return self.forms[node.inputs[0]]


register_dataclass(LoweredNode, ["primitive"], ["inputs"])
register_dataclass(Lowered, ["nodes"], ["n_sources", "forms", "outputs"])


def lower(program: Program, sources: tuple[Source, ...], *, ntk: bool, covariances: bool) -> Lowered:
    """Lowers a program.

    Args:
      program: steps.
      sources: what it starts from; says where tangent kernels are.
      ntk: the tangent kernel is asked for.
      covariances: the outputs are to be carried as deficits: their variances are asked for by the same pass.
    """
    nodes = tuple(
        LoweredNode(_primitive(node.step, program.spec(node.inputs[0])), node.inputs) for node in program.nodes
    )
    n_sources = len(program.sources)
    deficit = _deficits(n_sources, nodes, program.outputs, covariances)
    has_ntk = _tangents(nodes, [ntk and _has_ntk(source) for source in sources], ntk)
    specs = [program.spec(i) for i in range(program.n_values)]
    apart = _apart(n_sources, nodes, specs, program.outputs)
    axes = _axes(nodes, specs[:n_sources])
    forms = tuple(
        Form(spec.space, is_same_position(spec), d, a, t, at)
        for spec, d, a, t, at in zip(specs, deficit, apart, has_ntk, axes, strict=True)
    )
    return Lowered(n_sources, nodes, forms, program.outputs)


def is_same_position(spec: Spec) -> bool:
    """Whether covariances of a value hold pairs of equal positions only."""
    return spec.diagonal_spatial or not spec.space


def windows_of(step: steps.Conv | steps.Pool, space: tuple[int, ...]) -> Windows:
    """Returns the windows of a step along each spatial axis of its input."""
    dilation = step.dilation if isinstance(step, steps.Conv) else (1,) * len(step.window)
    pads = steps.window_pads(space, step.window, step.strides, step.padding, dilation)
    counts = steps.window_space(space, step.window, step.strides, step.padding, dilation, type(step).__name__)
    circular = step.padding == "CIRCULAR"
    return tuple(
        Window(n, count, taps, stride, d, low, high, circular)
        for n, count, taps, stride, d, (low, high) in zip(
            space, counts, step.window, step.strides, dilation, pads, strict=True
        )
    )


def _primitive(step: steps.Step, spec: Spec) -> Primitive:
    """The primitive that carries out a step on inputs of `spec`."""
    match step:
        case steps.Linear():
            convolves = isinstance(step, steps.Conv)
            along = windows_of(step, spec.space) if convolves else ()
            order = step.space_order(spec) if convolves else tuple(range(len(spec.space)))
            return Tied(
                step.w_var, step.b_var, *step.ntk_coefficients(spec), along, order, step.parameterization == "ntk"
            )
        case steps.Dual():
            return Dual(step.activation)
        case steps.Pool():
            return Pool(windows_of(step, spec.space), step.mean, step.normalize_edges)
        case steps.GlobalPool():
            # With the stride of its size, one window maps offset planes to offset planes.
            whole = tuple(Window(n, 1, n, max(n, 1), 1, 0, 0, False) for n in spec.space)
            return Pool(whole, step.mean, False, keeps_axes=False)
        case steps.Gather():
            return Gather(step.positions)
        case steps.Untie():
            return Untie()
        case steps.Flatten():
            return Flatten()
        case steps.Normalize():
            return Normalize(step.eps, step.first, step.second, step.space_axes)
        case steps.Scale():
            return Scale(step.first, step.second)
        case steps.Dropout():
            return Dropout(step.rate)
        case steps.Combine():
            return Sum(step.weights)
        case steps.TakeChannels():
            return Sum((1.0,))
        case steps.Multiply():
            return Product()
    return step.primitive(spec)


def _has_ntk(source: Source) -> bool:
    return not isinstance(source, Inputs) and source.ntk is not None and source.ntk.ndim > 0


def _deficits(
    n_sources: int, nodes: tuple[LoweredNode, ...], outputs: tuple[int, ...], covariances: bool
) -> list[bool]:
    """Which values are carried as deficits: variances are read there or later. After that, covariances are carried."""
    needs = [False] * (n_sources + len(nodes))
    for output in outputs:
        needs[output] = covariances
    for number, node in reversed(list(enumerate(nodes, n_sources))):
        for i in node.inputs:
            needs[i] = needs[i] or needs[number] or node.primitive.reads_variance
    return needs


def _tangents(nodes: tuple[LoweredNode, ...], of_sources: list[bool], asked: bool) -> list[bool]:
    has = list(of_sources)
    for node in nodes:
        has.append(asked and (isinstance(node.primitive, Tied) or any(has[i] for i in node.inputs)))
    return has


def _apart(n_sources: int, nodes: tuple[LoweredNode, ...], specs: list[Spec], outputs: tuple[int, ...]) -> list[bool]:
    """Of which values pairs of different positions are needed."""
    apart = [False] * len(specs)
    for output in outputs:
        apart[output] = not specs[output].diagonal_spatial and math.prod(specs[output].space) > 1
    for number, node in reversed(list(enumerate(nodes, n_sources))):
        is_pool, reads_equal = isinstance(node.primitive, Pool), isinstance(node.primitive, Flatten | Untie)
        for i in node.inputs:
            apart[i] |= not specs[i].diagonal_spatial and (is_pool or (apart[number] and not reads_equal))
    return apart


def _axes(nodes: tuple[LoweredNode, ...], sources: list[Spec]) -> list[tuple[int, ...]]:
    axes: list[tuple[int, ...]] = [tuple(range(len(spec.space))) for spec in sources]
    for node in nodes:
        first, primitive = axes[node.inputs[0]], node.primitive
        if isinstance(primitive, Tied):
            axes.append(tuple(first[i] for i in primitive.order))
        else:
            ends = isinstance(primitive, Flatten) or (isinstance(primitive, Pool) and not primitive.keeps_axes)
            axes.append(() if ends else first)
    return axes
