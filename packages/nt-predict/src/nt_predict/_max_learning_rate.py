"""The largest learning rate at which gradient descent converges."""

from typing import Any

import jax
import jax.numpy as jnp
from nt_core.layouts import make_2d
from nt_core.tracing import is_traced

from nt_predict._layout import as_array, symmetric


def max_learning_rate(
    ntk_train_train: Any, y_train_size: int | None = None, momentum: float = 0.0, eps: float = 1e-12
) -> jax.Array:
    r"""Largest learning rate at which discrete gradient descent on the mean squared error does not diverge.

    That is :math:`2 (1 + m) n / \lambda_{max}` for the loss :math:`\frac{1}{2n} \sum (f - y)^2` over all :math:`n`
    entries of the outputs, and :math:`m` the momentum (0: plain gradient descent).

    Args:
      ntk_train_train: train-train NTK, of shape ``(n, n)``, or with a pair of axes for every axis of the outputs.
      y_train_size: number of entries of the outputs, ``y_train.size``; None is the dimension of the kernel.
      momentum: coefficient of the momentum, in [0, 1).
      eps: added to the largest eigenvalue.

    Returns:
      The learning rate, a scalar.

    Raises:
      ValueError: the kernel is not square, or has infinities or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_predict import max_learning_rate
      >>> print(max_learning_rate(jnp.array([[4.0, 0.0], [0.0, 1.0]]), y_train_size=2))
      1.0
    """
    kernel = as_array(ntk_train_train, "ntk_train_train")
    if kernel.shape[::2] != kernel.shape[1::2]:
        raise ValueError(f"`ntk_train_train` must have pairs of axes of the same size, but has shape {kernel.shape}.")
    if not is_traced(kernel) and not jnp.isfinite(kernel).all():
        raise ValueError("`ntk_train_train` has entries that are infinite or not a number.")
    matrix = make_2d(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)))
    size = len(matrix) if y_train_size is None else y_train_size
    return 2 * (1 + momentum) * size / (jnp.linalg.eigvalsh(symmetric(matrix))[-1] + eps)
