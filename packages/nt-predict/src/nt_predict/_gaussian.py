"""Predictions, and the choice of which to make."""

import collections
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax

Get = str | Sequence[str] | None


class Gaussian(NamedTuple):
    """A Gaussian distribution of outputs.

    Attributes:
      mean: as the outputs, with the axes of the times in front.
      covariance: as a kernel of the outputs (a pair of axes for each axis of the outputs that is not a trace axis,
        along which the covariance is the same), with the axes of the times in front.
    """

    mean: jax.Array
    covariance: jax.Array


def parse_get(get: Get, allowed: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the kernels to predict with, in lower case; None stands for NNGP and NTK."""
    if get is None:
        return ("nngp", "ntk")
    given = (get,) if isinstance(get, str) else tuple(get)
    names = tuple(name.lower() for name in given)
    if not names:
        raise ValueError("`get` must be non-empty.")
    if len(set(names)) < len(names):
        raise ValueError(f"All entries of `get` must be unique, got {given}.")
    for name in names:
        if name not in allowed:
            raise ValueError(f"`get` must be one of {tuple(allowed)} or a tuple of these, got {name!r}.")
    return names


def package(get: Get, predictions: dict):
    """Returns the prediction that the string `get` names, or a named tuple of all of them."""
    if isinstance(get, str):
        return predictions[get.lower()]
    return _gaussians(tuple(predictions))(*predictions.values())


@functools.cache  # two results of the same fields have the same type, and so the same pytree structure
def _gaussians(names: tuple[str, ...]):
    return collections.namedtuple("Gaussians", names)
