"""Gated linear units: half of the channels times a nonlinearity of the other half."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from nt_core import Builder, Rule, Value, layer, rules_of, steps, supports_masking
from nt_core.authoring import NoStep, emit_all

from nt_stax.elementwise import Gelu
from nt_stax.smooth import Sigmoid, Silu
from nt_stax.weights import n_channels_of

_NO_NONLINEARITY = "GLU has kernels for an `activation` that is a nonlinearity."


@layer
@supports_masking(remask_kernel=True)
def GLU(activation: tuple[Any, Any, Any] | None = None, channel_axis: int = -1):
    """Gated linear unit, `f(x, y) = x activation(y)`, with `x` the first half of the channels and `y` the second.

    Both halves are independent and have the covariance `K` and the tangent kernel `T` of all channels, hence

        K' = K S(K)
        T' = T S(K) + K dS(K) T

    with `S(K)` the covariance after the activation, `E activation(u) activation(v)`, and `dS(K)` that of its
    derivatives (arXiv:1612.08083, arXiv:2002.05202). The result is not Gaussian: a Dense or Conv layer has to follow
    before another nonlinearity.

    Args:
      activation: a nonlinearity, as `Silu()`; None for `Sigmoid()`.
      channel_axis: channel axis of the inputs.

    Raises:
      TypeError: `activation` is no layer.
      ValueError: an odd number of channels; an `activation` with parameters; the kernel of inputs that are not
        Gaussian.

    >>> from nt_stax import Dense, GLU, Relu, serial
    >>> init_fn, apply_fn, kernel_fn = serial(Dense(1024), GLU(Relu()))
    >>> print(kernel_fn(jnp.ones((1, 3)), None, ("nngp", "ntk")))
    AnalyticKernel(nngp=Array([[0.5]], dtype=float32), ntk=Array([[1.]], dtype=float32))
    """
    activation = Sigmoid() if activation is None else activation
    if not (isinstance(activation, tuple) and len(activation) == 3 and all(map(callable, activation))):
        raise TypeError(
            f"GLU takes a nonlinearity, a layer like Silu(), as `activation`, got {activation!r}. Of a function `fn` "
            "that is Elementwise(fn)."
        )
    init_activation, apply_activation, kernel_fn = activation
    rules = rules_of(kernel_fn)

    def init_fn(rng, input_shape):
        n_in = n_channels_of("GLU", input_shape, channel_axis)
        output_shape = list(input_shape)
        output_shape[channel_axis] = _half(n_in)
        if jax.tree.leaves(init_activation(rng, tuple(output_shape))[1]):
            raise ValueError("GLU takes a nonlinearity as `activation`, got a layer that has parameters.")
        return tuple(output_shape), ()

    def apply_fn(params, inputs, **kwargs):
        linear, gate = _halves(inputs, channel_axis)
        return linear * apply_activation((), gate)

    def mask_fn(mask, input_shape):
        if mask.shape[channel_axis] == 1:
            return mask
        return jnp.logical_or(*_halves(mask, channel_axis))

    def emit(builder: Builder, value: Value) -> Value:
        half = builder.add(steps.TakeChannels(_half(value.spec.n_channels)), value)
        try:
            gate = emit_all(rules, builder, half)
        except NoStep:
            raise NotImplementedError(_NO_NONLINEARITY) from None
        node = builder.node(gate.number)
        if node is None or not isinstance(node.step, steps.Dual | steps.TakeChannels):  # the latter of Identity()
            raise NotImplementedError(_NO_NONLINEARITY)
        return builder.add(steps.Multiply(), half, gate)

    return init_fn, apply_fn, Rule("GLU", {"channel_axis": channel_axis}, emit=emit), mask_fn


def SwiGLU(channel_axis: int = -1):
    """`GLU` with `Silu`, as in the feed-forward layers of many language models (arXiv:2002.05202).

    >>> from nt_stax import SwiGLU
    >>> _, apply_fn, _ = SwiGLU()
    >>> print(apply_fn((), jnp.array([[2.0, 1.0]])).round(4))  # 2 / (1 + exp(-1))
    [[1.4621]]
    """
    return GLU(Silu(), channel_axis)


def GEGLU(channel_axis: int = -1):
    """`GLU` with `Gelu` (arXiv:2002.05202).

    >>> from nt_stax import GEGLU
    >>> _, apply_fn, _ = GEGLU()
    >>> print(apply_fn((), jnp.array([[2.0, 1.0]])).round(4))
    [[1.6827]]
    """
    return GLU(Gelu(), channel_axis)


def _half(n_channels: int) -> int:
    if n_channels % 2:
        raise ValueError(f"GLU parts the channels in two halves, got inputs with {n_channels} channels: an odd number.")
    return n_channels // 2


def _halves(x: Array, axis: int) -> tuple[Array, Array]:
    half = _half(x.shape[axis])
    first, second = jnp.split(x, [half], axis)
    return first, second
