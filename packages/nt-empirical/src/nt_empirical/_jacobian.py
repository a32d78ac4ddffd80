"""Jacobians of networks with respect to their parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nt_empirical._axes import Layout
from nt_empirical._batches import Batch
from nt_empirical._vmap import BatchAxes, map_samples, output_axes, sample_outputs


@dataclasses.dataclass(frozen=True)
class Differentiated:
    """An output of a network with its derivatives. A leaf, where it stands in a pytree.

    Attributes:
      value: the output.
      jacobian: for every array of parameters, the axes of the output and then those of the parameters.
    """

    value: jax.Array
    jacobian: list[jax.Array]

    def with_samples_at(self, axis: int) -> "Differentiated":
        """Moves the leading axis of the output to `axis`."""
        return Differentiated(jnp.moveaxis(self.value, 0, axis), [jnp.moveaxis(j, 0, axis) for j in self.jacobian])


def ntk_by_jacobians(
    f: Callable[..., Any], params: Any, batch1: Batch, batch2: Batch, layout: Layout, batch_axes: BatchAxes | None
) -> Any:
    """Returns the tangent kernels of two batches, a pytree as the outputs: products of their Jacobians."""
    outputs1 = differentiate(f, params, batch1, batch_axes)
    outputs2 = outputs1 if batch2 is batch1 else differentiate(f, params, batch2, batch_axes)
    axes = layout.axes_of(*(jax.tree.map(lambda y: y.value, outputs) for outputs in (outputs1, outputs2)))
    differentiated, structure = jax.tree.flatten(outputs1)
    kernels = [
        sum(output.contract(j1, j2) for j1, j2 in zip(y1.jacobian, y2.jacobian, strict=True))
        for output, y1, y2 in zip(axes, differentiated, jax.tree.leaves(outputs2), strict=True)
    ]
    return structure.unflatten(kernels)


def differentiate(f: Callable[..., Any], params: Any, batch: Batch, axes: BatchAxes | None) -> Any:
    """Returns the outputs of `f` for a batch as a pytree of `Differentiated`.

    With `axes`, samples are differentiated one by one, and not each output of a sample through the whole batch.
    """
    weights, params_structure = jax.tree.flatten(params)

    def outputs_and_jacobians(batch: Batch) -> tuple[Any, list[list[jax.Array]]]:
        def outputs_twice(weights: list[Any]) -> tuple[Any, Any]:
            outputs = sample_outputs(f, params_structure.unflatten(weights), batch, axes)
            return outputs, outputs

        jacobians, outputs = jax.jacrev(outputs_twice, has_aux=True)(weights)
        return outputs, jax.tree.structure(outputs).flatten_up_to(jacobians)

    if axes is None:
        outputs, jacobians = outputs_and_jacobians(batch)
    else:
        outputs, jacobians = map_samples(outputs_and_jacobians, batch, axes)
    values, structure = jax.tree.flatten(outputs)
    differentiated = [Differentiated(*pair) for pair in zip(values, jacobians, strict=True)]
    if axes is not None:
        samples_at = output_axes(outputs, axes)
        differentiated = [y.with_samples_at(axis) for y, axis in zip(differentiated, samples_at, strict=True)]
    return structure.unflatten(differentiated)


def check_parameters(params: Any) -> None:
    """Raises a TypeError for parameters that are not real floating-point arrays."""
    for path, weights in jax.tree_util.tree_leaves_with_path(params):
        kind = getattr(weights, "dtype", type(weights))
        if not (kind is float or jnp.issubdtype(kind, jnp.floating)):
            raise TypeError(
                f"Parameters must be real floating-point arrays, got {kind} in params{jax.tree_util.keystr(path)}. "
                "Hold what is not trained fixed inside the function."
            )
