"""Conditioning on labels by a Cholesky factorisation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from nt_core.tracing import evaluate_now, is_traced

from nt_predict._gram import Gram
from nt_predict._layout import OutputLayout
from nt_predict._posterior import Estimate, Fit, LeaveOneOut, Stats
from nt_predict._validation import generalised_cross_validation, leave_one_out, log_density


@dataclasses.dataclass(frozen=True)
class Cholesky:
    """Solver of :func:`fit` that factors the matrix: exact, differentiable, and works under `jax.jit`.

    It takes the memory of a few matrices, and a time cubic in their dimension.
    """

    def condition(self, gram: Gram, y_train: Any, layout: OutputLayout) -> Fit:
        """Returns the Gaussian process, given the labels."""
        return CholeskyFit(gram, y_train, layout)


class CholeskyFit(Fit):
    """A Gaussian process, given labels, by the factor of its matrix."""

    def __init__(self, gram: Gram, y_train: Any, layout: OutputLayout):
        self._factored = gram.factored(layout)
        super().__init__(gram, layout, layout.labels_to_matrix(y_train, self._factored.matrix.dtype))
        self._known_weights: jax.Array | None = None

    @property
    def stats(self) -> Stats:
        """How it was solved."""
        return Stats("Cholesky", "exact")

    @property
    def _weights(self) -> jax.Array:
        if self._known_weights is not None:
            return self._known_weights
        with evaluate_now():
            weights = self._solve(self._y)
        if not is_traced(weights):
            self._known_weights = weights
        return weights

    def _solve(self, rhs: jax.Array) -> jax.Array:
        return self._factored.solve(rhs)

    def log_evidence(self) -> Estimate:
        """See `Fit`."""
        log_determinant = self._factored.log_determinant()  # which refuses singular matrices, before there are weights
        value = log_density(self._y, self._weights, log_determinant)
        return Estimate(value, jnp.zeros_like(value))

    def leave_one_out(self) -> LeaveOneOut:
        """See `Fit`."""
        n_points, inverse = self._layout.n_points, self._factored.inverse()
        y, weights = (part.reshape(n_points, -1, part.shape[1]) for part in (self._y, self._weights))
        blocks = jnp.einsum("ipiq->ipq", inverse.reshape(y.shape[:2] * 2))
        left_out = leave_one_out(y, weights, blocks)
        return LeaveOneOut(
            self._layout.matrix_to_outputs(left_out.mean.reshape(self._y.shape), self._layout.train_positions, ()),
            left_out.variance.reshape(self._layout.train_positions),
            left_out.log_density,
        )

    def generalised_cross_validation(self) -> jax.Array:
        """See `Fit`."""
        trace = jnp.trace(self._factored.inverse())
        return generalised_cross_validation(self._weights, trace)
