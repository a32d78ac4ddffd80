"""Which keywords of a pair of inputs go to which of the two."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def split_kwargs(kwargs: dict[str, Any], x1: Any, x2: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the keywords for the function at `x1`, and those for the function at `x2`.

    A 2-tuple holds a value for each; anything else goes to both. `rng` is special, since a finite network with dropout
    is one function: equal inputs get the same key, and different inputs get different ones. So a single `rng` serves
    `x1`, and `x2` gets it too if it equals `x1`, or else one derived from it. Of two keys the second is replaced if it
    breaks that rule. Inputs are compared by value, under `jit` as well.

    Args:
      kwargs: the keywords.
      x1, x2: the inputs; `x2=None` stands for `x1`, and only the first of the results matters.

    Raises:
      TypeError: `rng` is neither a key nor two keys.

    Warns:
      UserWarning: the second key was replaced (cannot be known, and is not said, under `jit`).

    >>> split_kwargs(dict(train=True, scale=(1.0, 2.0)), np.zeros(3), np.ones(3))
    ({'train': True, 'scale': 1.0}, {'train': True, 'scale': 2.0})
    """
    kwargs1 = {name: value[0] if _is_pair(value) else value for name, value in kwargs.items()}
    kwargs2 = {name: value[1] if _is_pair(value) else value for name, value in kwargs.items()}
    if kwargs.get("rng") is not None:
        kwargs1["rng"], kwargs2["rng"] = _split_rng(kwargs["rng"], x1, x2)
    return kwargs1, kwargs2


def is_array(value: Any) -> bool:
    """Whether this is an array of JAX (traced ones included) or NumPy."""
    return isinstance(value, jax.Array | np.ndarray)


def is_absent(x2: Any) -> bool:
    """Whether `x2` is None, or nested containers of None: it then stands for `x1`."""
    return not jax.tree.leaves(x2)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2


def _split_rng(rng: Any, x1: Any, x2: Any) -> tuple[Any, Any]:
    key1, key2 = (_key(k) for k in (rng if _is_pair(rng) else (rng, rng)))
    if is_absent(x2):
        return key1, key1
    same_inputs, same_keys = _equal(x1, x2), jnp.all(key1 == key2)
    if _is_pair(rng):
        _warn_if_replaced(same_inputs, same_keys)
    different = jax.lax.select(same_keys, jax.random.fold_in(key1, 1), key2)
    return key1, jax.lax.select(same_inputs, key1, different)


def _key(key: Any) -> jax.Array:
    dtype, ndim = getattr(key, "dtype", None), getattr(key, "ndim", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and ndim == 0
    if not (is_typed or (dtype == np.uint32 and ndim == 1)):
        raise TypeError(
            f"`rng` must be one key of `jax.random`, or a tuple of two, for x1 and x2; got {key!r}. Give several keys "
            "under another name."
        )
    return jnp.asarray(key)


def _equal(x1: Any, x2: Any) -> jax.Array:
    if jax.tree.structure(x1) != jax.tree.structure(x2):
        return jnp.array(False)
    pairs = zip(jax.tree.leaves(x1), jax.tree.leaves(x2), strict=True)
    # NaN may mark masked entries, and then equals itself.
    return jnp.all(jnp.array([jnp.array_equal(a, b, equal_nan=True) for a, b in pairs]))


def _warn_if_replaced(same_inputs: jax.Array, same_keys: jax.Array) -> None:
    if isinstance(same_inputs, Tracer) or isinstance(same_keys, Tracer):
        return
    if bool(same_inputs) != bool(same_keys):
        given = "equal" if same_keys else "different"
        warnings.warn(
            f"`rng` has two {given} keys for {'equal' if same_inputs else 'different'} inputs x1 and x2; the second "
            "key is replaced, so that keys are equal where the inputs are. One key for both needs no such care.",
            stacklevel=6,
        )
