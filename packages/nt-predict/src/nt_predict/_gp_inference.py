"""Exact Bayesian inference with given kernels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from nt_core import Kernel
from nt_core.get import Get, as_named

from nt_predict._factored import Factored
from nt_predict._flow import bayesian_covariance, ensemble_covariance, test_change
from nt_predict._gaussian import Gaussian, parse_get
from nt_predict._gram import Gram
from nt_predict._layout import Axes, OutputLayout, matrix_to_kernel

# The kernel that each prediction is made with.
_KERNEL_OF = {"nngp": "nngp", "ntk": "ntk", "ntkgp": "ntk"}


def gp_inference(
    k_train_train: Any,
    y_train: Any,
    diag_reg: float = 0.0,
    diag_reg_absolute_scale: bool = False,
    trace_axes: Axes = (-1,),
) -> Callable[..., Any]:
    r"""Gaussian process inference: what a network of infinite width predicts after infinitely long training.

    With :math:`K` the NNGP, :math:`\Theta` the NTK, :math:`d` the training and :math:`*` the test points:

    * ``'nngp'``: the Bayesian posterior, mean :math:`K_{*d} K_{dd}^{-1} y`, covariance
      :math:`K_{**} - K_{*d} K_{dd}^{-1} K_{d*}`. It is also what training only the last layer gives.
    * ``'ntk'``: an ensemble of networks trained by gradient descent from random initial parameters, mean
      :math:`T y`, covariance :math:`K_{**} + T K_{dd} T^\top - (T K_{d*} + h.c.)`, where
      :math:`T = \Theta_{*d} \Theta_{dd}^{-1}` (Lee et al., 2019, arXiv:1902.06720).
    * ``'ntkgp'``: a Gaussian process whose covariance is the NTK (He et al., 2020, arXiv:2007.05864), the formulas of
      ``'nngp'`` with :math:`\Theta` for :math:`K`.

    Args:
      k_train_train: train-train kernel: an array, or anything with attributes ``nngp`` and ``ntk``, such as a
        :class:`nt_core.Kernel`. An array serves for every ``get``. Of shape ``(n, n)`` for ``y_train`` of shape
        ``(n, c)``; in general a pair of axes for every axis of ``y_train`` that is not in ``trace_axes``.
      y_train: training labels.
      diag_reg: multiple of the identity to add to the kernel that is inverted, in units of the mean of its diagonal;
        the variance of the noise of the labels.
      diag_reg_absolute_scale: whether ``diag_reg`` is to be taken as it is, not in units of the mean of the diagonal.
      trace_axes: axes of ``y_train`` along which outputs are independent and have the same kernel.

    Returns:
      ``predict_fn(get=None, k_test_train=None, k_test_test=None)``. ``get`` is ``'nngp'``, ``'ntk'``, ``'ntkgp'`` or a
      tuple of these, None is ``('nngp', 'ntk')``. The kernels are like ``k_train_train``, for test points. Without
      ``k_test_test`` the result is the mean, with it a :class:`Gaussian`; a named tuple ``Gaussians`` of them
      unless ``get`` is a string. The mean has the axes of ``y_train``, the covariance those of ``k_test_test``.
      ``k_test_train=None`` predicts the training points: the labels, without variance (for any ``k_test_test``
      that is not None or False).

    Raises:
      ValueError: shapes do not fit; a kernel that is needed is missing; the train-train kernel has infinities or NaN;
        ``numpy.linalg.LinAlgError`` (a ``ValueError``), from ``predict_fn``, if it has an eigenvalue that is negative
        beyond rounding. If it is singular, predictions are by its pseudo-inverse, with one warning. Where neither can
        be told, since ``k_train_train`` is traced by ``jax.jit``, ``vmap`` or ``grad``, the inverse of a matrix that
        is not positive definite is its pseudo-inverse, where negative eigenvalues count as zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_predict import gp_inference
      >>> x_train, x_test = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0, 2.0]])
      >>> y_train = jnp.array([[1.0], [3.0]])
      >>> predict_fn = gp_inference(x_train @ x_train.T, y_train)
      >>> posterior = predict_fn('nngp', x_test @ x_train.T, x_test @ x_test.T)
      >>> print(posterior.mean, posterior.covariance.round(5))
      [[5.]] [[0.]]
    """
    layout = OutputLayout.of(y_train, trace_axes)
    grams: dict[str, Factored] = {}
    for kind in ("nngp", "ntk"):
        kernel = _kernel_or_none(k_train_train, kind)
        if kernel is k_train_train and grams:
            grams[kind] = grams["nngp"]  # one array for both: factored once
        elif kernel is not None:
            gram = Gram(kernel, None, kind, diag_reg, diag_reg_absolute_scale)
            grams[kind] = gram.factored(layout, _name("k_train_train", k_train_train, kind))

    def predict_fn(get: Get = None, k_test_train: Any = None, k_test_test: Any = None) -> Any:
        compute_covariance = k_test_test is not None and k_test_test is not False
        predictions = {}
        for name in parse_get(get, tuple(_KERNEL_OF)):
            if _KERNEL_OF[name] not in grams:
                raise _missing("k_train_train", _KERNEL_OF[name], name)
            if k_test_train is None:
                predictions[name] = predict_train(name, compute_covariance)
            else:
                predictions[name] = predict_test(name, k_test_train, k_test_test, compute_covariance)
        return as_named(get, "Gaussians", predictions)

    def predict_train(name: str, compute_covariance: bool) -> jax.Array | Gaussian:
        matrix = grams[_KERNEL_OF[name]].matrix
        mean = jnp.asarray(y_train, matrix.dtype)
        if not compute_covariance:
            return mean
        return Gaussian(mean, matrix_to_kernel(jnp.zeros_like(matrix), layout.train_positions, ()))

    def predict_test(name: str, k_test_train: Any, k_test_test: Any, compute_covariance: bool) -> jax.Array | Gaussian:
        gram = grams[_KERNEL_OF[name]]
        test_train, positions = test_train_matrix(k_test_train, _KERNEL_OF[name], name)
        y = layout.outputs_to_matrix(y_train, layout.train_positions, gram.matrix.dtype, "y_train")
        mean = layout.matrix_to_outputs(test_change(gram, None, test_train, y), positions, ())
        if not compute_covariance:
            return mean

        prior = "ntk" if name == "ntkgp" else "nngp"
        kernel = _kernel(k_test_test, "k_test_test", prior, name)
        kernel_name = _name("k_test_test", k_test_test, prior)
        test_test = layout.test_test(kernel, positions, gram.matrix.dtype, kernel_name)
        if name == "ntk":
            if not (hasattr(k_train_train, "nngp") and hasattr(k_test_train, "nngp") and "nngp" in grams):
                raise ValueError(
                    "The covariance of `'ntk'` needs the NNGP and the NTK, train-train and test-train: "
                    "`k_train_train` and `k_test_train` must have attributes `nngp` and `ntk`, e.g. "
                    "`kernel_fn(x_test, x_train)` or `kernel_fn(x_test, x_train, ('nngp', 'ntk'))`."
                )
            nngp_test_train, _ = test_train_matrix(k_test_train, "nngp", name)
            covariance = ensemble_covariance(gram, None, test_train, grams["nngp"].kernel, nngp_test_train, test_test)
        else:
            covariance = bayesian_covariance(gram, None, test_train, test_test)
        return Gaussian(mean, matrix_to_kernel(covariance, positions, ()))

    def test_train_matrix(k_test_train: Any, kind: str, name: str) -> tuple[jax.Array, tuple[int, ...]]:
        kernel = _kernel(k_test_train, "k_test_train", kind, name)
        return layout.test_train(kernel, grams[kind].matrix.dtype, _name("k_test_train", k_test_train, kind))

    return predict_fn


def _has_kinds(given: Any) -> bool:
    return hasattr(given, "nngp") or hasattr(given, "ntk")


def _kernel_or_none(given: Any, kind: str) -> Any:
    if isinstance(given, Kernel) and given.is_reversed:
        given = given.reverse()  # outputs have their axes in order, whatever order the kernel is stored in
    return getattr(given, kind, None) if _has_kinds(given) else given


def _kernel(given: Any, argument: str, kind: str, prediction: str) -> Any:
    kernel = _kernel_or_none(given, kind)
    if kernel is None:
        raise _missing(argument, kind, prediction)
    return kernel


def _missing(argument: str, kind: str, prediction: str) -> ValueError:
    return ValueError(f"`{argument}.{kind}` is None or missing, and the prediction `{prediction!r}` needs it.")


def _name(argument: str, given: Any, kind: str) -> str:
    return f"{argument}.{kind}" if _has_kinds(given) else argument
