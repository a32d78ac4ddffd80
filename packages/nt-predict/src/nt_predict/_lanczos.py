"""Functions of a symmetric matrix that is known by its products, by the Lanczos method."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

Map = Callable[[np.ndarray], np.ndarray]

# Passes between two projections: to look at one takes a decomposition for each start.
_YIELD_EVERY = 4


class Projection(NamedTuple):
    """A matrix A in Krylov spaces, one for each start.

    Attributes:
      norms: (columns,), of the starts.
      basis: (steps, n, columns), orthonormal for each column, beginning with the start.
      values: (columns, steps), eigenvalues of A projected to it.
      vectors: (columns, steps, steps), eigenvectors.
    """

    norms: np.ndarray
    basis: np.ndarray
    values: np.ndarray
    vectors: np.ndarray

    def quadratic_form(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Returns `b^T f(A) b` for the starts b, (columns,)."""
        return self.norms**2 * (self.vectors[:, 0] ** 2 * function(self.values)).sum(1)

    def product(self, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Returns `f(A) b` for the starts b, (n, columns)."""
        first = np.einsum("cki,ci,ci->kc", self.vectors, function(self.values), self.vectors[:, 0])
        return np.einsum("knc,kc->nc", self.basis, first * self.norms)


def lanczos(multiply: Map, starts: np.ndarray, steps: int) -> Iterator[Projection]:
    """Yields projections to larger and larger Krylov spaces, a few passes over the matrix each.

    Args:
      multiply: `v -> A v`.
      starts: (n, columns), none of them zero.
      steps: how many at most.
    """
    norms = np.linalg.norm(starts, axis=0)
    basis = (starts / norms)[None]
    diagonal, beside = np.zeros((0, len(norms))), np.zeros((0, len(norms)))
    last = min(steps, len(starts)) - 1
    for step in range(last + 1):
        image = multiply(basis[-1])
        diagonal = np.concatenate([diagonal, (basis[-1] * image).sum(0)[None]])
        # A space that A does not leave is complete; ones below it stand for nothing.
        diagonal[-1] = np.where((basis[-1] == 0).all(0), 1, diagonal[-1])
        if step % _YIELD_EVERY == _YIELD_EVERY - 1 or step == last:
            yield Projection(norms, basis, *_decomposed(diagonal, beside))
        lengths = np.linalg.norm(image, axis=0)
        for _ in range(2):  # once more, for what rounding left
            image = image - np.einsum("knc,kc->nc", basis, np.einsum("knc,nc->kc", basis, image))
        new = np.linalg.norm(image, axis=0)
        new = np.where(new > 1e-12 * lengths, new, 0)
        beside = np.concatenate([beside, new[None]])
        basis = np.concatenate([basis, (np.where(new > 0, image, 0) / np.where(new > 0, new, 1))[None]])


def _decomposed(diagonal: np.ndarray, beside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns eigenvalues and eigenvectors of tridiagonal matrices, (columns, steps) and (columns, steps, steps)."""
    at = np.arange(len(diagonal))
    matrices = np.zeros((diagonal.shape[1], len(at), len(at)))
    matrices[:, at, at] = diagonal.T
    matrices[:, at[1:], at[:-1]] = beside.T  # the lower triangle is what counts
    return np.linalg.eigh(matrices)
