"""A Gaussian process, given labels, however its matrix is solved with."""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nt_predict._gram import Gram, TestPoints
from nt_predict._layout import OutputLayout, matrix_to_kernel, symmetric
from nt_predict._spectral import einsum


class Estimate(NamedTuple):
    """A number, and how far off it is if it was estimated.

    Attributes:
      value: ().
      standard_error: (), 0 for what is exact but for rounding.
    """

    value: jax.Array
    standard_error: jax.Array


class LeaveOneOut(NamedTuple):
    """What would be predicted for each training point by all others.

    Attributes:
      mean: as `y_train`.
      variance: of a label, noise included: as `y_train` without the trace axes, along which it is the same.
      log_density: (n,), of the labels of each training point, all its outputs together. Their sum is the
        leave-one-out score (Sundararajan and Keerthi, 2001; Rasmussen and Williams, 2006, section 5.4.2).
    """

    mean: jax.Array
    variance: jax.Array
    log_density: jax.Array


class Stats(NamedTuple):
    """How a matrix was solved with.

    Attributes:
      solver: its name.
      status: `'exact'`; of an iteration `'converged'`, `'stagnated'` (rounding errors allow no better) or
        `'out of passes'`.
      passes: how often all of the kernel was gone through.
      residuals: (columns,), of an iteration the true relative residuals of the labels.
      rank: of an iteration, that of its preconditioner.
      kept: of an iteration, where the kernel was between passes: `'in memory'`, `'on disk'`, or `'nowhere'` where it
        was computed, or read from where it was given, in every pass.
    """

    solver: str
    status: str
    passes: int = 0
    residuals: np.ndarray | None = None
    rank: int = 0
    kept: str = ""


class Fit(abc.ABC):
    """A Gaussian process with the kernel of a :class:`Gram`, given labels; made by :func:`fit`.

    With :math:`A = K_{dd} + s I` for training points :math:`d`, and :math:`*` the test points, the mean is
    :math:`K_{*d} A^{-1} y`, the covariance :math:`K_{**} - K_{*d} A^{-1} K_{d*}`: for the NNGP the posterior of a
    Bayesian network, for the NTK the mean of an ensemble trained by gradient descent (whose covariance is another, see
    :func:`gp_inference`).

    ``test`` are test inputs if the kernel is a function, and otherwise the test-train kernel, to which a covariance
    needs ``k_test_test``.
    """

    def __init__(self, gram: Gram, layout: OutputLayout, y: jax.Array):
        self._gram = gram
        self._layout = layout
        self._y = y

    @property
    @abc.abstractmethod
    def stats(self) -> Stats:
        """How it was solved."""

    @property
    @abc.abstractmethod
    def _weights(self) -> Any:
        """`A^-1 y`, (n, columns)."""

    @abc.abstractmethod
    def _solve(self, rhs: jax.Array) -> jax.Array:
        """Returns `A^-1 @ rhs`."""

    @abc.abstractmethod
    def log_evidence(self) -> Estimate:
        r"""Returns the logarithm of the density of the labels: :math:`-\frac12 (y^\top A^{-1} y + \log |2 \pi A|)`.

        It is summed over trace axes, along which outputs are independent.

        Raises:
          LinAlgError: (a `ValueError`) A is singular: there is no density. NaN where A is traced.
        """

    @abc.abstractmethod
    def leave_one_out(self) -> LeaveOneOut:
        """Returns what would be predicted for each training point by all others.

        A point is an entry of the first axis of the labels, with all its outputs.

        Raises:
          LinAlgError: (a `ValueError`) A is singular: the formulas need its inverse. NaN where A is traced.
        """

    @abc.abstractmethod
    def generalised_cross_validation(self) -> jax.Array:
        r"""Returns the mean squared error that is to be expected at new points, a scalar.

        With :math:`H` the matrix that predicts the training points from :math:`y`, and :math:`n` its dimension,
        :math:`n |y - H y|^2 / (n - tr H)^2`, the mean over trace axes (Golub, Heath and Wahba, 1979).
        """

    def mean(self, test: Any) -> jax.Array:
        """Returns the mean at test points, with the axes of the labels."""
        change, positions = self._at_test_points(self._gram.test_points(test), self._weights)
        return self._layout.matrix_to_outputs(change, positions, ())

    def covariance(self, test: Any, k_test_test: Any = None) -> jax.Array:
        """Returns the covariance of test points, without the noise of labels, with the axes of a kernel."""
        matrix, positions = self._covariance_matrix(self._gram.test_points(test, k_test_test))
        return matrix_to_kernel(matrix, positions, ())

    def sample(self, key: jax.Array, test: Any, n: int, k_test_test: Any = None) -> jax.Array:
        """Returns `n` draws of the outputs at test points, without the noise of labels, along a new first axis.

        Args:
          key: a key of `jax.random`.
          test: see above.
          n: how many.
          k_test_test: see above.
        """
        points = self._gram.test_points(test, k_test_test)
        covariance, positions = self._covariance_matrix(points)
        values, vectors = jnp.linalg.eigh(covariance)
        normal = jax.random.normal(key, (n, len(values), self._y.shape[1]), covariance.dtype)
        # Posterior covariances are singular wherever a point is all but known: no Cholesky factor.
        scaled = jnp.sqrt(jnp.maximum(values, 0))[None, :, None] * normal
        deviations = self._layout.matrix_to_outputs(einsum("ij,sjc->sic", vectors, scaled), positions, (n,))
        return self.mean(test)[None] + deviations

    def _at_test_points(self, points: TestPoints, weights: Any) -> tuple[jax.Array, tuple[int, ...]]:
        """Returns the kernel of test and training points times weights, (q, columns), and the axes of the former."""
        parts, positions = [], ()
        for rows in points.blocks(len(self._y)):
            cross, positions = self._cross(points, rows)
            parts.append(self._times(cross, weights))
        return jnp.concatenate(parts), (points.n, *positions[1:])

    def _times(self, cross: jax.Array, weights: Any) -> jax.Array:
        return einsum("qn,nc->qc", cross, weights)

    def _covariance_matrix(self, points: TestPoints) -> tuple[jax.Array, tuple[int, ...]]:
        blocks, of_all, positions = points.blocks(len(self._y)), [], ()
        for columns in blocks:
            cross, positions = self._cross(points, columns)
            solution = self._solve(cross.T)
            of_columns = []
            for rows in blocks:
                across, of_rows = self._cross(points, rows) if rows != columns else (cross, positions)
                prior = points.prior(rows, columns)
                prior = self._layout.test_test(prior, of_rows, self._y.dtype, "k_test_test", positions)
                of_columns.append(prior - einsum("qn,nr->qr", across, solution))
            of_all.append(jnp.concatenate(of_columns))
        return symmetric(jnp.concatenate(of_all, axis=1)), (points.n, *positions[1:])

    def _cross(self, points: TestPoints, rows: slice) -> tuple[jax.Array, tuple[int, ...]]:
        return self._layout.test_train(points.cross(rows), self._y.dtype, "k_test_train")
