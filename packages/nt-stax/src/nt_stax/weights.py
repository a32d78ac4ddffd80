"""Weights and biases: what dense layers and convolutions share."""

import math
from collections.abc import Sequence
from typing import Any

from jax import Array, random

_PARAMETERIZATIONS = ("ntk", "standard")


class Weights:
    """Weights and biases in either parameterization."""

    def __init__(
        self, layer: str, out_dim: int, W_std: Any, b_std: Any, parameterization: str, s: tuple[int, int]
    ) -> None:
        self._parameterization = parameterization.lower()
        if self._parameterization not in _PARAMETERIZATIONS:
            raise ValueError(f"{layer}: parameterization={parameterization!r} is unknown, use 'ntk' or 'standard'.")
        self._s = (s[0], s[1])
        self._W_std, self._b_std = W_std, b_std
        self.n_out = out_dim if self._parameterization == "ntk" else s[1] * out_dim

    def init(self, rng: Array, W_shape: Sequence[int], b_shape: Sequence[int], fan_in: int) -> tuple:
        """Returns random `(W, b)`."""
        W_rng, b_rng = random.split(rng)
        W_scale, b_scale = 1.0, 1.0
        if self._parameterization == "standard":
            W_scale, b_scale = self._W_std / (fan_in / self._s[0]) ** 0.5, self._b_std
        W = normal(W_rng, W_shape) * W_scale
        return W, None if self._b_std is None else normal(b_rng, b_shape) * b_scale

    def scaled(self, product: Array, b: Array | None, fan_in: int) -> Array:
        """Returns the outputs, given the product of weights and inputs."""
        if self._parameterization == "ntk":
            outputs = product * (self._W_std / fan_in**0.5)
            return outputs if b is None else outputs + b * self._b_std
        outputs = product * (1 / self._s[0] ** 0.5)
        return outputs if b is None else outputs + b

    @property
    def fields(self) -> dict[str, Any]:
        """What the step of any layer with weights has."""
        return {
            "w_var": self._W_std**2,
            "b_var": None if self._b_std is None else self._b_std**2,
            "out_dim": self.n_out,
            "parameterization": self._parameterization,
            "s": self._s,
        }


def normal(rng: Array, shape: Sequence[int]) -> Array:
    """Returns `random.normal(rng, shape)`, which XLA compiles several times faster along one axis."""
    return random.normal(rng, (math.prod(shape),)).reshape(shape)


def n_channels_of(layer: str, input_shape: Sequence[int], channel_axis: int) -> int:
    """Returns the size of the channel axis. Raises `ValueError` if there is no such axis, or its size is unknown."""
    if not -len(input_shape) <= channel_axis < len(input_shape):
        raise ValueError(f"{layer}: inputs of shape {tuple(input_shape)} have no channel axis {channel_axis}.")
    n_channels = input_shape[channel_axis]
    if n_channels < 0:
        raise ValueError(
            f"{layer} needs the size of the channel axis {channel_axis} to make its weights, got input_shape="
            f"{tuple(input_shape)} (-1 stands for an unknown size)."
        )
    return n_channels
