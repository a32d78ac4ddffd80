"""Inputs of different sizes in one array: entries that are masked, and carried as zeros."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nt_core.spec import Spec


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


@dataclasses.dataclass(frozen=True)
class Masks:
    """The masks of the activations of two batches.

    Attributes:
      first, second: booleans that broadcast to the shapes of the activations, True where masked. `second` is None where
        the second batch is the first.
    """

    first: Array
    second: Array | None

    @classmethod
    def of(cls, mask1: Array | None, mask2: Array | None, is_symmetric: bool) -> "Masks | None":
        """Returns both masks, of which one may be None where nothing is masked; None if both are."""
        given = mask2 if mask1 is None else mask1
        if given is None:
            return None
        if is_symmetric:
            return cls(given, None)
        nothing = jnp.zeros((1,) * given.ndim, bool)
        return cls(nothing if mask1 is None else mask1, nothing if mask2 is None else mask2)

    def unmasked(self, spec: Spec) -> tuple[Array, Array | None]:
        """Returns for both batches where they are not masked, as `(n, *space)`. See `mask_of_positions`."""
        return _unmasked(self.first, self.second, spec)


jax.tree_util.register_dataclass(Masks, data_fields=["first", "second"], meta_fields=[])


@functools.partial(jax.jit, static_argnames="spec")
def _unmasked(first: Array, second: Array | None, spec: Spec) -> tuple[Array, Array | None]:
    second = None if second is None else ~mask_of_positions(second, spec.shape2, spec)
    return ~mask_of_positions(first, spec.shape1, spec), second


def mask_of_positions(mask: Array, shape: tuple[int, ...], spec: Spec) -> Array:
    """Returns the mask of activations of `shape` as `(n, *space)`.

    Raises:
      NotImplementedError: it differs between channels.
    """
    sizes = tuple(1 if axis == spec.channel_axis else n for axis, n in enumerate(shape))
    if mask.ndim != len(shape) or any(m not in (1, n) for m, n in zip(mask.shape, shape, strict=True)):
        raise ValueError(f"A mask must broadcast to the shape {shape} of the activations, got shape {mask.shape}.")
    if mask.shape[spec.channel_axis] != 1:
        raise NotImplementedError(
            f"Masks that differ between channels have no infinite-width limit here, got a mask of shape {mask.shape} "
            f"with channel axis {spec.channel_axis}. Mask all channels of a position, or none, or put a Dense or Conv "
            "layer before this one."
        )
    mask = jnp.squeeze(jnp.broadcast_to(mask, sizes), spec.channel_axis)
    return jnp.moveaxis(mask, spec.batch_axis - (spec.batch_axis > spec.channel_axis), 0)


def get_masked_array(x: Any, mask_constant: float | Array | None = None) -> Any:
    """Masks the entries of an array that equal `mask_constant`.

    Args:
      x: an array. A `MaskedArray`, and None, are returned as they are.
      mask_constant: any number, infinities and NaN included, which may be traced; None masks nothing.

    Returns:
      A `MaskedArray`, or `x` itself if `mask_constant` is None.

    >>> import jax.numpy as jnp
    >>> x = get_masked_array(jnp.array([1.0, jnp.nan, 3.0]), mask_constant=jnp.nan)
    >>> print(x.masked_value, x.mask)
    [1. 0. 3.] [False  True False]
    """
    if mask_constant is None or x is None or isinstance(x, MaskedArray):
        return x
    if jnp.ndim(mask_constant) > 0:
        raise ValueError(f"mask_constant is one number, got an array of shape {jnp.shape(mask_constant)}.")
    if isinstance(mask_constant, int):
        mask_constant = float(mask_constant)  # integers of JAX have 32 bits
    return _masked(jnp.asarray(x), mask_constant)


@jax.jit
def _masked(x: Array, constant: Any) -> MaskedArray:
    if jnp.issubdtype(x.dtype, jnp.floating):
        constant = jnp.asarray(constant, x.dtype)  # 0.1 has to equal float32(0.1)
    mask = (x == constant) | (jnp.isnan(x) & jnp.isnan(constant))
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
