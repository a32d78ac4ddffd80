"""Layers on graphs: `Aggregate`."""

import enum
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from nt_core import Bool, Diagonal, Kernel, Rule, Run, layer, supports_masking
from nt_core.authoring import is_traced

_TO_CALLER = 4  # `stacklevel` of a warning: out of the constructor, and of the two decorators around it


class AggregateImplementation(enum.Enum):
    """How graphs are given to `Aggregate`: as matrices of weights, or as lists of edges."""

    DENSE = "DENSE"
    SPARSE = "SPARSE"


@layer
@supports_masking(remask_kernel=True)
def Aggregate(
    aggregate_axis: int | Sequence[int] | None = None,
    batch_axis: int = 0,
    channel_axis: int = -1,
    to_dense: Callable[[Any], Any] = lambda p: p,
    implementation: str | AggregateImplementation = AggregateImplementation.DENSE,
):
    """Sums over the neighbours of every node of a graph (arXiv:1905.13192): `y[j] = sum_i x[i] A[i, j]`.

    The nodes are the positions along `aggregate_axis`. Every sample has a graph of its own, which comes with each call:
    `apply_fn(params, x, pattern=pattern)` and `kernel_fn(x1, x2, pattern=(pattern1, pattern2))`, or `pattern=(pattern1,
    pattern1)` for `x2=None`. Without `pattern` the layer is the identity. A covariance `K` becomes `A1^T K A2`.

    With 'DENSE', `to_dense(pattern)` holds the weights `A` of all pairs of nodes, `(n, *nodes, *nodes)`: the sample,
    the node that an edge starts from, and the one that it leads to. With 'SPARSE', `pattern` holds the edges, as
    integers `(n, edges, axes, 2)`: the coordinates of their nodes along the axes of `aggregate_axis`, and last whether
    it is the node that sends (0) or the one that receives (1). The axis `axes` may be left out if there is one. An edge
    that is there several times has so much more weight; one with a negative coordinate is not there at all, so that
    samples may have different numbers of edges.

    Args:
      aggregate_axis: the axes of the inputs whose positions are nodes, in the order that patterns have them. None for
        all spatial axes.
      batch_axis: batch axis of the inputs. Patterns have theirs first.
      channel_axis: channel axis of the inputs.
      to_dense: what makes the weights of a 'DENSE' pattern.
      implementation: 'DENSE' or 'SPARSE'.

    Raises:
      ValueError: axes that are no spatial axes of the inputs; a pattern that does not fit the inputs.
      NotImplementedError: a pattern for one of two batches only.

    >>> from nt_stax import Aggregate
    >>> _, apply_fn, kernel_fn = Aggregate()
    >>> x = jnp.array([[[1.0], [2.0], [5.0]]])  # one graph of three nodes, with one channel
    >>> pattern = jnp.array([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])  # 0 -> 1, 1 -> 2, 2 -> 1
    >>> print(apply_fn((), x, pattern=pattern)[0, :, 0])
    [0. 6. 2.]
    >>> print(kernel_fn(x, None, "nngp", pattern=(pattern, pattern))[0, 0])
    [[ 0.  0.  0.]
     [ 0. 36. 12.]
     [ 0. 12.  4.]]
    """
    try:
        is_dense = AggregateImplementation(implementation) is AggregateImplementation.DENSE
    except ValueError:
        raise ValueError(
            f"Aggregate: implementation={implementation!r} is unknown, use one of "
            f"{', '.join(i.name for i in AggregateImplementation)}."
        ) from None
    if not is_dense:
        warnings.warn(
            "Aggregate with implementation='SPARSE' leaves out edges with negative coordinates: they pad patterns.",
            stacklevel=_TO_CALLER,
        )

    def graph_of(pattern: Any, shape: Sequence[int]) -> Any:
        """Returns the graphs of activations of `shape`, with nodes numbered in the order of `nodes_of`."""
        axes = _nodes_of(aggregate_axis, len(shape), batch_axis, channel_axis)
        nodes, n = tuple(shape[a] for a in axes), shape[batch_axis]
        return _weights(to_dense(pattern), n, nodes) if is_dense else _edges(pattern, n, nodes)

    def init_fn(rng, input_shape):
        _nodes_of(aggregate_axis, len(input_shape), batch_axis, channel_axis)
        return input_shape, ()

    def apply_fn(params, inputs, *, pattern=None, **kwargs):
        if pattern is None:
            return inputs
        axes = _nodes_of(aggregate_axis, inputs.ndim, batch_axis, channel_axis)
        graph = graph_of(pattern, inputs.shape)
        order = [batch_axis % inputs.ndim, *axes]
        order += [a for a in range(inputs.ndim) if a not in order]
        x = jnp.transpose(inputs, order)
        nodes, rest = x.shape[1 : 1 + len(axes)], x.shape[1 + len(axes) :]
        y = _aggregate(x.reshape(x.shape[0], math.prod(nodes), math.prod(rest)), graph)
        return jnp.transpose(y.reshape(x.shape), _inverse(order))

    def function(kernel: Kernel, run: Run) -> Kernel:
        pattern1, pattern2 = _pair(run.kwargs.get("pattern"))
        if pattern1 is None and pattern2 is None:
            return kernel
        if pattern1 is None or pattern2 is None:
            raise NotImplementedError(
                "Aggregate needs graphs for both batches, pattern=(pattern1, pattern2), or for none; got one for one "
                "of them only."
            )
        graph1 = graph_of(pattern1, kernel.shape1)
        graph2 = graph1 if pattern1 is pattern2 else graph_of(pattern2, kernel.shape2)
        nodes = _nodes_of(aggregate_axis, kernel.spec.ndim, kernel.batch_axis, kernel.channel_axis)
        space_axes = tuple(kernel.spec.spatial_axes.index(a) for a in nodes)
        if _are_same(graph1, graph2):
            return _aggregated(kernel, graph1, None, space_axes)
        return _aggregated(kernel, graph1, graph2, space_axes)

    requirements = {
        "batch_axis": batch_axis,
        "channel_axis": channel_axis,
        "diagonal_spatial": Diagonal(input=Bool.NO, output=Bool.NO),
    }
    return init_fn, apply_fn, Rule("Aggregate", requirements, function=function)


def _pair(patterns: Any) -> tuple[Any, Any]:
    """Returns the patterns of both batches."""
    if patterns is None:
        return None, None
    if not isinstance(patterns, tuple | list) or len(patterns) != 2:
        raise ValueError(
            "The kernel of Aggregate takes pattern=(pattern1, pattern2), the graphs of both batches (of x1 twice for "
            f"x2=None), got {type(patterns).__name__}."
        )
    return patterns[0], patterns[1]


def _nodes_of(axes: int | Sequence[int] | None, ndim: int, batch_axis: int, channel_axis: int) -> tuple[int, ...]:
    """Returns the axes of the activations whose positions are nodes, non-negative and checked."""
    others = batch_axis % ndim, channel_axis % ndim
    if axes is None:
        return tuple(a for a in range(ndim) if a not in others)
    given = (axes,) if isinstance(axes, int) else tuple(axes)
    nodes = tuple(a % ndim for a in given)
    if any(not -ndim <= a < ndim for a in given) or set(nodes) & set(others) or len(set(nodes)) < len(nodes):
        raise ValueError(
            f"Aggregate: aggregate_axis={axes} must name different spatial axes of inputs of rank {ndim}, with batch "
            f"axis {batch_axis} and channel axis {channel_axis}."
        )
    return nodes


def _weights(pattern: Any, n: int, nodes: tuple[int, ...]) -> Array:
    """Returns the weights of all pairs of nodes, `(n, P, P)`."""
    if jnp.shape(pattern) != (n, *nodes, *nodes):
        raise ValueError(
            f"Aggregate of {n} samples with {nodes} nodes needs a pattern of shape {(n, *nodes, *nodes)}, got "
            f"{jnp.shape(pattern)}."
        )
    n_nodes = math.prod(nodes)
    return jnp.reshape(pattern, (n, n_nodes, n_nodes))


def _edges(pattern: Any, n: int, nodes: tuple[int, ...]) -> tuple[Array, Array]:
    """Returns the numbers of the nodes that send and that receive, `(n, edges)`; -1 where there is no edge."""
    shape = jnp.shape(pattern)
    edges = jnp.reshape(pattern, (*shape[:-1], 1, shape[-1])) if len(nodes) == 1 and len(shape) == 3 else pattern
    if jnp.ndim(edges) != 4 or edges.shape[0] != n or edges.shape[2:] != (len(nodes), 2):
        raise ValueError(
            f"Aggregate of {n} samples with {nodes} nodes needs edges of shape ({n}, edges, {len(nodes)}, 2)"
            f"{f' or ({n}, edges, 2)' if len(nodes) == 1 else ''}, got {shape}."
        )
    if not jnp.issubdtype(edges.dtype, jnp.integer):
        raise ValueError(f"Aggregate: edges are pairs of integers, got {edges.dtype}.")
    sizes = np.array(nodes, int).reshape(1, 1, -1, 1)
    if not is_traced(edges) and np.any(np.asarray(edges) >= sizes):
        raise ValueError(f"Aggregate: an edge has coordinates beyond the {nodes} nodes of the inputs.")
    strides = np.array([math.prod(nodes[a + 1 :]) for a in range(len(nodes))], int)
    numbers = jnp.sum(edges * strides.reshape(1, 1, -1, 1), axis=2)
    numbers = jnp.where(jnp.any(edges < 0, axis=(2, 3))[..., None], -1, numbers)
    return numbers[..., 0], numbers[..., 1]


def _are_same(graph1: Any, graph2: Any) -> bool:
    """Whether two batches of graphs are known to be the same."""
    if graph1 is graph2:
        return True
    leaves = [*jax.tree.leaves(graph1), *jax.tree.leaves(graph2)]
    if any(map(is_traced, leaves)):
        return False
    # By NumPy: under jit, what jax.numpy makes even of known arrays is traced.
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), graph1, graph2)))


def _aggregate(x: Array, graph: Any) -> Array:
    """Sums what nodes send to each node: `(*batch, P, m)`, with graphs whose leading axes broadcast to `batch`."""
    if not isinstance(graph, tuple):
        weights = jnp.swapaxes(graph, -1, -2).astype(x.dtype)
        return jnp.matmul(weights, x, precision=lax.Precision.HIGHEST)

    @functools.partial(jnp.vectorize, signature="(p,m),(e),(e)->(p,m)")
    def received(x: Array, senders: Array, receivers: Array) -> Array:
        sent = jnp.where(jnp.expand_dims(senders, 1) < 0, jnp.zeros((), x.dtype), x[senders])
        return jnp.zeros_like(x).at[receivers].add(sent)

    return received(x, *graph)


def _aggregate_columns(x: Array, graph: Any) -> Array:
    """The same along the last axis, `(*batch, m, P)`."""
    if isinstance(graph, tuple):
        return jnp.swapaxes(_aggregate(jnp.swapaxes(x, -1, -2), graph), -1, -2)
    return jnp.matmul(x, graph.astype(x.dtype), precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames="axes")
def _aggregated(kernel: Kernel, graph1: Any, graph2: Any, axes: tuple[int, ...]) -> Kernel:
    """Returns the kernel after aggregation over the spatial axes numbered in `axes`.

    Args:
      graph1, graph2: of both batches; `graph2=None` for `graph1`.
    """
    if kernel.is_reversed:
        return _aggregated(kernel.reverse(), graph1, graph2, axes).reverse()
    if graph2 is not None:
        kernel = _with_second_batch(kernel, graph1, graph2)
    rest = [a for a in range(len(kernel.spec.space)) if a not in axes]

    def aggregate(k: Array, first: Any, second: Any) -> Array:
        """`A1^T K A2`, with the positions along `axes` as rows and columns of matrices."""
        start = k.ndim - 2 * len(kernel.spec.space)
        order = [*range(start), *(start + 2 * a + half for a in rest for half in (0, 1))]
        order += [start + 2 * a + half for half in (0, 1) for a in axes]
        sorted_ = jnp.transpose(k, order)
        n_nodes, n_others = (math.prod(kernel.spec.space[a] for a in which) for which in (axes, rest))
        matrices = sorted_.reshape(*k.shape[:start], n_others**2, n_nodes, n_nodes)
        first, second = (jax.tree.map(lambda g: jnp.expand_dims(g, start), graph) for graph in (first, second))
        received = _aggregate_columns(_aggregate(matrices, first), second)
        return jnp.transpose(received.reshape(sorted_.shape), _inverse(order))

    return kernel.map(aggregate, graph1, graph2)


def _inverse(order: Sequence[int]) -> list[int]:
    """Returns the permutation that undoes one."""
    return [order.index(i) for i in range(len(order))]


def _with_second_batch(kernel: Kernel, graph1: Any, graph2: Any) -> Kernel:
    """Spells the second batch out where it is the first: with other graphs it is not, any more."""
    equal = jax.tree.map(lambda a, b: a.shape == b.shape and jnp.all(a == b), graph1, graph2)
    same = functools.reduce(jnp.logical_and, jax.tree.leaves(equal), jnp.asarray(kernel.x1_is_x2))
    if kernel.cov2 is None:
        kernel = kernel.replace(cov2=kernel.cov1, mask2=kernel.mask1 if kernel.mask2 is None else kernel.mask2)
    return kernel.replace(x1_is_x2=same)
