"""Variances of one batch at every value of a program, before any pair of samples is looked at."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from nt_core.backends.xla.geometry import Window
from nt_core.spec import Spec
from nt_core.steps import Conv, Linear, Pool, window_pads


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What pairs need to know of each batch alone.

    Attributes:
      variance: for the values that need it, `(*space, n)`.
      self_deficit: for pools in deficit form, the pooled deficit of each window with itself, `(*space, n)`.
      repeated: for repeated blocks, the variances at the values of their body, `(count, *space, n)`.
    """

    variance: dict[int, Array]
    self_deficit: dict[int, Array] = dataclasses.field(default_factory=dict)
    repeated: dict[int, dict[int, Array]] = dataclasses.field(default_factory=dict)


jax.tree_util.register_dataclass(Statistics, data_fields=["variance", "self_deficit", "repeated"], meta_fields=[])


def windows(step: Linear | Pool, spec: Spec) -> list[Window]:
    """Returns the windows of a step along each spatial axis of its input."""
    if not isinstance(step, Conv | Pool):
        return []
    dilation = step.dilation if isinstance(step, Conv) else (1,) * len(step.window)
    pads = window_pads(spec.space, step.window, step.strides, step.padding, dilation)
    return [
        Window(
            size=n,
            count=(n + low + high - (w - 1) * d - 1) // s + 1,
            taps=w,
            stride=s,
            dilation=d,
            low=low,
            high=high,
            circular=step.padding == "CIRCULAR",
        )
        for n, w, s, d, (low, high) in zip(spec.space, step.window, step.strides, dilation, pads, strict=True)
    ]


def window_counts(pool: Pool, spec: Spec) -> Array:
    """Number of positions inside every window of a pool, `(*space,)`."""
    along = windows(pool, spec)
    counts = jnp.ones((1,) * len(along), int)
    for axis, window in enumerate(along):
        counts = counts * window.counts().reshape([-1 if i == axis else 1 for i in range(len(along))])
    return counts


def pool_sum(pool: Pool, spec: Spec, x: Array) -> Array:
    """Sums `(*space, *batch)` over the windows of a pool."""
    for axis, window in enumerate(windows(pool, spec)):
        x = window.sum(x, axis)
    return x
