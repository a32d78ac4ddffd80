"""Covariance programs: what a network does to covariances, as a graph of steps.

A program is plain data and a pytree. Its structure (steps, wiring, shapes) is static; the numbers inside the steps are
leaves, so that one compiled program serves all values of W_std and b_std, and derivatives with respect to them exist.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from nt_core.masks import Masks
from nt_core.spec import Spec
from nt_core.steps import Step


@dataclasses.dataclass(frozen=True)
class Node:
    """One step, the values it reads (`inputs`) and what is known of its output (`spec`)."""

    step: Step
    inputs: tuple[int, ...]
    spec: Spec


@dataclasses.dataclass(frozen=True)
class Program:
    """A directed acyclic graph of steps.

    Values are numbered: first the `sources` (covariances that come from outside), then the `nodes` in order. A node
    reads only values before it.

    Attributes:
      sources: specs of the covariances that the program starts from.
      nodes: the steps.
      outputs: numbers of the values that the program returns.
    """

    sources: tuple[Spec, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]

    def spec(self, value: int) -> Spec:
        """Returns the spec of a value."""
        n = len(self.sources)
        return self.sources[value] if value < n else self.nodes[value - n].spec

    @functools.cached_property
    def flat(self) -> tuple[tuple[Any, ...], Any]:
        """Its coefficients, and its structure: what `jax.tree.flatten` gives, once for all calls."""
        leaves, structure = jax.tree.flatten(self)
        return tuple(leaves), structure

    @property
    def n_values(self) -> int:
        return len(self.sources) + len(self.nodes)

    def __str__(self) -> str:
        lines = [f"%{i} = source {_describe_spec(s)}" for i, s in enumerate(self.sources)]
        for i, node in enumerate(self.nodes, len(self.sources)):
            inputs = ", ".join(f"%{j}" for j in node.inputs)
            lines.append(f"%{i} = {describe(node.step)}({inputs}) {_describe_spec(node.spec)}")
        lines.append("return " + ", ".join(f"%{j}" for j in self.outputs))
        return "\n".join(lines)


jax.tree_util.register_dataclass(Node, data_fields=["step"], meta_fields=["inputs", "spec"])
jax.tree_util.register_dataclass(Program, data_fields=["nodes"], meta_fields=["sources", "outputs"])


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of a program under construction.

    Attributes:
      number: of the value.
      spec: what is known of it.
      masks: where it is masked. Steps say nothing of masks: whoever adds them sets these anew.
    """

    number: int
    spec: Spec
    masks: Masks | None = None


class Builder:
    """Collects steps into a program.

    >>> from nt_core import Spec, Builder, steps, activations
    >>> builder = Builder()
    >>> x = builder.source(Spec((5, 8), (3, 8), batch_axis=0, channel_axis=1))
    >>> y = builder.add(steps.Dense(2.0, 0.1, 16), x)
    >>> y = builder.add(steps.Dual(activations.ABRelu(0.0, 1.0)), y)
    >>> print(builder.build(y))
    %0 = source (5, 8) x (3, 8)
    %1 = Dense(w_var=2.0, b_var=0.1, out_dim=16)(%0) (5, 16) x (3, 16)
    %2 = ABRelu(a=0.0, b=1.0)(%1) (5, 16) x (3, 16)
    return %2
    """

    def __init__(self) -> None:
        self._sources: list[Spec] = []
        self._nodes: list[Node] = []

    def source(self, spec: Spec) -> Value:
        """Adds a covariance that comes from outside. All sources come before the first step."""
        if self._nodes:
            raise ValueError("Add all sources of a program before its first step.")
        self._sources.append(spec)
        return Value(len(self._sources) - 1, spec)

    def add(self, step: Step, *inputs: Value) -> Value:
        """Adds a step that reads `inputs`, and returns its output."""
        spec = step.infer(*(value.spec for value in inputs))
        self._nodes.append(Node(step, tuple(value.number for value in inputs), spec))
        return Value(len(self._sources) + len(self._nodes) - 1, spec)

    def node(self, number: int) -> Node | None:
        """Returns the step that gives a value, or None if it comes from outside."""
        n = len(self._sources)
        return None if number < n else self._nodes[number - n]

    def spec(self, number: int) -> Spec:
        """Returns the spec of a value."""
        node = self.node(number)
        return self._sources[number] if node is None else node.spec

    def build(self, *outputs: Value) -> Program:
        """Returns the program that computes `outputs`, without the steps that they do not need."""
        return prune(Program(tuple(self._sources), tuple(self._nodes), tuple(value.number for value in outputs)))


def prune(program: Program) -> Program:
    """Drops the steps that no output depends on."""
    n = len(program.sources)
    needed = set(program.outputs)
    for number in reversed(range(n, program.n_values)):
        if number in needed:
            needed.update(program.nodes[number - n].inputs)
    renumbered = {i: i for i in range(n)}
    nodes = []
    for number, node in enumerate(program.nodes, n):
        if number in needed:
            renumbered[number] = n + len(nodes)
            nodes.append(dataclasses.replace(node, inputs=tuple(renumbered[i] for i in node.inputs)))
    return Program(program.sources, tuple(nodes), tuple(renumbered[i] for i in program.outputs))


def describe(step: Step) -> str:
    """Returns a step as it was written, without the settings left at their defaults."""
    value: Any = getattr(step, "activation", step)
    shown: Sequence[str] = [
        f"{f.name}={_shown(getattr(value, f.name))}"
        for f in dataclasses.fields(value)
        if f.default is dataclasses.MISSING or getattr(value, f.name) is not f.default
    ]
    return f"{type(value).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    """Arrays by their shape, all else as it is written."""
    return f"array{value.shape}" if getattr(value, "ndim", 0) else repr(value)


def _describe_spec(spec: Spec) -> str:
    return f"{spec.shape1} x {spec.shape2}"
