"""The tangent kernel column by column, from its products with unit vectors."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from nt_core.manual import varying, varying_axes

from nt_empirical._axes import Layout
from nt_empirical._batches import Batch
from nt_empirical._parameters import Parametrised
from nt_empirical._vmap import BatchAxes, map_samples, output_axes, outputs_of, sample_outputs

# Columns at once: so many gradients of all parameters are in memory.
COLUMNS_AT_ONCE = 32


def ntk_by_columns(
    network: Parametrised, batch1: Batch, batch2: Batch, layout: Layout, batch_axes: BatchAxes | None, per_leaf: bool
) -> list[Any]:
    """Returns the tangent kernels of two batches, without a Jacobian: of every array of the parameters, or of all."""
    arrays = range(len(network.weights))
    networks = [network.only([number]) for number in arrays] if per_leaf else [network]
    return [_kernels(alone, batch1, batch2, layout, batch_axes) for alone in networks]


def _kernels(network: Parametrised, batch1: Batch, batch2: Batch, layout: Layout, batch_axes: BatchAxes | None) -> Any:
    """Returns the tangent kernels of two batches, a pytree as the outputs.

    A column of the kernel belongs to one number among the outputs for `batch2`. It takes the gradient of that number,
    and the derivative of the outputs for `batch1` along it.
    """
    f, params = network.f, network.weights
    outputs1, pull_back1 = jax.vjp(lambda p: outputs_of(f, p, batch1, batch_axes), params)
    # Not by forward-mode differentiation, which functions with a `custom_vjp` do not have.
    push_forward = jax.linear_transpose(pull_back1, outputs1)
    structure = jax.tree.structure(outputs1)
    axes = layout.axes_of(outputs1, jax.eval_shape(lambda p: outputs_of(f, p, batch2, batch_axes), params))
    samples_at: list[Any] = [None] * structure.num_leaves if batch_axes is None else output_axes(outputs1, batch_axes)
    # Positions on shared axes are chosen in each column; samples are known to the mapping over them only.
    chosen = [[a for a in output.shared if a != axis] for output, axis in zip(axes, samples_at, strict=True)]

    def columns(batch: Batch) -> list[jax.Array]:
        """Returns the columns of a batch, or a sample, for each output: its axes, then those of the rows."""
        outputs2, pull_back = jax.vjp(lambda p: sample_outputs(f, p, batch, batch_axes), params)
        leaves = jax.tree.leaves(outputs2)

        def column(which: int, position: jax.Array) -> jax.Array:
            unit = (jnp.arange(leaves[which].size) == position).astype(leaves[which].dtype)
            vector = [jnp.zeros_like(y) for y in leaves]
            vector[which] = varying(unit.reshape(leaves[which].shape), varying_axes(leaves[which]))
            (gradients,) = pull_back(structure.unflatten(vector))
            (derivatives,) = push_forward((network.scaled(gradients),))
            rows = jax.tree.leaves(derivatives)[which]
            places: list[Any] = list(jnp.unravel_index(position, leaves[which].shape))
            if samples_at[which] is not None:
                places.insert(samples_at[which], None)
            for axis in reversed(chosen[which]):
                rows = jax.lax.dynamic_index_in_dim(rows, places[axis], axis, keepdims=False)
            return rows

        found = [map_numbers(functools.partial(column, which), y.size) for which, y in enumerate(leaves)]
        return [k.reshape(*y.shape, *k.shape[1:]) for k, y in zip(found, leaves, strict=True)]

    if batch_axes is None:
        found = columns(batch2)
    else:
        one_by_one = map_samples(columns, batch2, batch_axes, lambda fn: functools.partial(jax.lax.map, fn))
        found = [jnp.moveaxis(k, 0, axis) for k, axis in zip(one_by_one, samples_at, strict=True)]
    kernels = []
    for output, columns_of_output, without in zip(axes, found, chosen, strict=True):
        rows = [axis for axis in range(output.ndim) if axis not in without]
        kernel = output.kernel_of_columns(columns_of_output, rows)
        kernels.append(output.symmetric(kernel) if batch2 is batch1 else kernel)
    return structure.unflatten(kernels)


def map_numbers(fn: Callable[[jax.Array], jax.Array], n: int) -> jax.Array:
    """Calls `fn` with the numbers below `n`, some at once."""
    if n <= COLUMNS_AT_ONCE:
        return jax.vmap(fn)(jnp.arange(n))
    return jax.lax.map(fn, jnp.arange(n), batch_size=COLUMNS_AT_ONCE)
