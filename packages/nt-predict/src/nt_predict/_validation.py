"""What the inverse of the matrix of a Gaussian process says of points that were left out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nt_predict._spectral import einsum


class LeftOut(NamedTuple):
    """Predictions of points, each by all others, in matrices.

    Attributes:
      mean: (points, outputs, columns).
      variance: (points, outputs), noise of the labels included.
      log_density: (points,), of the labels.
    """

    mean: jax.Array
    variance: jax.Array
    log_density: jax.Array


def leave_one_out(y: jax.Array, weights: jax.Array, inverse_blocks: jax.Array) -> LeftOut:
    """Returns predictions of points, each by all others.

    Args:
      y: (points, outputs, columns), the labels.
      weights: of that shape, the inverse times the labels.
      inverse_blocks: (points, outputs, outputs), the inverse between the outputs of one point.
    """
    factors = jnp.linalg.cholesky(inverse_blocks)
    covariances = jax.vmap(
        lambda factor: jax.scipy.linalg.cho_solve((factor, True), jnp.eye(len(factor), dtype=factor.dtype))
    )(factors)
    errors = einsum("ipq,iqc->ipc", covariances, weights)
    log_determinants = 2 * jnp.log(jnp.diagonal(factors, axis1=1, axis2=2)).sum(1)
    outputs, columns = y.shape[1:]
    log_density = -(
        (errors * weights).sum((1, 2)) - columns * log_determinants + columns * outputs * jnp.log(2 * jnp.pi)
    )
    return LeftOut(y - errors, jnp.diagonal(covariances, axis1=1, axis2=2), log_density / 2)


def generalised_cross_validation(weights: jax.Array, trace_of_inverse: jax.Array) -> jax.Array:
    """Returns the generalised cross-validation error, of weights (n, columns), the inverse times the labels."""
    return len(weights) * (weights**2).sum(0).mean() / trace_of_inverse**2


def log_density(y: jax.Array, weights: jax.Array, log_determinant: jax.Array) -> jax.Array:
    """Returns the logarithm of the Gaussian density of labels (n, columns), the columns independent."""
    return -((y * weights).sum() + y.shape[1] * log_determinant + y.size * jnp.log(2 * jnp.pi)) / 2
