"""A train-train kernel matrix, factored at most once, and what happens if it is singular or indefinite."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import cho_solve, solve_triangular
from nt_core.tracing import evaluate_now, is_traced

from nt_predict._spectral import (
    DECAY,
    FALL,
    GAIN,
    SpectralFunction,
    Spectrum,
    apply_matrix,
    apply_spectrum,
    decompose,
    decompose_known,
    einsum,
    few_times,
)

# A pivot of the Cholesky factor this far below its diagonal entry holds nothing but rounding errors; for a training
# point that occurs twice it is 0 to 2.5 ulp (sizes 4 to 1500, both precisions).
_NULL_PIVOT_ULPS = 4.0
# Larger matrices are factored in parts: the LAPACK that comes with SciPy 1.17, which JAX uses on CPU, dies of a
# segmentation fault in double precision from some size between 15500 and 17000 on, unless it has a single thread:
# `scipy.linalg.cholesky(2 * np.eye(17000) + 0.5)`.
_LARGEST = 15000
# Of no more times than this, none is left out.
_FEW = 8


class Factored:
    """The kernel of the training points as a symmetric matrix, positive semi-definite but for rounding.

    Matrices whose values are known are factored on first use, and only once, also if that is inside `jax.jit`. Traced
    matrices are factored where they are used, so that nothing outlives the trace that it belongs to.

    Attributes:
      kernel: (n, n), as given.
      matrix: with regularisation added; what the methods mean by A.
      is_traced: whether the values of the matrix are unknown.

    Args:
      kernel: (n, n), symmetric.
      diag_reg: multiple of the identity to add.
      diag_reg_absolute_scale: whether that multiple is meant as it is, or in units of the mean of the diagonal.
    """

    def __init__(self, kernel: jax.Array, diag_reg: Any, diag_reg_absolute_scale: bool):
        self.kernel = kernel
        self._spectrum: Spectrum | None = None
        self._cholesky: jax.Array | None = None
        self._has_warned = False
        self._singular: Spectrum | None = None  # in the place of `_cholesky`, without what is zero up to rounding
        with evaluate_now():
            scale = 1 if diag_reg_absolute_scale else jnp.trace(kernel) / len(kernel)
            shift = jnp.asarray(diag_reg * scale, kernel.dtype)
            self.matrix = kernel + shift * jnp.eye(len(kernel), dtype=kernel.dtype)
            self.is_traced = is_traced(self.matrix)
            if not self.is_traced and not jnp.isfinite(self.matrix).all():
                raise ValueError("The train-train kernel, or `diag_reg`, is infinite or not a number somewhere.")

    def decay(self, times: jax.Array, rhs: jax.Array) -> jax.Array:
        """Returns `exp(-A t) @ rhs`, shape (times, n, columns)."""
        return self._apply(DECAY, times, rhs)

    def fall(self, times: jax.Array, rhs: jax.Array) -> jax.Array:
        """Returns `(exp(-A t) - 1) @ rhs`, shape (times, n, columns)."""
        return self._apply(FALL, times, rhs)

    def gain(self, times: jax.Array | None, rhs: jax.Array) -> jax.Array:
        """Returns `A^-1 (1 - exp(-A t)) @ rhs`, shape (times, n, columns); times None is infinity.

        There the solution is by Cholesky, or by the pseudo-inverse if A is singular.
        """
        return self.solve(rhs)[None] if times is None else self._apply(GAIN, times, rhs)

    def few_times(self, times: jax.Array | None) -> tuple[jax.Array | None, Callable[[jax.Array], jax.Array]]:
        """Returns times that are enough to know, and how gains at all times follow from those, along the first axis.

        They are all of them where the matrix or the times are traced.
        """
        if times is None or len(times) <= _FEW or self.is_traced or is_traced(times):
            return times, lambda gains: gains
        with evaluate_now():
            few, weights = few_times(self.spectrum(), times)
        return few, lambda gains: einsum("tf,f...->t...", weights, gains)

    def solve(self, rhs: jax.Array) -> jax.Array:
        """Returns `A^-1 @ rhs`, shape (n, columns), by Cholesky, or by the pseudo-inverse if A is singular."""
        if self.is_traced:
            return _solve_traced(self.matrix, rhs)
        self._factorise()
        if self._singular is not None:
            self._warn_if_singular()
            return apply_spectrum(GAIN, self._singular, jnp.full(1, jnp.inf, rhs.dtype), rhs)[0]
        assert self._cholesky is not None
        return cho_solve((self._cholesky, True), rhs)

    def log_determinant(self) -> jax.Array:
        """Returns the logarithm of the determinant of A. Raises `LinAlgError` if that is known to be zero."""
        return 2 * jnp.log(jnp.diagonal(self._regular_factor())).sum()

    def inverse(self) -> jax.Array:
        """Returns `A^-1`, shape (n, n). Raises `LinAlgError` if A is known to be singular."""
        identity = jnp.eye(len(self.matrix), dtype=self.matrix.dtype)
        return cho_solve((self._regular_factor(), True), identity)

    def spectrum(self) -> Spectrum:
        """Returns the eigendecomposition of A."""
        if self.is_traced:
            return decompose(self.matrix)
        if self._spectrum is None:
            with evaluate_now():
                self._spectrum = decompose_known(self.matrix)
                self._warn_if_indefinite(self._spectrum.values)
        return self._spectrum

    def _apply(self, function: SpectralFunction, times: jax.Array, rhs: jax.Array) -> jax.Array:
        if self.is_traced:
            return apply_matrix(function, self.matrix, times, rhs)
        return apply_spectrum(function, self.spectrum(), times, rhs)

    def _factorise(self) -> None:
        if self._cholesky is None and self._singular is None:
            with evaluate_now():
                factor = _cholesky(self.matrix)
                if _is_positive_definite(factor, self.matrix):
                    self._cholesky = factor
                else:
                    self._singular = self._spectrum_of_singular()

    def _regular_factor(self) -> jax.Array:
        if self.is_traced:
            return _cholesky(self.matrix)
        self._factorise()
        if self._cholesky is None:
            raise np.linalg.LinAlgError(
                f"{self._described_as_singular()} Labels have no density there, and a point that is left out no "
                f"prediction of its own.{self._regular_with()}"
            )
        return self._cholesky

    def _spectrum_of_singular(self) -> Spectrum:
        """Returns the spectrum. Raises `LinAlgError` if an eigenvalue is negative beyond rounding."""
        spectrum = decompose_known(self.matrix)
        values, dtype = spectrum.values, self.matrix.dtype
        smallest, largest = float(values[0]), float(values[-1])
        if smallest < -_rounding_of_kernels(dtype) * abs(largest):
            message = (
                f"The train-train kernel of dimension {len(values)} is not positive semi-definite in {dtype}: "
                f"its smallest eigenvalue is {smallest:.3g}, the largest {largest:.3g}."
            )
            advice = ""
            if missing := self._missing(smallest, largest):
                in_double = "" if dtype == jnp.float64 else ", or compute the kernel in float64"
                advice = f" Increase `diag_reg`, by about {missing} of the mean of the diagonal{in_double}."
            raise np.linalg.LinAlgError(message + advice)
        # Eigenvalues as small as the most negative one are rounding errors as well.
        return spectrum._replace(noise=jnp.maximum(spectrum.noise, jnp.abs(values[0]) / spectrum.scale))

    def _warn_if_singular(self) -> None:
        """Says once that solutions are by the pseudo-inverse."""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._described_as_singular()} Predictions at infinite time are by its pseudo-inverse, which is the "
                f"limit of gradient descent.{self._regular_with()}",
                stacklevel=3,
            )

    def _described_as_singular(self) -> str:
        assert self._singular is not None
        values, _, scale, noise = self._singular
        rank = int(jnp.sum(values > noise * scale))
        return (
            f"The train-train kernel of dimension {len(values)} has rank {rank} in {values.dtype}: its smallest "
            f"eigenvalue is {float(values[0]):.3g}, the largest {float(values[-1]):.3g}."
        )

    def _regular_with(self) -> str:
        assert self._singular is not None
        missing = self._missing(float(self._singular.values[0]), float(self._singular.values[-1]))
        return f" `diag_reg={missing}` would make it regular." if missing else ""

    def _missing(self, smallest: float, largest: float) -> str | None:
        """What `diag_reg` would have to be larger by, in units of the mean of the diagonal; None if that is no unit."""
        mean = float(jnp.trace(self.matrix)) / len(self.matrix)
        if mean <= 0:
            return None
        missing = max(-smallest, 0) + 10 * float(jnp.finfo(self.matrix.dtype).eps) * largest
        return f"{10.0 ** math.ceil(math.log10(missing / mean)):.0e}"

    def _warn_if_indefinite(self, eigenvalues: jax.Array) -> None:
        smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
        if smallest < -_rounding_of_kernels(eigenvalues.dtype) * abs(largest):
            warnings.warn(
                f"The train-train kernel has the eigenvalue {smallest:.3g} (the largest is {largest:.3g}), so that it "
                "is no covariance. Directions of negative eigenvalues are treated as if they were not learned.",
                stacklevel=2,
            )


def _rounding_of_kernels(dtype: Any) -> float:
    """How large rounding errors of kernels may be, relative to the largest eigenvalue: half of the digits."""
    return float(jnp.finfo(dtype).eps) ** 0.5


def _cholesky(matrix: jax.Array) -> jax.Array:
    if len(matrix) <= _LARGEST:
        return jnp.linalg.cholesky(matrix, symmetrize_input=False)
    half = len(matrix) // 2
    first = _cholesky(matrix[:half, :half])
    below = solve_triangular(first, matrix[half:, :half].T, lower=True).T
    rest = _cholesky(matrix[half:, half:] - jnp.matmul(below, below.T, precision=lax.Precision.HIGHEST))
    return jnp.block([[first, jnp.zeros((half, len(matrix) - half), matrix.dtype)], [below, rest]])


def _is_positive_definite(factor: jax.Array, matrix: jax.Array) -> jax.Array:
    pivots = jnp.diagonal(factor) ** 2
    # Not a number, which is what a failed factorisation holds, compares False.
    return (pivots > _NULL_PIVOT_ULPS * jnp.finfo(matrix.dtype).eps * jnp.diagonal(matrix)).all()


def _solve_traced(matrix: jax.Array, rhs: jax.Array) -> jax.Array:
    """Solves by Cholesky or, where that fails and nobody can be told, by the pseudo-inverse."""
    constant = lax.stop_gradient(matrix)
    factor = _cholesky(constant)
    positive_definite = _is_positive_definite(factor, constant)
    infinity = jnp.full(1, jnp.inf, matrix.dtype)

    def solve(_, columns):
        return lax.cond(
            positive_definite,
            lambda columns: cho_solve((factor, True), columns),
            lambda columns: apply_matrix(GAIN, constant, infinity, columns)[0],
            columns,
        )

    def multiply(columns):
        return jnp.matmul(matrix, columns, precision=lax.Precision.HIGHEST)

    return lax.custom_linear_solve(multiply, rhs, solve, symmetric=True)
