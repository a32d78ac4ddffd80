"""Finds layers that repeat, so that they are compiled once and looped over."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nt_core.lowering.lowered import Form, Lowered, LoweredNode
from nt_core.lowering.primitives import Dual, Primitive, Product, Rescale, Sum, Tied
from nt_core.pytrees import pytree_dataclass, static

_MAX_PERIOD = 24
_MIN_REPEATS = 3


@pytree_dataclass
class Repeated(Primitive):
    """A block of layers applied `count` times.

    Attributes:
      body: one application, with one source and one output of equal forms. Its coefficients, and the numbers of each
        sample in it, have a leading axis of size `count`.
    """

    body: Lowered
    count: int = static()


def fold_repeats(lowered: Lowered, ends_block: Callable[[Primitive], bool] = lambda primitive: True) -> Lowered:
    """Replaces runs of equal blocks by `Repeated` primitives.

    Args:
      ends_block: whether blocks should end with a primitive, where there is a choice.
    """
    n = lowered.n_sources
    read_by = _readers(lowered)
    nodes: list[LoweredNode] = []
    forms = list(lowered.forms[:n])
    renumbered = list(range(n)) + [-1] * len(lowered.nodes)
    start = 0
    while start < len(lowered.nodes):
        period, count = _longest_run(lowered, read_by, start, ends_block)
        if count >= _MIN_REPEATS:
            length, primitive = period * count, _repeated(lowered, start, period, count)
            inputs: tuple[int, ...] = (renumbered[_entry(lowered, start, period)],)
        else:
            length, primitive = 1, lowered.nodes[start].primitive
            inputs = tuple(renumbered[i] for i in lowered.nodes[start].inputs)
        last = start + length - 1
        renumbered[n + last] = n + len(nodes)
        forms.append(lowered.forms[n + last])
        nodes.append(LoweredNode(primitive, inputs))
        start += length
    return Lowered(n, tuple(nodes), tuple(forms), tuple(renumbered[i] for i in lowered.outputs))


def _longest_run(
    lowered: Lowered, read_by: list[set[int]], start: int, ends_block: Callable[[Primitive], bool]
) -> tuple[int, int]:
    """Returns the period and the number of repeats of the run at a node that covers most nodes."""
    best = (1, 1)
    for period in range(1, _MAX_PERIOD + 1):
        count, primitives = 1, [node.primitive for node in lowered.nodes[start : start + period]]
        has_end = ends_block(primitives[-1]) or not any(map(ends_block, primitives))
        if has_end and _is_block(lowered, read_by, start, period):
            while _repeats(lowered, read_by, start, start + count * period, period):
                count += 1
        if count >= _MIN_REPEATS and count * period > best[0] * best[1]:
            best = (period, count)
    return best


def _is_block(lowered: Lowered, read_by: list[set[int]], start: int, period: int) -> bool:
    """Whether nodes form a block: one value comes in, one of the same form goes out, and positions stay."""
    if start + period > len(lowered.nodes):
        return False
    n, nodes = lowered.n_sources, lowered.nodes[start : start + period]
    inside = range(n + start, n + start + period)
    entry = {i for node in nodes for i in node.inputs if i not in inside}
    if len(entry) != 1:
        return False
    form = _plain(lowered.forms[entry.pop()])
    same_space = all(lowered.forms[i].space == form.space for i in inside)
    keeps_axes = all(node.primitive.keeps_order for node in nodes if isinstance(node.primitive, Tied))
    private = all(read_by[i] <= set(inside) for i in inside[:-1])
    return (
        same_space
        and keeps_axes
        and all(_may_repeat(node.primitive, lowered.forms[i]) for i, node in zip(inside, nodes, strict=True))
        and private
        and (_plain(lowered.forms[inside[-1]]) == form)
    )


def _may_repeat(primitive: Primitive, form: Form) -> bool:
    """Whether a primitive may be part of a block: it keeps pairs apart, and all that is known of its samples follows
    from variances and from its own numbers."""
    if isinstance(primitive, Rescale):
        return form.deficit
    return isinstance(primitive, Tied | Dual | Sum | Product)


def _repeats(lowered: Lowered, read_by: list[set[int]], first: int, other: int, period: int) -> bool:
    """Whether the block at `other` does what the block at `first` does, to the output of the block before it."""
    if not _is_block(lowered, read_by, other, period):
        return False
    n, shift = lowered.n_sources, other - first
    if _entry(lowered, other, period) != n + other - 1:
        return False
    if not read_by[n + other - 1] <= set(range(n + other, n + other + period)):
        return False
    entries = (_entry(lowered, first, period), _entry(lowered, other, period))
    for i in range(period):
        a, b = lowered.nodes[first + i], lowered.nodes[other + i]
        if jax.tree.structure(a.primitive) != jax.tree.structure(b.primitive):
            return False
        if tuple(entries[1] if j == entries[0] else j + shift for j in a.inputs) != b.inputs:
            return False
        if _plain(lowered.forms[n + first + i]) != _plain(lowered.forms[n + other + i]):
            return False
    return True


def _repeated(lowered: Lowered, start: int, period: int, count: int) -> Repeated:
    n = lowered.n_sources
    entry = _entry(lowered, start, period)
    number = {entry: 0} | {n + start + i: 1 + i for i in range(period)}
    nodes = []
    for i in range(period):
        node = lowered.nodes[start + i]
        copies = [lowered.nodes[start + i + period * k].primitive for k in range(count)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *copies)
        nodes.append(LoweredNode(stacked, tuple(number[j] for j in node.inputs)))
    # After the first iteration there is a tangent kernel wherever the body has weights.
    ends_with_ntk = lowered.forms[n + start + period * count - 1].has_ntk
    forms = tuple(dataclasses.replace(lowered.forms[i], has_ntk=ends_with_ntk) for i in number)
    return Repeated(Lowered(1, tuple(nodes), forms, (period,)), count)


def _entry(lowered: Lowered, start: int, period: int) -> int:
    """The value that a block reads from outside."""
    inside = range(lowered.n_sources + start, lowered.n_sources + start + period)
    return next(i for node in lowered.nodes[start : start + period] for i in node.inputs if i not in inside)


def _readers(lowered: Lowered) -> list[set[int]]:
    """For each value the values computed from it, and -1 if it is an output."""
    readers: list[set[int]] = [set() for _ in range(lowered.n_values)]
    for number, node in lowered.numbered_nodes():
        for i in node.inputs:
            readers[i].add(number)
    for i in lowered.outputs:
        readers[i].add(-1)
    return readers


def _plain(form: Form) -> Form:
    """A form without what may differ between the first iteration and those after it."""
    return dataclasses.replace(form, has_ntk=False)
