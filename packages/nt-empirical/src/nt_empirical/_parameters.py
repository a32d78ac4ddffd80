"""The parameters of a network: which of them count, and how much."""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Parametrised:
    """A network as a function of a list of arrays.

    Attributes:
      f: `f(weights, x, **kwargs)`.
      weights: the arrays.
      scales: of every array, what products of derivatives by its entries are multiplied by: an array that broadcasts
        to it; None for 1.
    """

    f: Callable[..., Any]
    weights: list[Any]
    scales: list[jax.Array | None]

    @classmethod
    def of(cls, f: Callable[..., Any], params: Any, scale: Any) -> "Parametrised":
        """Returns a network of a pytree of parameters; see `check_parameters` and `_scales` for errors."""
        check_parameters(params)
        weights, structure = jax.tree.flatten(params)
        return cls(lambda w, x, **kwargs: f(structure.unflatten(w), x, **kwargs), weights, _scales(scale, params))

    def at(self, weights: list[Any]) -> "Parametrised":
        """Returns the network with other arrays."""
        return dataclasses.replace(self, weights=weights)

    def scaled(self, direction: list[Any]) -> list[Any]:
        """Returns a direction in the space of the arrays, multiplied by their scales."""
        pairs = zip(direction, self.scales, strict=True)
        return [d if s is None else (d * _with_axes(s, d.ndim)).astype(d.dtype) for d, s in pairs]

    def only(self, chosen: Sequence[int]) -> "Parametrised":
        """Returns the network as a function of some of its arrays; the others are held fixed."""

        def f(some: list[Any], x: Any, **kwargs: Any) -> Any:
            weights = list(self.weights)
            for number, w in zip(chosen, some, strict=True):
                weights[number] = w
            return self.f(weights, x, **kwargs)

        return Parametrised(f, [self.weights[i] for i in chosen], [self.scales[i] for i in chosen])


def check_parameters(params: Any) -> None:
    """Raises a TypeError for parameters that are not real floating-point arrays."""
    for path, weights in jax.tree_util.tree_leaves_with_path(params):
        kind = getattr(weights, "dtype", type(weights))
        if not (kind is float or jnp.issubdtype(kind, jnp.floating)):
            raise TypeError(
                f"Parameters must be real floating-point arrays, got {kind} in params{jax.tree_util.keystr(path)}. "
                "Hold what is not trained fixed inside the function."
            )


def counted(scale: Any, params: Any) -> list[int]:
    """Returns the numbers of the arrays whose scale is not known to be 0: numbers of Python and arrays of NumPy are."""
    given = _spread(scale, params)
    known = (numbers.Number, np.ndarray, np.generic)
    return [i for i, s in enumerate(given) if not isinstance(s, known) or np.any(np.asarray(s))]


def _spread(scale: Any, params: Any) -> list[Any]:
    """Returns the scale of every array, None for 1; a ValueError if the scales are no prefix of the parameters."""
    if scale is None:
        return [None] * len(jax.tree.leaves(params))
    prefix, structure = jax.tree.flatten(scale)
    try:
        branches = structure.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            "`scale` must have the structure of the parameters, or of their first levels: got "
            f"{structure} for {jax.tree.structure(params)}."
        ) from error
    return [s for s, branch in zip(prefix, branches, strict=True) for _ in jax.tree.leaves(branch)]


def _scales(scale: Any, params: Any) -> list[jax.Array | None]:
    """Returns the scale of every array, in single precision at least.

    Raises:
      ValueError: scales are no prefix of the parameters, or one does not broadcast to an array.
      TypeError: one is not real.
    """
    scales: list[jax.Array | None] = []
    paths = jax.tree_util.tree_leaves_with_path(params)
    for s, (path, weights) in zip(_spread(scale, params), paths, strict=True):
        if s is None:
            scales.append(None)
            continue
        name, shape = f"params{jax.tree_util.keystr(path)}", jnp.shape(weights)
        if jnp.issubdtype(jnp.result_type(s), jnp.complexfloating):
            raise TypeError(f"`scale` must be real, got {jnp.result_type(s)} for {name}.")
        if not _broadcasts(jnp.shape(s), shape):
            raise ValueError(
                f"`scale` must broadcast to the parameters: for {name} of shape {shape} it has shape {jnp.shape(s)}."
            )
        scales.append(jnp.asarray(s, jnp.promote_types(jnp.result_type(weights), jnp.float32)))
    return scales


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def _with_axes(scale: jax.Array, ndim: int) -> jax.Array:
    return jnp.expand_dims(scale, range(ndim - scale.ndim))


def labelled(scale: jax.Array, shape: Sequence[int], labels: Sequence[int]) -> tuple[jax.Array, list[int]]:
    """Returns a scale of arrays of this shape without axes that it is broadcast along, and the labels of its axes."""
    first = len(shape) - scale.ndim
    kept = [axis for axis in range(scale.ndim) if scale.shape[axis] == shape[first + axis]]
    array = jnp.squeeze(scale, [axis for axis in range(scale.ndim) if axis not in kept])
    return array, [labels[first + axis] for axis in kept]
