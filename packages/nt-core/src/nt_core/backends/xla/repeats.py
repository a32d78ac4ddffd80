"""Finds layers that repeat, so that they are compiled once and looped over."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from nt_core.program import Node, Program
from nt_core.steps import Combine, Conv, Dense, Dual, Multiply, Normalize, Step, static, step

_MAX_PERIOD = 24
_MIN_REPEATS = 3


@step
class Repeated(Step):
    """A block of layers applied `count` times.

    Attributes:
      body: one application, a program with one source and one output of equal specs. Its coefficients have a leading
        axis of size `count`.
      needs: which values of the body need variances.
    """

    body: Program
    count: int = static()
    needs: tuple[bool, ...] = static()

    reads_variance: ClassVar[bool] = False


def fold_repeats(
    program: Program, needs: tuple[bool, ...], ends_block: Callable[[Step], bool] = lambda step: True
) -> tuple[Program, tuple[bool, ...]]:
    """Replaces runs of equal blocks by `Repeated` steps.

    Args:
      ends_block: whether blocks should end with a step, where there is a choice.

    Returns:
      The program, and which of its values need variances.
    """
    n_sources = len(program.sources)
    read_by = _readers(program)
    nodes: list[Node] = []
    new_needs = list(needs[:n_sources])
    renumbered = list(range(n_sources)) + [-1] * len(program.nodes)
    start = 0
    while start < len(program.nodes):
        period, count = _longest_run(program, needs, read_by, start, ends_block)
        if count >= _MIN_REPEATS:
            length, step = period * count, _repeated(program, needs, start, period, count)
            inputs: tuple[int, ...] = (renumbered[_entry(program, start, period)],)
        else:
            length, step = 1, program.nodes[start].step
            inputs = tuple(renumbered[i] for i in program.nodes[start].inputs)
        last = start + length - 1
        renumbered[n_sources + last] = n_sources + len(nodes)
        new_needs.append(needs[n_sources + last])
        nodes.append(Node(step, inputs, program.nodes[last].spec))
        start += length
    outputs = tuple(renumbered[i] for i in program.outputs)
    return Program(program.sources, tuple(nodes), outputs), tuple(new_needs)


def _longest_run(
    program: Program,
    needs: tuple[bool, ...],
    read_by: list[set[int]],
    start: int,
    ends_block: Callable[[Step], bool],
) -> tuple[int, int]:
    """Returns the period and the number of repeats of the run at a node that covers most nodes."""
    best = (1, 1)
    for period in range(1, _MAX_PERIOD + 1):
        count, steps = 1, [node.step for node in program.nodes[start : start + period]]
        has_end = ends_block(steps[-1]) or not any(map(ends_block, steps))
        if has_end and _is_block(program, needs, read_by, start, period):
            while _repeats(program, needs, read_by, start, start + count * period, period):
                count += 1
        if count >= _MIN_REPEATS and count * period > best[0] * best[1]:
            best = (period, count)
    return best


def _is_block(program: Program, needs: tuple[bool, ...], read_by: list[set[int]], start: int, period: int) -> bool:
    """Whether nodes form a block: one value comes in, one of the same shape goes out, and positions stay."""
    if start + period > len(program.nodes):
        return False
    n, nodes = len(program.sources), program.nodes[start : start + period]
    inside = range(n + start, n + start + period)
    entry = {i for node in nodes for i in node.inputs if i not in inside}
    if len(entry) != 1:
        return False
    (source,) = entry
    spec = program.spec(source)
    same_space = all(node.spec.space == spec.space for node in nodes)
    known = all(isinstance(node.step, Dense | Conv | Dual | Normalize | Combine | Multiply) for node in nodes)
    keeps_axes = all(getattr(node.step, "axes_out", None) is None for node in nodes)
    private = all(read_by[i] <= set(inside) for i in inside[:-1])
    loops = _plain(nodes[-1].spec) == _plain(spec) and needs[source] == needs[inside[-1]]
    return same_space and known and keeps_axes and private and loops


def _repeats(
    program: Program, needs: tuple[bool, ...], read_by: list[set[int]], first: int, other: int, period: int
) -> bool:
    """Whether the block at `other` does what the block at `first` does, to the output of the block before it."""
    if not _is_block(program, needs, read_by, other, period):
        return False
    n, shift = len(program.sources), other - first
    if _entry(program, other, period) != n + other - 1:
        return False
    if not read_by[n + other - 1] <= set(range(n + other, n + other + period)):
        return False
    entries = (_entry(program, first, period), _entry(program, other, period))
    for a, b in zip(program.nodes[first : first + period], program.nodes[other : other + period], strict=True):
        if jax.tree.structure(a.step) != jax.tree.structure(b.step) or _plain(a.spec) != _plain(b.spec):
            return False
        moved = tuple(entries[1] if i == entries[0] else i + shift for i in a.inputs)
        if moved != b.inputs:
            return False
    span = range(n + first, n + first + period)
    return all(needs[i] == needs[i + shift] for i in span)


def _repeated(program: Program, needs: tuple[bool, ...], start: int, period: int, count: int) -> Repeated:
    n = len(program.sources)
    entry = _entry(program, start, period)
    number = {entry: 0} | {n + start + i: 1 + i for i in range(period)}
    nodes = []
    for i in range(period):
        node = program.nodes[start + i]
        copies = [program.nodes[start + i + period * k].step for k in range(count)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *copies)
        nodes.append(Node(stacked, tuple(number[j] for j in node.inputs), _plain(node.spec)))
    body = Program((_plain(program.spec(entry)),), tuple(nodes), (period,))
    return Repeated(body, count, tuple(needs[i] for i in number))


def _entry(program: Program, start: int, period: int) -> int:
    """The value that a block reads from outside."""
    inside = range(len(program.sources) + start, len(program.sources) + start + period)
    return next(i for node in program.nodes[start : start + period] for i in node.inputs if i not in inside)


def _readers(program: Program) -> list[set[int]]:
    """For each value the values computed from it, and -1 if it is an output."""
    readers: list[set[int]] = [set() for _ in range(program.n_values)]
    for number, node in enumerate(program.nodes, len(program.sources)):
        for i in node.inputs:
            readers[i].add(number)
    for i in program.outputs:
        readers[i].add(-1)
    return readers


def _plain(spec: Any) -> Any:
    """A spec without what matters only to how results are stored."""
    return dataclasses.replace(spec, is_reversed=False, is_input=False)
