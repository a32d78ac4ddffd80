"""Regularisation, chosen on a grid."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nt_predict._factored import Factored
from nt_predict._gram import Gram
from nt_predict._layout import Axes, OutputLayout
from nt_predict._spectral import Spectrum, einsum
from nt_predict._validation import generalised_cross_validation, leave_one_out, log_density

_DIAG_REGS = tuple(10.0 ** np.arange(-8, 1.5, 0.5))


class RegularisationPath(NamedTuple):
    """How well a kernel suits labels, with different regularisation.

    Attributes:
      diag_reg: (k,), as it was given.
      log_evidence: (k,), of the labels; minus infinity where the matrix is singular.
      leave_one_out: (k,), the logarithm of the density of labels when left out, summed; likewise.
      generalised_cross_validation: (k,), the mean squared error expected at new points; then infinite.
    """

    diag_reg: jax.Array
    log_evidence: jax.Array
    leave_one_out: jax.Array
    generalised_cross_validation: jax.Array

    def best(self, criterion: str = "log_evidence") -> jax.Array:
        """Returns the regularisation that is best by one of the three criteria, by its name."""
        values = getattr(self, criterion)
        best = jnp.argmin(values) if criterion == "generalised_cross_validation" else jnp.argmax(values)
        return self.diag_reg[best]


def regularisation_path(
    gram: Gram, y_train: Any, diag_regs: Any = _DIAG_REGS, trace_axes: Axes = (-1,)
) -> RegularisationPath:
    """Evidence and cross-validation for a grid of regularisations, from one eigendecomposition.

    Args:
      gram: the kernel; the grid takes the place of its regularisation, in the same units.
      y_train: training labels, as for :func:`fit`.
      diag_regs: (k,), the grid.
      trace_axes: as for :func:`fit`.

    Returns:
      A :class:`RegularisationPath`; ``.best()`` is the regularisation of the largest evidence.

    Raises:
      ValueError: as for :func:`fit`.

    Example:
      >>> import jax.numpy as jnp
      >>> from nt_predict import Gram, regularisation_path
      >>> x = jnp.arange(4.0)[:, None]
      >>> path = regularisation_path(Gram(x @ x.T + 1), 2 * x + jnp.array([[1.0], [-1.0], [-1.0], [1.0]]))
      >>> print(path.best() > 0)
      True
    """
    layout = OutputLayout.of(y_train, trace_axes)
    kernel = gram.factored(layout).kernel
    unregularised = Factored(kernel, 0.0, diag_reg_absolute_scale=True)
    y = layout.labels_to_matrix(y_train, kernel.dtype)
    diag_regs = jnp.asarray(diag_regs, kernel.dtype)
    scale = 1.0 if gram.diag_reg_absolute_scale else jnp.trace(kernel) / len(kernel)
    return RegularisationPath(diag_regs, *_criteria(layout.n_points, unregularised.spectrum(), y, diag_regs * scale))


@partial(jax.jit, static_argnums=0)
def _criteria(n_points: int, spectrum: Spectrum, y: jax.Array, shifts: jax.Array) -> tuple[jax.Array, ...]:
    components = einsum("ij,ic->jc", spectrum.vectors, y)
    vectors = spectrum.vectors.reshape(n_points, -1, len(y))

    def at(shift: jax.Array) -> tuple[jax.Array, ...]:
        values = spectrum.values + shift
        regular = values.min() > spectrum.noise * spectrum.scale
        rates = 1 / jnp.where(regular, values, 1)
        weights = einsum("ij,jc->ic", spectrum.vectors, rates[:, None] * components)
        blocks = einsum("ipj,j,iqj->ipq", vectors, rates, vectors)
        points = (n_points, -1, y.shape[1])
        left_out = leave_one_out(y.reshape(points), weights.reshape(points), blocks)
        return (
            jnp.where(regular, log_density(y, weights, -jnp.log(rates).sum()), -jnp.inf),
            jnp.where(regular, left_out.log_density.sum(), -jnp.inf),
            jnp.where(regular, generalised_cross_validation(weights, rates.sum()), jnp.inf),
        )

    return jax.lax.map(at, shifts)
