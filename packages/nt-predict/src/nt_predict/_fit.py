"""Conditioning a Gaussian process on labels."""

import math
from typing import Any, Protocol

from nt_predict._cholesky import Cholesky
from nt_predict._gram import Gram
from nt_predict._layout import Axes, OutputLayout
from nt_predict._memory import fits_in_memory
from nt_predict._pcg import PCG
from nt_predict._posterior import Fit


class Solver(Protocol):
    """How to solve linear systems with the matrix of a Gaussian process."""

    def condition(self, gram: Gram, y_train: Any, layout: OutputLayout) -> Fit:
        """Returns the Gaussian process, given the labels."""
        ...


def fit(gram: Gram, y_train: Any, solver: Solver | None = None, trace_axes: Axes = (-1,)) -> Fit:
    r"""Conditions a Gaussian process on labels: predictions, and how well its kernel suits the labels.

    Args:
      gram: the kernel of the training points, with the noise of the labels.
      y_train: training labels, of shape ``(n, c)`` for a kernel of shape ``(n, n)``; in general an axis for every pair
        of axes of the kernel, and the trace axes.
      solver: :class:`Cholesky`, or :class:`PCG` for matrices that are too large to factor. None chooses: the former
        where it fits in memory.
      trace_axes: axes of ``y_train`` along which outputs are independent and have the same kernel.

    Returns:
      A :class:`Fit`. With :class:`Cholesky`, all of it is differentiable with respect to anything that the kernel, the
      regularisation or the labels depend on (Rasmussen and Williams, 2006, chapter 5).

    Raises:
      ValueError: shapes do not fit; labels, kernel or ``diag_reg`` are infinite or not a number;
        ``numpy.linalg.LinAlgError`` (a ``ValueError``), from the methods of the result, if the matrix has an eigenvalue
        that is negative beyond rounding. If it is singular, predictions are by its pseudo-inverse, with one warning,
        and evidence and cross-validation are an error. Where neither can be told, since the kernel is traced by
        ``jax.jit``, ``vmap`` or ``grad``, they are NaN.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nt_predict import Gram, fit
      >>> x, y = jnp.linspace(0, 1, 5)[:, None], jnp.array([[0.0], [0.7], [1.0], [0.7], [0.0]])
      >>> def log_evidence(scale):
      ...     def kernel_fn(x1, x2, get):
      ...         return jnp.exp(-(((x1 - (x1 if x2 is None else x2).T) / scale) ** 2))
      ...     return fit(Gram(kernel_fn, x, diag_reg=1e-2), y).log_evidence().value
      >>> value, slope = jax.value_and_grad(log_evidence)(0.3)
      >>> print(value.round(1), slope.round(1))
      -4.6 8.5
    """
    layout = OutputLayout.of(y_train, trace_axes)
    return (solver or _choose(layout)).condition(gram, y_train, layout)


def _choose(layout: OutputLayout) -> Solver:
    # The kernel, with regularisation, and its factor; and as much again while the latter is made.
    return Cholesky() if fits_in_memory(math.prod(layout.train_positions), copies=3) else PCG()
