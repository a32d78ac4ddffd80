"""Conditioning on labels by conjugate gradients, for matrices that are too large to factor."""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from nt_core.tracing import is_traced

from nt_predict._conjugate_gradients import conjugate_gradients
from nt_predict._gram import Gram
from nt_predict._lanczos import lanczos
from nt_predict._layout import OutputLayout
from nt_predict._posterior import Estimate, Fit, LeaveOneOut, Stats
from nt_predict._preconditioner import Preconditioner, randomly_pivoted_cholesky
from nt_predict._tiles import Tiles

# Lanczos' method ends when a few more passes change an estimate by less than this share of its standard error, or
# samples by less than this share of themselves.
_CHANGE = 1e-2


@dataclasses.dataclass(frozen=True)
class PCG:
    """Solver of :func:`fit` that multiplies with the matrix tile by tile, for any number of points.

    Preconditioned conjugate gradients, where all right-hand sides share each pass over the kernel. The preconditioner
    is a randomly pivoted Cholesky factor (arXiv:2304.12465, 2410.03969). They end when the true relative residual of
    every column is below `rtol`; if it cannot be reached, with a warning that says what is. Numbers are added in double
    precision, whatever the kernel is in. A loop in Python, not differentiable, and not for `jax.jit`.

    Attributes:
      rank: of the preconditioner; None is a tenth of the dimension, and at most 1000.
      rtol: the relative residual to reach.
      max_passes: the most passes over the kernel for a system.
      seed: of the preconditioner, and of estimates of the evidence.
      probes: vectors from which the evidence is estimated.
      hold: whether the kernel of a function is kept in memory between passes, half a matrix. None chooses: in memory if
        that fits, else in a temporary file if it is read from there sooner than it is computed again, else nowhere.
      progress: whether to show a bar during passes that take longer than a second.
    """

    rank: int | None = None
    rtol: float = 1e-6
    max_passes: int = 200
    seed: int = 0
    probes: int = 10
    hold: bool | None = None
    progress: bool = True

    def condition(self, gram: Gram, y_train: Any, layout: OutputLayout) -> Fit:
        """Returns the Gaussian process, given the labels."""
        leaves = jax.tree.leaves((gram.x_train, gram.diag_reg, y_train, None if callable(gram.kernel) else gram.kernel))
        if any(map(is_traced, leaves)):
            raise TypeError(
                "`PCG` is a loop in Python over tiles of known numbers, and cannot be traced by `jax.jit`, `vmap` or "
                "`grad`: use `Cholesky()` there."
            )
        return PCGFit(self, gram, y_train, layout)


class PCGFit(Fit):
    """A Gaussian process, given labels, by products with its matrix."""

    def __init__(self, solver: PCG, gram: Gram, y_train: Any, layout: OutputLayout):
        self._solver = solver
        self._tiles = gram.tiles(layout, solver.hold, solver.progress)
        super().__init__(
            gram, layout, layout.labels_to_matrix(y_train, jnp.promote_types(self._tiles.dtype, "float32"))
        )
        mean = 1 if gram.diag_reg_absolute_scale else self._tiles.diagonal().mean()
        self._shift = float(gram.diag_reg) * float(mean)
        factor = self._low_rank(self._tiles)
        self._preconditioner = Preconditioner(factor, self._positive_shift(factor))
        self._double_weights, self._residuals, self._status = self._iterate(np.asarray(self._y, np.float64), "labels")

    @property
    def stats(self) -> Stats:
        """How it was solved."""
        tiles, rank = self._tiles, self._preconditioner.rank
        return Stats("PCG", self._status, tiles.passes, self._residuals, rank, tiles.kept)

    @property
    def _weights(self) -> np.ndarray:
        return self._double_weights

    def _solve(self, rhs: jax.Array) -> jax.Array:
        return jnp.asarray(self._iterate(np.asarray(rhs, np.float64), "test points")[0], self._y.dtype)

    def log_evidence(self) -> Estimate:
        """See `Fit`; by stochastic Lanczos quadrature (Ubaru, Chen and Saad, 2017), with its standard error."""
        log_determinant, error = self._log_determinant()
        y, (n, columns) = np.asarray(self._y, np.float64), self._y.shape
        value = -((y * self._double_weights).sum() + columns * (log_determinant + n * np.log(2 * np.pi))) / 2
        return Estimate(*(jnp.asarray(number, self._y.dtype) for number in (value, columns * error / 2)))

    def leave_one_out(self) -> LeaveOneOut:
        """Raises `NotImplementedError`."""
        raise _needs_inverse("Leave-one-out predictions need")

    def generalised_cross_validation(self) -> jax.Array:
        """Raises `NotImplementedError`."""
        raise _needs_inverse("Generalised cross-validation needs")

    def sample(self, key: jax.Array, test: Any, n: int, k_test_test: Any = None) -> jax.Array:
        """See `Fit`; by Matheron's rule (Wilson et al., 2020, arXiv:2002.09309).

        Draws from the prior at training and test points are corrected by what labels say that training points lack. The
        low-rank part of the prior's kernel is drawn from by its factor, what is left by Lanczos' method.
        """
        layout, (dimension, columns) = self._layout, self._y.shape
        joint, joint_layout = self._gram.joined(layout, test, k_test_test)
        tiles = joint.tiles(joint_layout, self._solver.hold, self._solver.progress)
        keys = jax.random.split(key)
        prior = _draws(tiles, self._low_rank(tiles), self._solver.max_passes, keys[0], n * columns)
        noise = max(self._shift, 0) ** 0.5 * np.asarray(
            jax.random.normal(keys[1], (dimension, n * columns)), np.float64
        )
        labels = np.tile(np.asarray(self._y, np.float64), n)
        weights, _, _ = self._iterate(labels - prior[:dimension] - noise, "samples")
        corrections, positions = self._at_test_points(self._gram.test_points(test), weights)
        draws = jnp.asarray(prior[dimension:], self._y.dtype) + corrections
        draws = draws.reshape(-1, n, columns).swapaxes(0, 1)
        return layout.matrix_to_outputs(draws, positions, (n,))

    def _times(self, cross: jax.Array, weights: Any) -> jax.Array:
        # Weights are large and of either sign: their sums lose the digits of single precision.
        with jax.enable_x64(True):
            product = jnp.matmul(cross.astype(jnp.float64), jnp.asarray(weights, jnp.float64))
        return product.astype(self._y.dtype)

    def _low_rank(self, tiles: Tiles) -> np.ndarray:
        rank = min(1000, -(-tiles.dimension // 10)) if self._solver.rank is None else self._solver.rank
        random = np.random.default_rng(self._solver.seed)
        return randomly_pivoted_cholesky(tiles, min(rank, tiles.dimension), random)

    def _positive_shift(self, factor: np.ndarray) -> float:
        """Returns what the preconditioner adds: the regularisation, or, without, what its factor misses on average."""
        diagonal = self._tiles.diagonal()
        noise = float(np.finfo(self._tiles.dtype).eps) * abs(diagonal).max()
        return max(self._shift, noise if self._shift > 0 else (diagonal - (factor**2).sum(1)).mean(), noise) or 1.0

    def _multiply(self, vectors: np.ndarray) -> np.ndarray:
        return self._tiles.multiply(vectors, self._shift)

    def _iterate(self, rhs: np.ndarray, of: str) -> tuple[np.ndarray, np.ndarray, str]:
        precondition = functools.partial(self._preconditioner.power, -1.0)
        solution = conjugate_gradients(self._multiply, precondition, rhs, self._solver.rtol, self._solver.max_passes)
        if solution.status != "converged":
            warnings.warn(
                f"Conjugate gradients for the {of} reached a relative residual of {solution.residuals.max():.1g} only, "
                f"not `rtol={self._solver.rtol:g}` ({solution.status}, {self._tiles.passes} passes so far). Increase "
                "`diag_reg`, the `rank` of the preconditioner, or `max_passes`.",
                stacklevel=5,
            )
        return solution

    def _log_determinant(self) -> tuple[float, float]:
        """Returns an estimate of `log |A|`, and its standard error.

        It is the preconditioner's, plus the trace of the logarithm of what that leaves, averaged over random signs.
        """
        root = functools.partial(self._preconditioner.power, -0.5)
        random = np.random.default_rng(self._solver.seed)
        signs = random.choice([-1.0, 1.0], (self._tiles.dimension, self._solver.probes))
        mean, error = np.inf, np.inf
        for projection in lanczos(lambda v: root(self._multiply(root(v))), signs, self._solver.max_passes):
            if projection.values.min() <= 0:
                raise np.linalg.LinAlgError("The train-train kernel is singular or indefinite. Increase `diag_reg`.")
            traces, previous = projection.quadratic_form(np.log), mean
            mean, error = traces.mean(), traces.std(ddof=1) / len(traces) ** 0.5
            if abs(mean - previous) <= _CHANGE * error:
                break
        return self._preconditioner.log_determinant + mean, error


def _draws(tiles: Tiles, factor: np.ndarray, max_passes: int, key: jax.Array, n: int) -> np.ndarray:
    """Returns draws of a Gaussian process, (dimension, n), for a factor of a part of its kernel."""
    keys = jax.random.split(key)
    of_factor, of_rest = (
        np.asarray(jax.random.normal(k, (size, n)), np.float64)
        for k, size in zip(keys, factor.shape[::-1], strict=True)
    )
    rest = np.inf
    for projection in lanczos(lambda v: tiles.multiply(v) - factor @ (factor.T @ v), of_rest, max_passes):
        previous, rest = rest, projection.product(lambda values: np.sqrt(np.maximum(values, 0)))
        if np.linalg.norm(rest - previous) <= _CHANGE * np.linalg.norm(rest):
            break
    return factor @ of_factor + rest


def _needs_inverse(what: str) -> NotImplementedError:
    return NotImplementedError(f"{what} the inverse of the matrix: use `Cholesky()`.")
