"""The outputs of a network in the course of gradient descent on the mean squared error."""

from collections.abc import Callable
from typing import Any

from nt_predict._flow import flow_times, test_change, train_change
from nt_predict._gram import Gram
from nt_predict._layout import Axes, OutputLayout


def gradient_descent_mse(
    k_train_train: Any,
    y_train: Any,
    learning_rate: float = 1.0,
    diag_reg: float = 0.0,
    diag_reg_absolute_scale: bool = False,
    trace_axes: Axes = (-1,),
) -> Callable[..., Any]:
    r"""Outputs of an infinitely wide, or a linearised, network under gradient descent on the mean squared error.

    Continuous-time gradient descent on the loss :math:`\frac{1}{2n} \sum (f - y)^2`, the mean over all :math:`n`
    entries of the outputs, keeps the tangent kernel :math:`\Theta` fixed and has the solution (Lee et al., 2019,
    arXiv:1902.06720)

    .. math::
      f_t = f_0 + (1 - e^{-\Theta_{dd} \tau}) (y - f_0), \quad
      f^*_t = f^*_0 + \Theta_{*d} \Theta_{dd}^{-1} (1 - e^{-\Theta_{dd} \tau}) (y - f_0), \quad
      \tau = \eta t / n.

    Args:
      k_train_train: train-train kernel of shape ``(n, n)`` for ``y_train`` of shape ``(n, c)``; in general a pair of
        axes for every axis of ``y_train`` that is not in ``trace_axes``. The NTK (empirical or of infinite width), or
        the NNGP if only the last layer is trained.
      y_train: training labels.
      learning_rate: step size; a step is one unit of ``t``.
      diag_reg: multiple of the identity to add to the train-train kernel, in units of the mean of its diagonal.
      diag_reg_absolute_scale: whether ``diag_reg`` is to be taken as it is, not in units of the mean of the diagonal.
      trace_axes: axes of ``y_train`` along which outputs are independent and have the same kernel.

    Returns:
      ``predict_fn(t=None, fx_train_0=0., fx_test_0=None, k_test_train=None)``. ``t`` is a number or array of any shape,
      at least 0; ``None`` or ``jnp.inf`` is infinity. ``fx_train_0`` and ``fx_test_0`` are the outputs before
      training, broadcast to all points; None leaves out the prediction. The result is ``fx_train``, ``fx_test`` or
      the tuple of both, with the axes of ``t`` in front. ``k_test_train`` is needed for test points.

      Training points at ``t=None`` get their labels. Eigenvalues that are zero to rounding belong to directions that
      are not learned; at ``t=None`` the inverse of the kernel is then its pseudo-inverse, and one warning says so.

    Raises:
      ValueError: shapes do not fit; nothing to predict, or no kernel to do it with; negative times; the kernel has
        infinities or NaN; ``numpy.linalg.LinAlgError`` (a ``ValueError``), from ``predict_fn`` with ``t=None`` for test
        points, if it has an eigenvalue that is negative beyond rounding. Where the kernel is traced by ``jax.jit``,
        ``vmap`` or ``grad``, so that its values cannot be looked at, the pseudo-inverse takes the place of the inverse,
        as for ``t=jnp.inf``.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_predict import gradient_descent_mse
      >>> predict_fn = gradient_descent_mse(jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0], [3.0]]))
      >>> fx_train, fx_test = predict_fn(jnp.array([0.0, 4.0]), 0.0, 0.0, k_test_train=jnp.array([[1.0, 1.0]]))
      >>> print(fx_train.shape, fx_test.round(3).ravel())
      (2, 2, 1) [0.    3.085]
    """
    layout = OutputLayout.of(y_train, trace_axes)
    gram = Gram(k_train_train, None, "ntk", diag_reg, diag_reg_absolute_scale).factored(layout)
    dtype = gram.matrix.dtype

    def predict_fn(t: Any = None, fx_train_0: Any = 0.0, fx_test_0: Any = None, k_test_train: Any = None) -> Any:
        if fx_train_0 is None and fx_test_0 is None:
            raise ValueError("Both `fx_train_0` and `fx_test_0` are None: there is nothing to predict.")
        if fx_test_0 is not None and k_test_train is None:
            raise ValueError("`fx_test_0` asks for predictions at test points, which need `k_test_train`.")

        times, leading = flow_times(t, learning_rate, layout.size, dtype)
        y = layout.outputs_to_matrix(y_train, layout.train_positions, dtype, "y_train")
        f_0 = 0.0 if fx_train_0 is None else fx_train_0
        f_0 = layout.outputs_to_matrix(f_0, layout.train_positions, dtype, "fx_train_0")
        predictions = []
        if fx_train_0 is not None:
            fx = y[None] if times is None else f_0[None] + train_change(gram, times, y - f_0)
            predictions.append(layout.matrix_to_outputs(fx, layout.train_positions, leading))
        if fx_test_0 is not None:
            test_train, positions = layout.test_train(k_test_train, dtype, "k_test_train")
            fx_0 = layout.outputs_to_matrix(fx_test_0, positions, dtype, "fx_test_0")
            fx = fx_0[None] + test_change(gram, times, test_train, y - f_0)
            predictions.append(layout.matrix_to_outputs(fx, positions, leading))
        return tuple(predictions) if len(predictions) > 1 else predictions[0]

    return predict_fn
