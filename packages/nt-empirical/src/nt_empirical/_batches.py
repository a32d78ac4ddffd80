"""The two batches of inputs of a kernel, and what a network returns for them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from nt_core.keywords import is_absent, split_kwargs


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Inputs of a network, and the keywords that it takes for them."""

    x: Any
    kwargs: dict[str, Any]


def make_batches(x1: Any, x2: Any, kwargs: dict[str, Any]) -> tuple[Batch, Batch]:
    """Returns both batches, the same object twice if `x2` is None."""
    kwargs1, kwargs2 = split_kwargs(kwargs, x1, x2)
    first = Batch(x1, kwargs1)
    return first, first if is_absent(x2) else Batch(x2, kwargs2)


def checked_outputs(outputs: Any) -> Any:
    """Returns the outputs of a network, as arrays.

    Raises:
      TypeError: outputs are not real floating-point arrays.
    """
    outputs = jax.tree.map(jnp.asarray, outputs)
    for path, y in jax.tree_util.tree_leaves_with_path(outputs):
        if not jnp.issubdtype(y.dtype, jnp.floating):
            raise TypeError(
                f"The function must return real floating-point arrays, got dtype {y.dtype} in "
                f"outputs{jax.tree_util.keystr(path)}. If it returns a `MaskedArray`, wrap it with `unmask_fn`."
            )
    return outputs


def check_same_structure(outputs1: Any, outputs2: Any) -> None:
    """Raises a ValueError unless a network returns for `x2` what it returns for `x1`, apart from sizes."""
    structures = jax.tree.structure(outputs1), jax.tree.structure(outputs2)
    if structures[0] != structures[1]:
        raise ValueError(f"The function must return the same for x1 and x2, got {structures[0]} and {structures[1]}.")
    for y1, y2 in zip(jax.tree.leaves(outputs1), jax.tree.leaves(outputs2), strict=True):
        if y1.ndim != y2.ndim:
            raise ValueError(f"Outputs must have as many axes for x1 as for x2, got shapes {y1.shape} and {y2.shape}.")
