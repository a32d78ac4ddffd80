"""Inputs of different sizes in one array: entries that are masked, and carried as zeros."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedArray:
    """An array of which some entries are masked.

    Attributes:
      masked_value: the array, with zeros at masked entries.
      mask: booleans that broadcast to the shape of `masked_value`, True where masked.
    """

    masked_value: Array
    mask: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.masked_value.shape

    @property
    def ndim(self) -> int:
        return self.masked_value.ndim

    def replace(self, **changes: Any) -> "MaskedArray":
        """Returns a copy with other values of the named fields."""
        return dataclasses.replace(self, **changes)

    def asdict(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return {"masked_value": self.masked_value, "mask": self.mask}

    def astuple(self) -> tuple[Any, ...]:
        """Returns `(masked_value, mask)`."""
        return self.masked_value, self.mask


jax.tree_util.register_dataclass(MaskedArray, data_fields=["masked_value", "mask"], meta_fields=[])


def get_masked_array(x: Any, mask_constant: float | None = None) -> Any:
    """Masks the entries of an array that equal `mask_constant`.

    Args:
      x: an array. A `MaskedArray`, and None, are returned as they are.
      mask_constant: any number, infinities and NaN included; None masks nothing.

    Returns:
      A `MaskedArray`, or `x` itself if `mask_constant` is None.

    >>> import jax.numpy as jnp
    >>> x = get_masked_array(jnp.array([1.0, jnp.nan, 3.0]), mask_constant=jnp.nan)
    >>> print(x.masked_value, x.mask)
    [1. 0. 3.] [False  True False]
    """
    if mask_constant is None or x is None or isinstance(x, MaskedArray):
        return x
    x = jnp.asarray(x)
    # A Python number takes the precision of `x`: 0.1 has to equal float32(0.1).
    constant = float(mask_constant)
    mask = jnp.isnan(x) if constant != constant else x == constant
    return MaskedArray(_zeroed(x, mask), mask)


def unmask_fn(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `fn`, e.g. the `apply_fn` of a network, so that it returns arrays in the place of `MaskedArray`s.

    Masked entries are zero in the arrays.

    >>> import jax.numpy as jnp
    >>> fn = unmask_fn(lambda x: get_masked_array(x, mask_constant=9.0))
    >>> print(fn(jnp.array([1.0, 9.0])))
    [1. 0.]
    """

    @functools.wraps(fn)
    def unmasked(*args: Any, **kwargs: Any) -> Any:
        return jax.tree.map(_unmask, fn(*args, **kwargs), is_leaf=_is_masked)

    return unmasked


def _is_masked(x: Any) -> bool:
    return isinstance(x, MaskedArray)


def _unmask(x: Any) -> Any:
    return _zeroed(x.masked_value, x.mask) if _is_masked(x) else x


def _zeroed(x: Array, mask: Array) -> Array:
    return jnp.where(mask, jnp.zeros((), x.dtype), x)
