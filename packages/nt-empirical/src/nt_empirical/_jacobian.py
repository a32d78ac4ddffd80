"""Jacobians of networks with respect to their parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nt_empirical._axes import Layout, OutputAxes
from nt_empirical._batches import Batch
from nt_empirical._chunks import map_chunks
from nt_empirical._parameters import Parametrised
from nt_empirical._vmap import BatchAxes, map_samples, output_axes, sample_outputs


@dataclasses.dataclass(frozen=True)
class Differentiated:
    """An output of a network with its derivatives. A leaf, where it stands in a pytree.

    Attributes:
      value: the output.
      derivatives: for every array, by which it was differentiated; with an axis of samples first, if they were
        differentiated one by one.
      samples_at: the axis of the samples in `value` if they were differentiated one by one.
    """

    value: jax.Array
    derivatives: list[Any]
    samples_at: int | None


def ntk_by_jacobians(
    network: Parametrised, batch1: Batch, batch2: Batch, layout: Layout, batch_axes: BatchAxes | None, per_leaf: bool
) -> list[Any]:
    """Returns, of every array of the parameters, the tangent kernels of two batches: products of their Jacobians."""

    def jacobians(batch: Batch) -> tuple[Any, list[list[jax.Array]]]:
        def outputs_twice(weights: list[jax.Array]) -> tuple[Any, Any]:
            outputs = sample_outputs(network.f, weights, batch, batch_axes)
            return outputs, outputs

        found, outputs = jax.jacrev(outputs_twice, has_aux=True)(network.weights)
        return outputs, jax.tree.structure(outputs).flatten_up_to(found)

    outputs1 = differentiate(jacobians, batch1, batch_axes)
    outputs2 = outputs1 if batch2 is batch1 else differentiate(jacobians, batch2, batch_axes)

    def of_array(number: int) -> Any:
        def kernel(output: OutputAxes, y1: Differentiated, y2: Differentiated) -> jax.Array:
            jacobian1 = _with_samples(y1, number)
            jacobian2 = jacobian1 if y2 is y1 else _with_samples(y2, number)
            return output.contract(jacobian1, jacobian2, network.scales[number])

        return kernels_of(kernel, outputs1, outputs2, layout)

    return [of_array(number) for number in range(len(network.weights))]


def _with_samples(y: Differentiated, number: int) -> jax.Array:
    """Returns the Jacobian by an array, with the samples where they are in the output."""
    jacobian = y.derivatives[number]
    return jacobian if y.samples_at is None else jnp.moveaxis(jacobian, 0, y.samples_at)


def kernels_of(
    kernel: Callable[[OutputAxes, Differentiated, Differentiated], jax.Array],
    outputs1: Any,
    outputs2: Any,
    layout: Layout,
) -> Any:
    """Calls `kernel` for each output of a network, two pytrees of `Differentiated`."""
    axes = layout.axes_of(*(jax.tree.map(lambda y: y.value, outputs) for outputs in (outputs1, outputs2)))
    leaves, structure = jax.tree.flatten(outputs1)
    return structure.unflatten(map(kernel, axes, leaves, jax.tree.leaves(outputs2)))


def differentiate(
    derivatives: Callable[[Batch], tuple[Any, list[list[Any]]]], batch: Batch, axes: BatchAxes | None
) -> Any:
    """Differentiates a network, for a batch.

    Args:
      derivatives: returns outputs for a batch or a sample, and the derivatives of each of them.
      batch: inputs.
      axes: with these, samples are differentiated one by one, and not each output of a sample through the whole batch.

    Returns:
      A pytree of `Differentiated`.
    """
    if axes is None:
        outputs, found = derivatives(batch)
    else:
        outputs, found = map_samples(derivatives, batch, axes, map_chunks if axes.in_turn else jax.vmap)
    values, structure = jax.tree.flatten(outputs)
    samples_at = [None] * len(values) if axes is None else output_axes(outputs, axes)
    return structure.unflatten(
        Differentiated(y if axis is None else jnp.moveaxis(y, 0, axis), of_output, axis)
        for y, of_output, axis in zip(values, found, samples_at, strict=True)
    )
