"""Inside of `jax.shard_map`: the axes of the mesh over which arrays vary.

The derivative by an array that is the same on all devices is summed over them. Where it is the derivative of what one
device has that is wanted, the array must be said to vary.
"""

from collections.abc import Iterable
from typing import Any

import jax


def varying_axes(tree: Any) -> frozenset[str]:
    """Returns the axes over which any of these arrays, or of their types, varies."""
    types = [leaf if hasattr(leaf, "manual_axis_type") else jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]
    # None where nothing is known of it, as with `check_vma=False`.
    return frozenset[str]().union(*(t.manual_axis_type.varying for t in types if t.manual_axis_type is not None))


def varying(tree: Any, axes: Iterable[str]) -> Any:
    """Returns the same arrays, as ones that vary over these axes too."""

    def cast(a: Any) -> Any:
        missing = frozenset(axes) - varying_axes(a)
        return jax.lax.pcast(a, tuple(sorted(missing)), to="varying") if missing else a

    return jax.tree.map(cast, tree)
