"""The mean and covariance of an ensemble of networks in the course of gradient descent."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from nt_core.get import Get, as_named
from nt_core.tracing import evaluate_now

from nt_predict._factored import Factored
from nt_predict._flow import (
    bayesian_covariance,
    ensemble_covariance,
    flow_times,
    test_change,
    train_change,
    train_covariance,
)
from nt_predict._gaussian import Gaussian, parse_get
from nt_predict._gram import Gram
from nt_predict._keywords import test_test_keywords, test_train_keywords
from nt_predict._layout import Axes, OutputLayout, matrix_to_kernel


def gradient_descent_mse_ensemble(
    kernel_fn: Callable[..., Any],
    x_train: Any,
    y_train: Any,
    learning_rate: float = 1.0,
    diag_reg: float = 0.0,
    diag_reg_absolute_scale: bool = False,
    trace_axes: Axes = (-1,),
    **kernel_fn_train_train_kwargs: Any,
) -> Callable[..., Any]:
    r"""Mean and covariance of an infinite ensemble of infinitely wide networks, trained for any time.

    Every member starts at random parameters and follows continuous-time gradient descent on
    :math:`\frac{1}{2n} \sum (f - y)^2`, the mean over all :math:`n` entries of the outputs (Lee et al., 2019,
    arXiv:1902.06720). With :math:`K` the NNGP, :math:`\Theta` the kernel of the flow, :math:`d` the training and
    :math:`*` the test points, :math:`\tau = \eta t / n` and
    :math:`A = \Theta_{*d} \Theta_{dd}^{-1} (1 - e^{-\Theta_{dd} \tau})`:

    * ``'ntk'``: all parameters are trained, :math:`\Theta` is the NTK; mean :math:`A y`, covariance
      :math:`K_{**} + A K_{dd} A^\top - (A K_{d*} + h.c.)`; of training points
      :math:`e^{-\Theta_{dd} \tau} K_{dd} e^{-\Theta_{dd} \tau}`.
    * ``'nngp'``: the last layer is trained, :math:`\Theta = K`; the same formulas. At infinite time this is the
      Bayesian posterior.

    Args:
      kernel_fn: ``kernel_fn(x1, x2, get, **kwargs)``, of an infinite network (``stax``), estimated by Monte Carlo, or
        empirical. ``x2=None`` stands for ``x1``; ``get`` is ``'nngp'``, ``'ntk'`` (returns an array) or
        ``('nngp', 'ntk')`` (returns an object with these attributes).
      x_train: training inputs.
      y_train: training labels.
      learning_rate: step size; a step is one unit of ``t``.
      diag_reg: multiple of the identity to add to the train-train kernel that is inverted, in units of the mean of its
        diagonal. In ``'nngp'`` it is the variance of the noise of the labels.
      diag_reg_absolute_scale: whether ``diag_reg`` is to be taken as it is, not in units of the mean of the diagonal.
      trace_axes: axes of ``y_train`` along which outputs are independent and have the same kernel.
      **kernel_fn_train_train_kwargs: keywords of ``kernel_fn`` for the training points.

    Returns:
      ``predict_fn(t=None, x_test=None, get=None, compute_cov=False, **kernel_fn_test_test_kwargs)``. ``t`` is a number
      or array of any shape, at least 0; ``None`` or ``jnp.inf`` is infinity. ``x_test=None`` predicts the training
      points. ``get`` is ``'nngp'``, ``'ntk'`` or a tuple of these, None is both. The result is the mean, with
      ``compute_cov`` a :class:`Gaussian`; a named tuple ``Gaussians`` of them unless ``get`` is a string. Mean and
      covariance have the axes of ``t`` in front. Each train-train kernel is computed and factored once, the others in
      every call.

      Keywords of ``predict_fn`` are for the test points; those not given are as for the training points. The
      test-train kernel gets ``(test value, training value)`` for arrays that differ, of pairs of arrays the
      first part each. Anything else must be the same for both, or be given for the test points only.

      Training points at ``t=None`` get their labels, without variance, whatever the regularisation. Eigenvalues that
      are zero to rounding belong to directions that are not learned; at ``t=None`` the inverse of the train-train
      kernel is then its pseudo-inverse, and one warning says so.

    Raises:
      ValueError: shapes or keywords do not fit; negative times; the kernel has infinities or NaN;
        ``numpy.linalg.LinAlgError`` (a ``ValueError``), from ``predict_fn`` with ``t=None`` for test points, if the
        train-train kernel has an eigenvalue that is negative beyond rounding. Where it is traced by ``jax.jit``,
        ``vmap`` or ``grad``, so that its values cannot be looked at, the pseudo-inverse takes the place of the inverse,
        as for ``t=jnp.inf``.
      NotImplementedError: ``get`` contains ``'ntkgp'``, which is no ensemble of networks; see :func:`gp_inference`.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_predict import gradient_descent_mse_ensemble
      >>> def kernel_fn(x1, x2, get):
      ...     return x1 @ (x1 if x2 is None else x2).T  # a linear model: NNGP and NTK are the same
      >>> x_train, y_train = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0], [3.0]])
      >>> predict_fn = gradient_descent_mse_ensemble(kernel_fn, x_train, y_train)
      >>> mean, covariance = predict_fn(jnp.array([0.0, 10.0]), jnp.array([[1.0, 2.0]]), 'nngp', compute_cov=True)
      >>> print(mean.shape, covariance.shape, covariance.ravel().round(3))
      (2, 1, 1) (2, 1, 1) [5.   0.03]
    """
    layout = OutputLayout.of(y_train, trace_axes)
    train_keywords = kernel_fn_train_train_kwargs
    known: dict[str, Factored] = {}

    def train_grams(kinds: Sequence[str]) -> dict[str, Factored]:
        missing = [kind for kind in kinds if kind not in known]
        with evaluate_now():
            kernels = _kernels(kernel_fn, x_train, None, missing, train_keywords)
            grams = {
                kind: Gram(k, None, kind, diag_reg, diag_reg_absolute_scale).factored(layout, f"k_train_train.{kind}")
                for kind, k in kernels.items()
            }
        known.update({kind: gram for kind, gram in grams.items() if not gram.is_traced})
        return {**known, **grams}

    def predict_fn(
        t: Any = None,
        x_test: Any = None,
        get: Get = None,
        compute_cov: bool = False,
        **kernel_fn_test_test_kwargs: Any,
    ) -> Any:
        names = parse_get(get, ("nngp", "ntk", "ntkgp"))
        if "ntkgp" in names:
            raise NotImplementedError(
                "`'ntkgp'` is not the distribution of an ensemble of networks; `gp_inference` predicts with it."
            )
        # The outputs start with the covariance of the NNGP, whatever it is that is trained.
        kinds = [kind for kind in ("nngp", "ntk") if kind in names or (kind == "nngp" and compute_cov)]
        grams = train_grams(kinds)
        dtype = grams[kinds[0]].matrix.dtype
        times, leading = flow_times(t, learning_rate, layout.size, dtype)
        y = layout.outputs_to_matrix(y_train, layout.train_positions, dtype, "y_train")

        if x_test is None:
            points = _TrainPoints(grams, times, y, layout.train_positions)
        else:
            keywords = test_train_keywords(train_keywords, kernel_fn_test_test_kwargs)
            test_train, positions, test_test = {}, (), None
            for kind, value in _kernels(kernel_fn, x_test, x_train, kinds, keywords).items():
                test_train[kind], positions = layout.test_train(value, dtype, f"k_test_train.{kind}")
            if compute_cov:
                keywords = test_test_keywords(train_keywords, kernel_fn_test_test_kwargs)
                kernel = kernel_fn(x_test, None, "nngp", **keywords)
                test_test = layout.test_test(kernel, positions, dtype, "k_test_test.nngp")
            points = _TestPoints(grams, times, y, positions, test_train, test_test)

        means = {name: layout.matrix_to_outputs(points.mean(name), points.positions, leading) for name in names}
        if not compute_cov:
            return as_named(get, "Gaussians", means)
        covariances = {name: matrix_to_kernel(points.covariance(name), points.positions, leading) for name in names}
        return as_named(get, "Gaussians", {name: Gaussian(means[name], covariances[name]) for name in names})

    return predict_fn


class _TrainPoints(NamedTuple):
    """The training points at some times; `positions` are the sizes of the axes that a kernel has for them."""

    grams: dict[str, Factored]
    times: jax.Array | None
    y: jax.Array
    positions: tuple[int, ...]

    def mean(self, name: str) -> jax.Array:
        return self.y[None] if self.times is None else train_change(self.grams[name], self.times, self.y)

    def covariance(self, name: str) -> jax.Array:
        # With regularisation, what the NNGP predicts at the training points are the outputs with noise.
        initial = self.grams["nngp"].matrix if name == "nngp" else self.grams["nngp"].kernel
        return train_covariance(self.grams[name], self.times, initial)


class _TestPoints(NamedTuple):
    """Test points at some times, with the kernels that their distribution depends on."""

    grams: dict[str, Factored]
    times: jax.Array | None
    y: jax.Array
    positions: tuple[int, ...]
    test_train: dict[str, jax.Array]
    nngp_test_test: jax.Array | None  # None if no covariance is asked for

    def mean(self, name: str) -> jax.Array:
        return test_change(self.grams[name], self.times, self.test_train[name], self.y)

    def covariance(self, name: str) -> jax.Array:
        assert self.nngp_test_test is not None
        gram, nngp_test_train = self.grams[name], self.test_train["nngp"]
        if name == "nngp":
            return bayesian_covariance(gram, self.times, nngp_test_train, self.nngp_test_test)
        nngp_train_train = self.grams["nngp"].kernel
        return ensemble_covariance(
            gram, self.times, self.test_train["ntk"], nngp_train_train, nngp_test_train, self.nngp_test_test
        )


def _kernels(kernel_fn: Callable[..., Any], x1: Any, x2: Any, kinds: Sequence[str], keywords: Any) -> dict[str, Any]:
    """Returns the kernels of both inputs, of the kinds asked for and computed together."""
    if not kinds:
        return {}
    if len(kinds) == 1:
        return {kinds[0]: kernel_fn(x1, x2, kinds[0], **keywords)}
    kernels = kernel_fn(x1, x2, tuple(kinds), **keywords)
    if not all(hasattr(kernels, kind) for kind in kinds):
        raise TypeError(
            f"`kernel_fn` was called with `get={tuple(kinds)}` and must return an object with these attributes, but "
            f"returned a {type(kernels).__name__}."
        )
    return {kind: getattr(kernels, kind) for kind in kinds}
