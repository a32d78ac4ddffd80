"""A low-rank approximation of a kernel, and what it makes of systems with the kernel: easy ones.

Randomly pivoted Cholesky chooses rows in proportion to what is still missing of the diagonal (Chen, Epperly, Tropp and
Webber, 2022, arXiv:2207.06503, and Diaz et al., 2023, arXiv:2304.12465, for preconditioning); in blocks, of which
rejection keeps what one row after another would have chosen (Epperly, Tropp and Webber, 2024, arXiv:2410.03969).
"""

import numpy as np

from nt_predict._tiles import Tiles

# Rows that are proposed at a time.
_BLOCK = 128


def randomly_pivoted_cholesky(tiles: Tiles, rank: int, random: np.random.Generator) -> np.ndarray:
    """Returns F, (n, rank or fewer columns), with `F F^T` near the kernel and not larger.

    Fewer if they leave nothing but rounding errors.
    """
    remaining = tiles.diagonal()
    floor = np.finfo(tiles.dtype).eps * remaining.max()
    block = min(_BLOCK, rank, tiles.dimension)
    factor = np.zeros((tiles.dimension, rank))
    done = 0
    while done < rank and (total := remaining.sum()) > floor * tiles.dimension:
        proposed = random.choice(tiles.dimension, block, p=remaining / total)
        missing = tiles.between(proposed) - factor[proposed, :done] @ factor[proposed, :done].T
        kept = _kept(missing, floor, random)[: rank - done]
        if not kept:
            break
        rows = proposed[kept]
        columns = tiles.columns(rows, block) - factor[:, :done] @ factor[rows, :done].T
        root = np.linalg.cholesky(missing[np.ix_(kept, kept)])
        new = np.linalg.solve(root, columns.T).T
        factor[:, done : done + len(kept)] = new
        remaining = np.maximum(remaining - (new**2).sum(1), 0)
        remaining[rows] = 0
        done += len(kept)
    return factor[:, :done]


def _kept(missing: np.ndarray, floor: float, random: np.random.Generator) -> list[int]:
    """Returns which of proposed rows to keep, given the matrix between them: those that earlier ones do not explain."""
    left, kept = missing.copy(), []
    bounds = missing.diagonal() * random.uniform(size=len(missing))
    for i, bound in enumerate(bounds):
        if left[i, i] > max(bound, floor):
            kept.append(i)
            left -= np.outer(left[i], left[i]) / left[i, i]
    return kept


class Preconditioner:
    """The matrix `P = F F^T + shift` for F (n, rank)."""

    def __init__(self, factor: np.ndarray, shift: float):
        self._values, vectors = np.linalg.eigh(factor.T @ factor)
        self._values = np.maximum(self._values, 0)
        self._directions = factor @ vectors
        self._shift = shift

    @property
    def rank(self) -> int:
        """Rank of `F F^T`."""
        return len(self._values)

    @property
    def log_determinant(self) -> float:
        """The logarithm of the determinant of P."""
        return float(np.log1p(self._values / self._shift).sum() + len(self._directions) * np.log(self._shift))

    def power(self, exponent: float, vectors: np.ndarray) -> np.ndarray:
        """Returns `P^exponent @ vectors`, for vectors (n, columns)."""
        # (1 + z)^e - 1 over z, for the eigenvalues z of `F F^T / shift`.
        z = self._values / self._shift
        rates = np.expm1(exponent * np.log1p(z)) / np.where(z > 0, z, 1)
        rates = np.where(z > 0, rates, exponent)[:, None] / self._shift
        return self._shift**exponent * (vectors + self._directions @ (rates * (self._directions.T @ vectors)))
