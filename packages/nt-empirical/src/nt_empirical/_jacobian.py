"""Jacobians of networks with respect to their parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nt_empirical._batches import Batch, checked_outputs
from nt_empirical._vmap import BatchAxes, drop_sample_axis, map_samples, output_axes


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


def differentiate(f: Callable[..., Any], params: Any, batch: Batch, axes: BatchAxes | None) -> Any:
    """Returns the outputs of `f` for a batch as a pytree of `Differentiated`.

    With `axes`, samples are differentiated one by one, and not each output of a sample through the whole batch.
    """
    _check_parameters(params)
    weights, params_structure = jax.tree.flatten(params)

    def outputs_and_jacobians(batch: Batch) -> tuple[Any, list[list[jax.Array]]]:
        def outputs_twice(weights: list[Any]) -> tuple[Any, Any]:
            outputs = checked_outputs(f(params_structure.unflatten(weights), batch.x, **batch.kwargs))
            if axes is not None:
                outputs = drop_sample_axis(outputs, axes)
            return outputs, outputs

        if not weights:  # `jax.jacrev` needs some
            _, outputs = outputs_twice([])
            return outputs, [[] for _ in jax.tree.leaves(outputs)]
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


def _check_parameters(params: Any) -> None:
    for path, weights in jax.tree_util.tree_leaves_with_path(params):
        kind = getattr(weights, "dtype", type(weights))
        if not (kind is float or jnp.issubdtype(kind, jnp.floating)):
            raise TypeError(
                f"Parameters must be real floating-point arrays, got {kind} in params{jax.tree_util.keystr(path)}. "
                "Hold what is not trained fixed inside the function."
            )
