"""Jacobians of networks with respect to their parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nt_empirical._axes import Layout, OutputAxes
from nt_empirical._batches import Batch
from nt_empirical._parameters import Parametrised
from nt_empirical._vmap import BatchAxes, map_samples, output_axes, sample_outputs

Function = Callable[[list[Any]], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Differentiated:
    """An output of a network with its derivatives. A leaf, where it stands in a pytree.

    Attributes:
      value: the output.
      jacobian: for every array, by which it was differentiated, the axes of the output and then those of the array.
      samples_at: the axis of the samples if they were differentiated one by one.
    """

    value: jax.Array
    jacobian: list[jax.Array]
    samples_at: int | None

    @classmethod
    def of(cls, value: jax.Array, jacobian: list[jax.Array], samples_at: int | None) -> "Differentiated":
        """Moves the samples from the leading axis to where they belong."""
        if samples_at is not None:
            value, *jacobian = (jnp.moveaxis(array, 0, samples_at) for array in (value, *jacobian))
        return cls(value, jacobian, samples_at)


def ntk_by_jacobians(
    network: Parametrised, batch1: Batch, batch2: Batch, layout: Layout, batch_axes: BatchAxes | None, per_leaf: bool
) -> list[Any]:
    """Returns, of every array of the parameters, the tangent kernels of two batches: products of their Jacobians."""

    def function_of(batch: Batch) -> tuple[Function, list[Any]]:
        return lambda w: (sample_outputs(network.f, w, batch, batch_axes), ()), network.weights

    outputs1, _ = differentiate(function_of, batch1, batch_axes)
    outputs2 = outputs1 if batch2 is batch1 else differentiate(function_of, batch2, batch_axes)[0]

    def of_array(number: int) -> Any:
        def kernel(output: OutputAxes, y1: Differentiated, y2: Differentiated) -> jax.Array:
            return output.contract(y1.jacobian[number], y2.jacobian[number], network.scales[number])

        return kernels_of(kernel, outputs1, outputs2, layout)

    return [of_array(number) for number in range(len(network.weights))]


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
    function_of: Callable[[Batch], tuple[Function, list[Any]]], batch: Batch, axes: BatchAxes | None
) -> tuple[Any, Any]:
    """Differentiates a network, for a batch, by what is given with it.

    Args:
      function_of: returns a function of arrays, for a batch or a sample, and the arrays. The function returns outputs,
        and anything else that is to be returned.
      batch: inputs.
      axes: with these, samples are differentiated one by one, and not each output of a sample through the whole batch.

    Returns:
      A pytree of `Differentiated`, and what else the function returned, with `axes` with a leading axis of samples.
    """

    def outputs_and_jacobians(batch: Batch) -> tuple[Any, list[list[jax.Array]], Any]:
        function, arrays = function_of(batch)

        def outputs_twice(arrays: list[Any]) -> tuple[Any, Any]:
            outputs, rest = function(arrays)
            return outputs, (outputs, rest)

        if not arrays:  # `jax.jacrev` needs some
            _, (outputs, rest) = outputs_twice([])
            return outputs, [[] for _ in jax.tree.leaves(outputs)], rest
        jacobians, (outputs, rest) = jax.jacrev(outputs_twice, has_aux=True)(arrays)
        return outputs, jax.tree.structure(outputs).flatten_up_to(jacobians), rest

    if axes is None:
        outputs, jacobians, rest = outputs_and_jacobians(batch)
    else:
        outputs, jacobians, rest = map_samples(outputs_and_jacobians, batch, axes)
    values, structure = jax.tree.flatten(outputs)
    samples_at = [None] * len(values) if axes is None else output_axes(outputs, axes)
    differentiated = [Differentiated.of(*arguments) for arguments in zip(values, jacobians, samples_at, strict=True)]
    return structure.unflatten(differentiated), rest
