"""Predictions, and the choice of which to make."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import nt_core.get
from nt_core.get import Get


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
    """Returns the names of the predictions to make; None stands for NNGP and NTK."""
    try:
        return nt_core.get.parse_get(get, allowed)
    except KeyError as error:  # no field of anything: a value that does not exist
        raise ValueError(error.args[0]) from None
