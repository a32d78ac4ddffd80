"""Lays out what kernels need to know of single samples: one table of planes for each sample."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from nt_core.activations.bounds import QUADRATURES, quadrature
from nt_core.backends.mosaic.plan import BOUNDED, GHOST_ROOT, Row, Stage, Torus, Two, terms_of
from nt_core.backends.mosaic.terms import Terms
from nt_core.evaluation.samples import Batch
from nt_core.evaluation.statistics import Statistics
from nt_core.lowering import Lowered, LoweredNode, Repeated, windows
from nt_core.lowering.primitives import Dual, Tied


def tables(stage: Stage, lowered: Lowered, batch: Batch, statistics: Statistics, addresses: np.ndarray) -> Array:
    """Returns the rows of a stage at some addresses, `(rows, addresses, n)`. Ghosts are 0, or `GHOST_ROOT`."""
    found = []
    for table in stage.tables:
        rows = [_row(row, stage.torus, lowered, batch, statistics, addresses) for row in table.rows]
        if rows:
            of_iterations = [row.reshape(table.count, -1, *row.shape[1:]) for row in rows]
            found.append(jnp.concatenate(of_iterations, 1).reshape(table.count * table.size, *rows[0].shape[1:]))
    return jnp.concatenate(found)


def coefficients(stage: Stage, lowered: Lowered, both: tuple[Statistics, Statistics]) -> Array:
    """Returns the numbers that all pairs of two batches read: those in the primitives of a stage, those of an iteration
    of a `Repeated` together; then how many turns the sums over terms take; then the nodes of quadratures."""
    parts = []
    for primitives, count in stage.leaves:
        leaves = [jnp.asarray(leaf, jnp.float32) for leaf in jax.tree.leaves(primitives)]
        if leaves:  # those of a body have one number for each iteration
            parts.append(jnp.stack(leaves, -1).reshape(len(leaves) * (count or 1)))
    rows = [row for table in stage.tables for row in table.rows if row.kind == "terms"]
    parts += [jnp.maximum(*(_turns(row, lowered, statistics) for statistics in both)) for row in rows]
    if any(isinstance(activation, BOUNDED) for activation in stage.nonlinearities):
        parts += [array for count in QUADRATURES for array in quadrature(count, jnp.float32)]
    return jnp.concatenate([*parts, jnp.zeros(1, jnp.float32)])  # never empty


def positions(torus: Torus, space: Two, scale: Two) -> np.ndarray:
    """Returns the number of the position at each address, `(phases, addresses)`; of a ghost, that is their count."""
    (rows, columns), phase = torus.shape, np.arange(scale[0] * scale[1])[:, None]
    row, column = np.divmod(np.arange(rows * columns), columns)
    y, x = row * scale[0] + phase // scale[1], column * scale[1] + phase % scale[1]
    at = np.full((phase.size, torus.size), math.prod(space))
    address = (row * torus.steps[0] + column * torus.steps[1]) % torus.size
    at[:, address] = np.where((y < space[0]) & (x < space[1]), y * space[1] + x, math.prod(space))
    return at


def _row(
    row: Row, torus: Torus, lowered: Lowered, batch: Batch, statistics: Statistics, addresses: np.ndarray
) -> Array:
    n = batch.index.shape[0]
    if row.kind == "column":
        column = jnp.asarray(addresses % torus.shape[1], jnp.float32)
        return jnp.broadcast_to(column[None, :, None], (1, len(addresses), n))
    values = _values(row, lowered, batch, statistics)  # (any, *space, n)
    flat = values.reshape(values.shape[0], math.prod(row.space), n)
    with_ghost = jnp.pad(flat, ((0, 0), (0, 1), (0, 0)), constant_values=GHOST_ROOT if row.kind == "root" else 0)
    at = positions(torus, row.space, row.scale)[:, addresses]
    return jnp.take(with_ghost, at.reshape(-1), axis=1).reshape(-1, len(addresses), n)


def _values(row: Row, lowered: Lowered, batch: Batch, statistics: Statistics) -> Array:
    if row.kind == "mask":
        return jnp.ones((1, *row.space, batch.index.shape[0]), jnp.float32)
    if row.kind == "channel":
        return jnp.moveaxis(batch.inputs[row.number], -2, 0)
    of_values, node = _iterations(row, lowered, statistics)
    if row.kind == "half":
        return _variance(row, of_values, node) / 2
    if row.kind == "root":
        return jnp.sqrt(of_values.variance[row.number])
    if row.kind == "scale":
        return of_values.scale[row.number]
    assert node is not None
    before = of_values.variance[node.inputs[0]]
    if row.kind == "terms":
        numbers = _terms(node).numbers(before)
        return jnp.moveaxis(numbers, 0, 1).reshape(-1, *before.shape[1:])
    assert row.kind == "average" and isinstance(node.primitive, Tied)
    tied = node.primitive
    sums = jax.vmap(lambda variance: windows.sums(tied.windows, variance))(before)
    return sums / (2 * tied.n_taps)


def _iterations(row: Row, lowered: Lowered, statistics: Statistics) -> tuple[Statistics, LoweredNode | None]:
    """Returns statistics with a leading axis, of iterations, and what computes the value of a row."""
    if row.repeated is None:
        return jax.tree.map(lambda x: x[None], statistics), lowered.node(row.number)
    repeated = lowered.node(row.repeated)
    assert repeated is not None and isinstance(repeated.primitive, Repeated)
    return statistics.repeated[row.repeated], repeated.primitive.body.node(row.number)


def _variance(row: Row, of_values: Statistics, node: LoweredNode | None) -> Array:
    """The variances of a value, also of a covariance for which nothing else needs them: it is that of a dual."""
    if row.number in of_values.variance:
        return of_values.variance[row.number]
    assert node is not None and isinstance(node.primitive, Dual)
    return node.primitive.variance(of_values.variance[node.inputs[0]])


def _turns(row: Row, lowered: Lowered, statistics: Statistics) -> Array:
    """How many turns a sum over terms takes, in each iteration."""
    of_values, node = _iterations(row, lowered, statistics)
    assert node is not None
    return _terms(node).turns(of_values.variance[node.inputs[0]])


def _terms(node: LoweredNode) -> Terms:
    terms = terms_of(node.primitive)
    assert terms is not None
    return terms
