"""Parameters that enter inside of a loop or a branch: their uses there, as uses outside."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from nt_empirical._factors import Factor, new_labels
from nt_empirical._uses import InEachRound, Step, Use


def outside_loop(outer: Use, inner: Use, values: Any, sliced: bool) -> Use | None:
    """Returns how a parameter changes values of the rounds of a loop; None if that is no einsum.

    Args:
      outer: of an input of the loop.
      inner: how that input changes the value in a round. Its factors are stacked: they have the rounds first.
      values: those of all rounds, stacked, or their shape.
      sliced: whether each round gets an entry of the first axis of the input, or all of them get it whole.
    """
    use = _moved(outer, [InEachRound(step) for step in inner.steps] if sliced else inner.steps)
    if use is None:
        return None
    rounds = use.axes[0] if sliced else new_labels(1)[0]
    stacked = tuple(dataclasses.replace(factor, labels=(rounds, *factor.labels)) for factor in inner.factors)
    # The use may be of the value reshaped, but not so its rounds.
    shape = (values.shape[0], *inner.shape)
    of_all = inner.replace(axes=(rounds, *inner.axes), shape=shape, factors=stacked)
    first = 1 if sliced else 0
    return _composed(use, use.axes[first:], use.shape[first:], of_all, values.dtype)


def outside_branch(outer: Use, inner: Use, value: Any) -> Use | None:
    """Returns how a parameter changes a value in a branch, as `outside_loop` does."""
    use = _moved(outer, inner.steps)
    return None if use is None else _composed(use, use.axes, use.shape, inner, value.dtype)


def _moved(use: Use, steps: Sequence[Step | InEachRound]) -> Use | None:
    return functools.reduce(lambda moved, step: None if moved is None else moved.moved(step), steps, use)


def _composed(outer: Use, entering: Sequence[int], sizes: Sequence[int], inner: Use, dtype: Any) -> Use:
    """Returns the use of a parameter, from its use by an array, with axes `entering`, and that of the array."""
    name = dict(zip(inner.weight_axes, entering, strict=True))
    factors = (*outer.factors, *(factor.named(name) for factor in inner.factors))
    axes = tuple(name.get(label, label) for label in inner.axes)
    known = {*outer.weight_axes, *axes, *(label for factor in factors for label in factor.all_labels)}
    repeated = math.prod(size for label, size in zip(entering, sizes, strict=True) if label not in known)
    if repeated != 1:  # the sum over an axis along which neither the parameter nor a factor differs
        factors = (*factors, Factor(jnp.full((), repeated, dtype), ()))
    return outer.replace(axes=axes, shape=inner.shape, factors=factors)
